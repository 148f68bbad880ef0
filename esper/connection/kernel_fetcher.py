"""Kernels for the link: commands get theirs through the model's cache, predicted ones come early.

Owns the fetching from S3 and the order of it; the cache owns what is kept. Belongs to the link's
event loop. Invariant: a prefetch never makes a command wait: it begins when no command wants a
kernel, and gives way to the first one that wants another.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from esper.connection.checkpoints.access_history import load_access_history, save_access_history
from esper.errors import KernelError, UnavailableError
from esper.kasmina.cache import KernelCache
from esper.kasmina.catalogue import MAX_KERNEL_BYTES
from esper.kasmina.kernels import LoadedKernel, load_kernel
from esper.logging import get_logger
from esper.schemas.enums import RejectionReason
from esper.schemas.events import GerminateSeed, SeedCommand
from esper.storage.blobs import BlobStore

MAX_PARALLEL_FETCHES = 4  # more would hold as many kernels of 256 MiB in memory, whatever the cache may
MAX_EXPECTED = 64  # predicted kernels that wait to be fetched; further ones are predicted again later

Answer = tuple[LoadedKernel | None, tuple[RejectionReason, str] | None]
"""A command's kernel, or what was wrong with it; neither for a command that needs none."""

_log = get_logger(__name__)


class KernelFetcher:
    """Async context manager. ``habits``: the file of what earlier runs of this shape of model asked for."""

    def __init__(self, cache: KernelCache, blobs: BlobStore | None, access_history: Path) -> None:
        self._cache = cache
        self._blobs = blobs
        self._habits = access_history
        self._slots = asyncio.Semaphore(MAX_PARALLEL_FETCHES)
        self._verifier = ThreadPoolExecutor(1, "esper-kernels")  # hashing must not hold the loop up
        self._expected: asyncio.Queue[str] = asyncio.Queue(MAX_EXPECTED)
        self._num_answering = 0
        self._is_quiet = asyncio.Event()
        self._is_quiet.set()
        self._early: tuple[str, asyncio.Task[None]] | None = None

    async def __aenter__(self) -> Self:
        load_access_history(self._cache, self._habits)
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self._verifier.shutdown(wait=False, cancel_futures=True)
        save_access_history(self._cache, self._habits)
        _log.info("kernel_cache.closed", **asdict(self._cache.stats))

    async def answer(self, command: SeedCommand) -> Answer:
        """What a command needs. Never raises but where it is cancelled: every command is answered."""
        if not isinstance(command, GerminateSeed):
            return None, None
        key, limit = command.kernel_sha256, min(command.kernel_size_bytes, MAX_KERNEL_BYTES)
        with self._commands_first(key):
            try:
                kernel = await self._get(key, limit)
            except KernelError as error:
                return None, (RejectionReason.KERNEL_INVALID, str(error))
            except Exception as error:  # whatever it was: the command is answered
                return None, (RejectionReason.KERNEL_UNAVAILABLE, str(error) or type(error).__name__)
            self._expect(after=key)
            return kernel, None

    async def keep_prefetching(self) -> None:
        """Fetch what is predicted, one at a time, while no command is being answered. Never ends."""
        self._expect(after=None)
        while True:
            key = await self._expected.get()
            await self._is_quiet.wait()
            task = asyncio.create_task(self._prefetch(key), name="link-prefetch")
            self._early = key, task
            try:
                await asyncio.wait({task})
            finally:
                self._early = None
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            if task.cancelled() and not self._expected.full():  # it gave way to a command
                self._expected.put_nowait(key)

    @contextmanager
    def _commands_first(self, key: str) -> Iterator[None]:
        self._num_answering += 1
        self._is_quiet.clear()
        if self._early is not None and self._early[0] != key:
            self._early[1].cancel()
        try:
            yield
        finally:
            self._num_answering -= 1
            if not self._num_answering:
                self._is_quiet.set()

    async def _get(self, key: str, max_bytes: int) -> LoadedKernel:
        kernel, has_waited = self._cache.get(key), False
        while kernel is None:
            claim = self._cache.claim(key)
            if not claim.leads:
                try:
                    kernel = await asyncio.wrap_future(claim.future)
                except UnavailableError:
                    if has_waited:  # that fetch began after this command came: it had the whole time
                        raise
                    has_waited = True
                continue
            with claim:
                kernel = await self._fetch(key, max_bytes)
                claim.deliver(kernel)
        return kernel

    async def _prefetch(self, key: str) -> None:
        claim = self._cache.claim(key, is_prefetch=True)
        if not claim.leads:
            return
        try:
            with claim:
                claim.deliver(await self._fetch(key, MAX_KERNEL_BYTES))
        except Exception as error:  # a command that waits for it hears of it through the claim
            _log.info("kernel.prefetch_failed", kernel=key[:12], error=str(error) or type(error).__name__)

    async def _fetch(self, key: str, max_bytes: int) -> LoadedKernel:
        if self._blobs is None:
            raise UnavailableError("no S3 is named: set ESPER_S3__ENDPOINT_URL")
        async with self._slots:
            data = await self._blobs.get(key, max_bytes=max_bytes)
            verify = asyncio.get_running_loop().run_in_executor
            return await verify(self._verifier, lambda: load_kernel(data, key, max_bytes=max_bytes))

    def _expect(self, *, after: str | None) -> None:
        if self._blobs is None:
            return
        for key in self._cache.predictions(after):
            if not self._expected.full():
                self._expected.put_nowait(key)
