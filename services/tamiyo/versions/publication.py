"""A fitted policy goes into the log: its file into S3, then a `trained` event, then an `evaluated` one for each rival.

Pure but for reading the folder. It decides nothing: `esper tamiyo activate` does, where an evaluation lets it.
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

KIND = "gnn"
SHIPPED = Path(__file__).parents[1] / "shipped"
"""The policy that comes with Esper; ``make train-tamiyo`` makes such a one."""
_NAMESPACE = uuid.UUID("5b1cc7a0-4c8e-5d0e-9a51-9f7f1f3f2b6d")


@dataclass(frozen=True, slots=True)
class FittedFiles:
    """What ``esper tamiyo retrain`` left in a folder."""

    data: bytes
    sha256: str
    card: Mapping[str, Any]


def read_fitted(folder: Path) -> FittedFiles:
    """The policy in a folder, verified: this program can run it, and its card is its own.

    Raises:
        ContractError: there is none, or it is not whole.
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
    """The `trained` event, and what was found of it against each rival. The same policy and version, the same ids.

    Args:
        baseline_version: the version that the baselines go by.
        parent: the version of this policy before it, if any.

    Raises:
        ContractError: the card does not say what training and evaluation came to.
    """
    try:
        trained = _trained(fitted, policy_id, version, parent, reason)
        found = [*_evaluated(fitted.card["verdicts"], policy_id, version, baseline_version)]
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise ContractError(f"the card does not say what training came to ({error!r}): retrain") from error
    events: list[PolicyTrained | PolicyEvaluated] = [trained, *found]
    first = _id(fitted, policy_id, version, "trained")
    messages = [OonaMessage.of(events[0], id=first, source=source)]
    for event in found:
        rival = f"{event.against_policy_id} v{event.against_version}"
        event_id = _id(fitted, policy_id, version, rival)
        messages.append(OonaMessage.of(event, id=event_id, source=source, causation_id=first))
    return messages


def _trained(fitted: FittedFiles, policy_id: str, version: int, parent: int | None, reason: str) -> PolicyTrained:
    training, own = fitted.card["training"], read_card(fitted.data)
    return PolicyTrained(
        policy_id=policy_id,
        policy_version=version,
        kind=KIND,
        parent_version=parent,
        weights_sha256=fitted.sha256,
        weights_size_bytes=len(fitted.data),
        parameters={"metric": own.metric, "temperature": own.temperature},
        data=tuple(LogRange.model_validate(one) for one in fitted.card.get("data", ())),
        num_decisions=training["num_experiences"],
        figures=training["figures"],
        reason=reason,
    )


def _evaluated(
    verdicts: Iterable[Mapping[str, Any]], policy_id: str, version: int, baseline_version: int
) -> Iterable[PolicyEvaluated]:
    for found in verdicts:
        rival = _rival(found["than"], baseline_version)
        if rival is not None:
            told = {name: value for name, value in found.items() if name != "than"}
            yield PolicyEvaluated(
                policy_id=policy_id,
                policy_version=version,
                against_policy_id=rival[0],
                against_version=rival[1],
                **{**told, "reason": told["reason"][:2000]},
            )


def _rival(name: str, baseline_version: int) -> tuple[str, int] | None:
    """Policy and version of a rival: a baseline, or ``policy vN``; None of what only happened."""
    if name in BASELINES:
        return name, baseline_version
    policy_id, _space, version = name.rpartition(" v")
    return (policy_id, int(version)) if policy_id and version.isdecimal() else None


def _id(fitted: FittedFiles, policy_id: str, version: int, what: str) -> uuid.UUID:
    return uuid.uuid5(_NAMESPACE, f"{fitted.sha256}:{policy_id}:{version}:{what}")
