"""KernelFetcher: gets the kernels of commands through the model's cache, and prefetches predicted ones from S3.

Owns the downloads and their order; the cache owns what is kept. Runs in the connection's event loop. Invariant: a
prefetch never delays a command: it starts when no command needs a kernel, and is cancelled when a command needs
another one.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
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

MAX_PARALLEL_FETCHES = 4  # each may hold a kernel of 256 MiB in memory, in addition to the cache
MAX_PREDICTED = 64  # kernels that wait to be prefetched; further ones are predicted again later

FetchResult = tuple[LoadedKernel | None, tuple[RejectionReason, str] | None]
"""A command's kernel, or the reason why it is unusable; neither for a command that needs no kernel."""

_log = get_logger(__name__)


class KernelFetcher:
    """Fetches kernels. An async context manager, which loads the access history and saves it again.

    Args:
        blobs: None where no S3 is configured: every fetch then fails.
        access_history: the file with the requests of earlier runs with the same layer shapes.
    """

    def __init__(self, cache: KernelCache, blobs: BlobStore | None, access_history: Path) -> None:
        self._cache = cache
        self._blobs = blobs
        self._access_history = access_history
        self._slots = asyncio.Semaphore(MAX_PARALLEL_FETCHES)
        self._verifier = ThreadPoolExecutor(1, "esper-kernels")  # hashing must not block the event loop
        self._predicted: asyncio.Queue[str] = asyncio.Queue(MAX_PREDICTED)
        self._num_waiting = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._prefetching: tuple[str, asyncio.Task[None]] | None = None

    async def __aenter__(self) -> Self:
        load_access_history(self._cache, self._access_history)
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._verifier.shutdown(wait=False, cancel_futures=True)
        save_access_history(self._cache, self._access_history)
        _log.info("kernel_cache.closed", **asdict(self._cache.stats))

    async def fetch_for(self, command: SeedCommand) -> FetchResult:
        """The kernel of a command. Raises only CancelledError: a failed fetch rejects the command."""
        if not isinstance(command, GerminateSeed):
            return None, None
        key, limit = command.kernel_sha256, min(command.kernel_size_bytes, MAX_KERNEL_BYTES)
        with self._pause_prefetching(key):
            try:
                kernel = await self._get(key, limit)
            except KernelError as error:
                return None, (RejectionReason.KERNEL_INVALID, str(error))
            except Exception as error:  # any failure must reject the command, or it would wait without limit
                return None, (RejectionReason.KERNEL_UNAVAILABLE, str(error) or type(error).__name__)
            self._predict(after=key)
            return kernel, None

    async def keep_prefetching(self) -> None:
        """Prefetch predicted kernels, one at a time, while no command waits for a kernel. Runs until cancelled."""
        self._predict(after=None)
        while True:
            key = await self._predicted.get()
            await self._is_idle.wait()
            task = asyncio.create_task(self._prefetch(key), name="link-prefetch")
            self._prefetching = key, task
            try:
                await asyncio.wait({task})
            finally:
                self._prefetching = None
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            if task.cancelled() and not self._predicted.full():  # a command cancelled it
                self._predicted.put_nowait(key)

    @contextmanager
    def _pause_prefetching(self, key: str) -> Iterator[None]:
        self._num_waiting += 1
        self._is_idle.clear()
        if self._prefetching is not None and self._prefetching[0] != key:
            self._prefetching[1].cancel()
        try:
            yield
        finally:
            self._num_waiting -= 1
            if not self._num_waiting:
                self._is_idle.set()

    async def _get(self, key: str, max_bytes: int) -> LoadedKernel:
        kernel, has_waited = self._cache.get(key), False
        while kernel is None:
            claim = self._cache.claim(key)
            if not claim.leads:
                try:
                    kernel = await asyncio.wrap_future(claim.future)
                except UnavailableError:
                    if has_waited:  # that fetch started after this command arrived, and used its full deadline
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
        except Exception as error:  # the claim passes the error to a command that waits
            _log.info("kernel.prefetch_failed", kernel=key[:12], error=str(error) or type(error).__name__)

    async def _fetch(self, key: str, max_bytes: int) -> LoadedKernel:
        if self._blobs is None:
            raise UnavailableError("no S3 is configured: set ESPER_S3__ENDPOINT_URL")
        async with self._slots:
            data = await self._blobs.get(key, max_bytes=max_bytes)
            verify = asyncio.get_running_loop().run_in_executor
            return await verify(self._verifier, lambda: load_kernel(data, key, max_bytes=max_bytes))

    def _predict(self, *, after: str | None) -> None:
        if self._blobs is None:
            return
        for key in self._cache.predictions(after):
            if not self._predicted.full():
                self._predicted.put_nowait(key)
