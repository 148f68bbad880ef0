"""Field reports: what is remembered of each adaptation from germination to its end."""

from typing import Any
from uuid import UUID

from esper.kasmina.lifecycle import Transition
from esper.schemas.enums import ReportMethod
from esper.schemas.events.seeds import END_STAGES


class AdaptationBook:
    """Open adaptations by seed, and the newest value of the metric. Plain data: it is checkpointed."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.last_value: float | None = None
        self.num_adaptations = 0
        self._open: dict[str, dict[str, Any]] = {}

    def germinated(self, plan: Transition, command_id: UUID, decision_id: UUID, step: int) -> None:
        """An adaptation begins."""
        self.num_adaptations += 1
        self._open[_key(plan)] = {
            "decision_id": str(decision_id),
            "command_id": str(command_id),
            "before": self.last_value,
            "step": step,
        }

    def ended(self, plan: Transition) -> dict[str, Any] | None:
        """The report's fields for a seed that came to its end; None for any other move."""
        opened = self._open.pop(_key(plan), None) if plan.to_stage in END_STAGES else None
        if opened is None:
            return None
        return {
            "layer_id": plan.layer_id,
            "seed_id": plan.seed_id,
            "blueprint_id": plan.blueprint_id,
            "outcome": plan.to_stage,
            "decision_id": UUID(opened["decision_id"]),
            "command_id": UUID(opened["command_id"]),
            "method": ReportMethod.BEFORE_AFTER,
            "metric": self.metric,
            "before": opened["before"],
            "after": self.last_value,
            "germinated_at_step": opened["step"],
            "num_parameters": plan.num_parameters,
        }

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"last_value": self.last_value, "num": self.num_adaptations, "open": self._open}

    def load_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of ``to_dict``."""
        self.last_value, self.num_adaptations, self._open = saved["last_value"], saved["num"], saved["open"]


def _key(plan: Transition) -> str:
    return f"{plan.layer_id}:{plan.seed_id}"
