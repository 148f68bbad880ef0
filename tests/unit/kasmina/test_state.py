"""The arrays of seeds: a plain dict says what they must hold, one thread or a thousand at a time."""

import copy
import hashlib
import pickle
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from esper.errors import ConflictError, ContractError, KernelError
from esper.kasmina.device_state import DeviceSeeds, move_on_device
from esper.kasmina.fields import FIELDS, SeedRows
from esper.kasmina.kernel_ids import NO_KERNEL, KernelTable
from esper.kasmina.lifecycle import NEXT_BY_SCHEDULE, StageSchedule
from esper.kasmina.state import SeedArrays
from esper.schemas.enums import SeedStage
from esper.schemas.lifecycle import STAGES, TRANSITIONS

S = SeedStage
LAYERS, SEEDS = 3, 2
PLACES = [(layer, seed) for layer in range(LAYERS) for seed in range(SEEDS)]
WHOLE_LIFE = (S.DORMANT, S.GERMINATED, S.TRAINING, S.GRAFTING, S.STABILIZING, S.EVALUATING, S.CULLED)
DIGESTS = [hashlib.sha256(bytes([n])).hexdigest() for n in range(3)]

places = st.sampled_from(PLACES)
stages = st.sampled_from(STAGES)
times = st.integers(0, 2**62)
expectations = st.none() | stages


@dataclass
class PlainSeed:
    """What one seed must be."""

    stage: SeedStage = S.DORMANT
    digest: str | None = None
    alpha: float = 0.0
    health: float = 1.0
    since_step: int = 0
    since_boundary: int = 0
    germinated_at_step: int = 0

    def refusal(self, to: SeedStage, expected: SeedStage | None) -> type[Exception] | None:
        if expected is not None and self.stage is not expected:
            return ConflictError
        return None if to in TRANSITIONS[self.stage] else ContractError

    def move(self, to: SeedStage, step: int, boundary: int, digest: str | None) -> None:
        self.stage, self.since_step, self.since_boundary = to, step, boundary
        if to is S.GERMINATED:
            self.germinated_at_step, self.digest = step, digest
        elif to is S.DORMANT:
            self.digest = None


def read(state: SeedArrays | SeedRows, kernels: KernelTable) -> dict[tuple[int, int], PlainSeed]:
    return {
        at: PlainSeed(
            STAGES[state.stage[at]],
            kernels.sha256_of(int(state.kernel_id[at])),
            *(getattr(state, name)[at].item() for name in FIELDS if name not in ("stage", "kernel_id")),
        )
        for at in PLACES
    }


def in_order(chosen: set[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    at = np.array(sorted(chosen), np.intp).reshape(-1, 2)
    return at[:, 0], at[:, 1]


def as_mask(chosen: set[tuple[int, int]]) -> np.ndarray:
    mask = np.zeros((LAYERS, SEEDS), bool)
    mask[in_order(chosen)] = True
    return mask


class SeedsAsPlain(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.arrays = SeedArrays(LAYERS, SEEDS)
        self.plain = {at: PlainSeed() for at in PLACES}
        self.version = 0
        self.kept: list[tuple[SeedRows, dict[tuple[int, int], PlainSeed]]] = []
        self.mirror = SimpleNamespace(**{name: getattr(self.arrays, name).copy() for name in FIELDS})
        self.mirrored = 0

    @rule(at=places, to=stages, step=times, boundary=times, expected=expectations, digest=st.sampled_from(DIGESTS))
    def move(self, at, to, step, boundary, expected, digest) -> None:
        options = {"step": step, "boundary": boundary, "expected": expected, "kernel_sha256": digest}
        refusal = self.plain[at].refusal(to, expected)
        if refusal is not None:
            with pytest.raises(refusal):
                self.arrays.move(*at, to, **options)
            return
        self.version += 1
        assert self.arrays.move(*at, to, **options) == self.version
        self.plain[at].move(to, step, boundary, digest)

    @rule(at=places, data=st.data(), step=times)
    def move_on(self, at, data, step) -> None:
        to = data.draw(st.sampled_from(sorted(TRANSITIONS[self.plain[at].stage])))
        self.move(at, to, step, step // 2, self.plain[at].stage, DIGESTS[0])

    @rule(
        chosen=st.sets(places),
        to=stages,
        step=times,
        boundary=times,
        expected=expectations,
        form=st.sampled_from([as_mask, in_order]),
    )
    def move_where(self, chosen, to, step, boundary, expected, form) -> None:
        self.move_together(chosen, to, step, boundary, expected, form)

    @rule(stage=stages, data=st.data(), step=times, form=st.sampled_from([as_mask, in_order]))
    def move_all_at_a_stage(self, stage, data, step, form) -> None:
        to = data.draw(st.sampled_from(sorted(TRANSITIONS[stage])))
        chosen = {at for at, seed in self.plain.items() if seed.stage is stage}
        self.move_together(chosen, to, step, step // 2, stage, form)

    def move_together(self, chosen, to, step, boundary, expected, form) -> None:
        refusals = [r for at in sorted(chosen) if (r := self.plain[at].refusal(to, expected))]
        options = {"step": step, "boundary": boundary, "expected": expected}
        if refusals:
            with pytest.raises(ConflictError if ConflictError in refusals else ContractError):
                self.arrays.move_where(form(chosen), to, **options)
            return
        self.version += bool(chosen)
        assert self.arrays.move_where(form(chosen), to, **options) == self.version
        for at in chosen:
            self.plain[at].move(to, step, boundary, None)

    @rule(at=places, alpha=st.floats(0, 1, width=16))
    def set_alpha(self, at, alpha) -> None:
        self.arrays.set_alpha(*at, alpha)
        self.version += self.plain[at].alpha != alpha
        self.plain[at].alpha = alpha

    @rule(layer=st.integers(0, LAYERS - 1), scores=st.lists(st.floats(0, 1, width=32), max_size=SEEDS))
    def set_health(self, layer, scores) -> None:
        self.arrays.set_health(layer, scores)
        self.version += any(self.plain[layer, n].health != score for n, score in enumerate(scores))
        for n, score in enumerate(scores):
            self.plain[layer, n].health = score

    @rule(at=places, alpha=st.sampled_from([-0.1, 1.1, float("nan")]))
    def refuse_values_out_of_range(self, at, alpha) -> None:
        with pytest.raises(ContractError, match="alpha is in"):
            self.arrays.set_alpha(*at, alpha)
        for scores in ([alpha], [1.0] * (SEEDS + 1)):
            with pytest.raises(ContractError, match="health is up to"):
                self.arrays.set_health(at[0], scores)

    @rule(boundary=times, lengths=st.lists(times, min_size=6, max_size=6))
    def ask_what_is_due(self, boundary, lengths) -> None:
        schedule = StageSchedule(*lengths)
        due = [
            at
            for at, seed in self.plain.items()
            if seed.stage in NEXT_BY_SCHEDULE
            and boundary - seed.since_boundary >= getattr(schedule, NEXT_BY_SCHEDULE[seed.stage][1])
        ]
        assert list(zip(*self.arrays.due(boundary, schedule), strict=True)) == due

    @rule()
    def keep_a_snapshot(self) -> None:
        self.kept.append((self.arrays.snapshot(), copy.deepcopy(self.plain)))

    @rule()
    def follow(self) -> None:
        rows = self.arrays.changes_since(self.mirrored)
        for name in FIELDS:
            getattr(self.mirror, name)[rows.layers] = getattr(rows, name)
        self.mirrored = rows.version
        assert read(self.mirror, self.arrays.kernels) == self.plain
        assert len(self.arrays.changes_since(self.mirrored).layers) == 0

    @rule(how=st.sampled_from(["deepcopy", "pickle", "lists"]))
    def go_on_with_a_copy(self, how) -> None:
        before = self.arrays
        if how == "deepcopy":
            self.arrays = copy.deepcopy(before)
        elif how == "pickle":
            self.arrays = pickle.loads(pickle.dumps(before))
        else:
            self.arrays.load_lists(before.to_lists())
            self.version += 1
        assert (self.arrays is before) == (how == "lists")

    @invariant()
    def the_arrays_are_as_plain(self) -> None:
        assert read(self.arrays, self.arrays.kernels) == self.plain
        assert self.arrays.version == self.version
        snapshot = self.arrays.snapshot()
        assert snapshot is self.arrays.snapshot()
        assert snapshot.version == self.version
        awake = list(zip(*self.arrays.not_dormant(), strict=True))
        assert awake == [at for at, seed in self.plain.items() if seed.stage is not S.DORMANT]
        for at, seed in self.plain.items():
            assert self.arrays.stage_of(*at) is seed.stage
            assert self.arrays.sha256_of(*at) == seed.digest

    def teardown(self) -> None:
        for snapshot, plain in getattr(self, "kept", []):
            assert read(snapshot, self.arrays.kernels) == plain


SeedsAsPlain.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSeedsAsPlain = SeedsAsPlain.TestCase


@pytest.mark.parametrize("array", ["stage", "kernel_id", "alpha", "health", "since_step"])
def test_nobody_changes_the_arrays_past_the_version(array: str) -> None:
    arrays = SeedArrays(LAYERS, SEEDS)
    for owner in (arrays, arrays.snapshot(), arrays.changes_since(-1)):
        with pytest.raises(ValueError, match="read-only"):
            getattr(owner, array)[0, 0] = 0


def test_seeds_that_are_not_there_are_refused() -> None:
    arrays = SeedArrays(LAYERS, SEEDS)
    with pytest.raises(IndexError):
        arrays.move(LAYERS, 0, S.GERMINATED, step=0, boundary=0)
    for where in ((np.array([0]), np.array([SEEDS])), np.ones((SEEDS, LAYERS), bool), np.ones((LAYERS, SEEDS), int)):
        with pytest.raises(ContractError):
            arrays.move_where(where, S.GERMINATED, step=0, boundary=0)
    assert arrays.version == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lists: lists.pop("alpha"),
        lambda lists: lists.update(stage=[[10] * SEEDS] * LAYERS),
        lambda lists: lists.update(stage=[[300] * SEEDS] * LAYERS),
        lambda lists: lists.update(health=[[1.0] * SEEDS]),
        lambda lists: lists.update(since_step=[[0], [0, 0], []]),
    ],
)
def test_a_state_of_another_model_is_refused_whole(spoil: Callable[[dict], None]) -> None:
    arrays = SeedArrays(LAYERS, SEEDS)
    arrays.move(1, 1, S.GERMINATED, step=7, boundary=3)
    before, lists = arrays.to_lists(), SeedArrays(LAYERS, SEEDS).to_lists()
    spoil(lists)
    with pytest.raises(ContractError):
        arrays.load_lists(lists)
    assert arrays.to_lists() == before


def test_two_kernels_that_share_an_id_are_never_both_held() -> None:
    digest = DIGESTS[0]
    twin = digest[:16] + "0" * 48
    arrays = SeedArrays(LAYERS, SEEDS)
    arrays.move(0, 0, S.GERMINATED, step=0, boundary=0, kernel_sha256=digest)
    with pytest.raises(KernelError, match="shares its first 63 bits"):
        arrays.move(0, 1, S.GERMINATED, step=0, boundary=0, kernel_sha256=twin)
    assert arrays.stage_of(0, 1) is S.DORMANT
    for nonsense in ("", digest[:-1], digest.upper(), digest + "\n"):
        with pytest.raises(KernelError, match="is not a SHA-256"):
            arrays.kernels.add(nonsense)
    assert len(arrays.kernels) == 1
    assert arrays.kernels.sha256_of(NO_KERNEL) is None


@given(length=st.integers(1, 100_000), data=st.data())
def test_float16_shows_alpha_to_three_hundredths_of_a_percent(length: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, length - 1))
    shown, following = np.float16(step / length), np.float16((step + 1) / length)
    assert abs(float(shown) - step / length) <= 2**-12
    assert shown < following if length <= 2048 else shown <= following
    assert (np.float16(0), np.float16(1)) == (0, 1)


def test_a_seed_takes_less_than_a_kilobyte() -> None:
    tracemalloc.start()
    try:
        arrays = SeedArrays(25_000, 4)
        taken, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert arrays.num_bytes <= taken < 64 * arrays.stage.size


# -- many threads ----------------------------------------------------------------------------


@contextmanager
def threads_that_switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def run_together(programs: list[Callable[[], None]]) -> None:
    """All at once; the first error of any of them is raised here."""
    gate, errors = threading.Barrier(len(programs)), []

    def run(program: Callable[[], None]) -> None:
        try:
            gate.wait()
            program()
        except BaseException as error:  # whatever it was: the test must fail on it
            errors.append(error)

    threads = [threading.Thread(target=run, args=(program,)) for program in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@dataclass(frozen=True)
class Attempt:
    """One move by one thread. ``made`` is its version, or None: then it was refused between two versions."""

    at: tuple[int, int]
    to: SeedStage
    expected: SeedStage | None
    step: int
    before: int
    after: int
    made: int | None


def replay(attempts: list[Attempt]) -> list[dict[tuple[int, int], PlainSeed]]:
    """The seeds after each version, from those that succeeded; each must have been allowed where it stands."""
    made = sorted((a for a in attempts if a.made is not None), key=lambda a: a.made)
    assert [a.made for a in made] == list(range(1, len(made) + 1))
    history = [{at: PlainSeed() for at in PLACES}]
    for attempt in made:
        assert attempt.before < attempt.made <= attempt.after
        now = copy.deepcopy(history[-1])
        assert now[attempt.at].refusal(attempt.to, attempt.expected) is None
        now[attempt.at].move(attempt.to, attempt.step, attempt.step, None)
        history.append(now)
    return history


programs = st.lists(
    st.lists(st.tuples(st.sampled_from(PLACES[:2]), stages | st.none(), expectations, st.booleans()), max_size=12),
    min_size=2,
    max_size=6,
)


@given(programs=programs)
@settings(max_examples=150, deadline=None)
def test_whatever_threads_do_there_is_an_order_in_which_it_was_done(programs: list[list[tuple]]) -> None:
    """Linearizability. Versions give the order of what succeeded; each refusal and each snapshot must fit into it."""
    arrays = SeedArrays(LAYERS, SEEDS)
    attempts: list[Attempt] = []
    snapshots: list[SeedRows] = []

    def attempt(at, to, expected, is_batch: bool, step: int) -> None:
        if to is None:  # the likeliest next stage, so that long lives are drawn too
            to = min(TRANSITIONS[arrays.stage_of(*at)])
        options = {"step": step, "boundary": step, "expected": expected}
        before = arrays.version
        try:
            if is_batch:
                made = arrays.move_where((np.array([at[0]]), np.array([at[1]])), to, **options)
            else:
                made = arrays.move(*at, to, **options)
        except (ConflictError, ContractError):
            made = None
        attempts.append(Attempt(at, to, expected, step, before, arrays.version, made))
        snapshots.append(arrays.snapshot())

    def program_of(thread: int, moves: list[tuple]) -> Callable[[], None]:
        def program() -> None:
            for n, move in enumerate(moves):
                attempt(*move, step=1000 * thread + n)

        return program

    with threads_that_switch_often():
        run_together([program_of(*numbered) for numbered in enumerate(programs)])
    history = replay(attempts)
    assert read(arrays, arrays.kernels) == history[-1]
    for refused in (a for a in attempts if a.made is None):
        seen = history[refused.before : refused.after + 1]
        assert any(seeds[refused.at].refusal(refused.to, refused.expected) for seeds in seen)
    for rows in snapshots:
        assert read(rows, arrays.kernels) == history[rows.version]


def test_of_a_thousand_racers_exactly_one_makes_each_move() -> None:
    arrays = SeedArrays(LAYERS, SEEDS)
    winners: list[tuple[SeedStage, int]] = []

    def race(number: int) -> None:
        for at, to in pairwise(WHOLE_LIFE):
            try:
                version = arrays.move(1, 0, to, step=number, boundary=number, expected=at)
            except ConflictError:
                rows = arrays.snapshot()
                assert rows.since_step[1, 0] == rows.since_boundary[1, 0]
            else:
                winners.append((to, version))

    with threads_that_switch_often():
        run_together([lambda n=n: race(n) for n in range(1024)])
    assert sorted(winners, key=lambda w: w[1]) == [(to, n) for n, to in enumerate(WHOLE_LIFE[1:], 1)]
    assert arrays.version == len(winners)


def test_copies_are_whole_while_others_move_seeds() -> None:
    arrays = SeedArrays(LAYERS, SEEDS)
    is_over = threading.Event()

    def move() -> None:
        n = 0
        while not is_over.is_set():
            n += 1
            digest = hashlib.sha256(str(n % 500).encode()).hexdigest()
            arrays.move(0, 0, S.GERMINATED, step=n, boundary=n, kernel_sha256=digest)
            for to in (S.CANCELLED, S.DORMANT):
                arrays.move(0, 0, to, step=n, boundary=n)

    def copy_it() -> None:
        try:
            for n in range(100):
                twin = copy.deepcopy(arrays) if n % 2 else pickle.loads(pickle.dumps(arrays))
                assert twin.since_step[0, 0] == twin.since_boundary[0, 0]
                assert (twin.sha256_of(0, 0) is None) == (twin.stage_of(0, 0) is S.DORMANT)
        finally:
            is_over.set()

    with threads_that_switch_often():
        run_together([move, copy_it])


# -- on a device -----------------------------------------------------------------------------


@pytest.mark.parametrize("to", STAGES)
def test_a_device_moves_seeds_as_the_arrays_do(to: SeedStage) -> None:
    codes = [[code] * 2 for code in range(len(STAGES))]
    mask = np.array([[True, False]] * len(STAGES))
    arrays = SeedArrays(len(STAGES), 2)
    arrays.load_lists(arrays.to_lists() | {"stage": codes})
    device = DeviceSeeds.of(arrays.snapshot(), "cpu")
    refused = move_on_device(device, torch.tensor(mask.reshape(-1)), to, step=2**62, boundary=2**61)
    movable = np.array([[to in TRANSITIONS[at]] * 2 for at in STAGES])
    assert refused.tolist() == (mask & ~movable).reshape(-1).tolist()
    arrays.move_where(mask & movable, to, step=2**62, boundary=2**61)
    for name in ("stage", "since_step", "since_boundary"):
        assert getattr(device, name).tolist() == getattr(arrays, name).reshape(-1).tolist()


def test_a_move_on_a_device_reads_nothing_back() -> None:
    """Meta tensors have no values: whatever waits for one raises."""
    device = DeviceSeeds.of(SeedArrays(LAYERS, SEEDS).snapshot(), "meta")
    mask = torch.ones(LAYERS * SEEDS, dtype=torch.bool, device="meta")
    refused = move_on_device(device, mask, S.GERMINATED, step=1, boundary=1)
    assert refused.device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        bool(refused.any())
