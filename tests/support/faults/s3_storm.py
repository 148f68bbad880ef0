"""Thousands of operations on blobs through a proxy that injects faults: no blob may be lost or torn.

Records the expected content of the bucket, and at the end compares it with what S3 has, read without the proxy. Sizes
are small, as those of kernels; one in a hundred is a file that is uploaded in parts.
"""

import asyncio
import hashlib
import random
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from support.data.storage_stats import StorageStats
from support.proxies.s3_proxy import S3FaultProxy

from esper.config import S3Settings
from esper.embedded.s3 import EmbeddedS3
from esper.errors import EsperError, MissingBlobError
from esper.storage.blob_inspection import collectable, stored_blobs
from esper.storage.blobs import MULTIPART_BYTES, BlobStore
from esper.storage.garbage_collection import collect
from esper.storage.tombstones import server_time

CONCURRENCY = 24
READ_TIMEOUT_S = 1.0  # a stalled request costs one second
DEADLINE_S = 60.0
MAX_BLOB_BYTES = 60_000
WEIGHTS = {"put": 40, "get": 38, "exists": 10, "absent": 5, "again": 6, "file": 0.5, "file download": 0.5}
SWEEPS_EVERY = 100  # operations; a sweep collects the unreferenced blobs
DOOMED_SHARE = 0.1  # of the blobs: never referenced again


@dataclass
class ExpectedBlobs:
    """Expected content of S3, and durations and failures of all operations."""

    kept: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    garbage: set[str] = field(default_factory=set)
    sweepable: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    unconfirmed: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    failures: list[str] = field(default_factory=list)


class S3Storm:
    """``num_operations`` random operations on ``s3`` through a proxy."""

    def __init__(self, s3: EmbeddedS3, proxy: S3FaultProxy, folder: Path, num_operations: int, seed: int) -> None:
        self.expected = ExpectedBlobs()
        self.stats = StorageStats()
        self._s3, self._proxy, self._folder = s3, proxy, folder
        self._num_operations = num_operations
        self._rng = random.Random(seed)
        self._num_begun = 0

    def settings(self, endpoint_url: str) -> S3Settings:
        fields = {"access_key": self._s3.access_key, "secret_key": self._s3.secret_key, "endpoint_url": endpoint_url}
        return S3Settings.model_validate({**fields, "read_timeout_s": READ_TIMEOUT_S, "deadline_s": DEADLINE_S})

    async def run(self) -> float:
        """Run all operations. Returns their duration in seconds."""
        began = time.monotonic()
        async with BlobStore(self.settings(self._proxy.endpoint_url), self.stats.add) as blobs:
            await asyncio.gather(*(self._keep_working(blobs) for _n in range(CONCURRENCY)))
        return time.monotonic() - began

    async def check(self) -> None:
        """Compare the bucket, read without the proxy, with its expected content."""
        expected = self.expected
        assert not expected.failures, expected.failures[:5]
        async with BlobStore(self.settings(self._s3.endpoint_url)) as blobs:
            stored = {digest for _kind, digest in await stored_blobs(blobs)}
            lost = [d for d in (*expected.kept, *expected.files) if d not in stored]
            assert not lost, f"{len(lost)} lost: {lost[:3]}"
            late = {path.rpartition("/")[2] for path in self._proxy.unanswered_puts}
            assert not expected.deleted & stored - late, "deleted, and still stored"
            assert not stored - {*expected.kept, *expected.files, *expected.garbage}, "never stored"
            for kind, digest in await stored_blobs(blobs):
                await blobs.check(digest, kind=kind)  # raises for a torn blob

    async def _keep_working(self, blobs: BlobStore) -> None:
        while self._num_begun < self._num_operations:
            self._num_begun += 1
            name = self._rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            if self._num_begun % SWEEPS_EVERY == 0:
                name = "sweep"
            began = time.monotonic()
            try:
                await self._work(blobs, name)
            except EsperError as error:
                self.expected.failures.append(f"{name}: {error!r}")
            self.expected.seconds[name].append(time.monotonic() - began)

    async def _work(self, blobs: BlobStore, name: str) -> None:
        expected, rng = self.expected, self._rng
        match name:
            case "get" | "again" | "exists" if expected.kept:
                digest = rng.choice(expected.kept)
                if name == "exists":
                    assert await blobs.exists(digest)
                    return
                data = await blobs.get(digest, max_bytes=MAX_BLOB_BYTES)
                assert hashlib.sha256(data).hexdigest() == digest
                if name == "again":
                    assert await blobs.put(data) == digest
            case "absent":
                unknown = hashlib.sha256(rng.randbytes(8)).hexdigest()
                assert not await blobs.exists(unknown)
                try:
                    await blobs.get(unknown, max_bytes=1)
                except MissingBlobError:
                    return
                raise AssertionError("S3 has a blob that was never stored")
            case "file":
                await self._put_file(blobs)
            case "file download" if expected.files:
                await self._get_file(blobs, rng.choice(expected.files))
            case "sweep":
                await self._sweep(blobs)
            case _:
                await self._put(blobs)

    async def _put(self, blobs: BlobStore) -> None:
        data = self._rng.randbytes(self._rng.randrange(MAX_BLOB_BYTES))
        digest = hashlib.sha256(data).hexdigest()
        if self._rng.random() < DOOMED_SHARE:
            self.expected.garbage.add(digest)
            await blobs.put(data)
            self.expected.sweepable.add(
                digest
            )  # only now, or a retry of the put would store it again after its collection
        else:
            assert await blobs.put(data) == digest
            self.expected.kept.append(digest)

    async def _put_file(self, blobs: BlobStore) -> None:
        path = self._folder / f"file-{self._num_begun}"
        path.write_bytes(self._rng.randbytes(MULTIPART_BYTES + self._rng.randrange(MULTIPART_BYTES // 4)))
        self.expected.files.append(await blobs.put_file(path))
        path.unlink()

    async def _get_file(self, blobs: BlobStore, digest: str) -> None:
        path = self._folder / f"back-{self._num_begun}"
        await blobs.get_file(digest, path, max_bytes=1 << 30)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
        path.unlink()

    async def _sweep(self, blobs: BlobStore) -> None:
        referenced = {*self.expected.kept, *self.expected.files}
        sweepable = set(self.expected.sweepable)
        stored = {n: b for n, b in (await stored_blobs(blobs)).items() if b.digest in sweepable}
        now = await server_time(blobs.client)
        old = collectable(stored, referenced, now + timedelta(days=1))
        done = await collect(blobs, old, now + timedelta(days=1))
        self.expected.deleted |= {b.digest for b in (*done.deleted, *done.missing)}
        self.expected.unconfirmed += len(done.unconfirmed)


def summary(storm: S3Storm, proxy: S3FaultProxy, seconds: float, seed: int) -> str:
    """Rates, faults and latencies as text."""
    times = storm.expected.seconds
    num, faults = sum(map(len, times.values())), sum(proxy.counts.values())
    retries = sum(storm.stats.retries.values())
    lines = [
        f"{num:,} operations, seed {seed}, in {seconds:.1f} s: {num / seconds:.0f}/s; {len(storm.expected.failures)} failed; "
        f"{faults:,} faults in {proxy.num_requests:,} requests, {retries:,} retries by Esper; "
        f"{len(storm.expected.deleted):,} collected, {storm.expected.unconfirmed} unconfirmed",
        "faults: " + ", ".join(f"{name} {count}" for name, count in sorted(proxy.counts.items())),
        f"{'ms':<12}{'count':>7}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}",
    ]
    for name, taken in sorted(times.items()):
        ms = sorted(1000 * t for t in taken)
        cuts = statistics.quantiles(ms, n=100) if len(ms) > 1 else [ms[0]] * 99
        lines.append(f"{name:<12}{len(ms):>7,}{cuts[49]:>9.1f}{cuts[94]:>9.1f}{cuts[98]:>9.1f}{ms[-1]:>9.1f}")
    return "\n".join(lines)
