"""A body that a host sent with a coding that was not requested: gzip is decoded within bounds of memory and CPU."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from storage.errors import FetchUnusable

# The largest output of one call of the decoder: a zip bomb grows by this much before the size is checked.
DECODED_BYTES = 256 * 1024
# The largest input of one call: zlib copies all that follows a member's end.
CODED_BYTES = 16 * 1024
# 256 MiB in the members of 65,280 bytes that bgzip writes. Empty members add nothing to the size that is checked, and
# so many of them cost 4 ms of CPU.
MAX_GZIP_MEMBERS = 4_200
# Registered content codings (IANA). Other values say nothing about the bytes: uploaders set `UTF-8` or `aws-chunked`,
# and stores return it.
CODINGS = frozenset({"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd", "dcb", "dcz"})
GZIP = frozenset({"gzip", "x-gzip"})


def codings(content_encoding: str) -> list[str]:
    """The codings that a Content-Encoding header names, in the order in which they were applied."""
    words = (word.strip().lower() for word in content_encoding.split(","))
    return [word for word in words if word in CODINGS]


def without_codings(blocks: Iterable[bytes | memoryview], content_encoding: str) -> Iterable[bytes | memoryview]:
    """The content of a body. One layer of gzip is decoded; anything else raises `FetchUnusable`.

    Nested layers multiply: 4 kB of `gzip, gzip` hold gigabytes, and the inner layer would be decoded in one piece.
    """
    found = codings(content_encoding)
    if not found:
        return blocks
    if len(found) == 1 and found[0] in GZIP:
        return decoded(blocks)
    raise FetchUnusable("sent with a Content-Encoding although none was requested")


def decoded(blocks: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """The content of gzip members, one after the other (RFC 1952 §2.2). zlib checks their checksums and lengths.

    Hosts that compress block by block send several members.
    """
    decoder, members = zlib.decompressobj(16 + zlib.MAX_WBITS), 1
    try:
        for block in blocks:
            for at in range(0, len(block), CODED_BYTES):
                rest = block[at : at + CODED_BYTES]
                while rest:
                    if decoder.eof:
                        decoder, members = zlib.decompressobj(16 + zlib.MAX_WBITS), members + 1
                        if members > MAX_GZIP_MEMBERS:
                            raise FetchUnusable(f"the gzip coding has more than {MAX_GZIP_MEMBERS} members")
                    yield decoder.decompress(rest, DECODED_BYTES)
                    rest = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
        yield decoder.flush()
    except zlib.error:
        raise FetchUnusable("the gzip coding is broken") from None
    if not decoder.eof:
        raise FetchUnusable("the gzip coding is cut short")
