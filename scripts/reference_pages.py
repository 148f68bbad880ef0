"""Write the generated pages of the documentation: CLI, events, settings, metrics and view features.

``python scripts/reference_pages.py`` writes all of them. tests/docs compares them with the code. The rest of docs/ is
written by hand.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from esper.cli.app import app
from esper.cli.metrics import catalogue
from esper.cli.metrics import markdown as metrics_markdown
from esper.config.settings_reference import markdown as settings_markdown
from esper.graph.feature_docs import replace_feature_tables
from esper.schemas.registry import REGISTRY
from esper.schemas.topics import FOREVER_MS, TOPICS, TopicSpec

DOCS = Path(__file__).resolve().parent.parent / "docs"
METRICS_HEADING = "## All metrics"
_MS_PER_H = 3_600_000
_OMITTED = ("help", "install_completion", "show_completion")


def cli_page(_current: str = "") -> str:
    """Every command of `esper`, with its arguments and options, as typer declares them."""
    head = (
        "# CLI",
        "`python scripts/reference_pages.py` writes this page from the code; a test keeps it up to date.",
        "",
        "`esper [--config FILE] COMMAND`. `--config` names a YAML file with settings; `ESPER_CONFIG` does the same.",
        "`esper COMMAND --help` prints what this page says.",
    )
    root = typer.main.get_command(app)
    return "\n".join((*head, *_command_lines(root, ()))) + "\n"


def events_page(_current: str = "") -> str:
    """Every topic and every event type, as the registry declares them."""
    lines = [
        "# Events",
        "`python scripts/reference_pages.py` writes this page from the code; a test keeps it up to date.",
        "",
        "Every record is a CloudEvent in Kafka's binary mode: `ce_` headers, and a JSON value. Records with one key",
        "are in one partition, in order. The fields of each type are in `schemas/json/TYPE.json`.",
        "[Contracts](../api/contracts.md) has the rules of change, [consuming events](../guides/consuming-events.md)",
        "shows how to read them.",
    ]
    for topic in TOPICS:
        lines += ["", f"## {topic.name}", _topic_facts(topic), "", "| type | key | meaning |", "|---|---|---|"]
        for entry in (e for e in REGISTRY.values() if e.topic == topic):
            lines.append(f"| `{entry.type}` | `{entry.key_field}` | {_first_sentence(entry.model.__doc__)} |")
    return "\n".join(lines) + "\n"


def monitoring_page(current: str) -> str:
    """The monitoring page with the metrics as the code declares them."""
    before, heading, _old = current.partition(METRICS_HEADING)
    if not heading:
        raise ValueError(f"the monitoring page has no heading {METRICS_HEADING!r}; restore it from git")
    return (
        f"{before}{heading}\n`esper metrics docs` prints these tables; a test keeps them up to date. The label `le` of "
        f"histograms is omitted.\n\n{metrics_markdown(catalogue())}"
    )


GENERATED: dict[Path, Callable[[str], str]] = {
    DOCS / "reference" / "cli.md": cli_page,
    DOCS / "reference" / "events.md": events_page,
    DOCS / "reference" / "view-features.md": replace_feature_tables,
    DOCS / "deployment" / "configuration.md": lambda _current: settings_markdown(),
    DOCS / "deployment" / "monitoring.md": monitoring_page,
}
"""Page -> function from its current text to its new one."""


def _command_lines(command: Any, path: tuple[str, ...]) -> Iterator[str]:
    if path:
        yield from ("", f"{'#' * min(4, 1 + len(path))} esper {' '.join(path)}", _plain(command.help))
    children = getattr(command, "commands", {})  # isinstance fails: typer bundles a copy of click
    shown = [p for p in command.params if p.name not in _OMITTED] if path else []
    if shown:
        yield from ("", "| argument, option | default | meaning |", "|---|---|---|")
        yield from map(_parameter_row, shown)
    for name, child in children.items():
        yield from _command_lines(child, (*path, name))


def _parameter_row(parameter: Any) -> str:
    help_text = _plain(getattr(parameter, "help", None))
    if parameter.param_type_name == "argument":
        many = "..." if parameter.nargs == -1 else ""
        return f"| `{parameter.name.upper()}{many}` | {'' if parameter.required else 'optional'} | {help_text} |"
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return f"| {names} | {_default(parameter)} | {help_text} |"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if isinstance(parameter.show_default, str):
        return f"`{parameter.show_default}`"
    value = parameter.default
    if not parameter.show_default or value is None or value is False or value in ("", (), []) or callable(value):
        return ""
    values = value if isinstance(value, list) else [value]
    return ", ".join(f"`{getattr(v, 'value', v)}`" for v in values)


def _topic_facts(topic: TopicSpec) -> str:
    kept = "kept forever" if topic.retention_ms == FOREVER_MS else f"kept {topic.retention_ms // _MS_PER_H} h"
    return (
        f"{topic.num_partitions} partitions, {kept}. Records that cannot be decoded go to `{topic.dead_letters.name}`."
    )


def _first_sentence(doc: str | None) -> str:
    paragraph = " ".join((doc or "").strip().split("\n\n")[0].split())
    return _plain(paragraph.split(". ")[0].rstrip(".") + ".")


def _plain(text: str | None) -> str:
    return " ".join((text or "").replace("``", "`").split()).replace("|", "\\|")


def main() -> None:
    """Write every generated page."""
    for page, write in GENERATED.items():
        current = page.read_text(encoding="utf-8") if page.exists() else ""
        page.write_text(write(current), encoding="utf-8")
        print(page.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
