"""Base of the fault proxies: an event loop in a thread, started and ended with a context manager."""

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any, Self


class ThreadedProxy(ABC):
    """Context manager around a proxy that runs in a thread. Subclasses implement ``_begin`` and ``_end``."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._begin())
        return self

    def __exit__(self, *_error: object) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    @abstractmethod
    async def _begin(self) -> None:
        """Start to serve."""

    @abstractmethod
    async def _end(self) -> None:
        """Close every connection."""
