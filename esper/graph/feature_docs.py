"""Prints the features of views as Markdown tables: the generated part of docs/reference/view-features.md.

``python -m esper.graph.feature_docs docs/reference/view-features.md`` rewrites the page after the line of ``MARK``.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from esper.graph.view_features import FEATURES, VIEW_VERSION, Feature, Level

MARK = "<!-- generated from here on by `python -m esper.graph.feature_docs docs/reference/view-features.md` -->"
_TITLES = {
    Level.RUN: "The run and the boundary",
    Level.LAYER: "Nodes: layers",
    Level.EDGE: "Edges: the model's data flow",
    Level.SEED: "Nodes: seeds",
    Level.EPOCH: "Epochs",
    Level.KERNEL: "Kernels that could be germinated",
}


def features_markdown() -> str:
    """The tables of all levels, one for each."""
    return "\n".join(_lines())


def replace_feature_tables(text: str) -> str:
    """The text of a page with the current tables in place of everything after its ``MARK``.

    Raises:
        ValueError: the page has no ``MARK``.
    """
    before, mark, _old = text.partition(MARK)
    if not mark:
        raise ValueError(f"the page has no line {MARK}; add it where the tables begin")
    return f"{before}{mark}\n{features_markdown()}"


def _lines() -> Iterator[str]:
    yield f"This is view version {VIEW_VERSION}. \u201csince\u201d is the version that had the feature first."
    for level, features in FEATURES.items():
        yield from ("", f"## {_TITLES[level]}")
        yield "| feature | kind | unit, range | null | since | formula | tables |"
        yield "|---|---|---|---|---|---|---|"
        yield from (_row(feature) for feature in features)
    yield ""


def _row(feature: Feature) -> str:
    null = "yes" if feature.is_nullable else ""
    cells = (f"`{feature.name}`", feature.kind, feature.unit, null, feature.since, feature.formula, feature.source)
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(replace_feature_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
