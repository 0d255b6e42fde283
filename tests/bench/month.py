"""How many pictures one worker process on this machine archives in a month at Kling's usual sizes.

`python -m tests.bench.month` measures pictures a second as in row 4 (source, store and worker share the machine), and
multiplies by thirty days. A rate of some seconds is no month: disks fill, providers throttle, and requests come
unevenly.
"""

from __future__ import annotations

from tests.bench import pictures, stage

MONTH_SECONDS = 30 * 86_400
# KLING §7 plans for 1–2 MB (1k), 4–8 MB (2k) and 15–35 MB (4k): the middle sizes, and how many pictures of each.
SIZES = {"1k, 1.5 MB": (1_500_000, 240), "2k, 6 MB": (6_000_000, 96), "4k, 25 MB": (25_000_000, 32)}


def main() -> None:
    for name, (size, count) in SIZES.items():
        with stage.folder() as place, pictures.source(place, count=min(count, 32), size=size) as files:
            seconds, cpu_seconds = pictures.ours(place, files, count)
        rate = count / seconds
        millions, terabytes = rate * MONTH_SECONDS / 1e6, rate * MONTH_SECONDS * size / 1e12
        words = (
            f"{name}: {rate:.1f} pictures/s ({rate * size / 1e6:.0f} MB/s), {cpu_seconds / count * 1e3:.0f} ms of CPU"
        )
        print(f"{words} each; in 30 days {millions:.1f} million, {terabytes:.0f} TB", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
