"""A small TCP proxy that cuts, slows, half-closes and stalls its connections on demand."""

import asyncio
import contextlib
from typing import Any

from support.proxies.threaded_proxy import ThreadedProxy

CHUNK = 64 * 1024


class FaultProxy(ThreadedProxy):
    """A TCP proxy in a thread. All methods are thread-safe."""

    def __init__(self, port: int, target_port: int) -> None:
        super().__init__(port)
        self._target_port = target_port
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._bytes_per_s: float | None = None

    def cut(self) -> None:
        """Reset every connection."""
        self._run(self._cut())

    def stall(self) -> None:
        """Keep connections open and forward nothing, as in a network partition."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def slow(self, bytes_per_s: float) -> None:
        """Limit the rate in each direction of each connection."""
        self._bytes_per_s = bytes_per_s

    def half_close(self) -> None:
        """Close the direction from the broker to clients; clients may still send."""
        self._run(self._half_close())

    def heal(self) -> None:
        """Remove all faults. Half-closed connections stay half-closed until their client closes them."""
        self._bytes_per_s = None
        self._loop.call_soon_threadsafe(self._open.set)

    async def _begin(self) -> None:
        self._open.set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def _end(self) -> None:
        self._server.close()
        await self._cut()
        for pump in list(self._pumps):
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _accept(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            broker_reader, broker = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            client.transport.abort()
            return
        pair = (client, broker)
        self._pairs.add(pair)
        for source, sink in ((client_reader, broker), (broker_reader, client)):
            pump = self._loop.create_task(self._pump(source, sink, pair))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, pair: tuple[Any, Any]) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(CHUNK):
                await self._open.wait()
                if self._bytes_per_s:
                    await asyncio.sleep(len(data) / self._bytes_per_s)
                sink.write(data)
                await sink.drain()
        self._drop(pair)

    def _drop(self, pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter]) -> None:
        self._pairs.discard(pair)
        for writer in pair:
            writer.transport.abort()

    async def _cut(self) -> None:
        for pair in list(self._pairs):
            self._drop(pair)

    async def _half_close(self) -> None:
        for client, _broker in self._pairs:
            with contextlib.suppress(OSError, RuntimeError):
                client.write_eof()
