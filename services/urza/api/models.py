"""The base of all models of the API: requests, responses and problems."""

from pydantic import BaseModel, ConfigDict


class ApiModel(BaseModel):
    """A model in which an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")
