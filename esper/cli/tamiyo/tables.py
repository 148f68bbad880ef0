"""Prints replays, verified views and evaluated policies."""

import math
from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from esper.cli.terminal import format_interval, new_table, print_line, print_table
from esper.services.tamiyo.dataset.exclusions import DESCRIPTIONS, FAULTS, Exclusion, count_by_reason
from esper.services.tamiyo.dataset.experiences import Experiences, Key
from esper.services.tamiyo.dataset.log_replay import Replay
from esper.services.tamiyo.dataset.view_verification import ViewVerification
from esper.services.tamiyo.evaluation.off_policy import Comparison, Interval, PolicyEstimate
from esper.services.tamiyo.evaluation.outcome_prediction import OutcomeAccuracy
from esper.services.tamiyo.versions.retraining import Split


def print_replay(replay: Replay, num_shown: int) -> None:
    """Print counts, excluded decisions and reports with their reasons, and the digest."""
    joined, experiences = replay.joined, replay.joined.experiences
    print_line(
        f"{len(experiences):,} experiences of {len(experiences.runs):,} runs, from {joined.num_decisions:,} decisions "
        f"({replay.num_records:,} records read)"
    )
    if joined.measured:
        rows = [(str(action), f"{num:,}", f"{rewarded:,}") for action, (rewarded, num) in joined.measured.items()]
        print_table(new_table("action", numbers=("decisions", "with a reward"), rows=rows))
    for (topic, n), offset in sorted(replay.bounds.lost.items()):
        print_line(f"[red]{topic}[{n}] begins at offset {offset:,}: earlier records are lost[/red]")
    print_exclusions(replay.exclusions, num_shown)
    print_digest(experiences)


def print_split(split: Split) -> None:
    """Print the sizes of both parts of a split."""
    train, held_out = split.train, split.held_out
    print_line(
        f"{len(train):,} experiences of {len(train.runs):,} runs to train on, {len(held_out):,} of "
        f"{len(held_out.runs):,} runs held out"
    )


def print_digest(experiences: Experiences) -> None:
    """Print the digest, by which two replays are compared."""
    print_line(f"digest {experiences.digest}")


def print_exclusions(exclusions: Sequence[Exclusion], num_shown: int) -> None:
    """Print the number for each reason, then the first few exclusions, faults first."""
    if not exclusions:
        print_line("nothing was excluded")
        return
    table = new_table("excluded", "count", "meaning")
    for reason, count in count_by_reason(exclusions).items():
        name = f"[red]{reason}[/red]" if reason in FAULTS else str(reason)
        table.add_row(name, f"{count:,}", DESCRIPTIONS[reason])
    print_table(table)
    for one in sorted(exclusions, key=lambda e: (e.reason not in FAULTS, e))[:num_shown]:
        print_line(escape(_format_exclusion(one)))
    num_left = len(exclusions) - num_shown
    if num_left > 0:
        print_line(f"{num_left:,} more; `--show {len(exclusions)}` prints all")


def print_verification(verification: ViewVerification, num_views: int) -> None:
    """Print how many views the log reproduces, how many it cannot reproduce and why, and the first that differs."""
    print_line(f"{verification.num_equal:,} of {num_views:,} views are reproduced from the log, byte for byte")
    if expired := verification.expired:
        first = _format_key(expired[0])
        print_line(f"{len(expired):,} cannot be reproduced: their telemetry has expired (the first is {first})")
    if verification.older:
        print_line(f"{len(verification.older):,} have an older view version, which is no longer computed")
    if verification.different:
        key, digest = verification.different[0]
        what = f"gives {digest[:16]}" if digest else "does not have that boundary"
        print_line(
            f"[red]{len(verification.different):,} differ though the log is whole; the first is "
            f"{escape(_format_key(key))}: the log {what}[/red]"
        )


def print_evaluation(comparison: Comparison) -> None:
    """Print a row for each policy, the reasons of refusals, and how the candidate compares with each other policy."""
    print_line(f"{comparison.num_decisions:,} held-out decisions of {comparison.num_runs:,} runs")
    print_table(_estimates_table(comparison.estimates))
    for name, estimate in comparison.estimates.items():
        for refusal in estimate.refusals:
            print_line(f"[red]{escape(name)} cannot be evaluated: {refusal}[/red]")
    for d in comparison.differences:
        verdict = "better" if d.is_better else "not shown to be better"
        estimates = _format(d.snips) + (f", doubly robust {_format(d.dr)}" if d.dr else "")
        detail = estimates if d.is_supported else "too few comparable decisions"
        print_line(f"{escape(d.name)} than {escape(d.than)}: {verdict} ({detail})")


def print_outcome_accuracy(accuracy: OutcomeAccuracy, floor_name: str) -> None:
    """Print how often it was predicted correctly whether a germination helps, and the baseline of always saying no."""
    auc = "" if accuracy.auc is None else f", AUC {accuracy.auc:.2f}"
    correlation = "" if accuracy.correlation is None else f", correlation with the reward {accuracy.correlation:.2f}"
    print_line(
        f"{accuracy.num:,} held-out germinations, {accuracy.num_helped:,} helped beyond the {floor_name} "
        f"({accuracy.floor:+.4f}): {100 * accuracy.accuracy:.1f} % predicted correctly "
        f"({100 * accuracy.low:.1f} to {100 * accuracy.high:.1f}), {100 * accuracy.always_no:.1f} % by always saying "
        f"no{auc}{correlation}"
    )


def _estimates_table(estimates: Mapping[str, PolicyEstimate]) -> Table:
    """Reward per decision with 95 % intervals, and the diagnostics of importance sampling."""
    columns = ("reward (SNIPS)", "reward (doubly robust)", "effective size", "largest weight", "rarely tried")
    table = Table("policy", *columns)
    for name, one in estimates.items():
        rewards = (_format(one.snips), _format(one.dr) if one.dr else "-")
        cells = rewards if one.is_supported else ("[red]refused[/red]",) * 2
        table.add_row(escape(name), *cells, f"{one.ess:,.1f}", f"{one.max_weight:.2f}", f"{100 * one.thin_share:.1f} %")
    return table


def _format_exclusion(one: Exclusion) -> str:
    where = _format_key((one.run_id, one.incarnation, one.boundary)) if one.boundary else (one.run_id or "no run")
    detail = f": {one.detail}" if one.detail else ""
    return f"    {where}: {one.reason}{detail} ({one.location})"


def _format_key(key: Key) -> str:
    return f"{key[0]} incarnation {key[1]} boundary {key[2]}"


def _format(interval: Interval) -> str:
    if math.isnan(interval.low):
        return "unknown"
    return format_interval(interval.value, interval.low, interval.high, "{:+.4f}")
