"""connect(): gives a training loop the handle of its run."""

import uuid
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from esper.config import Settings, load_settings
from esper.connection.checkpoints.training_state import TrainingState
from esper.connection.follower_link import FollowerLink
from esper.connection.run_handle import RunHandle
from esper.connection.run_link import RunLink
from esper.connection.settings import LinkOptions
from esper.kasmina.distributed import ranks_of
from esper.kasmina.optimizers import plain_optimizer
from esper.schemas.base import Scalar


def connect(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    run_id: str | None = None,
    settings: Settings | None = None,
    options: LinkOptions | None = None,
    scheduler: Any = None,
    scaler: Any = None,
    hyperparameters: Mapping[str, Scalar] | None = None,
    is_resumed: bool = False,
) -> RunHandle:
    """Connect a training loop with Esper. Returns a context manager; nothing connects before it is entered.

    With several ranks of a DistributedDataParallel model, every rank calls this.

    Args:
        model: a model from ``esper.wrap``, or the DistributedDataParallel module around it.
        optimizer: a torch.optim optimizer, or a wrapper around one; the parameters of seeds are added to it.
        run_id: the name of the run, required to resume; a new unique one if None.
        settings: addresses and credentials of Kafka and S3; from the environment if None.
        options: boundaries, sampling and limits; the defaults if None.
        scheduler: a learning rate scheduler, or anything with ``state_dict``; saved in checkpoints.
        scaler: the ``torch.amp.GradScaler`` that scales the loss; saved in checkpoints.
        hyperparameters: recorded with the run.
        is_resumed: continue the run from its newest checkpoint.

    Raises:
        ConfigError: ``settings`` is None and a setting in the environment is invalid.
        ContractError: the model has no seeds, or it is one of several ranks and not in DistributedDataParallel.
        NotSupportedError: the optimizer cannot take new parameters.
    """
    morphable, replicas = ranks_of(model)
    training = TrainingState(morphable, plain_optimizer(optimizer), scheduler, scaler)
    if replicas is not None and replicas.rank > 0:
        return FollowerLink(replicas, training)
    return RunLink(
        training,
        replicas,
        run_id=run_id or f"run-{uuid.uuid4().hex[:12]}",
        settings=settings or load_settings(),
        options=options or LinkOptions.model_validate({}),
        hyperparameters=dict(hyperparameters or {}),
        is_resumed=is_resumed,
    )
