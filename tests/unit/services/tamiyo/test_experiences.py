"""Records become experiences: each boundary gives what its story expects, whatever the order of the log."""

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
from support.data.decided_runs import FORK, RENT, Story, a_view, decided, generate_run, lay_out, recorded, reported

from esper.errors import ConflictError, ContractError, NewerVersionError
from esper.graph.view_bytes import encode as encode_view
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
from esper.services.tamiyo.dataset.experience_join import ExperienceJoin, join_experiences
from esper.services.tamiyo.dataset.experiences import Experiences
from esper.services.tamiyo.dataset.record_index import RecordIndex


def joined(records: list[StoredRecord], **options: Any) -> ExperienceJoin:
    index = RecordIndex(**options)
    for record in records:
        index.add(record)
    return join_experiences(index, RENT)


def without_locations(found: ExperienceJoin) -> Any:
    """The digest and the exclusions without their locations, which duplicates change."""
    exclusions = sorted((one.run_id, one.incarnation, one.boundary, one.reason, one.detail) for one in found.exclusions)
    return found.experiences.digest, exclusions


STORIES = st.builds(
    lambda seed, sizes: [generate_run(f"run{n}", random.Random(f"{seed}{n}"), size) for n, size in enumerate(sizes)],
    st.integers(0, 2**32),
    st.lists(st.integers(1, 8), min_size=1, max_size=4),
)


@settings(max_examples=50)
@given(stories=STORIES, seed=st.integers(0, 2**32))
def test_every_boundary_gives_what_its_story_expects(stories: list[Story], seed: int) -> None:
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
def test_order_and_duplicates_do_not_change_the_result(
    stories: list[Story], seeds: tuple[int, int], share_resent: float
) -> None:
    plain = lay_out(stories, random.Random(seeds[0]))
    rng = random.Random(seeds[1])
    other = lay_out(rng.sample(stories, len(stories)), rng, share_resent)
    rng.shuffle(other)  # partitions interleave in any way, and not even the order of reading matters
    assert without_locations(joined(other)) == without_locations(joined(plain))


@settings(max_examples=50)
@given(stories=STORIES, seed=st.integers(0, 2**32))
def test_unwanted_run_does_not_change_the_result(stories: list[Story], seed: int) -> None:
    alone = joined(lay_out(stories[:1], random.Random(seed)))
    among = joined(lay_out(stories, random.Random(seed)), is_wanted=lambda run_id: run_id == "run0")
    assert without_locations(among) == without_locations(alone)


@settings(max_examples=25)
@given(stories=STORIES, seed=st.integers(0, 2**32))
def test_experiences_survive_a_folder(
    tmp_path_factory: pytest.TempPathFactory, stories: list[Story], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("replayed") / "a" / "b"
    found = joined(lay_out(stories, random.Random(seed))).experiences
    write_experiences(folder, found, {"source": "a test"})
    again = read_experiences(folder)
    assert again.stored == found.stored
    assert again.digest == found.digest == read_manifest(folder)["digest"]
    assert [e.view for e in again] == [e.view for e in found]
    with pytest.raises(ConflictError, match="name a new folder"):
        write_experiences(folder, found, {})


# single cases


def one_whole(**report: Any) -> tuple[Story, Any, Any]:
    """A story of one boundary with a germination."""
    story, key = Story(), ("run", 1, 1)
    view = a_view(random.Random(1), key)
    choice = next(c for c in legal_choices(view) if c.action is Action.GERMINATE)
    story.add(recorded(view), ids.view_id(*key))
    story.add(decided(view, choice, 0.5), ids.decision_id(*key))
    reported(story, key, choice, ids.decision_id(*key), **report)
    return story, view, choice


def records_of(story: Story) -> list[StoredRecord]:
    return lay_out([story], random.Random(0))


def test_first_decision_counts_and_rival_report_is_excluded() -> None:
    story, view, choice = one_whole()
    rival = next(c for c in legal_choices(view) if c.action is Action.GERMINATE and c.kernel != choice.kernel)
    key = ("run", 1, 1)
    story.messages["control.tamiyo.decisions"].insert(0, story.messages["control.tamiyo.decisions"][0])
    other = Story()
    other.add(decided(view, rival, 0.3), ids.decision_id(*key))
    story.messages["control.tamiyo.decisions"][0] = other.messages["control.tamiyo.decisions"][0]
    found = joined(records_of(story))
    assert len(found.experiences) == 0, "the report is on the second decision, which was carried out all the same"
    assert count_by_reason(found.exclusions) == {Reason.WRONG_REPORT: 1, Reason.RIVAL: 1, Reason.NO_REPORT: 1}


def test_view_of_another_boundary_is_excluded() -> None:
    story, view, choice = one_whole()
    key, elsewhere = ("run", 1, 1), replace(view, step=view.step + 1)
    story.messages["control.tamiyo.views"], story.messages["control.tamiyo.decisions"] = [], []
    story.add(recorded(elsewhere), ids.view_id(*key))
    story.add(decided(view, choice, 0.5, view_digest=elsewhere.digest), ids.decision_id(*key))
    (exclusion,) = joined(records_of(story)).exclusions
    assert (exclusion.reason, exclusion.detail) == (
        Reason.WRONG_VIEW,
        "it is of run, incarnation 1, boundary 1, step 11",
    )


def test_damaged_view_is_excluded_and_newer_one_raises() -> None:
    story, view, _choice = one_whole()
    (message,) = story.messages["control.tamiyo.views"]
    for data, is_newer in (
        (b"no frame", False),
        (encode_view(view).replace(b'"view_version":2', b'"view_version":9'), True),
    ):
        digest, packed = hashlib.sha256(data).hexdigest(), zstandard.compress(data) if is_newer else data
        event = recorded(view, digest=digest, view_zstd=base64.b64encode(packed))
        story.messages["control.tamiyo.views"] = [message.model_copy(update={"data": event})]
        (decision,) = story.messages["control.tamiyo.decisions"]
        changed = decision.data.model_copy(update={"view_digest": digest})
        story.messages["control.tamiyo.decisions"] = [decision.model_copy(update={"data": changed})]
        if is_newer:
            with pytest.raises(NewerVersionError):
                joined(records_of(story))
        else:
            assert count_by_reason(joined(records_of(story)).exclusions) == {Reason.VIEW_DAMAGED: 1}


def test_view_that_claims_to_be_huge_is_not_decompressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.services.tamiyo.control.recorded_view.MAX_VIEW_BYTES", 1_000)
    (exclusion,) = joined(records_of(one_whole()[0])).exclusions
    assert (exclusion.reason, exclusion.detail.startswith("it claims to have")) == (Reason.VIEW_DAMAGED, True)


def test_skipped_record_is_excluded_until_it_is_redriven() -> None:
    records = records_of(one_whole()[0])
    decision = next(r for r in records if r.position.topic == "control.tamiyo.decisions")
    skipped = {decision.position: "invalid: step"}
    found = joined(records, skipped_records=skipped)
    assert count_by_reason(found.exclusions) == {Reason.UNDECODABLE: 1, Reason.NO_DECISION: 1}
    place = decision.position
    redriven = decision._replace(
        position=place._replace(offset=place.offset + 9),
        headers=(*decision.headers, (ORIGIN_HEADER, f"{place.topic}/{place.partition}/{place.offset}".encode())),
    )
    found = joined([*records, redriven], skipped_records=skipped)
    assert (len(found.experiences), found.exclusions) == (1, ())


def test_undecodable_record_is_excluded_with_its_location() -> None:
    records = records_of(one_whole()[0])
    broken = [r._replace(value=b"\x00") if r.position.topic == "innovation.field-reports" else r for r in records]
    found = joined(broken)
    assert count_by_reason(found.exclusions) == {Reason.UNDECODABLE: 1, Reason.NO_REPORT: 1}
    undecodable = next(one for one in found.exclusions if one.reason is Reason.UNDECODABLE)
    assert undecodable.location.startswith("innovation.field-reports[")
    assert undecodable.run_id == "run"


def test_placebo_difference_is_scaled_to_one_draw(tmp_path: Path) -> None:
    found = joined(records_of(one_whole(after=0.75, fork=FORK.model_copy(update={"is_placebo": True}))[0]))
    assert found.placebos == (("run", pytest.approx(0.25 * 2**0.5)),)
    write_experiences(tmp_path / "it", found.experiences, {})
    assert [(e.is_placebo, e.reward) for e in read_experiences(tmp_path / "it")] == [(True, 0.0)]
    real = joined(records_of(one_whole(before=0.5, after=0.5, outcome="culled")[0])).experiences
    assert [(e.is_placebo, e.reward) for e in real] == [(False, 0.0)]


def test_altered_folder_is_rejected(tmp_path: Path) -> None:
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


def test_view_with_other_bytes_is_rejected() -> None:
    (one,) = joined(records_of(one_whole()[0])).experiences.stored
    for forged in (b"no frame", zstandard.compress(b"{}")):
        with pytest.raises(ContractError, match="replay again"):
            replace(one, view_zstd=forged).to_experience()


def test_stored_view_of_a_newer_program_asks_for_an_upgrade() -> None:
    (one,) = joined(records_of(one_whole()[0])).experiences.stored
    data = encode_view(one.to_experience().view).replace(b'"view_version":2', b'"view_version":9')
    newer = replace(one, view_digest=hashlib.sha256(data).hexdigest(), view_zstd=zstandard.compress(data))
    with pytest.raises(NewerVersionError):
        newer.to_experience()


def test_two_experiences_of_one_boundary_are_rejected() -> None:
    (one,) = joined(records_of(one_whole()[0])).experiences.stored
    with pytest.raises(ValueError, match="two experiences of boundary"):
        Experiences([one, one])


def test_every_reason_has_a_description() -> None:
    assert set(DESCRIPTIONS) == set(Reason)
    assert Reason.NO_VIEW in FAULTS
    assert FAULTS.isdisjoint({Reason.NO_REPORT, Reason.STALE, Reason.RIVAL})
