"""From records to experiences: each boundary comes to what its story says, whatever the order of the log."""

import base64
import hashlib
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from support.data.decided_runs import FORK, RENT, Story, a_view, decided, lay_out, recorded, reported, tell_run

from esper.errors import ConflictError, ContractError, NewerVersionError
from esper.graph.view_encoding import encode as encode_view
from esper.oona.dead_letters.dead_letter import ORIGIN_HEADER
from esper.oona.log_reader import StoredRecord
from esper.schemas import ids
from esper.schemas.enums import Action
from esper.services.tamiyo.control.legal_choices import legal_choices
from esper.services.tamiyo.dataset.exclusions import DESCRIPTIONS, FAULTS, Reason, count_by_reason
from esper.services.tamiyo.dataset.experience_files import (
    MANIFEST,
    NUMBERS,
    read_experiences,
    read_manifest,
    write_experiences,
)
from esper.services.tamiyo.dataset.experience_join import ExperienceJoin, join
from esper.services.tamiyo.dataset.experiences import Experiences
from esper.services.tamiyo.dataset.record_index import RecordIndex
from esper.services.tamiyo.dataset.report_rewards import fork_rewards


def joined(records: list[StoredRecord], **gathering: Any) -> ExperienceJoin:
    gathered = RecordIndex(**gathering)
    for record in records:
        gathered.add(record)
    return join(gathered, fork_rewards(RENT))


def told(found: ExperienceJoin) -> Any:
    """Everything but the places, which resends move."""
    exclusions = sorted((one.run_id, one.incarnation, one.boundary, one.reason, one.detail) for one in found.exclusions)
    return found.experiences.digest, exclusions


STORIES = st.builds(
    lambda seed, sizes: [tell_run(f"run{n}", random.Random(f"{seed}{n}"), size) for n, size in enumerate(sizes)],
    st.integers(0, 2**32),
    st.lists(st.integers(1, 8), min_size=1, max_size=4),
)


@settings(max_examples=50)
@given(stories=STORIES, seed=st.integers(0, 2**32))
def test_every_boundary_comes_to_what_its_story_says(stories: list[Story], seed: int) -> None:
    found = joined(lay_out(stories, random.Random(seed)))
    expected = {key: what for story in stories for key, what in story.expected.items()}
    made = {e.key: (e.chosen, e.probability, e.reward) for e in found.experiences}
    assert made == {key: what for key, what in expected.items() if isinstance(what, tuple)}
    reasons = Counter(what for what in expected.values() if isinstance(what, str))
    reasons += Counter({Reason.RIVAL: sum(n for story in stories for n in story.rivals.values())})
    reasons += Counter({Reason.NO_DECISION: sum(story.orphans for story in stories)})
    reasons += Counter({Reason.WRONG_REPORT: sum(story.wrong_reports for story in stories)})
    assert count_by_reason(found.exclusions) == +reasons
    assert found.num_decisions == len(expected)
    assert sum(rewarded for rewarded, _eligible in found.measured.values()) == len(found.experiences)
    unmeasured = sum(eligible - rewarded for rewarded, eligible in found.measured.values())
    assert unmeasured == sum(reasons[r] for r in (Reason.NO_METRIC, Reason.BEFORE_AFTER, Reason.NO_REPORT))


@settings(max_examples=50)
@given(
    stories=STORIES,
    seeds=st.tuples(st.integers(0, 2**32), st.integers(0, 2**32)),
    share_resent=st.sampled_from((0.0, 0.3)),
)
def test_no_order_of_runs_no_interleaving_and_no_resend_changes_anything(
    stories: list[Story], seeds: tuple[int, int], share_resent: float
) -> None:
    plain = lay_out(stories, random.Random(seeds[0]))
    rng = random.Random(seeds[1])
    other = lay_out(rng.sample(stories, len(stories)), rng, share_resent)
    rng.shuffle(other)  # partitions interleave in any way, and not even the order of reading matters
    assert told(joined(other)) == told(joined(plain))


@settings(max_examples=50)
@given(stories=STORIES, seed=st.integers(0, 2**32))
def test_a_run_that_was_not_asked_for_changes_nothing(stories: list[Story], seed: int) -> None:
    alone = joined(lay_out(stories[:1], random.Random(seed)))
    among = joined(lay_out(stories, random.Random(seed)), is_wanted=lambda run_id: run_id == "run0")
    assert told(among) == told(alone)


@settings(max_examples=25)
@given(stories=STORIES, seed=st.integers(0, 2**32))
def test_experiences_are_the_same_from_a_folder(
    tmp_path_factory: pytest.TempPathFactory, stories: list[Story], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("replayed") / "a" / "b"
    found = joined(lay_out(stories, random.Random(seed))).experiences
    write_experiences(folder, found, {"whence": "a test"})
    again = read_experiences(folder)
    assert again.stored == found.stored
    assert again.digest == found.digest == read_manifest(folder)["digest"]
    assert [e.view for e in again] == [e.view for e in found]
    with pytest.raises(ConflictError, match="name a new folder"):
        write_experiences(folder, found, {})


# one thing at a time


def one_whole(**report: Any) -> tuple[Story, Any, Any]:
    """A story of one boundary that germinates."""
    story, key = Story(), ("run", 1, 1)
    view = a_view(random.Random(1), key)
    choice = next(c for c in legal_choices(view) if c.action is Action.GERMINATE)
    story.tell(recorded(view), ids.view_id(*key))
    story.tell(decided(view, choice, 0.5), ids.decision_id(*key))
    reported(story, key, choice, ids.decision_id(*key), **report)
    return story, view, choice


def records_of(story: Story) -> list[StoredRecord]:
    return lay_out([story], random.Random(0))


def test_of_two_decisions_the_first_in_the_log_counts_and_a_report_of_the_others_choice_is_told() -> None:
    story, view, choice = one_whole()
    rival = next(c for c in legal_choices(view) if c.action is Action.GERMINATE and c.kernel != choice.kernel)
    key = ("run", 1, 1)
    story.told["control.tamiyo.decisions"].insert(0, story.told["control.tamiyo.decisions"][0])
    other = Story()
    other.tell(decided(view, rival, 0.3), ids.decision_id(*key))
    story.told["control.tamiyo.decisions"][0] = other.told["control.tamiyo.decisions"][0]
    found = joined(records_of(story))
    assert len(found.experiences) == 0, "the report is of what came second, and was carried out all the same"
    assert count_by_reason(found.exclusions) == {Reason.WRONG_REPORT: 1, Reason.RIVAL: 1, Reason.NO_REPORT: 1}


def test_a_view_of_another_boundary_is_not_the_view() -> None:
    story, view, choice = one_whole()
    key, elsewhere = ("run", 1, 1), replace(view, step=view.step + 1)
    story.told["control.tamiyo.views"], story.told["control.tamiyo.decisions"] = [], []
    story.tell(recorded(elsewhere), ids.view_id(*key))
    story.tell(decided(view, choice, 0.5, view_digest=elsewhere.digest), ids.decision_id(*key))
    (exclusion,) = joined(records_of(story)).exclusions
    assert (exclusion.reason, exclusion.detail) == (
        Reason.WRONG_VIEW,
        "it is of run, incarnation 1, boundary 1, step 11",
    )


def test_a_view_that_is_no_view_is_told_and_one_of_a_newer_program_stops_the_replay() -> None:
    story, view, _choice = one_whole()
    (message,) = story.told["control.tamiyo.views"]
    for data, is_newer in (
        (b"no frame", False),
        (encode_view(view).replace(b'"view_version":2', b'"view_version":9'), True),
    ):
        digest, packed = hashlib.sha256(data).hexdigest(), zstandard.compress(data) if is_newer else data
        event = recorded(view, digest=digest, view_zstd=base64.b64encode(packed))
        story.told["control.tamiyo.views"] = [message.model_copy(update={"data": event})]
        (decision,) = story.told["control.tamiyo.decisions"]
        changed = decision.data.model_copy(update={"view_digest": digest})
        story.told["control.tamiyo.decisions"] = [decision.model_copy(update={"data": changed})]
        if is_newer:
            with pytest.raises(NewerVersionError):
                joined(records_of(story))
        else:
            assert count_by_reason(joined(records_of(story)).exclusions) == {Reason.VIEW_DAMAGED: 1}


def test_a_view_that_claims_to_be_huge_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.services.tamiyo.dataset.experience_join.MAX_VIEW_BYTES", 1_000)
    (exclusion,) = joined(records_of(one_whole()[0])).exclusions
    assert (exclusion.reason, exclusion.detail.startswith("it claims to have")) == (Reason.VIEW_DAMAGED, True)


def test_what_workers_passed_over_is_left_out_until_it_is_redriven() -> None:
    records = records_of(one_whole()[0])
    decision = next(r for r in records if r.position.topic == "control.tamiyo.decisions")
    passed = {decision.position: "invalid: step"}
    found = joined(records, skipped_record=passed)
    assert count_by_reason(found.exclusions) == {Reason.UNDECODABLE: 1, Reason.NO_DECISION: 1}
    place = decision.position
    redriven = decision._replace(
        position=place._replace(offset=place.offset + 9),
        headers=(*decision.headers, (ORIGIN_HEADER, f"{place.topic}/{place.partition}/{place.offset}".encode())),
    )
    found = joined([*records, redriven], skipped_record=passed)
    assert (len(found.experiences), found.exclusions) == (1, ())


def test_a_record_that_is_no_event_is_told_with_its_place() -> None:
    records = records_of(one_whole()[0])
    broken = [r._replace(value=b"\x00") if r.position.topic == "innovation.field-reports" else r for r in records]
    found = joined(broken)
    assert count_by_reason(found.exclusions) == {Reason.UNDECODABLE: 1, Reason.NO_REPORT: 1}
    undecodable = next(one for one in found.exclusions if one.reason is Reason.UNDECODABLE)
    assert undecodable.place.startswith("innovation.field-reports[")
    assert undecodable.run_id == "run"


def test_a_placebo_is_known_as_one_and_its_difference_is_told_as_of_one_draw(tmp_path: Path) -> None:
    found = joined(records_of(one_whole(after=0.75, fork=FORK.model_copy(update={"is_placebo": True}))[0]))
    assert found.placebos == (("run", pytest.approx(0.25 * 2**0.5)),)
    write_experiences(tmp_path / "it", found.experiences, {})
    assert [(e.is_placebo, e.reward) for e in read_experiences(tmp_path / "it")] == [(True, 0.0)]
    real = joined(records_of(one_whole(before=0.5, after=0.5, outcome="culled")[0])).experiences
    assert [(e.is_placebo, e.reward) for e in real] == [(False, 0.0)]


def test_an_altered_folder_is_refused(tmp_path: Path) -> None:
    found = joined(records_of(one_whole(after=0.75)[0])).experiences
    assert [(e.reward, e.reward_variance) for e in found] == [
        (pytest.approx(0.25 - 0.25 * 16 / 128 - 0.5 * 32 / 256), 0.0625)
    ]
    write_experiences(tmp_path / "it", found, {})
    manifest = (tmp_path / "it" / MANIFEST).read_text()
    (tmp_path / "it" / MANIFEST).write_text(manifest.replace(found.digest, "0" * 64))
    with pytest.raises(ContractError, match="was altered"):
        read_experiences(tmp_path / "it")
    (tmp_path / "it" / MANIFEST).write_text(manifest.replace('"format": 2', '"format": 1'))
    with pytest.raises(ContractError, match="this program reads 2: replay again"):
        read_experiences(tmp_path / "it")
    (tmp_path / "it" / MANIFEST).write_text(manifest)
    data = (tmp_path / "it" / NUMBERS).read_bytes()
    (tmp_path / "it" / NUMBERS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ContractError, match="cannot be read"):
        read_experiences(tmp_path / "it")
    with pytest.raises(ContractError, match="holds no experiences"):
        read_manifest(tmp_path)


def test_a_view_whose_bytes_were_exchanged_is_refused_when_it_is_opened() -> None:
    (one,) = joined(records_of(one_whole()[0])).experiences.stored
    for forged in (b"no frame", zstandard.compress(b"{}")):
        with pytest.raises(ContractError, match="replay again"):
            replace(one, view_zstd=forged).opened()


def test_two_experiences_of_one_boundary_cannot_be() -> None:
    (one,) = joined(records_of(one_whole()[0])).experiences.stored
    with pytest.raises(ValueError, match="two experiences of boundary"):
        Experiences([one, one])


def test_every_reason_says_what_it_means() -> None:
    assert set(DESCRIPTIONS) == set(Reason)
    assert Reason.NO_VIEW in FAULTS
    assert FAULTS.isdisjoint({Reason.NO_REPORT, Reason.STALE, Reason.RIVAL})
