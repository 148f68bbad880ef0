"""Operations on blobs by the thousand, through a network and an S3 that fail: none lost, none torn.

Every operation is written down before and after; at the end the bucket is read past the proxy and
compared with the book. Sizes are small as kernels are, and a hundredth are files that go in parts.
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

from support.proxies.s3_proxy import S3FaultProxy

from esper.config import S3Settings
from esper.embedded.s3 import EmbeddedS3
from esper.errors import EsperError, MissingBlobError
from esper.storage.blobs import MULTIPART_BYTES, BlobStore
from esper.storage.call_stats import StorageStats
from esper.storage.garbage_collection import collect
from esper.storage.inventory import collectable, stored_blobs
from esper.storage.tombstones import server_time

CONCURRENCY = 24
READ_TIMEOUT_S = 1.0  # so that a stall costs a second
DEADLINE_S = 60.0
MAX_BLOB_BYTES = 60_000
WEIGHTS = {"put": 40, "get": 38, "exists": 10, "absent": 5, "again": 6, "file": 0.5, "file back": 0.5}
SWEEPS_EVERY = 100  # operations; each sweep takes what was doomed since
DOOMED_SHARE = 0.1  # of what is put: never asked for again


@dataclass
class Book:
    """What S3 must have in the end, and how each operation went."""

    kept: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    doomed: set[str] = field(default_factory=set)
    sweepable: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    unsure: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    failures: list[str] = field(default_factory=list)


class S3Storm:
    """One storm of ``num_operations`` against ``s3``, through a proxy on a port of its own."""

    def __init__(self, s3: EmbeddedS3, proxy: S3FaultProxy, folder: Path, num_operations: int, seed: int) -> None:
        self.book = Book()
        self.stats = StorageStats()
        self._s3, self._proxy, self._folder = s3, proxy, folder
        self._num_operations = num_operations
        self._rng = random.Random(seed)
        self._num_begun = 0

    def settings(self, endpoint_url: str) -> S3Settings:
        fields = {"access_key": self._s3.access_key, "secret_key": self._s3.secret_key, "endpoint_url": endpoint_url}
        return S3Settings.model_validate({**fields, "read_timeout_s": READ_TIMEOUT_S, "deadline_s": DEADLINE_S})

    async def rage(self) -> float:
        """All operations; gives the seconds they took."""
        began = time.monotonic()
        async with BlobStore(self.settings(self._proxy.endpoint_url), self.stats.add) as blobs:
            await asyncio.gather(*(self._keep_working(blobs) for _n in range(CONCURRENCY)))
        return time.monotonic() - began

    async def check(self) -> None:
        """Read the bucket past the proxy, and compare it with the book."""
        book = self.book
        assert not book.failures, book.failures[:5]
        async with BlobStore(self.settings(self._s3.endpoint_url)) as blobs:
            stored = {digest for _kind, digest in await stored_blobs(blobs)}
            lost = [d for d in (*book.kept, *book.files) if d not in stored]
            assert not lost, f"{len(lost)} lost: {lost[:3]}"
            late = {path.rpartition("/")[2] for path in self._proxy.unanswered_puts}
            assert not book.deleted & stored - late, "deleted, and still there"
            assert not stored - {*book.kept, *book.files, *book.doomed}, "nobody stored these"
            for kind, digest in await stored_blobs(blobs):
                await blobs.check(digest, kind=kind)  # raises for one that is torn

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
                self.book.failures.append(f"{name}: {error!r}")
            self.book.seconds[name].append(time.monotonic() - began)

    async def _work(self, blobs: BlobStore, name: str) -> None:
        book, rng = self.book, self._rng
        match name:
            case "get" | "again" | "exists" if book.kept:
                digest = rng.choice(book.kept)
                if name == "exists":
                    assert await blobs.exists(digest)
                    return
                data = await blobs.get(digest, max_bytes=MAX_BLOB_BYTES)
                assert hashlib.sha256(data).hexdigest() == digest
                if name == "again":
                    assert await blobs.put(data) == digest
            case "absent":
                nobodys = hashlib.sha256(rng.randbytes(8)).hexdigest()
                assert not await blobs.exists(nobodys)
                try:
                    await blobs.get(nobodys, max_bytes=1)
                except MissingBlobError:
                    return
                raise AssertionError("S3 has what nobody stored")
            case "file":
                await self._put_file(blobs)
            case "file back" if book.files:
                await self._get_file(blobs, rng.choice(book.files))
            case "sweep":
                await self._sweep(blobs)
            case _:
                await self._put(blobs)

    async def _put(self, blobs: BlobStore) -> None:
        data = self._rng.randbytes(self._rng.randrange(MAX_BLOB_BYTES))
        digest = hashlib.sha256(data).hexdigest()
        if self._rng.random() < DOOMED_SHARE:
            self.book.doomed.add(digest)
            await blobs.put(data)
            self.book.sweepable.add(digest)  # before, and a retry of the put would bring it back
        else:
            assert await blobs.put(data) == digest
            self.book.kept.append(digest)

    async def _put_file(self, blobs: BlobStore) -> None:
        path = self._folder / f"file-{self._num_begun}"
        path.write_bytes(self._rng.randbytes(MULTIPART_BYTES + self._rng.randrange(MULTIPART_BYTES // 4)))
        self.book.files.append(await blobs.put_file(path))
        path.unlink()

    async def _get_file(self, blobs: BlobStore, digest: str) -> None:
        path = self._folder / f"back-{self._num_begun}"
        await blobs.get_file(digest, path, max_bytes=1 << 30)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
        path.unlink()

    async def _sweep(self, blobs: BlobStore) -> None:
        referenced = {*self.book.kept, *self.book.files}
        sweepable = set(self.book.sweepable)
        stored = {n: b for n, b in (await stored_blobs(blobs)).items() if b.digest in sweepable}
        now = await server_time(blobs.client)
        old = collectable(stored, referenced, now + timedelta(days=1))
        done = await collect(blobs, old, now + timedelta(days=1))
        self.book.deleted |= {b.digest for b in (*done.deleted, *done.gone)}
        self.book.unsure += len(done.unsure)


def told(storm: S3Storm, proxy: S3FaultProxy, seconds: float, seed: int) -> str:
    """The figures of a storm, as text."""
    times = storm.book.seconds
    num, faults = sum(map(len, times.values())), sum(proxy.counts.values())
    retries = sum(storm.stats.retries.values())
    lines = [
        f"{num:,} operations, seed {seed}, in {seconds:.1f} s: {num / seconds:.0f}/s; {len(storm.book.failures)} failed; "
        f"{faults:,} faults in {proxy.num_requests:,} requests, {retries:,} retries of ours; "
        f"{len(storm.book.deleted):,} collected, {storm.book.unsure} unsure",
        "faults: " + ", ".join(f"{name} {count}" for name, count in sorted(proxy.counts.items())),
        f"{'ms':<12}{'count':>7}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}",
    ]
    for name, taken in sorted(times.items()):
        ms = sorted(1000 * t for t in taken)
        cuts = statistics.quantiles(ms, n=100) if len(ms) > 1 else [ms[0]] * 99
        lines.append(f"{name:<12}{len(ms):>7,}{cuts[49]:>9.1f}{cuts[94]:>9.1f}{cuts[98]:>9.1f}{ms[-1]:>9.1f}")
    return "\n".join(lines)
