"""A proxy that delays: every byte arrives half a round trip later, and a new connection waits for one round trip.

Nothing is lost or slowed down otherwise.

python -m tests.bench.delay PORT HOST:PORT ROUND_TRIP_SECONDS
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

import uvloop

READ_BYTES = 256 * 1024
# The buffer of one direction of one connection, in reads: more than half a round trip brings on loopback.
MOST_HELD = 64


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_seconds: float) -> None:
    """Pass on all bytes after the delay, and then the end."""
    loop = asyncio.get_running_loop()
    held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MOST_HELD)

    async def send() -> None:
        while True:
            due, part = await held.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not part:
                break
            writer.write(part)
            await writer.drain()

    async with asyncio.TaskGroup() as both:
        both.create_task(send())
        while part := await reader.read(READ_BYTES):
            await held.put((loop.time() + delay_seconds, part))
        await held.put((loop.time() + delay_seconds, b""))
    writer.close()


async def serve(port: int, behind: str, round_trip_seconds: float) -> None:
    host, _, behind_port = behind.partition(":")

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ExceptionGroup):
            await asyncio.sleep(round_trip_seconds)
            onward, back = await asyncio.open_connection(host, int(behind_port), limit=READ_BYTES)
            half = round_trip_seconds / 2
            await asyncio.gather(_pass_on(reader, back, half), _pass_on(onward, writer, half))

    server = await asyncio.start_server(join, "127.0.0.1", port, limit=READ_BYTES)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.install()
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2], float(sys.argv[3])))
