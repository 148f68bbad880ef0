"""Publication of a trained policy: the `trained` event, and an `evaluated` event for each policy it was compared with.

Pure except for reading the folder. It activates nothing: `esper tamiyo activate` does, if an evaluation permits it.
"""

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from esper.errors import ContractError
from esper.schemas.events import PolicyEvaluated, PolicyTrained
from esper.schemas.events.policies import LogRange
from esper.schemas.messages import OonaMessage
from esper.services.tamiyo.gnn.policy_file import load_policy, read_card
from esper.services.tamiyo.gnn.policy_fit import CARD_FILE, POLICY_FILE
from esper.services.tamiyo.policies.policy_sources import BASELINES
from esper.services.tamiyo.versions.activation import MAX_REASON_CHARS

KIND = "gnn"
SHIPPED = Path(__file__).parents[1] / "shipped"
"""The policy that comes with Esper; ``make train-tamiyo`` trains one."""
_NAMESPACE = uuid.UUID("5b1cc7a0-4c8e-5d0e-9a51-9f7f1f3f2b6d")


@dataclass(frozen=True, slots=True)
class FittedFiles:
    """The files that ``esper tamiyo retrain`` wrote into a folder."""

    data: bytes
    sha256: str
    card: Mapping[str, Any]


def read_fitted(folder: Path) -> FittedFiles:
    """Read and verify the policy in a folder: this program can run it, and the card belongs to it.

    Raises:
        ContractError: there is none, or it is damaged.
    """
    try:
        data = (folder / POLICY_FILE).read_bytes()
        card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
        sha256 = str(card["policy_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ContractError(f"{folder} holds no policy ({error}): write one with `esper tamiyo retrain`") from error
    load_policy(data, sha256)
    return FittedFiles(data, sha256, card)


def messages_of(
    fitted: FittedFiles,
    policy_id: str,
    version: int,
    parent: int | None,
    baseline_version: int,
    reason: str,
    source: str,
) -> list[OonaMessage]:
    """Return the `trained` event, then the evaluations. Equal policies and versions give equal ids.

    Args:
        parent: the previous version of this policy, if any.
        baseline_version: the version that evaluations name for baselines.

    Raises:
        ContractError: the card lacks results of training or evaluation.
    """
    try:
        trained = _trained(fitted, policy_id, version, parent, reason)
        evaluations = [*_evaluations(fitted.card["verdicts"], policy_id, version, baseline_version)]
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise ContractError(f"the card lacks results of training or evaluation ({error!r}): retrain") from error
    trained_id = _id(fitted, policy_id, version, "trained")
    messages = [OonaMessage.of(trained, id=trained_id, source=source)]
    for event in evaluations:
        event_id = _id(fitted, policy_id, version, f"{event.against_policy_id} v{event.against_version}")
        messages.append(OonaMessage.of(event, id=event_id, source=source, causation_id=trained_id))
    return messages


def _trained(fitted: FittedFiles, policy_id: str, version: int, parent: int | None, reason: str) -> PolicyTrained:
    training, card = fitted.card["training"], read_card(fitted.data)
    return PolicyTrained(
        policy_id=policy_id,
        policy_version=version,
        kind=KIND,
        parent_version=parent,
        weights_sha256=fitted.sha256,
        weights_size_bytes=len(fitted.data),
        parameters={"metric": card.metric, "temperature": card.temperature},
        data=tuple(LogRange.model_validate(one) for one in fitted.card.get("data", ())),
        num_decisions=training["num_experiences"],
        figures=training["figures"],
        reason=reason,
    )


def _evaluations(
    verdicts: Iterable[Mapping[str, Any]], policy_id: str, version: int, baseline_version: int
) -> Iterable[PolicyEvaluated]:
    for verdict in verdicts:
        other = _version_named(verdict["than"], baseline_version)
        if other is not None:
            fields = {name: value for name, value in verdict.items() if name != "than"}
            yield PolicyEvaluated(
                policy_id=policy_id,
                policy_version=version,
                against_policy_id=other[0],
                against_version=other[1],
                **{**fields, "reason": fields["reason"][:MAX_REASON_CHARS]},
            )


def _version_named(name: str, baseline_version: int) -> tuple[str, int] | None:
    """Return policy and version of a baseline or of ``POLICY vN``; None for the logged behaviour."""
    if name in BASELINES:
        return name, baseline_version
    policy_id, _space, version = name.rpartition(" v")
    return (policy_id, int(version)) if policy_id and version.isdecimal() else None


def _id(fitted: FittedFiles, policy_id: str, version: int, what: str) -> uuid.UUID:
    return uuid.uuid5(_NAMESPACE, f"{fitted.sha256}:{policy_id}:{version}:{what}")
