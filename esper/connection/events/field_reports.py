"""Field reports: the metric before and after each adaptation, from its germination to its end."""

from typing import Any
from uuid import UUID

from esper.kasmina.lifecycle import Transition
from esper.schemas.enums import ReportMethod
from esper.schemas.events.seeds import END_STAGES


class AdaptationLedger:
    """The adaptations in progress by seed, and the latest value of the metric. Plain data, saved in checkpoints."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.last_value: float | None = None
        self.num_adaptations = 0
        self._in_progress: dict[str, dict[str, Any]] = {}

    def germinated(self, plan: Transition, command_id: UUID, decision_id: UUID, step: int) -> None:
        """Note the start of an adaptation."""
        self.num_adaptations += 1
        self._in_progress[_key(plan)] = {
            "decision_id": str(decision_id),
            "command_id": str(command_id),
            "before": self.last_value,
            "step": step,
        }

    def ended(self, plan: Transition) -> dict[str, Any] | None:
        """The fields of the field report for a seed that reached a final stage; None for any other transition."""
        started = self._in_progress.pop(_key(plan), None) if plan.to_stage in END_STAGES else None
        if started is None:
            return None
        return {
            "layer_id": plan.layer_id,
            "seed_id": plan.seed_id,
            "blueprint_id": plan.blueprint_id,
            "outcome": plan.to_stage,
            "decision_id": UUID(started["decision_id"]),
            "command_id": UUID(started["command_id"]),
            "method": ReportMethod.BEFORE_AFTER,
            "metric": self.metric,
            "before": started["before"],
            "after": self.last_value,
            "germinated_at_step": started["step"],
            "num_parameters": plan.num_parameters,
        }

    def to_dict(self) -> dict[str, Any]:
        """The state, for a checkpoint."""
        return {"last_value": self.last_value, "num": self.num_adaptations, "open": self._in_progress}

    def load_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of ``to_dict``."""
        self.last_value, self.num_adaptations, self._in_progress = saved["last_value"], saved["num"], saved["open"]


def _key(plan: Transition) -> str:
    return f"{plan.layer_id}:{plan.seed_id}"
