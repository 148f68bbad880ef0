"""The life of a policy on a real stack: experiences, a fit, publication, activation, decisions."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from support.conditions import wait_until_async
from support.data.random_experiences import experiences, stored
from support.data.rebuild_runs import esper
from support.events.run_messages import read_run_messages
from support.events.tamiyo_run_events import boundary_reached, epoch_completed, run_started
from support.processes.esper_processes import WORKER, process, running

from esper.config import Settings
from esper.embedded.stack import EmbeddedStack
from esper.oona.producer import OonaProducer
from esper.schemas import events
from esper.schemas.topics import DECISIONS
from esper.services.tamiyo.dataset.experience_files import write_experiences
from esper.services.tamiyo.dataset.experiences import Experiences
from esper.services.tamiyo.decision_service import DecisionService
from esper.services.tamiyo.settings import RentSettings, TamiyoSettings
from esper.storage.blob_keys import BlobKind
from esper.storage.blobs import BlobStore
from esper.streams.database.connections import connect_pool
from esper.streams.read_models.policy_versions import trained_versions

pytestmark = pytest.mark.slow
QUICK = {"WIDTH": 8, "NUM_BATCHES": 6, "BATCH_SIZE": 32, "EVAL_EVERY": 3}
DECISIONS_READ = f"{DECISIONS.name}[0]"


@pytest.mark.timeout(300)
async def test_fitted_policy_is_published_activated_and_decides(
    mine: Settings, log: EmbeddedStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in QUICK.items():
        monkeypatch.setenv(f"ESPER_TAMIYO__TRAINING__{name}", str(value))
    seen, into = tmp_path / "seen", tmp_path / "policy"
    manifest: dict[str, Any] = {
        "patterns": [], "begins": {DECISIONS_READ: 0}, "ends": {DECISIONS_READ: 300}, "lost": {}, "measured": {},
        "rent": RentSettings.model_validate({}).model_dump(),
    }  # fmt: skip
    write_experiences(seen, Experiences(stored(e) for e in experiences(range(24))), manifest)
    code, printed = await esper(mine, "tamiyo", "retrain", "--experiences", str(seen), "--into", str(into), "--quiet")
    assert code == 0, printed
    sha256 = json.loads((into / "card.json").read_text())["policy_sha256"]

    dsn = mine.need_postgres().dsn.get_secret_value()
    worker = process(log, tmp_path, "worker", *WORKER, ESPER_POSTGRES__DSN=dsn)
    with running(worker, "worker.ready"):
        code, printed = await esper(mine, "tamiyo", "publish", str(into), "--reason", "a first try")
        assert (code, "gnn v1" in printed) == (0, True), printed

        async def versions() -> list[Any]:
            async with connect_pool(mine.need_postgres()) as pool, pool.acquire() as connection:
                return await trained_versions(connection)

        (version,) = await wait_until_async(versions, 40, "the training's row")
        assert version.version.weights is not None
        assert version.version.weights.sha256 == sha256
        assert [(d["topic"], d["until_offset"]) for d in version.data] == [(DECISIONS.name, 300)]
        code, printed = await esper(mine, "tamiyo", "publish", str(into))
        assert (code, "gnn v1" in printed) == (0, True), "twice is one version"
        async with BlobStore(mine.need_s3()) as blobs:
            assert (
                await blobs.get(sha256, max_bytes=10**7, kind=BlobKind.POLICY)
                == (into / "policy.safetensors").read_bytes()
            )
        code, printed = await esper(mine, "tamiyo", "activate", "gnn", "1", "--reason", "trust me")
        assert (code, "--force activates it anyway" in printed) == (1, True), printed
        code, printed = await esper(mine, "tamiyo", "activate", "gnn", "1", "--reason", "a trial", "--force")
        assert code == 0, printed

        second = tmp_path / "second"
        again = ("--experiences", str(seen), "--into", str(second), "--seed", "1", "--active", "--quiet")
        code, printed = await esper(mine, "tamiyo", "retrain", *again)
        assert code == 0, printed
        assert "gnn v1" in {v["than"] for v in json.loads((second / "card.json").read_text())["verdicts"]}
        code, printed = await esper(mine, "tamiyo", "publish", str(second))
        assert (code, "gnn v2" in printed, "than gnn v1" in printed) == (0, True, True), printed

        run_id = "decided-by-the-network"
        async with OonaProducer(mine.need_kafka()) as producer:
            await producer.send_batch([run_started(run_id), epoch_completed(run_id, 1), boundary_reached(run_id, 2, 1)])
        tamiyo = TamiyoSettings.model_validate({"policy": "active"})
        async with DecisionService(mine, tamiyo) as service:
            deciding = asyncio.create_task(service.run())

            async def decisions() -> list[Any]:
                return [m.data for m in await read_run_messages(log, run_id, DECISIONS)]

            (decision, *_more) = await wait_until_async(decisions, 60, "the decision")
            deciding.cancel()
    assert (decision.policy_id, decision.policy_version, decision.stale) == ("gnn", 1, False)
    assert "val_accuracy" in decision.reason
    code, printed = await esper(mine, "projections", "verify", "--quiet")
    assert code == 0, printed
    assert isinstance(decision, events.DecisionMade)
