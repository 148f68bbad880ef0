"""How replays, verified views and judged policies are shown."""

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from esper.services.tamiyo.dataset.exclusions import DESCRIPTIONS, FAULTS, Exclusion, count_by_reason
from esper.services.tamiyo.dataset.experiences import Experiences, Key
from esper.services.tamiyo.dataset.log_replay import Replay
from esper.services.tamiyo.dataset.view_verification import ViewVerification
from esper.services.tamiyo.evaluation.off_policy import Comparison, Interval, PolicyEstimate
from esper.services.tamiyo.evaluation.outcome_prediction import OutcomeAccuracy
from esper.services.tamiyo.versions.retraining import Split


def show_replay(console: Console, replay: Replay, num_shown: int) -> None:
    """Counts, what was set aside and why, and the digest."""
    found, experiences = replay.joined, replay.joined.experiences
    console.print(
        f"{len(experiences):,} experiences of {len(experiences.runs):,} runs, from {found.num_decisions:,} decisions "
        f"({replay.num_records:,} records read)",
        highlight=False,
    )
    if found.measured:
        table = Table("action", "decisions", "with a reward")
        for action, (rewarded, eligible) in found.measured.items():
            table.add_row(str(action), f"{eligible:,}", f"{rewarded:,}")
        console.print(table)
    for (topic, n), offset in sorted(replay.bounds.lost.items()):
        console.print(f"[red]{topic}[{n}] begins at offset {offset:,}: what was before is gone[/red]", soft_wrap=True)
    show_exclusions(console, replay.exclusions, num_shown)
    show_digest(console, experiences)


def show_split(console: Console, split: Split) -> None:
    """How many there are on each side."""
    console.print(
        f"{len(split.train):,} experiences of {len(split.train.runs):,} runs to train on, {len(split.held_out):,} of "
        f"{len(split.held_out.runs):,} held out",
        highlight=False,
        soft_wrap=True,
    )


def show_digest(console: Console, experiences: Experiences) -> None:
    """The line to compare two replays by."""
    console.print(f"digest {experiences.digest}", highlight=False, soft_wrap=True)


def show_exclusions(console: Console, exclusions: Sequence[Exclusion], num_shown: int) -> None:
    """How many of each reason; then the first few one by one, faults before the rest."""
    if not exclusions:
        console.print("nothing was set aside")
        return
    table = Table("set aside", "count", "what that is")
    for reason, count in count_by_reason(exclusions).items():
        name = f"[red]{reason}[/red]" if reason in FAULTS else str(reason)
        table.add_row(name, f"{count:,}", DESCRIPTIONS[reason])
    console.print(table)
    for one in sorted(exclusions, key=lambda a: (a.reason not in FAULTS, a))[:num_shown]:
        console.print(escape(_told(one)), highlight=False, soft_wrap=True)
    left = len(exclusions) - num_shown
    if left > 0:
        console.print(f"{left:,} more; `--show {len(exclusions)}` shows all", highlight=False)


def _told(one: Exclusion) -> str:
    where = _key((one.run_id, one.incarnation, one.boundary)) if one.boundary else (one.run_id or "no run")
    detail = f": {one.detail}" if one.detail else ""
    return f"    {where}: {one.reason}{detail} ({one.place})"


def _key(key: Key) -> str:
    return f"{key[0]} incarnation {key[1]} boundary {key[2]}"


def show_verified(console: Console, verified: ViewVerification, num_views: int) -> None:
    """For how many views something can be said, and what; the first that differs by name."""
    console.print(
        f"{verified.num_equal:,} of {num_views:,} views come out of the log again, byte by byte", highlight=False
    )
    if verified.expired:
        console.print(
            f"{len(verified.expired):,} cannot be seen again: their telemetry has expired (the first is "
            f"{_key(verified.expired[0])})",
            soft_wrap=True,
            highlight=False,
        )
    if verified.older:
        console.print(f"{len(verified.older):,} are of an older view version, which is not made any more")
    if verified.different:
        key, digest = verified.different[0]
        gives = f"gives {digest[:16]}" if digest else "does not hold that boundary"
        console.print(
            f"[red]{len(verified.different):,} differ though the log is whole; the first is {escape(_key(key))}: "
            f"the log {gives}[/red]",
            soft_wrap=True,
            highlight=False,
        )


def show_comparison(console: Console, found: Comparison) -> None:
    """A policy a row; of one that the log says too little of only the reason."""
    console.print(f"{found.num_decisions:,} held-out decisions of {found.num_runs:,} runs", highlight=False)
    console.print(judged_table(found.judged))
    for name, judged in found.judged.items():
        for refusal in judged.refusals:
            console.print(f"[red]{escape(name)} cannot be judged: {refusal}[/red]", soft_wrap=True, highlight=False)
    for d in found.differences:
        verdict = "better" if d.is_better else "not shown to be better"
        told = f"{_interval(d.snips)}" + (f", doubly robust {_interval(d.dr)}" if d.dr else "")
        told = told if d.is_supported else "the log says too little"
        console.print(f"{escape(d.name)} than {escape(d.than)}: {verdict} ({told})", soft_wrap=True, highlight=False)


def show_foresight(console: Console, found: OutcomeAccuracy, floor: str) -> None:
    """How well what helped beyond a floor was foreseen, beside the class balance."""
    auc = "" if found.auc is None else f", AUC {found.auc:.2f}"
    related = "" if found.correlation is None else f", correlation with the reward {found.correlation:.2f}"
    console.print(
        f"{found.num:,} held-out germinations, {found.num_helped:,} helped beyond the {floor} "
        f"({found.floor:+.4f}): "
        f"{100 * found.accuracy:.1f} % foreseen ({100 * found.low:.1f} to {100 * found.high:.1f}), "
        f"{100 * found.always_no:.1f} % by saying no of all{auc}{related}",
        highlight=False,
        soft_wrap=True,
    )


def judged_table(judged: Mapping[str, PolicyEstimate]) -> Table:
    """Reward a decision, with 95 % intervals."""
    table = Table(
        "policy", "reward, SNIPS", "reward, doubly robust", "effective size", "largest weight", "hardly tried"
    )
    for name, one in judged.items():
        dr = _interval(one.dr) if one.dr else "-"
        told = (_interval(one.snips), dr) if one.is_supported else ("[red]refused[/red]", "[red]refused[/red]")
        table.add_row(escape(name), *told, f"{one.ess:,.1f}", f"{one.max_weight:.2f}", f"{100 * one.thin_share:.1f} %")
    return table


def _interval(interval: Interval) -> str:
    if math.isnan(interval.low):
        return "unknown"
    return f"{interval.value:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})"
