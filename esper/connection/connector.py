"""connect(): gives a training loop its link. Rank 0 of a run, or its only process, gets the one that talks to Kafka."""

import uuid
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from esper.config import Settings, load_settings
from esper.connection.checkpoints.training_state import Training
from esper.connection.follower_link import FollowerLink
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
) -> RunLink | FollowerLink:
    """Link a training loop with Oona. Use it as a context manager.

    Where several ranks train one DistributedDataParallel model, all of them call it: rank 0 talks to
    Kafka, the others follow what it does.

    Args:
        model: from ``esper.wrap``, or the DistributedDataParallel module around it.
        optimizer: any torch.optim optimizer, or what wraps one; grown parameters join it.
        run_id: names the run; a new name where it is None.
        settings: where everything is; from the environment where it is None.
        scheduler: an lr scheduler (or anything with state_dict), kept in checkpoints.
        scaler: the AMP GradScaler that scales the loss, likewise.
        hyperparameters: told with ``run started``.
        is_resumed: go on from the newest checkpoint of ``run_id``.

    Raises:
        ContractError: the model holds no seeds, or is one rank's of several and not in DDP.
        NotSupportedError: nothing can grow beside this optimizer.
    """
    morphable, replicas = ranks_of(model)
    training = Training(morphable, plain_optimizer(optimizer), scheduler, scaler)
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
