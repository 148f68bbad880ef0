"""Compatibility with third-party models: wrap, train, grow, save, load, bake and unwrap each, and print a table.

Each model runs in a process that is forked from one with the catalogue imported, so that a crash, a hang or a model
that is too large for memory is one line of the table.

    python tests/benchmarks/compatibility/compatibility.py --catalogue torchvision --models "resnet*"
"""

import argparse
import fnmatch
import json
import multiprocessing
import os
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kasmina"))
from model_catalogues import Case, cases
from model_checks import Unsuited, examine
from seed_by_replacement import wrap_by_replacement

MAX_BYTES = 8 * 2**30  # resident memory of one model's process, which is killed beyond it
TIMEOUT_S = 400.0  # for one model
POLL_S = 0.1
FACTS = ("parameters", "layers", "reached")


@dataclass
class Result:
    """Result of one model. ``verdict`` is works, refused, fails or unsuited (the plain model does not run here)."""

    catalogue: str
    name: str
    family: str
    verdict: str = "fails"
    reason: str = ""
    seconds: float = 0.0
    facts: dict[str, int] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)


def main() -> None:
    options = _options()
    if options.read:
        print("\n".join(table(read(options.read))))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it at import; nothing is downloaded
    torch.set_num_threads(1)
    began = time.monotonic()
    results = []
    for catalogue in options.catalogue or ["torchvision", "transformers"]:
        chosen = _chosen(cases(catalogue), options)
        done = {r.name for r in read([options.json])} if Path(options.json).is_file() else set()
        for case in (c for c in chosen if c.name not in done):
            if options.seconds and time.monotonic() - began > options.seconds:
                print(f"time limit reached: {catalogue} stops before {case.name}")
                break
            results.append(run_one(case, options.method))
            print(_line(results[-1]), flush=True)
            if options.json:
                with Path(options.json).open("a") as out:
                    out.write(json.dumps(asdict(results[-1])) + "\n")
    print("\n" + "\n".join(table(results)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--catalogue", action="append", choices=["torchvision", "transformers", "timm"])
    parser.add_argument("--models", default="*", help="pattern of model names")
    parser.add_argument(
        "--limit", type=int, default=0, help="number of models of each catalogue, drawn evenly from its families"
    )
    parser.add_argument("--seconds", type=float, default=0.0, help="start no model after this time")
    parser.add_argument("--method", choices=["swap", "replacement"], default="swap")
    parser.add_argument("--json", default="", help="file to append results to; models in it are not run again")
    parser.add_argument(
        "--read",
        nargs="+",
        default=[],
        help="print the table of these files and run nothing; the last result of a model counts",
    )
    return parser.parse_args()


def read(paths: Sequence[str]) -> list[Result]:
    """Results of earlier runs; the last result of each model."""
    lines = [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]
    return list({(line["catalogue"], line["name"]): Result(**line) for line in lines}.values())


def _chosen(every: Sequence[Case], options: argparse.Namespace) -> list[Case]:
    matching = [c for c in every if fnmatch.fnmatch(c.name, options.models or "*")]
    if not options.limit or options.limit >= len(matching):
        return matching
    drawn = random.Random(0).sample(matching, len(matching))
    seen: Counter[str] = Counter()
    ranks = []
    for case in drawn:
        ranks.append((seen[case.family], case.family, case.name))
        seen[case.family] += 1
    names = {name for _rank, _family, name in sorted(ranks)[: options.limit]}
    return [c for c in matching if c.name in names]


# -- one model in one process -----------------------------------------------------------------


def run_one(case: Case, method: str) -> Result:
    """Check one model in a separate process."""
    result = Result(case.catalogue, case.name, case.family)
    began = time.monotonic()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case, method, there))
    process.start()
    there.close()
    ended = ""
    for kind, name, value in _received(here, process, began):
        if kind == "ended":
            ended = value
        elif name in FACTS:
            result.facts[name] = int(value)
        elif kind == "unsuited":
            result.verdict, result.reason = "unsuited", value
        else:
            result.checks[name] = value
    process.join()
    result.seconds = time.monotonic() - began
    if result.verdict != "unsuited":
        _judge(result, ended)
    return result


def _judge(result: Result, ended: str) -> None:
    failed = {n: v for n, v in result.checks.items() if v not in ("ok", "plain too")}
    if failed or ended:
        result.reason = "; ".join([*(f"{n}: {v}" for n, v in failed.items()), *([ended] if ended else [])])
        if ended and "forward" not in result.checks and not failed:
            result.verdict = "unsuited"  # it failed before it was wrapped
    elif "refused" in result.checks:
        result.verdict = "refused"
    else:
        result.verdict = "works"


def _received(here: Connection, process: multiprocessing.Process, began: float) -> Iterator[tuple[str, str, str]]:
    while True:
        if here.poll(POLL_S):
            try:
                yield here.recv()
                continue
            except EOFError:
                process.join()
                if process.exitcode:
                    yield "ended", "", f"process exited with {process.exitcode}"
                return
        try:
            resident = psutil.Process(process.pid).memory_info().rss
        except psutil.NoSuchProcess:
            continue  # read its last message first
        too = "much memory" if resident > MAX_BYTES else "long" if time.monotonic() - began > TIMEOUT_S else ""
        if too:
            process.kill()
            process.join()
            yield "ended", "", f"took too {too}"
            return


def _child(case: Case, method: str, there: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    wrap = {"wrap": wrap_by_replacement} if method == "replacement" else {}
    try:
        for name, value in examine(case, **wrap):
            there.send(("check", name, value))
    except Unsuited as error:
        there.send(("unsuited", "", str(error)))
    except Exception as error:  # wrap() itself failed: one line of the table
        there.send(("check", "wrap", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
    there.close()


# -- the table --------------------------------------------------------------------------------


def _line(result: Result) -> str:
    facts = " ".join(f"{k} {v:,}" for k, v in result.facts.items())
    return f"{result.verdict:8} {result.catalogue}:{result.name} ({result.seconds:.1f} s; {facts}) {result.reason}".rstrip()


def table(results: Sequence[Result]) -> list[str]:
    """Counts by catalogue and family, in Markdown; then each failure with its reason."""
    verdicts = ("works", "refused", "fails", "unsuited")
    rows = [
        "| catalogue | family | models | works | refused as expected | fails | plain model does not run |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], Counter[str]] = {}
    for r in results:
        for key in ((r.catalogue, r.family if r.catalogue == "torchvision" else "all"), ("total", "")):
            groups.setdefault(key, Counter())[r.verdict] += 1
    for (catalogue, family), counts in sorted(groups.items(), key=lambda g: (g[0][0] == "total", g[0])):
        rows.append(
            f"| {catalogue} | {family} | {counts.total()} | " + " | ".join(str(counts[v]) for v in verdicts) + " |"
        )
    for verdict in ("fails", "unsuited"):
        listed = [f"- {r.catalogue}:{r.name}: {r.reason}" for r in results if r.verdict == verdict]
        rows += ["", f"{verdict}: {len(listed)}", *listed]
    return rows


if __name__ == "__main__":
    main()
