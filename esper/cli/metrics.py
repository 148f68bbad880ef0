"""`esper metrics docs`: the reference of every metric of every process."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import typer

from esper.cli.command_group import add_group
from esper.metrics import Meter, MetricSpec, client_metrics

SHARED = "every process"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_group(app, "metrics", "Document the metrics that processes expose to Prometheus.", {"docs": docs})


def docs() -> None:
    """Print the reference of all metrics in Markdown, as in the documentation."""
    typer.echo(markdown(catalogue()), nl=False)


def catalogue() -> dict[str, tuple[MetricSpec, ...]]:
    """Metrics by process. Those that every process exposes are listed once, under ``SHARED``."""
    build = Meter()
    client_metrics.show_build(build, "")
    shared = (*build.specs, *client_metrics.METER.specs)
    by_process = {name: tuple(s for s in meter.specs if s not in shared) for name, meter in _meters().items()}
    return {SHARED: shared, **by_process}


def markdown(metrics: Mapping[str, Iterable[MetricSpec]]) -> str:
    """The catalogue as Markdown tables, one for each process."""
    lines = []
    for process, specs in metrics.items():
        lines += ["", f"### {process[0].upper()}{process[1:]}", "", "| metric | type | labels | meaning |"]
        lines.append("|---|---|---|---|")
        for spec in specs:
            labels = ", ".join(f"`{label}`" for label in spec.labels)
            lines.append(f"| `{spec.name}` | {spec.kind} | {labels} | {spec.help} |")
    return "\n".join(lines[1:]) + "\n"


def _meters() -> dict[str, Meter]:
    from esper.connection.metrics import RunParts, TrainerMetrics
    from esper.services.tamiyo.metrics import TamiyoMetrics
    from esper.services.urza.metrics import UrzaMetrics
    from esper.streams.worker.worker_metrics import WorkerMetrics

    nothing = cast(Any, None)  # the parts of a run are read at a scrape, not at construction
    return {
        "worker": WorkerMetrics().meter,
        "urza": UrzaMetrics(lambda: True).meter,
        "tamiyo": TamiyoMetrics("wait", 1).meter,
        "trainer": TrainerMetrics(RunParts(*[nothing] * len(RunParts._fields)), 0).meter,
    }
