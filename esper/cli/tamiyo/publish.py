"""`esper tamiyo publish`: stores a fitted policy in S3 and records its training and evaluation in the log."""

import asyncio
from pathlib import Path

import typer
from pydantic import TypeAdapter, ValidationError

from esper.cli.database import database_connection
from esper.config import Settings, load_settings
from esper.errors import ConfigError, ContractError
from esper.oona.producer import OonaProducer
from esper.schemas.base import PolicyId
from esper.schemas.events import PolicyEvaluated, PolicyTrained
from esper.schemas.messages import OonaMessage
from esper.storage.blob_keys import BlobKind
from esper.storage.blobs import BlobStore
from esper.streams.read_models.policy_versions import TrainedVersion, trained_versions

SOURCE = "esper-tamiyo"


def publish(
    folder: Path | None = typer.Argument(
        None, help="Folder from `esper tamiyo retrain --into`. [default: the policy that ships with Esper]"
    ),
    policy: PolicyId = typer.Option("gnn", help="Name of the policy; this becomes its next version."),
    reason: str = typer.Option("", help="Reason; recorded in the log."),
) -> None:
    """Publish a fitted policy as a version that can be activated.

    The weights go to S3, its training and evaluation into the log. `esper tamiyo activate` activates the version.
    Publishing the same weights again changes nothing.
    """
    from esper.services.tamiyo.versions.publication import SHIPPED

    try:
        TypeAdapter(PolicyId).validate_python(policy)
    except ValidationError as error:
        raise ConfigError(f"--policy {policy}: {error.errors()[0]['msg']}") from None
    publish_policy(folder or SHIPPED, policy, reason)


def publish_policy(folder: Path, policy: PolicyId, reason: str) -> int:
    """Publish a policy, print its version and evaluation, and return the version."""
    from esper.services.tamiyo.settings import TamiyoSettings
    from esper.services.tamiyo.versions.publication import messages_of, read_fitted

    settings = load_settings()
    fitted = read_fitted(folder)
    baseline = settings.section("tamiyo", TamiyoSettings).policy_version
    versions = [v for v in asyncio.run(_trained()) if v.version.policy_id == policy]
    version, parent = _version_of(fitted.sha256, versions)
    messages = messages_of(fitted, policy, version, parent, baseline, reason, SOURCE)
    asyncio.run(_write(settings, fitted.data, fitted.sha256, messages))
    typer.echo(f"{policy} v{version}: {len(fitted.data):,} bytes of weights, {fitted.sha256[:12]}")
    for message in messages:
        if isinstance(message.data, PolicyEvaluated):
            found = message.data
            typer.echo(f"  {found.verdict} than {found.against_policy_id} v{found.against_version}: {found.reason}")
        elif isinstance(message.data, PolicyTrained):
            typer.echo(f"  trained on {message.data.num_decisions:,} decisions")
    return version


def _version_of(sha256: str, versions: list[TrainedVersion]) -> tuple[int, int | None]:
    """Version and parent version of these weights: the ones they were published as before, or the next ones."""
    for one in versions:
        if one.version.weights is not None and one.version.weights.sha256 == sha256:
            return one.version.version, one.parent_version
    newest = max((v.version.version for v in versions), default=0)
    return newest + 1, newest or None


async def _trained() -> list[TrainedVersion]:
    async with database_connection() as connection:
        return await trained_versions(connection)


async def _write(settings: Settings, data: bytes, sha256: str, messages: list[OonaMessage]) -> None:
    """Store the weights first, so that every version in the log has its blob."""
    async with BlobStore(settings.need_s3()) as blobs:
        if await blobs.put(data, kind=BlobKind.POLICY) != sha256:
            raise ContractError("the policy file changed while it was published; publish it again")
    async with OonaProducer(settings.need_kafka(), client_id=SOURCE) as producer:
        for message in messages:  # one by one, so that an evaluation never precedes its training
            await producer.send(message)
