"""A TCP proxy whose connections can hang or be cut, as those of a network."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self


class Wire:
    """A proxy for the address `target`, as long as the block runs."""

    def __init__(self, target: str) -> None:
        self.connections = 0  # accepted so far
        self._target = target
        self._flows = asyncio.Event()
        self._flows.set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self.cut()

    def fall_silent(self) -> None:
        """Stops forwarding without closing a connection, as when a cable is unplugged."""
        self._flows.clear()

    def cut(self) -> None:
        """Aborts all connections; new ones reach the target again."""
        for writer in self._writers:
            writer.transport.abort()
        self._flows.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        host, port = self._target.split(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        both = {writer, far_writer}
        self._writers |= both
        try:
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            self._writers -= both

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()
