"""A source that delays its answers: small PNGs after a given time, over kept connections.

python -m tests.bench.late PORT SECONDS
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import zlib

import uvloop

PICTURE_BYTES = 20_000


def png(size: int, seed: int) -> bytes:
    """A valid grey PNG of about `size` bytes: noise in stored blocks, as large decoded as encoded."""
    width = math.isqrt(size)  # a narrow one of 100 MB is correctly refused
    height = max(1, size // (width + 1))
    noise = os.urandom(width)
    rows = b"".join(b"\0" + noise[shift % width :] + noise[: shift % width] for shift in range(seed, seed + height))

    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 0)) + chunk(b"IEND", b"")


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
