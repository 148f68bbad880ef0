"""The response model of field reports."""

from datetime import datetime
from uuid import UUID

from pydantic import Field

from esper.schemas.enums import ReportMethod, SeedStage
from esper.services.urza.api.models import ApiModel


class FieldReportResponse(ApiModel):
    """The outcome of one adaptation. It is superseded where a resumed run took over before its step."""

    run_id: str
    incarnation: int
    sequence: int
    step: int
    layer_id: str
    seed_id: int
    blueprint_id: str
    outcome: SeedStage
    method: ReportMethod
    metric: str
    before: float | None
    after: float | None
    germinated_at_step: int
    num_parameters: int
    horizon_steps: int | None = Field(
        description="Set for forks, as the fields down to `flops_host`; null for other methods."
    )
    num_draws: int | None
    variance: float | None
    is_placebo: bool | None
    num_parameters_host: int | None
    flops_added: int | None
    flops_host: int | None
    decision_id: UUID
    command_id: UUID
    event_id: UUID
    causation_id: UUID | None
    at: datetime
    is_superseded: bool
