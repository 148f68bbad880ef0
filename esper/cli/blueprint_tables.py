"""The tables of `esper blueprints`: rows of the library as people read them."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from esper.services.urza.blueprint_changes import ChangeOutcome
from esper.services.urza.library_queries import Lineage, Row


def table_of(title: str, *columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """An empty table; ``numbers`` are columns that come last, to the right."""
    table = Table(title=title, title_justify="left")
    for n, name in enumerate(columns):
        table.add_column(name, no_wrap=n == 0)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def blueprints_table(rows: list[Row]) -> Table:
    """Blueprints, a row each."""
    table = table_of(f"{len(rows)} blueprint(s)", "blueprint", "status", "module", "layers", numbers=("version",))
    for row in rows:
        spec = row["spec"]
        table.add_row(
            row["blueprint_id"], row["status"], module_of(spec), ", ".join(spec["targets"]), str(row["version"])
        )
    return table


def module_of(spec: dict[str, Any]) -> str:
    """A module and its options: ``low_rank(rank=4)``."""
    options = ", ".join(f"{name}={value}" for name, value in spec["parameters"].items())
    return escape(f"{spec['module']}({options})") if options else str(spec["module"])


def outcomes_table(outcomes: list[ChangeOutcome], key: str, late: str) -> Table:
    """Changes that were asked for, and their verdicts; ``late`` stands where none came."""
    table = table_of(f"key {key}", "blueprint", "change", "verdict", numbers=("version now",))
    for o in outcomes:
        table.add_row(o.blueprint_id, o.change, o.verdict or late, str(o.version_after or "-"))
    return table


def lineage_tables(found: Lineage) -> list[Table]:
    """Everything of one blueprint but itself, in the order in which it came about."""
    tables = [_changes(found.changes), *map(_certificate, found.certificates)]
    if found.kernels or found.refusals:
        tables.append(_kernels(found))
    if found.uses:
        tables.append(_uses(found.uses))
    return tables


def _changes(rows: list[Row]) -> Table:
    table = table_of("Changes", "at", "change", "verdict", "reason", numbers=("version",))
    for row in rows:
        told = f"{row['expected_version']} -> {row['version_after'] or '-'}"
        table.add_row(f"{row['at']:%Y-%m-%d %H:%M:%S}", row["change"], row["verdict"], escape(row["reason"]), told)
    return table


def _certificate(row: Row) -> Table:
    title = f"Certificate of version {row['blueprint_version']}: {', '.join(row['checks'])} ({row['examiner']})"
    numbers = ("features", "parameters", "FLOPs / sample", "p50 ms", "p95 ms", "peak memory")
    table = table_of(title, "layer", numbers=numbers)
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
    table.caption = f"latency and memory for {row['measurements'][0]['batch_size']} samples of x positions"
    return table


def _kernels(found: Lineage) -> Table:
    table = table_of("Kernels", "kernel", "layer", numbers=("features", "parameters", "bytes"))
    for row in found.kernels:
        numbers = (f"{row[name]:,}" for name in ("num_features", "num_parameters", "size_bytes"))
        table.add_row(row["kernel_sha256"][:12], row["target"], *numbers)
    for row in found.refusals:
        table.add_row(escape(f"refused: {row['reason']}"), row["target"], f"{row['num_features']:,}", "-", "-")
    return table


def _uses(rows: list[Row]) -> Table:
    table = table_of("Where it was sent, newest first", "run", "seed", "outcome", "metric", numbers=("before", "after"))
    for row in rows:
        before, after = ("-" if row[name] is None else f"{row[name]:.4g}" for name in ("before", "after"))
        told = f"{row['metric']} ({row['method']})" if row["metric"] else "-"
        seed = f"{row['layer_id']}:{row['seed_id']}"
        table.add_row(row["run_id"], seed, row["outcome"] or "no report yet", told, before, after)
    return table
