"""`esper tamiyo replay`: reads experiences from the log and checks them against the log."""

import os
from pathlib import Path

import typer
from rich.markup import escape

from esper.cli.streams.replay_progress import QUIET, replay_progress
from esper.cli.tamiyo.tables import print_digest, print_replay, print_verification
from esper.cli.terminal import EXIT_ERROR, print_line, run_or_exit
from esper.config import Settings, load_settings
from esper.errors import ConfigError, ConflictError
from esper.services.tamiyo.dataset.dataset_origin import describe_origin, read_origin, was_read_with
from esper.services.tamiyo.dataset.exclusions import FAULTS
from esper.services.tamiyo.dataset.experience_files import read_experiences, write_experiences
from esper.services.tamiyo.dataset.experiences import Experiences
from esper.services.tamiyo.dataset.log_ranges import EARLIEST, ReplayRange
from esper.services.tamiyo.dataset.log_replay import Replay
from esper.services.tamiyo.dataset.log_replay import replay as read_log
from esper.services.tamiyo.dataset.view_verification import verify_views
from esper.services.tamiyo.settings import RentSettings, TamiyoSettings

MAX_EXCLUSIONS = 10

SINCE = typer.Option(
    [EARLIEST],
    "--from",
    help="First decisions to read: EARLIEST, a time, or `control.tamiyo.decisions[PARTITION]@OFFSET`. Repeatable.",
)
UNTIL = typer.Option(
    [], help="Read the log as of a time, or up to `TOPIC[PARTITION]@OFFSET`. Repeatable. [default: its end]"
)
RUNS = typer.Option([], help=r"Only runs whose id matches this pattern with `*`, `?` and `[abc]`. Repeatable.")


def replay(
    since: list[str] = SINCE,
    until: list[str] = UNTIL,
    runs: list[str] = RUNS,
    into: Path | None = typer.Option(None, help="New folder to write the experiences into."),
    again: Path | None = typer.Option(
        None, help="Folder of an earlier replay: read the same part of the log and compare digests."
    ),
    verify: bool = typer.Option(False, "--verify", help="Compute every view again from telemetry, and compare."),
    strict: bool = typer.Option(False, "--strict", help="Exit with 1 if the log is truncated or damaged."),
    show: int = typer.Option(MAX_EXCLUSIONS, min=0, help="Number of excluded decisions and reports to print."),
    quiet: bool = QUIET,
) -> None:
    """Read experiences from the log: each joins a view, the decision made on it and its field report.

    The same part of the log always gives the same digest.

    Exit codes: 0 done; 1 a view differs (--verify), the digest differs (--again), or the log is not whole (--strict);
    2 failed.
    """
    if again is not None and (list(since) != [EARLIEST] or until or runs):
        raise ConfigError("--again reads the range of its folder; leave out --from, --until and --runs")
    log_range = ReplayRange.parse(since, until, runs) if again is None else read_origin(again).log_range
    check_new_folder(into)
    settings = load_settings()
    found = _read(settings, log_range, again, quiet)
    print_replay(found, show)
    if into is not None:
        write_experiences(into, found.joined.experiences, describe_origin(found, log_range, _rent(again)))
        print_line(f"written to {into}")
    is_good = not (strict and (found.bounds.lost or any(one.reason in FAULTS for one in found.exclusions)))
    if again is not None:
        is_good &= _compare_digests(found.joined.experiences, again)
    if verify:
        is_good &= _verify(settings, found, quiet)
    if not is_good:
        raise typer.Exit(EXIT_ERROR)


def replay_into(folder: Path, log_range: ReplayRange, *, verify: bool, quiet: bool, is_resumed: bool) -> None:
    """Read experiences into a new folder, or keep those of an interrupted retraining.

    Raises:
        ConflictError: the folder exists, or was read from another part of the log.
    """
    if is_resumed and folder.exists():
        if not was_read_with(folder, log_range):
            raise ConflictError(
                f"{folder} was read with another --from, --until or --runs; pass the same ones, or remove the folder"
            )
        return
    check_new_folder(folder)
    settings = load_settings()
    found = _read(settings, log_range, None, quiet)
    print_replay(found, MAX_EXCLUSIONS)
    if verify and not _verify(settings, found, quiet):
        print_line("[red]nothing was trained[/red]")
        raise typer.Exit(EXIT_ERROR)
    write_experiences(folder, found.joined.experiences, describe_origin(found, log_range, _rent(None)))


def check_new_folder(folder: Path | None) -> None:
    """Refuse a folder that has something in it.

    Raises:
        ConflictError: it is a file or is not empty.
    """
    if folder is not None and folder.exists() and (not folder.is_dir() or os.listdir(folder)):
        raise ConflictError(f"{folder} already exists; name a new folder, or remove it")


def tamiyo_settings() -> TamiyoSettings:
    """Tamiyo's section of the settings."""
    return load_settings().section("tamiyo", TamiyoSettings)


def _rent(again: Path | None) -> RentSettings:
    """The rent of the settings, or of the folder that is read again."""
    return tamiyo_settings().rent if again is None else RentSettings.model_validate(read_origin(again).rent)


def _read(settings: Settings, log_range: ReplayRange, again: Path | None, quiet: bool) -> Replay:
    kafka, rent = settings.need_kafka(), _rent(again)
    bounds = None if again is None else read_origin(again).bounds
    with replay_progress(quiet=quiet) as on_progress:
        return run_or_exit(lambda: read_log(kafka, log_range, rent, bounds=bounds, on_progress=on_progress))


def _compare_digests(found: Experiences, folder: Path) -> bool:
    before = read_experiences(folder)
    if before.digest == found.digest:
        print_line(f"equal to {folder}")
        return True
    old, new = ({e.key: e.canonical() for e in some.stored} for some in (before, found))
    key = min(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    what = "is gone" if key not in new else "is new" if key not in old else "differs"
    run, incarnation, boundary = key
    print_line(
        f"[red]not equal to {escape(str(folder))}: the first that {what} is {escape(run)} incarnation {incarnation} "
        f"boundary {boundary}[/red]"
    )
    print_digest(before)
    return False


def _verify(settings: Settings, found: Replay, quiet: bool) -> bool:
    views = found.joined.views
    with replay_progress(quiet=quiet) as on_progress:
        verification = run_or_exit(lambda: verify_views(settings, views, on_progress))
    print_verification(verification, len(views))
    return not verification.different
