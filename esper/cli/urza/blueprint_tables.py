"""Tables that `esper blueprints` prints."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from esper.cli.terminal import format_time, new_table
from esper.services.urza.blueprint_changes import ChangeOutcome
from esper.services.urza.library_queries import Lineage
from esper.services.urza.projection_reader import Row


def blueprints_table(rows: list[Row]) -> Table:
    """One row for each blueprint."""
    title = f"{len(rows)} blueprint(s)"
    table = new_table("blueprint", "status", "module", "layers", numbers=("version",), title=title)
    for row in rows:
        spec = row["spec"]
        table.add_row(
            row["blueprint_id"], row["status"], format_module(spec), ", ".join(spec["targets"]), str(row["version"])
        )
    return table


def format_module(spec: dict[str, Any]) -> str:
    """A module and its parameters: ``low_rank(rank=4)``."""
    options = ", ".join(f"{name}={value}" for name, value in spec["parameters"].items())
    return escape(f"{spec['module']}({options})") if options else str(spec["module"])


def outcomes_table(outcomes: list[ChangeOutcome], key: str, pending: str) -> Table:
    """Requested changes and their verdicts; ``pending`` replaces a missing verdict."""
    title = f"idempotency key {key}"
    table = new_table("blueprint", "change", "verdict", numbers=("version",), title=title)
    for o in outcomes:
        table.add_row(o.request.blueprint_id, o.request.change, o.verdict or pending, str(o.version_after or "-"))
    return table


def lineage_tables(found: Lineage) -> list[Table]:
    """Changes, certificates, kernels and uses of one blueprint, in this order."""
    tables = [_changes(found.changes), *map(_certificate, found.certificates)]
    if found.kernels or found.refusals:
        tables.append(_kernels(found))
    if found.uses:
        tables.append(_uses(found.uses))
    return tables


def _changes(rows: list[Row]) -> Table:
    table = new_table("at", "change", "verdict", "reason", numbers=("version",), title="Changes")
    for row in rows:
        versions = f"{row['expected_version']} -> {row['version_after'] or '-'}"
        table.add_row(format_time(row["at"]), row["change"], row["verdict"], escape(row["reason"]), versions)
    return table


def _certificate(row: Row) -> Table:
    title = f"Certificate of version {row['blueprint_version']}: {', '.join(row['checks'])} ({row['examiner']})"
    numbers = ("features", "parameters", "FLOPs / sample", "p50 ms", "p95 ms", "peak memory")
    table = new_table("layer", numbers=numbers, title=title)
    for m in row["measurements"]:
        table.add_row(
            f"{m['target']} x {m['positions']}",
            f"{m['num_features']:,}",
            f"{m['num_parameters']:,}",
            f"{m['flops']:,}",
            f"{m['latency_p50_ms']:.3f}",
            f"{m['latency_p95_ms']:.3f}",
            f"{m['peak_memory_bytes'] / 1024:,.0f} KiB",
        )
    table.caption = f"latency and memory for a batch of {row['measurements'][0]['batch_size']} samples"
    return table


def _kernels(found: Lineage) -> Table:
    table = new_table("kernel", "layer", numbers=("features", "parameters", "bytes"), title="Kernels")
    for row in found.kernels:
        numbers = (f"{row[name]:,}" for name in ("num_features", "num_parameters", "size_bytes"))
        table.add_row(row["kernel_sha256"][:12], row["target"], *numbers)
    for row in found.refusals:
        table.add_row(escape(f"refused: {row['reason']}"), row["target"], f"{row['num_features']:,}", "-", "-")
    return table


def _uses(rows: list[Row]) -> Table:
    title = "Uses, newest first"
    table = new_table("run", "seed", "outcome", "metric", numbers=("before", "after"), title=title)
    for row in rows:
        before, after = ("-" if row[name] is None else f"{row[name]:.4g}" for name in ("before", "after"))
        metric = f"{row['metric']} ({row['method']})" if row["metric"] else "-"
        seed = f"{row['layer_id']}:{row['seed_id']}"
        table.add_row(row["run_id"], seed, row["outcome"] or "no report yet", metric, before, after)
    return table
