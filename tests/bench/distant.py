"""Rows 13 and 14: 3 MB pictures over https; from a distant source into a distant store, and without a distance."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from tests.bench import stage
from tests.bench.pictures import Source, ours, rclone, source
from tests.bench.table import Sample, say

PICTURE_BYTES = 3_000_000
SOURCE_SECONDS, STORE_SECONDS = 0.04, 0.02  # a round trip to each
# Threads, and how many pictures they archive: some seconds of each.
DISTANT = {1: 24, 8: 64, 32: 96}
SMALL_DISTANT = {2: 2}
# For each thread, on both sides: a store that has just started has no memory for the bodies of all puts at once, and
# how soon the host gives it is no matter of distance.
WARM_UP = 2
ALIKE, SMALL_ALIKE = 120, 2


def latency_bound(small: bool) -> Sample:
    """Pictures a second with 1, 8 and 32 threads, and of rclone with as many transfers; the worst share decides."""
    samples = []
    with stage.folder() as place, _secure_source(place, 4 if small else 32) as near:
        with stage.program(place, "tests.bench.delay", near.address, str(SOURCE_SECONDS)) as port:
            files = replace(near, address=f"{stage.HOST}:{port}")
            for threads, count in (SMALL_DISTANT if small else DISTANT).items():
                inside = place / str(threads)
                inside.mkdir()
                warm = WARM_UP * threads
                theirs, _ = rclone(inside, files, count, threads=threads, store=_distant_store, warm=warm)
                mine, _ = ours(inside, files, count, threads=threads, store=_distant_store, warm=warm)
                samples.append(Sample(count / mine, count / theirs))
                say(f"row 13, {threads} threads: {samples[-1].figure:.2f}")
    return min(samples, key=lambda sample: sample.figure)


def tls_cpu(small: bool) -> Sample:
    """CPU milliseconds a picture, of the worker and of rclone."""
    count = SMALL_ALIKE if small else ALIKE
    with stage.folder() as place, _secure_source(place, min(count, 64)) as files:
        _, theirs = rclone(place, files, count)
        _, mine = ours(place, files, count)
    return Sample(mine / count * 1e3, theirs / count * 1e3)


@contextmanager
def _distant_store(place: Path) -> Iterator[dict[str, str]]:
    with stage.seaweed(place) as found:
        near = urlsplit(found["RECEIVER_S3_ENDPOINT_URL"]).netloc
        with stage.program(place, "tests.bench.delay", near, str(STORE_SECONDS)) as port:
            yield {**found, "RECEIVER_S3_ENDPOINT_URL": f"http://{stage.HOST}:{port}"}


@contextmanager
def _secure_source(place: Path, count: int) -> Iterator[Source]:
    certificate = place / "certificate.pem"
    with source(place, count=count, size=PICTURE_BYTES, certificate=_certificate(certificate)) as files:
        yield files


def _certificate(file: Path) -> Path:
    """A certificate of this host's own, with its key."""
    request = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=bench"
    names = ["-addext", f"subjectAltName=IP:{stage.HOST}", "-keyout", str(file), "-out", f"{file}.public"]
    subprocess.run([*request.split(), *names], check=True, capture_output=True)
    file.write_text(file.read_text() + Path(f"{file}.public").read_text())
    return file
