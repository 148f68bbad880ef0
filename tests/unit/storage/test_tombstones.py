"""Storing and collecting the same blob in any order of requests: a blob that was stored remains."""

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.config import S3Settings
from esper.storage import blobs as blobs_module
from esper.storage.blob_keys import BlobKind, StoredBlob, key_of
from esper.storage.blobs import BlobStore
from esper.storage.garbage_collection import Collected, collect
from esper.storage.tombstones import SUFFIX, TOMBSTONE_TTL_S

S3 = S3Settings.model_validate({"endpoint_url": "http://127.0.0.1:1", "access_key": "a", "secret_key": "b"})
NOW = datetime(2026, 1, 2, tzinfo=UTC)
DATA = b"what is stored"


class OneAtATime:
    """S3 in memory: each request waits for its turn in the schedule, then happens atomically."""

    def __init__(self, choices: list[int]) -> None:
        self.objects: dict[str, tuple[bytes, datetime]] = {}
        self.waiting: list[asyncio.Future[None]] = []
        self.now = NOW
        self._choices = choices

    async def run(self, *works: Any) -> list[Any]:
        tasks = [asyncio.create_task(w) for w in works]
        while not all(t.done() for t in tasks):
            for _turn in range(30):  # every task runs until it waits for S3
                await asyncio.sleep(0)
            if self.waiting:
                choice = self._choices.pop() if self._choices else 0
                self.waiting.pop(choice % len(self.waiting)).set_result(None)
            else:
                await asyncio.sleep(0)
        return [t.result() for t in tasks]

    async def answer(self, method: str, options: dict[str, Any]) -> Any:
        gate = asyncio.get_running_loop().create_future()
        self.waiting.append(gate)
        await gate
        key, meta = options.get("Key", ""), {"HTTPHeaders": {"date": format_datetime(self.now, usegmt=True)}}
        match method:
            case "put_object":
                body = options["Body"]
                self.objects[key] = (body if isinstance(body, bytes) else body.read(), self.now)
            case "delete_object":
                self.objects.pop(key, None)
            case "list_objects_v2":
                found = [(k, v) for k, v in sorted(self.objects.items()) if k.startswith(options["Prefix"])]
                rows = [{"Key": k, "Size": len(data), "LastModified": at} for k, (data, at) in found]
                return {"ResponseMetadata": meta, "Contents": rows}
        return {"ResponseMetadata": meta}


def store(s3: OneAtATime) -> BlobStore:
    made = BlobStore(S3)
    made.client.send = s3.answer  # type: ignore[method-assign]
    return made


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(work: Any, *arguments: Any) -> Any:
        return work(*arguments)

    monkeypatch.setattr(blobs_module, "TOMBSTONE_POLL_S", 0.0)
    monkeypatch.setattr(asyncio, "to_thread", at_once)


def old_blob(s3: OneAtATime, digest: str) -> StoredBlob:
    at = NOW - timedelta(days=30)
    s3.objects[key_of(BlobKind.KERNEL, digest)] = (DATA, at)
    return StoredBlob(BlobKind.KERNEL, digest, len(DATA), at)


DIGEST = blobs_module.hashlib.sha256(DATA).hexdigest()


@settings(max_examples=120, deadline=None)
@given(choices=st.lists(st.integers(0, 3), max_size=40), num_storers=st.integers(1, 3))
def test_put_survives_any_order_of_a_collector(choices: list[int], num_storers: int) -> None:
    async def scenario() -> None:
        s3 = OneAtATime(choices)
        blob, older_than = old_blob(s3, DIGEST), NOW - timedelta(days=7)
        storers = [store(s3).put(DATA) for _n in range(num_storers)]
        done, *digests = await s3.run(collect(store(s3), [blob], older_than), *storers)
        assert digests == [DIGEST] * num_storers
        assert s3.objects.keys() == {key_of(BlobKind.KERNEL, DIGEST)}
        assert len(done.deleted) + len(done.revived) == 1

    asyncio.run(scenario())


@settings(max_examples=25, deadline=None)
@given(choices=st.lists(st.integers(0, 3), max_size=20))
def test_collect_deletes_a_blob_once(choices: list[int]) -> None:
    async def scenario() -> None:
        s3 = OneAtATime(choices)
        blob, older_than = old_blob(s3, DIGEST), NOW - timedelta(days=7)
        first, second = await s3.run(*(collect(store(s3), [blob], older_than) for _n in range(2)))
        assert not s3.objects
        assert isinstance(first, Collected)
        assert isinstance(second, Collected)

    asyncio.run(scenario())


def test_put_ignores_an_expired_tombstone() -> None:
    async def scenario() -> None:
        s3 = OneAtATime([])
        s3.objects[key_of(BlobKind.KERNEL, DIGEST) + SUFFIX] = (b"", NOW - timedelta(seconds=TOMBSTONE_TTL_S + 1))
        assert await s3.run(store(s3).put(DATA)) == [DIGEST]

    asyncio.run(scenario())
