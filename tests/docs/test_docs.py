"""Documentation without a service or a documentation tool: links, code blocks, command lines, generated pages."""

import importlib
import importlib.util
import re
import shlex
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import typer
import yaml
from support import banned_words
from support.paths import DOCS, ROOT

from esper.cli.app import app
from esper.cli.metrics import catalogue
from esper.cli.metrics import markdown as metrics_markdown
from esper.config import SECTIONS
from esper.config.settings_reference import markdown as settings_markdown
from esper.config.sources import variable_of

PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"])
SEED_PAGES = (
    *(f"api/{name}.md" for name in ("contracts", "execution", "services", "examples")),
    *(f"deployment/{name}.md" for name in ("production", "configuration", "monitoring", "troubleshooting")),
)
MAX_README_LINES = 150
FOLDERS = ("configs", "docs", "esper", "infra", "requirements", "schemas", "scripts", "services", "streams", "tests")
CODE_FOLDERS = ("esper", "schemas", "services", "streams")
IN_THE_TUTORIAL = "esper/"  # the clone's folder
MADE_BY_READERS = ("infra/.env", "schemas/json/TYPE.json")
POSTGRES = "esper_reader esper_writer esper_rebuild esper_before esper_dlq esper_urza"
"""Names in Postgres and Kafka that are no metrics."""
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.M | re.S)
FENCE = re.compile(r"(?:^<!-- (?P<mark>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"(?:^|[|;&$`(]|&&)\s*(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?esper (?P<arguments>.*)")
INLINE_COMMAND = re.compile(r"`(?:\.venv/bin/)?esper ([a-z][^`\n]*)`")
ENDS_COMMAND = {"|", ">", "2>", "&", "&&", ";", "2>&1"}


class Block(NamedTuple):
    """A fenced code block. ``mark`` is the HTML comment in front of it."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start("text")) + 1
        yield Block(page, line, found["language"], found["mark"] or "", found["text"])


def current_text(page: Path) -> str:
    """The text of a page, without the table of earlier names."""
    return page.read_text(encoding="utf-8").partition("\n## Renamed\n")[0]


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub and Python-Markdown make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def leaf_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that some words name, and its arguments."""
    command: Any = typer.main.get_command(app)
    if words[:1] == ["--config"]:
        words = words[2:]
    while hasattr(command, "commands"):
        if command.invoke_without_command and (not words or words[0].startswith("-")):
            break
        assert words, "a group without a command"
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def is_name(name: str) -> bool:
    """Whether a dotted name is a module of Esper, or an attribute of one. Event types and log names are no modules."""
    if re.search(r"\.v\d+|\.dlq$|^esper\.policy\.", name):
        return True
    module, attributes = name, []
    while module != "esper":
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError:
            module, _, attribute = module.rpartition(".")
            attributes.insert(0, attribute)
            continue
        for attribute in attributes:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return hasattr(importlib.import_module("esper"), attributes[0]) if attributes else True


def exists(path: str) -> bool:
    clone = path.removeprefix(IN_THE_TUTORIAL)
    return path in MADE_BY_READERS or clone.startswith(".venv") or any((ROOT / p).exists() for p in (path, clone))


def is_setting(key: str) -> bool:
    section, _, rest = key.partition(".")
    return variable_of((section, *rest.split("."))) in settings_markdown()


@lru_cache
def source_code() -> str:
    return "".join(p.read_text(encoding="utf-8") for folder in CODE_FOLDERS for p in (ROOT / folder).rglob("*.py"))


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def command_lines(block: Block) -> Iterator[list[str]]:
    for line in block.text.splitlines():
        for found in COMMAND.finditer(line):
            words = shlex.split(found["arguments"].replace("|", " | "), comments=True)
            ends = [i for i, word in enumerate(words) if word in ENDS_COMMAND]
            yield words[: ends[0]] if ends else words


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [b for b in ALL_BLOCKS if b.language == "python"]
RUNNABLE = [b for b in PYTHON if not b.mark]
COMMANDS = [(b, words) for b in ALL_BLOCKS if b.language != "python" for words in command_lines(b)]


@pytest.fixture(scope="module")
def reference_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_pages", ROOT / "scripts" / "reference_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_resolve(page: Path) -> None:
    for target in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert ROOT in found.parents, target
        assert not anchor or anchor in anchors(found), target


def test_generated_pages_match_the_code(reference_pages: ModuleType) -> None:
    for page, write in reference_pages.GENERATED.items():
        current = page.read_text(encoding="utf-8")
        assert write(current) == current, f"{page.name}: run python scripts/reference_pages.py"


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_compile(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_python_blocks_run(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block without a mark runs as it is, in the repository's folder."""
    monkeypatch.chdir(ROOT)
    exec(compile(block.text, str(block), "exec"), {"__name__": "a_code_block"})


def test_marks_of_blocks_are_known() -> None:
    for block in PYTHON:
        assert re.fullmatch(r"|needs the stack|only compiled|excerpt: docs/examples/\w+\.py", block.mark), str(block)


@pytest.mark.parametrize("block", [b for b in PYTHON if b.mark.startswith("excerpt")], ids=str)
def test_excerpts_match_their_program(block: Block) -> None:
    program = (ROOT / block.mark.removeprefix("excerpt: ")).read_text(encoding="utf-8")
    first = block.text.splitlines()[0]
    indent = re.search(rf"^( *){re.escape(first)}$", program, re.M)
    assert indent is not None, first
    assert textwrap.indent(block.text, indent[1]) in program


@pytest.mark.parametrize(("block", "words"), COMMANDS, ids=lambda value: str(value) if isinstance(value, Block) else "")
def test_command_lines_parse(block: Block, words: list[str]) -> None:
    command, arguments = leaf_of(words)
    try:
        command.make_context("esper", arguments)
    except typer.Exit:  # --help
        return
    except typer.BadParameter as error:
        if "No such file" not in str(error):  # the reader has the file
            raise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_text_exist(page: Path) -> None:
    for text in INLINE_COMMAND.findall(current_text(page)):
        command: Any = typer.main.get_command(app)
        for word in text.split():
            if not hasattr(command, "commands") or not re.fullmatch(r"[a-z][a-z-]*", word):
                break
            assert word in command.commands, f"esper {text}"
            command = command.commands[word]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_in_the_text_exist(page: Path) -> None:
    """Files, make targets, settings, variables and metrics: a rename that misses the documentation fails here."""
    text = current_text(page)
    code = "\n".join(CODE.findall(text))
    paths = re.findall(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w/.-]+\w)(?![\w/*{{<])", code)
    assert [path for path in paths if not exists(path)] == []
    assert [name for name in re.findall(r"^::: (\S+)$", text, re.M) if not is_name(name)] == []
    modules = [name.rstrip(".") for name in re.findall(r"\besper\.[a-z_]+(?:\.\w+)+", code)]
    assert [name for name in modules if not is_name(name)] == []
    assert set(re.findall(r"\bmake ([a-z][\w-]+)", code)) <= make_targets() | {"with"}
    keys = re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_.0-9]+)`", text)
    settings = settings_markdown()
    assert [k for k in keys if not is_setting(k) and f'"{k}"' not in source_code()] == []  # or the name of a log event
    assert [name for name in re.findall(r"\bESPER_[A-Z_0-9]+__[A-Z_0-9]+\b", text) if f"`{name}`" not in settings] == []
    metrics = metrics_markdown(catalogue())
    assert [name for name in re.findall(r"`(esper_[a-z]+_[a-z_]+)`", text) if name not in metrics + POSTGRES] == []


def test_pages_named_in_the_code_exist() -> None:
    """Released contracts are exempt: they keep the text that they were released with."""
    named = set()
    for path in banned_words.files():
        if path.suffix != ".md":
            named |= set(re.findall(r"\bdocs/[\w/.-]+\.md\b", path.read_text(encoding="utf-8")))
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_every_page_is_in_the_navigation() -> None:
    def paths(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for child in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from paths(child)

    listed = set(paths(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    decisions = {str(p.relative_to(DOCS)) for p in (DOCS / "design" / "decisions").glob("0*.md")}
    assert listed == {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")} - decisions
    assert listed >= set(SEED_PAGES)
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert {page for page in listed if f"({page}" not in index} == {"index.md"}


def test_every_decision_is_in_the_index() -> None:
    folder = DOCS / "design" / "decisions"
    assert set(re.findall(r"\((0[^)]+)\)", (folder / "README.md").read_text())) == {
        p.name for p in folder.glob("0*.md")
    }


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES
