"""The process that decodes pictures, and `shrink`, which it calls. It imports nothing of ours, and Pillow alone.

Standard input: one picture after another, each behind its length in 8 bytes. Standard output: a WebP behind its length
for each, or the length 0. It ends with its input, or after a minute without any.
"""

from __future__ import annotations

import io
import os
import resource
import select
from contextlib import suppress

SIDE_PIXELS = 480
QUALITY = 78
# So many take 410 MB as an RGBA PNG and 790 MB as WebP.
MAX_PIXELS = 50_000_000
MAX_MEMORY_BYTES = 2**30
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF")
IDLE_SECONDS = 60.0
LOW_PRIORITY = 10  # callbacks and pages come first
LENGTH_BYTES = 8


def shrink(content: bytes) -> bytes:
    """A WebP of at most 480 pixels a side. Raises ValueError for too many pixels, OSError and others for no picture."""
    from PIL import Image  # not in the web server, which reads constants here

    with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels are too many")
        picture.draft("RGB", (SIDE_PIXELS * 2, SIDE_PIXELS * 2))  # for JPEG: decodes at a smaller size
        has_alpha = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
        mode = "RGBA" if has_alpha else "RGB"
        small = picture if picture.mode == mode else picture.convert(mode)
        small.thumbnail((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.LANCZOS)
        target = io.BytesIO()
        small.save(target, "WEBP", quality=QUALITY, method=2)
    return target.getvalue()


def main() -> None:
    with suppress(OSError):
        os.nice(LOW_PRIORITY)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # where memory runs out the kernel ends this process first
    with suppress(OSError, ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    source, target = open(0, "rb", buffering=0), open(1, "wb")  # noqa: SIM115 - for the process's life
    while select.select([source], [], [], IDLE_SECONDS)[0]:
        if not (content := _next(source)):
            return
        try:
            small = shrink(content)
        except Exception:  # noqa: BLE001 - whatever Pillow raises: there is no picture
            small = b""
        target.write(len(small).to_bytes(LENGTH_BYTES, "big") + small)
        target.flush()
        del content, small


def _next(source: io.FileIO) -> bytes:
    """The next picture; empty at the end."""
    return _exactly(source, int.from_bytes(_exactly(source, LENGTH_BYTES), "big"))


def _exactly(source: io.FileIO, count: int) -> bytes:
    content = bytearray()
    while len(content) < count and (block := source.read(min(count - len(content), 2**20))):
        content += block
    return bytes(content) if len(content) == count else b""


if __name__ == "__main__":
    main()
