"""`esper metrics docs`: every metric of every process, as the code has it."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import typer

from esper.metrics import Meter, MetricSpec, client_metrics

SHARED = "every process"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    metrics = typer.Typer(no_args_is_help=True, help="What processes show to Prometheus.")
    metrics.command()(docs)
    metrics.callback()(_group)
    app.add_typer(metrics, name="metrics")


def docs() -> None:
    """Print the table of metrics that docs/monitoring.md holds."""
    typer.echo(markdown(catalogue()), nl=False)


def catalogue() -> dict[str, tuple[MetricSpec, ...]]:
    """Process -> the metrics that it alone has; ``SHARED`` -> those that all have."""
    build = Meter()
    client_metrics.show_build(build, "")
    shared = (*build.specs, *client_metrics.METER.specs)
    own = {name: tuple(s for s in meter.specs if s not in shared) for name, meter in _meters().items()}
    return {SHARED: shared, **own}


def markdown(metrics: Mapping[str, Iterable[MetricSpec]]) -> str:
    """The catalogue as tables, one for each process."""
    lines = []
    for process, specs in metrics.items():
        lines += ["", f"### {process[0].upper()}{process[1:]}", "", "| metric | type | labels | what it says |"]
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

    nothing = cast(Any, None)  # the parts of a run are looked at when Prometheus comes, not before
    return {
        "worker": WorkerMetrics().meter,
        "urza": UrzaMetrics(lambda: True).meter,
        "tamiyo": TamiyoMetrics("wait", 1).meter,
        "trainer": TrainerMetrics(RunParts(*[nothing] * len(RunParts._fields)), 0).meter,
    }


def _group() -> None:
    """What processes show to Prometheus."""
