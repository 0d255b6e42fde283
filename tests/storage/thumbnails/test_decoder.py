"""The process that decodes pictures: what it makes, its bounds in time and memory, and its end."""

from __future__ import annotations

import io
import os
import re
import signal
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import cast

import pytest
from PIL import Image

from storage.bucket.bucket import Bucket
from storage.rows.models import Asset
from storage.thumbnails import decode, decoder
from storage.thumbnails.decode import shrink
from storage.thumbnails.decoder import Decoder, NoThumbnail
from storage.thumbnails.thumbnails import Thumbnails
from tests.harness import wait_until


def picture(width: int = 900, height: int = 600, mode: str = "RGB", form: str = "PNG") -> bytes:
    target = io.BytesIO()
    Image.new(mode, (width, height)).save(target, form)
    return target.getvalue()


@pytest.mark.parametrize(
    ("mode", "form"), [("RGB", "PNG"), ("RGBA", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("L", "PNG")]
)
def test_thumbnails_are_small_webp(mode: str, form: str) -> None:
    with Image.open(io.BytesIO(shrink(picture(mode=mode, form=form)))) as small:
        assert (small.format, small.size) == ("WEBP", (480, 320))


def test_a_picture_of_too_many_pixels_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="900 x 600"):
        shrink(picture())
    with pytest.raises(OSError, match="identify"):
        shrink(b"<svg onload=alert(1)>")


def slow_jpeg(scans: int) -> bytes:
    """A progressive JPEG of 50 million pixels. Each refinement scan has some 90 bytes and takes 35 ms to decode."""

    def segment(marker: int, content: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content

    width = height = 880  # blocks of 8 x 8
    left, bits = width * height, ""
    head = [b"\xff\xd8", segment(0xDB, b"\0" + b"\x01" * 64)]
    head += [segment(0xC2, struct.pack(">BHHB", 8, height * 8, width * 8, 1) + bytes([1, 0x11, 0]))]
    head += [segment(0xC4, bytes([0, 1]) + bytes(16)), segment(0xC4, bytes([0x10, 1, 1]) + bytes(14) + b"\xe0\0")]
    head += [segment(0xDA, bytes([1, 1, 0, 0, 0, 0])), bytes((left + 7) // 8)]
    while left >= 16_384:
        run = min(left, 32_767)
        bits, left = f"{bits}0{run - 16_384:014b}", left - run
    bits += "1" * (-len(bits) % 8)
    coded = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    scan = segment(0xDA, bytes([1, 1, 0, 1, 63, 0x10])) + coded
    return b"".join(head) + scan * scans + b"\xff\xd9"


def test_a_picture_that_takes_too_long_is_given_up_and_the_next_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Decoder()
    with closing(one):
        one.shrink(picture())  # its process is kept
        monkeypatch.setattr(decoder, "DECODE_SECONDS", 2.0)
        started = time.monotonic()
        with pytest.raises(NoThumbnail):
            one.shrink(slow_jpeg(5_000))  # two minutes
        assert time.monotonic() - started < 3.9  # one try
        monkeypatch.setattr(decoder, "DECODE_SECONDS", 120.0)
        assert one.shrink(picture())[8:12] == b"WEBP"


def test_pictures_are_decoded_in_a_bounded_process_that_is_used_again() -> None:
    one = Decoder()
    with closing(one):
        for content in (picture(), b"<svg onload=alert(1)>", picture(), picture(7_000, 7_000, "P")):
            with suppress(NoThumbnail):
                one.shrink(content)
        assert one.process_id is not None
        limits = Path(f"/proc/{one.process_id}/limits").read_text()
        assert re.search(rf"Max address space +{decode.MAX_MEMORY_BYTES} ", limits)
        os.kill(one.process_id, signal.SIGKILL)
        assert one.shrink(picture())[8:12] == b"WEBP"


def test_half_of_an_answer_is_no_thumbnail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that the kernel ends while it answers."""
    program = tmp_path / "half.py"
    program.write_text("import os; os.read(0, 99); os.write(1, (9).to_bytes(8, 'big') + b'RIFF')")
    monkeypatch.setattr(decoder, "PROGRAM", program)
    with closing(Decoder()) as one, pytest.raises(NoThumbnail):
        one.shrink(b"picture")


class SlowBucket:
    def read_bytes(self, *_: object) -> bytes:
        return slow_jpeg(5_000)


def test_closing_ends_what_is_being_decoded(tmp_path: Path) -> None:
    asset = Asset(sha256="ab12", media_type="image/jpeg", key="slow.jpg", size=500_000)
    kept = Thumbnails(cast(Bucket, SlowBucket()), tmp_path, 20_000)
    with ThreadPoolExecutor(1) as reader:
        asked = reader.submit(kept.get, asset)
        wait_until(lambda: any(each.process_id for each in kept.decoders))
        started = time.monotonic()
        kept.close()
        assert asked.result(10) is None
        assert time.monotonic() - started < decoder.DECODE_SECONDS / 2
