"""A source that thinks before it answers: small PNGs after a given time, over kept connections.

python -m tests.bench.late PORT SECONDS
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

from tests.bench.pictures import png

PICTURE_BYTES = 20_000


async def serve(port: int, delay_seconds: float) -> None:
    body = png(PICTURE_BYTES, 1)
    answer = f"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    async def answer_each(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(delay_seconds)
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer_each, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.install()
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2])))
