"""A fuzzer for the body of a create: depth, width, sizes, escapes, cuts. Each is read or refused, in bounded memory.

Bounded and seeded; the suite runs a short form, the long one is a command:

    .venv/bin/python -m tests.fuzz_creates --bodies 100000 --processes 2
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from receiver.gateway.answers import Refused
from receiver.gateway.create_body import MAX_TEXT_BYTES, ArrivingBody
from receiver.gateway.creates import Creates
from storage.fetch.addresses import AddressPolicy
from tests.bench.stage import memory_bytes
from tests.fuzz import ODD_VALUES
from tests.unreported_tasks import drawn, encoded

MIB = 2**20
# A body is in memory as received and as parsed. While it is processed, its text has three more copies.
COPIES, COPIES_OF_A_TEXT, MOST_With_BYTES = 2, 3, 6 * MIB
# Bodies before the first measurement of memory, and the allowed growth of the process after a tenth of all.
FIRST, MOST_GROWTH_BYTES = 200, 32 * MIB
FULL: dict[str, Any] = {
    "model_name": "kling-v3-omni", "prompt": "a boat <<<image_1>>> at “dusk” 🌅", "n": 2, "resolution": "2k",
    "image_list": [{"image": "https://p2-fdl.klingai.com/z3.png?x=1&y=2"}], "aspect_ratio": "16:9",
    "element_list": [{"element_id": 835266081714884677}], "result_type": "series", "series_amount": 3,
    "watermark_info": {"enabled": True}, "external_task_id": "order-1", "callback_url": "https://client.example.com/x",
}  # fmt: skip
PLAIN = {"model_name": "kling-v3-omni", "prompt": "a boat", "n": 1}
NESTED = ((b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]"), (b"[[],", b"]"), (b'{"a":[', b"]}"), (b"[", b""))
WIDE = (b"[],", b"{},", b"1,", b'"",', b'"a":1,', b'"\\u0061":[],', b"1e9,", b"null,", b" ,", b'"\\\\",', b"NaN,")


def bodies(chance: random.Random, count: int, *, most: int) -> Iterator[bytes]:
    """`count` bodies of at most about `most` bytes. Most are small, one in a hundred is among the largest."""
    kinds: list[Callable[[random.Random, int], bytes]] = [_deep, _wide, _long_text, _escaped, _odd, _odd, _cut, _noise]
    for number in range(count):
        size = most if number % 100 == 0 else int(10 ** chance.uniform(0, 4.3))
        yield chance.choice(kinds)(chance, size)


def _deep(chance: random.Random, size: int) -> bytes:
    opening, closing = chance.choice(NESTED)
    depth = size // max(len(opening + closing), 1)
    return b'{"prompt":' + opening * depth + b"1" + closing * depth + b"}"


def _wide(chance: random.Random, size: int) -> bytes:
    item = chance.choice(WIDE)
    start, end = chance.choice(((b'{"image_list":[', b"1]}"), (b"{", b'"z":1}'), (b"[", b"1]")))
    return start + item * (size // len(item)) + end


def _long_text(chance: random.Random, size: int) -> bytes:
    """Pictures in Base64, one large or several."""
    pictures = chance.choice((1, 1, 2, 9))
    data = encoded(drawn(400, 300) + chance.randbytes(size * 3 // 4 // pictures))
    sent = PLAIN | {"image_list": [{"image": chance.choice(("", "data:image/png;base64,")) + data}] * pictures}
    return json.dumps(sent).replace("/", chance.choice(("/", "\\/"))).encode()


def _escaped(chance: random.Random, size: int) -> bytes:
    piece = chance.choice((b"\\u751f", b"\\ud800", b'\\"', b"\\\\", b"\\/", b"\\u0000", b"\\x", b"\\", "é".encode()))
    return b'{"prompt":"' + piece * (size // len(piece)) + chance.choice((b'"}', b'"', b""))


def _odd(chance: random.Random, size: int) -> bytes:
    """A valid request with some invalid values."""
    sent = dict(chance.choice((FULL, PLAIN)))
    for name in chance.sample(sorted(sent), chance.randint(0, 3)):
        sent[name] = chance.choice(ODD_VALUES)
    if chance.random() < 0.2:
        sent |= {f"field-{number}": 1 for number in range(min(size // 16, 400))}
    return json.dumps(sent).encode("utf-8", "surrogatepass")


def _cut(chance: random.Random, size: int) -> bytes:
    whole = _odd(chance, size) + bytes(chance.choice((0, 0, size)))
    return whole[: chance.randint(0, len(whole))]


def _noise(chance: random.Random, size: int) -> bytes:
    raw = bytearray(json.dumps(FULL).encode())
    for _ in range(chance.randint(1, 9)):
        raw[chance.randrange(len(raw))] = chance.randrange(256)
    return bytes(raw) + chance.randbytes(chance.choice((0, size)))


@dataclass
class Outcome:
    """`ends`: how many were read, and how many refused with each code. `worst`: bytes of memory of the most expensive
    body.
    """

    ends: Counter[str] = field(default_factory=Counter)
    worst_bytes: int = 0
    slowest_seconds: float = 0.0

    def __add__(self, other: Outcome) -> Outcome:
        worst = max(self.worst_bytes, other.worst_bytes)
        return Outcome(self.ends + other.ends, worst, max(self.slowest_seconds, other.slowest_seconds))


def verdict_while_arriving(body: bytes) -> str:
    """How a body ends that is refused before its end has arrived; "read" for the others. In pieces of a kilobyte."""
    try:
        ArrivingBody(1024).check(bytearray(body))
    except Refused as refused:
        return f"{refused.http_status}/{refused.code}"
    return "read"


def read(reader: Creates, wanted: Iterator[bytes], *, measured: bool) -> Outcome:
    """Read each body. Raises whatever is no refusal, a different one on arrival, and memory beyond the bound."""
    outcome = Outcome()
    for body in wanted:
        if measured:
            tracemalloc.start()
        started, early, end = time.perf_counter(), verdict_while_arriving(body), "read"
        try:
            reader.read(bytearray(body), "client", "a-key")
        except Refused as refused:
            end = f"{refused.http_status}/{refused.code}"
        assert early in ("read", end), (early, end, len(body), body[:80])
        outcome.ends[end] += 1
        outcome.slowest_seconds = max(outcome.slowest_seconds, time.perf_counter() - started)
        if measured:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            most = COPIES * len(body) + COPIES_OF_A_TEXT * min(len(body), MAX_TEXT_BYTES) + MOST_With_BYTES
            assert peak <= most, (peak, len(body), body[:80])
            outcome.worst_bytes = max(outcome.worst_bytes, peak)
    return outcome


def creates() -> Creates:
    """The part of the gateway that reads creates. It opens nothing."""
    unused: Any = None
    return Creates(unused, unused, unused, AddressPolicy())


@dataclass
class Part:
    """The measurements of one process. `resident`: bytes of its memory after the first bodies, after a tenth, and at
    the end.
    """

    plain: Outcome
    traced: Outcome
    resident: list[int]
    seconds: float


def read_part(seed: int, count: int, largest: int) -> Part:
    """Read `count` bodies, and measure the memory of each of the last tenth."""
    reader, chance, tenth = creates(), random.Random(seed), max(count // 10, 1)
    started, plain, resident = time.monotonic(), Outcome(), []
    for some in (FIRST, tenth, count - 2 * tenth):  # Python keeps the memory of the first bodies
        plain += read(reader, bodies(chance, some, most=largest), measured=False)
        resident.append(memory_bytes(os.getpid()))
    seconds = time.monotonic() - started
    traced = read(reader, bodies(chance, tenth, most=largest), measured=True)
    return Part(plain, traced, resident, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bodies", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--largest", type=int, default=4 * MIB, help="bytes of one body in a hundred")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    given = parser.parse_args()
    count = max(given.bodies // given.processes, 2)
    seeds = range(given.seed, given.seed + given.processes)
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(read_part, seed, count, given.largest) for seed in seeds]
        parts = [future.result() for future in futures]
    ends = sum((part.plain.ends + part.traced.ends for part in parts), Counter[str]())
    print(f"seed {given.seed}: {sum(ends.values())} bodies: {dict(ends.most_common())}")  # noqa: T201
    for part in parts:
        first, tenth, last = (size / MIB for size in part.resident)
        print(  # noqa: T201
            f"memory {first:.0f} MiB after {FIRST} bodies, {tenth:.0f} after {count // 10} more, {last:.0f} at the end;"
            f" dearest of {count // 10} measured {part.traced.worst_bytes / MIB:.1f} MiB;"
            f" slowest {part.plain.slowest_seconds * 1_000:.0f} ms, all in {part.seconds:.0f} s"
        )
    sys.exit(any(part.resident[2] > part.resident[1] + MOST_GROWTH_BYTES for part in parts))


if __name__ == "__main__":
    main()
