"""Words that docs/glossary.md bans from code, documentation and help output, and where they occur.

``python tests/support/banned_words.py [PATH ...]`` prints every occurrence below the paths (default: the repository).
"""

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BANNED = (
    "told",
    "tell",
    "tells",
    "telling",
    "teller",
    "whence",
    "whither",
    "wherever from",
    "whoever",
    "who asks",
    "is asked",
    "of those",
    "by whom",
    "what becomes of",
    "what became of",
    "knows of itself",
    "has it that",
    "for want of",
    "as ever",
    "goes on",
    "went on",
    "nobody could read",
    "nobody can read",
    "nobody knows",
    "passed over",
    "letters",
)
"""Case does not matter; underscores and capitals separate the words of an identifier."""
TEXT = (".py", ".md", ".sql", ".toml", ".yml", ".yaml", ".json", ".sh", ".in", "Makefile", "run", "Dockerfile")
EXEMPT = (
    "esper/kasmina/",
    "tests/unit/kasmina/",
    "tests/benchmarks/kasmina/",  # redesigned next, words included
    "schemas/released/",
    "schemas/json/esper.adaptation.reported.v1.json",  # old versions: copies of the released ones
    "schemas/json/esper.blueprint-change.requested.v1.json",
    "infra/migrations/",
    "tests/contract/golden/",  # released: they stay
    "docs/glossary.md",  # it names the banned words
    "requirements/",
    "CHANGELOG.md",
    "tests/support/banned_words.py",
)
_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|_")
_PATTERN = re.compile(r"\b(?:" + "|".join(map(re.escape, BANNED)) + r")\b", re.I)
_TABLES = re.compile(r"pending_letters|dead[-_ ]?letters?|told_at(?![a-z])", re.I)


def occurrences(text: str) -> Iterator[tuple[int, str]]:
    """Line number (from 1) and banned word of each occurrence. "Dead letters" is Kafka's own term."""
    for number, line in enumerate(text.splitlines(), 1):
        words = _WORD_START.sub(" ", _TABLES.sub(" ", line))
        for found in _PATTERN.finditer(words):
            yield number, found.group().lower()


def files(paths: Iterable[str] = ()) -> Iterator[Path]:
    """Files of the repository that have no exemption, below ``paths`` if any are given."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "--", *paths]
    for name in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        path = ROOT / name
        if name.endswith(TEXT) and not name.startswith(EXEMPT) and path.is_file() and not path.is_symlink():
            yield path


def main() -> None:
    """Print every occurrence, and how many there are."""
    count = 0
    for path in files(sys.argv[1:]):
        for number, word in occurrences(path.read_text(encoding="utf-8")):
            print(f"{path.relative_to(ROOT)}:{number}: {word}")
            count += 1
    print(f"{count} banned words", file=sys.stderr)


if __name__ == "__main__":
    main()
