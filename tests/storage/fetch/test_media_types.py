"""Type and structure of files: real files of every format, and a table of hostile ones."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from storage.errors import AssetDamaged, NotAnAsset
from storage.fetch import jpeg, media_types, structure
from storage.fetch.media_types import Media

PNG_START = b"\x89PNG\r\n\x1a\n"


def picture(kind: str, *, frames: int = 1, **options) -> bytes:
    """A real file by Pillow: 60 × 40 pixels of noise, which hardly compresses."""
    noise = random.Random(frames)
    images = [Image.frombytes("RGB", (60, 40), noise.randbytes(60 * 40 * 3)) for _ in range(frames)]
    file = io.BytesIO()
    several = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    images[0].save(file, kind, **several, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, width: int = 2, height: int = 2, colour: int = 2) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return PNG_START + header + b"".join(chunks or (chunk(b"IDAT", b"data"), chunk(b"IEND")))


def box(kind: bytes, *content: bytes) -> bytes:
    data = b"".join(content)
    return struct.pack(">I", len(data) + 8) + kind + data


def riff(form: bytes, *chunks: bytes) -> bytes:
    data = form + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(data)) + data


def riff_chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) & 1)


def shortened(data: bytes) -> bytes:
    """A RIFF file that declares 8 bytes less than it has."""
    return data[:4] + struct.pack("<I", struct.unpack("<I", data[4:8])[0] - 8) + data[8:]


TRACK = box(b"trak", box(b"tkhd", b"\0" * 76, struct.pack(">II", 1280 << 16, 720 << 16)))
ISPE = box(b"meta", b"\0" * 4, box(b"iprp", box(b"ipco", box(b"ispe", struct.pack(">III", 0, 640, 480)))))
MP4 = box(b"ftyp", b"isom\0\0\2\0isommp42") + box(b"moov", TRACK) + box(b"mdat", b"film" * 50)
MOV = box(b"ftyp", b"qt  \0\0\2\0qt  ") + box(b"wide") + box(b"mdat", b"film" * 50) + box(b"moov", TRACK)
HEIC = box(b"ftyp", b"heic\0\0\0\0mif1heic") + ISPE + box(b"mdat", b"still" * 20)
WEBM = bytes.fromhex("1a45dfa3 87 4282 84") + b"webm" + bytes.fromhex("18538067 8b 1549a966 80 1f43b675 81 00")
MP3_FRAME = bytes.fromhex("fffb9064") + b"\0" * 413
MP3 = b"ID3\x04\0\0\0\0\0\x0a" + b"\0" * 10 + MP3_FRAME * 3
UNKNOWN = b"\x01" + b"\xff" * 7  # a length that a live stream leaves open
BLOCK = b"\xa3\x83abc"
LIVE_WEBM = WEBM[:12] + b"\x18\x53\x80\x67" + UNKNOWN + (b"\x1f\x43\xb6\x75" + UNKNOWN + BLOCK * 3) * 2
WAV = riff(b"WAVE", riff_chunk(b"fmt ", b"\1\0\1\0" + b"\0" * 12), riff_chunk(b"data", b"sound" * 9))

WHOLE: dict[str, tuple[bytes, str, str]] = {
    "png": (picture("PNG"), "image/png", "png"),
    "apng": (picture("PNG", frames=4), "image/png", "png"),
    "jpeg": (picture("JPEG"), "image/jpeg", "jpg"),
    "jpeg progressive": (picture("JPEG", progressive=True), "image/jpeg", "jpg"),
    "jpeg restarts": (picture("JPEG", restart_marker_blocks=2, comment=b"\xff\xd9"), "image/jpeg", "jpg"),
    "webp": (picture("WEBP"), "image/webp", "webp"),
    "webp lossless": (picture("WEBP", lossless=True), "image/webp", "webp"),
    "webp extended": (picture("WEBP", exif=b"Exif\0\0abc"), "image/webp", "webp"),
    "webp animated": (picture("WEBP", frames=4), "image/webp", "webp"),
    "gif": (picture("GIF"), "image/gif", "gif"),
    "gif animated": (picture("GIF", frames=4), "image/gif", "gif"),
    "heic": (HEIC, "image/heic", "heic"),
    "mp4": (MP4, "video/mp4", "mp4"),
    "mov": (MOV, "video/quicktime", "mov"),
    "webm": (WEBM, "video/webm", "webm"),
    "mp3": (MP3, "audio/mpeg", "mp3"),
    "mp3 without tag": (MP3_FRAME * 2, "audio/mpeg", "mp3"),
    "wav": (WAV, "audio/wav", "wav"),
}
if features.check("avif"):
    WHOLE["avif"] = (picture("AVIF"), "image/avif", "avif")
    WHOLE["avif animated"] = (picture("AVIF", frames=3), "image/avif", "avif")

SIZES = {"heic": (640, 480), "mp4": (1280, 720), "mov": (1280, 720)}
SOUNDS = {"webm", "mp3", "wav"}  # and formats whose size is not read
FRAMES_10_000 = chunk(b"acTL", struct.pack(">II", 10_000, 0))
ZIP = b"PK\x03\x04\x14\0\0\0\0\0" + b"\0" * 40

DAMAGED: dict[str, tuple[bytes, str]] = {
    "png wrong CRC": (png(chunk(b"IDAT", b"data")[:-1] + b"\0", chunk(b"IEND")), "wrong CRC in IDAT"),
    "png wrong CRC in IHDR": (png().replace(b"\x08\x02\0\0\0", b"\x08\x06\0\0\0", 1), "wrong CRC in IHDR"),
    "png bomb by dimensions": (png(width=65_000, height=65_000), "more than 178956970 allowed"),
    "png absurd side": (png(width=2**31 - 1, height=1), "not a picture size"),
    "png of no width": (png(width=0), "not a picture size"),
    "png impossible colour": (png(colour=5), "colour type 5"),
    "png 10,000 frames announced": (png(FRAMES_10_000, chunk(b"IDAT", b"x"), chunk(b"IEND")), "1000 frames"),
    "png 10,000 frames": (png(chunk(b"IDAT", b"x"), *[chunk(b"fcTL", b"\0" * 26)] * 10_000), "1000 frames"),
    "png without data": (png(chunk(b"IEND")), "no picture data"),
    "png with empty data": (png(chunk(b"IDAT"), chunk(b"IEND")), "no picture data"),
    "png without IHDR": (PNG_START + chunk(b"IDAT", b"x") + chunk(b"IEND"), "IHDR is not the first"),
    "png chunk larger than the file": (png(b"\x7f\xff\xff\xffIDATdata"), "cut short inside IDAT"),
    "png + html": (png() + b"<html><script>", "14 bytes after the end hold markup"),
    "png + zip": (png() + ZIP, "50 bytes after the end hold a zip"),
    "jpeg + zip": (picture("JPEG") + ZIP, "50 bytes after the end hold a zip"),
    "jpeg of segments only": (b"\xff\xd8\xff\xfe\0\4ab\xff\xd9", "no picture data"),
    "jpeg segment too short": (b"\xff\xd8\xff\xc0\0\3" + b"\1" * 20, "too small"),
    "jpeg segment of no length": (b"\xff\xd8\xff\xe0\0\0" + b"\0" * 20, "no segment"),
    "jpeg in a jpeg": (b"\xff\xd8\xff\xd8\xff\xd9", "no segment"),
    "gif + html": (picture("GIF") + b"<html>", "6 bytes after the end hold markup"),
    "gif 10,000 frames": (b"GIF89a\2\0\2\0\0\0\0" + (b"\x2c" + b"\0" * 11) * 10_000 + b"\x3b", "1000 frames"),
    "gif with a frame of 4 gigapixels": (
        b"GIF89a\1\0\1\0\0\0\0\x2c\0\0\0\0\xff\xff\xff\xff\0\2\2\x44\1\0\x3b",
        "65535 × 65535 pixels, more",
    ),
    "gif without a frame": (b"GIF89a\2\0\2\0\0\0\0\x3b", "no picture data"),
    "gif of no width": (b"GIF89a\0\0\2\0\0\0\0\x3b", "not a picture size"),
    "webp + html": (picture("WEBP") + b"<html>", "6 bytes after the end hold markup"),
    "webp without a frame": (riff(b"WEBP", riff_chunk(b"VP8X", b"\0" * 10)), "no picture data"),
    "webp canvas of 16 million": (riff(b"WEBP", riff_chunk(b"VP8X", b"\0\0\0\0" + b"\xff" * 6)), "not a picture size"),
    "webp that is no frame": (riff(b"WEBP", riff_chunk(b"VP8 ", b"\0" * 20)), "no key frame"),
    "webp 10,000 frames": (riff(b"WEBP", *[riff_chunk(b"ANMF", b"\0" * 16)] * 10_000), "1000 frames"),
    "mp4 + zip": (MP4 + ZIP, "after the end hold a zip"),
    "mp4 + html": (MP4 + b"<html><body>", "after the end hold markup"),
    "mp4 of fragments with a hole": (MP4 + box(b"moof") + bytes(16) + box(b"mdat"), "no box"),
    "mp4 without moov": (box(b"ftyp", b"isom\0\0\2\0") + box(b"mdat", b"x"), "no moov"),
    "mp4 box smaller than its head": (box(b"ftyp", b"isom\0\0\2\0") + b"\0\0\0\4moov", "no moov"),
    "webp chunk longer than its list": (shortened(picture("WEBP")), "continues after the end"),
    "mp4 64-bit box": (box(b"ftyp", b"isom\0\0\2\0") + b"\0\0\0\1mdat" + b"\xff" * 8, "cut short inside mdat"),
    "heic bomb": (HEIC.replace(struct.pack(">II", 640, 480), struct.pack(">II", 60_000, 60_000)), "allowed"),
    "webm + html": (WEBM + b"<html>", "6 bytes after the end hold markup"),
    "webm without cluster": (WEBM[:-6].replace(b"\x67\x8b", b"\x67\x85"), "no Cluster"),
    "webm with anything behind its first cluster": (LIVE_WEBM + b"\xec\x8fanything", "cut short"),
    "webm with a page behind its first cluster": (LIVE_WEBM + b"<html>", "cut short|no element"),
    "mp3 with a page behind its first frames": (MP3 + b"<html>", "6 bytes after the end hold markup"),
    "mp3 cut within its last frame": (MP3[:-9], "cut short"),
    "mp3 tag without sound": (b"ID3\x04\0\0\0\0\0\0" + b"<html>", "no sound frame"),
    "wav without sound": (riff(b"WAVE", riff_chunk(b"fmt ", b"\0" * 16)), "no sound data"),
}

FOREIGN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty"),
    "html": (b"<!DOCTYPE html><title>404", "html"),
    "html after a comment": (b"\xef\xbb\xbf\r\n <!-- a --> <HTML>", "html"),
    "xml error": (b'<?xml version="1.0"?><Error><Code>AccessDenied', "xml"),
    "svg": (b"<svg onload=alert(1)>", "svg"),
    "svg after a prologue": (b'<?xml version="1.0"?><!DOCTYPE svg PUBLIC "a"><!-- b --><svg>', "svg"),
    "json": (b'{"error": "expired"}', "json"),
    "json list": (b"[\n {}]", "json"),
    "zip": (ZIP, "zip"),
    "gzip": (b"\x1f\x8b\x08\0", "gzip"),
    "7z": (b"7z\xbc\xaf\x27\x1c", "archive"),
    "tar": (b"a" * 257 + b"ustar\0", "archive"),
    "elf": (b"\x7fELF\2\1\1", "executable"),
    "windows": (b"MZ\x90\0", "executable"),
    "mach-o": (b"\xcf\xfa\xed\xfe", "executable"),
    "script": (b"#!/bin/sh\n", "executable"),
    "wasm": (b"\0asm\1\0\0\0", "executable"),
    "pdf": (b"%PDF-1.7", "pdf"),
    "text": (b"Access denied.\n", "text"),
    "utf-16": ("<html>".encode("utf-16"), "UTF-16"),
    "bmp": (b"BM\0\0\0\0\0\0", "first bytes 42 4d"),
    "half a signature": (PNG_START[:7], "first bytes 89 50"),
    "riff of another kind": (riff(b"AVI "), "first bytes"),
    "boxes of another kind": (box(b"ftyp", b"jp2 \0\0\0\0"), "first bytes"),
    "matroska": (WEBM.replace(b"webm", b"mkvx"), "first bytes 1a 45"),
    "zeros": (b"\0" * 4_096, "first bytes 00"),
    "comments without end": (b"<!---->" * 140 + b"<!--", "xml|text"),
}


def described(data: bytes) -> Media:
    return media_types.inspect(io.BytesIO(data))


@pytest.mark.parametrize("name", WHOLE)
def test_whole_file_is_described(name: str) -> None:
    data, media_type, extension = WHOLE[name]
    width, height = (None, None) if name.split()[0] in SOUNDS else SIZES.get(name, (60, 40))
    assert described(data) == Media(media_type, extension, width, height, verified=True)
    assert media_types.sniff(data[: media_types.HEAD_BYTES]) == (media_type, extension)


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_refused_with_its_reason(name: str) -> None:
    data, reason = DAMAGED[name]
    with pytest.raises(AssetDamaged, match=reason):
        described(data)


def test_live_stream_without_lengths_is_described() -> None:
    assert described(LIVE_WEBM) == Media("video/webm", "webm", None, None, verified=True)


@pytest.mark.parametrize("name", FOREIGN)
def test_file_of_another_kind_is_named(name: str) -> None:
    data, looks_like = FOREIGN[name]
    with pytest.raises(NotAnAsset, match=looks_like):
        described(data)


# Sound may end between any two frames; the other formats mark their end.
@pytest.mark.parametrize("name", [name for name in WHOLE if not name.startswith("mp3")])
def test_every_truncation_is_refused(name: str) -> None:
    data = WHOLE[name][0]
    cuts = range(len(data)) if len(data) < 2_000 else sorted(random.Random(1).sample(range(len(data)), 500))
    for cut in (*cuts, len(data) - 1):
        with pytest.raises((AssetDamaged, NotAnAsset)):
            described(data[:cut])


def test_png_cut_at_every_chunk_boundary_is_refused() -> None:
    whole = png(*[chunk(b"IDAT", b"x" * 50)] * 20, chunk(b"tEXt", b"a\0b"), chunk(b"IEND"))
    assert described(whole).verified
    for boundary in (33, *range(33 + 62, len(whole), 62), len(whole) - 12, len(whole) - 4):
        with pytest.raises(AssetDamaged, match="cut short"):
            described(whole[:boundary])


@pytest.mark.parametrize("module", ["isal.isal_zlib", "zlib"])
def test_the_crc_of_a_picture_is_that_of_zlib(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no wheel of isal, zlib's own is used."""
    monkeypatch.setattr(structure, "crc32", import_module(module).crc32)
    for length in (1, 63, 64, 65, 4_095, 300_001):
        data = random.Random(length).randbytes(length)
        assert described(png(chunk(b"IDAT", data), chunk(b"IEND"))).verified
        damaged = bytearray(png(chunk(b"IDAT", data), chunk(b"IEND")))
        damaged[33 + 8 + length // 2] ^= 1
        with pytest.raises(AssetDamaged, match="wrong CRC in IDAT"):
            described(bytes(damaged))


def test_the_structure_is_checked_without_isal() -> None:
    words = (
        "import sys; sys.modules['isal'] = None; from storage.fetch import structure as s; print(s.crc32.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=60)
    assert done.stdout == "zlib\n", done.stderr


HARMLESS: dict[str, bytes] = {
    "padding": bytes(4_096),
    "a line end": b"\r\n" * 4,
    "a second picture": WHOLE["jpeg"][0],
    "a film": MP4,
    "a maker's record": b"SEFH" + bytes(20) + b"\x0c\0\0\0SEFT",
    "provenance": b"\n<?xpacket begin=''?><x:xmpmeta xmlns:x='adobe:ns:meta/'/>",
    "coded data": random.Random(7).randbytes(300_000),
}
HARMFUL: dict[str, bytes] = {
    "html": b"<HTML><body>",
    "a page after padding": bytes(300_000) + b"\r\n<!DOCTYPE html>",
    "a script within": random.Random(7).randbytes(300_000) + b"<ScRiPt>alert(1)</script>",
    "php within": WHOLE["jpeg"][0] + b"<?php system($_GET[0]);",
    "svg": b"\n<svg onload=alert(1)>",
    "zip": ZIP,
    "a zip's end within": b"record" + b"PK\5\6" + bytes(18),
    "rar": b"Rar!\x1a\7\1\0",
    "7z": b"\0\0" + b"7z\xbc\xaf\x27\x1c\0\4",
    "gzip": b"\x1f\x8b\x08\0" + bytes(9),
    "tar": b"name" + bytes(253) + b"ustar\x0000",
    "elf": b"\x7fELF\2\1\1\0",
    "windows": b"MZ\x90\0\3\0\0\0",
    "mach-o": b"\xcf\xfa\xed\xfe\7\0\0\1",
    "shell": b"\n#!/bin/sh\n",
    "pdf": b"comment\n%PDF-1.7",
}


@pytest.mark.parametrize("name", WHOLE)
def test_harmless_bytes_after_the_end_are_counted(name: str) -> None:
    data, media_type, _ = WHOLE[name]
    for tail in HARMLESS.values():
        found = described(data + tail)
        assert (found.media_type, found.trailing_bytes) in ((media_type, len(tail)), (media_type, 0))
        assert found.trailing_bytes or tail is MP4  # appended boxes belong to the same file


@pytest.mark.parametrize("tail", HARMFUL)
def test_page_archive_or_program_after_the_end_is_refused(tail: str) -> None:
    for name in WHOLE:
        with pytest.raises(AssetDamaged, match="after the end hold"):
            described(WHOLE[name][0] + HARMFUL[tail])


def test_signature_across_two_blocks_is_found() -> None:
    for shift in range(12):
        with pytest.raises(AssetDamaged, match="markup"):
            described(png() + b"." * (structure.BLOCK_BYTES - shift) + b"<!doctype html>")


def test_stray_bytes_that_decoders_skip_are_noted() -> None:
    start, rest = WHOLE["jpeg"][0][:2], WHOLE["jpeg"][0][2:]
    for stray in (b"hello", b"\xff\0", b"\xff\xd5\0o", b"\0" * structure.BLOCK_BYTES):
        if len(stray) > jpeg.MAX_STRAY_BYTES:
            with pytest.raises(AssetDamaged, match="no marker at byte 20"):
                described(start + rest[:18] + stray + rest[18:])
        else:
            assert described(start + rest[:18] + stray + rest[18:]).notes == ("stray bytes between segments",)
    assert described(start + b"\xff" * 9 + rest).notes == ()
    assert described(WHOLE["gif"][0][:-1] + b"\0;").notes == ("zero bytes between blocks",)


@given(st.sampled_from(sorted(WHOLE)), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6))
def test_changed_file_is_described_or_refused(name: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(WHOLE[name][0])
    for share, byte in changes:
        data[int(share**3 * (len(data) - 1))] = byte  # mostly near the beginning, where the structure is
    with suppress(AssetDamaged, NotAnAsset):
        described(bytes(data))


@given(st.binary(max_size=200), st.sampled_from([entry[0][:12] for entry in WHOLE.values()]))
def test_any_bytes_are_described_or_refused(data: bytes, start: bytes) -> None:
    for candidate in (data, start + data):
        with suppress(AssetDamaged, NotAnAsset):
            described(candidate)


def test_marker_split_between_two_blocks_is_found() -> None:
    start, scan, end = WHOLE["jpeg"][0].partition(b"\xff\xda")[0], b"\xff\xda\0\2", b"\xff\xd9"
    for shift in range(-4, 5):
        body = b"\x01" * (structure.BLOCK_BYTES + shift)
        assert described(start + scan + body + b"\xff\0\xff\xd0\1\xff" + end).verified


LARGE: dict[str, Callable[[], bytes]] = {
    "png of one chunk": lambda: png(chunk(b"IDAT", bytes(30_000_000)), chunk(b"IEND")),
    "jpeg of one scan": lambda: WHOLE["jpeg"][0][:-2] + bytes(30_000_000) + b"\xff\xd9",
    "gif of many blocks": lambda: b"GIF89a\2\0\2\0\0\0\0!\1" + (b"\xff" + bytes(255)) * 40_000 + b"\0;",
    "mp4 with one box": lambda: MP4 + box(b"free", bytes(30_000_000)),
}


@pytest.mark.parametrize("name", LARGE)
def test_memory_is_constant_for_a_large_file(name: str) -> None:
    file = io.BytesIO(LARGE[name]())
    tracemalloc.start()
    try:
        media_types.inspect(file)
    except AssetDamaged:
        assert name == "gif of many blocks"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


PIECES: dict[str, bytes] = {
    "jpeg segments": b"\xff\xd8" + b"\xff\xfe\0\2" * 590_000 + b"\xff\xd9",
    "jpeg scans": b"\xff\xd8" + b"\xff\xda\0\2" * 590_000 + b"\xff\xd9",
    "png chunks": PNG_START + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0)) + chunk(b"teXt") * 200_000,
    "gif sub-blocks": b"GIF89a\2\0\2\0\0\0\0!\1" + b"\1x" * 1_000_000,
    "mp4 boxes": MP4 + box(b"free") * 300_000,
}


@pytest.mark.parametrize("name", PIECES)
def test_file_of_too_many_pieces_is_refused_within_a_second(name: str) -> None:
    started = time.process_time()
    with pytest.raises(AssetDamaged, match="too many pieces"):
        described(PIECES[name])
    assert time.process_time() - started < 1
