"""`esper tamiyo publish`: a fitted policy goes into S3 and into the log, with what evaluation says of it."""

import asyncio
from pathlib import Path

import typer
from pydantic import TypeAdapter, ValidationError

from esper.config import Settings, load_settings
from esper.errors import ConfigError, ContractError
from esper.oona.producer import OonaProducer
from esper.schemas.base import PolicyId
from esper.schemas.events import PolicyEvaluated, PolicyTrained
from esper.schemas.messages import OonaMessage
from esper.storage.blob_keys import BlobKind
from esper.storage.blobs import BlobStore
from esper.streams.database.connections import connect_pool
from esper.streams.read_models.policy_versions import TrainedVersion, trained_versions

SOURCE = "esper-tamiyo"


def register(group: typer.Typer) -> None:
    """Add the command to the `esper tamiyo` group."""
    group.command()(publish)


def publish(
    folder: Path | None = typer.Argument(
        None, help="What `esper tamiyo retrain --into` wrote; without it the policy that comes with Esper."
    ),
    policy: PolicyId = typer.Option("gnn", help="The policy that it is a version of."),
    reason: str = typer.Option("", help="Kept in the log."),
) -> None:
    """Make a fitted policy a version that can be activated: its weights into S3, what was found of it into the log.

    It decides nothing by that: `esper tamiyo activate` does, where an evaluation says that it is better. Done twice, or
    once more after it was interrupted, it is one version.
    """
    from esper.services.tamiyo.versions.publication import SHIPPED

    try:
        TypeAdapter(PolicyId).validate_python(policy)
    except ValidationError as error:
        raise ConfigError(f"--policy {policy}: {error.errors()[0]['msg']}") from None
    publish_policy(folder or SHIPPED, policy, reason)


def publish_policy(folder: Path, policy: PolicyId, reason: str) -> int:
    """Publish it and say so; gives the version."""
    from esper.services.tamiyo.settings import TamiyoSettings
    from esper.services.tamiyo.versions.publication import messages_of, read_fitted

    settings = load_settings()
    fitted = read_fitted(folder)
    baseline = settings.section("tamiyo", TamiyoSettings).policy_version
    versions = [v for v in asyncio.run(_trained(settings)) if v.version.policy_id == policy]
    version, parent = _number(fitted.sha256, versions)
    messages = messages_of(fitted, policy, version, parent, baseline, reason, SOURCE)
    asyncio.run(_write(settings, fitted.data, fitted.sha256, messages))
    typer.echo(f"{policy} v{version}: {len(fitted.data):,} bytes of weights, {fitted.sha256[:12]}")
    for message in messages:
        if isinstance(message.data, PolicyEvaluated):
            found = message.data
            typer.echo(f"  {found.verdict} than {found.against_policy_id} v{found.against_version}: {found.reason}")
        elif isinstance(message.data, PolicyTrained):
            typer.echo(f"  learnt from {message.data.num_decisions:,} decisions")
    return version


def _number(sha256: str, versions: list[TrainedVersion]) -> tuple[int, int | None]:
    """The version that these weights get, and the one before: where they were published, the same as then."""
    for one in versions:
        if one.version.weights is not None and one.version.weights.sha256 == sha256:
            return one.version.version, one.parent_version
    newest = max((v.version.version for v in versions), default=0)
    return newest + 1, newest or None


async def _trained(settings: Settings) -> list[TrainedVersion]:
    async with connect_pool(settings.need_postgres()) as pool, pool.acquire() as connection:
        return await trained_versions(connection)


async def _write(settings: Settings, data: bytes, sha256: str, messages: list[OonaMessage]) -> None:
    """The weights first: a version in the log has its blob."""
    async with BlobStore(settings.need_s3()) as blobs:
        if await blobs.put(data, kind=BlobKind.POLICY) != sha256:
            raise ContractError("the folder changed meanwhile: publish it again")
    async with OonaProducer(settings.need_kafka(), client_id="esper-tamiyo") as producer:
        for message in messages:  # one by one: an evaluation never stands before its training
            await producer.send(message)
