"""All benchmarks, side by side with their references, and a table at the end. See README.md beside this file.

.venv/bin/python -m tests.bench                        three rounds of all rows
.venv/bin/python -m tests.bench --rows 4,6 --rounds 5 --json figures.json
.venv/bin/python -m tests.bench --smoke                one small round, which judges nothing
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from tests.bench import acks, beside, distant, latency, pictures, queues, settling, start, table
from tests.bench.idle import Idle
from tests.bench.img2dataset import COMMAND, AgainstImg2dataset
from tests.bench.pictures import AgainstRclone
from tests.bench.table import Row, Sample
from tests.bytecode import compile_sources

LARGE, SMALL = AgainstRclone(3_000_000, 120), AgainstRclone(100_000, 600)
LARGE_FLOOR, SMALL_FLOOR = AgainstRclone(3_000_000, 120, pictures.floor), AgainstRclone(100_000, 600, pictures.floor)
IDLE = Idle()
BARE = "bare Starlette endpoint"


def _acks(kind: str) -> partial[Sample]:
    return partial(acks.per_second, kind)


ROWS = [
    Row("1", "durable acknowledgements, SQLite", BARE, "/s", 0.8, "at least", _acks("sqlite")),
    Row("1f", "the least that is durable intake, no goal", BARE, "/s", 0, "at least", partial(acks.floor, "sqlite")),
    Row("2", "durable acknowledgements, PostgreSQL", BARE, "/s", 0.7, "at least", _acks("postgresql")),
    Row("2f", "the least, PostgreSQL, no goal", BARE, "/s", 0, "at least", partial(acks.floor, "postgresql")),
    Row("3", "p99 at half of our rate", f"{BARE}, same rate", "ms", 3, "at most", acks.p99_at_half_rate),
    Row("3f", "p99 of the least at half its rate, no goal", BARE, "ms", 0, "at least", acks.floor_p99),
    Row("4", "archived 3 MB pictures", "rclone copyurl", "/s", 0.88, "at least",
        LARGE.rate),
    Row("4f", "the least that archives them, no goal", "rclone copyurl", "/s", 0, "at least",
        LARGE_FLOOR.rate),
    Row("5", "archived 100 KB pictures", "rclone copyurl", "/s", 0.8, "at least",
        SMALL.rate),
    Row("5f", "the least that archives them, no goal", "rclone copyurl", "/s", 0, "at least",
        SMALL_FLOOR.rate),
    Row("5b", "the same files, no goal", "img2dataset", "/s", 0, "at least",
        AgainstImg2dataset(SMALL).rate),
    Row("6", "CPU per archived 3 MB picture", "rclone copyurl", "ms", 1.6, "at most",
        LARGE.cpu),
    Row("6b", "CPU per archived 100 KB picture", "rclone copyurl", "ms", 2, "at most",
        SMALL.cpu),
    Row("6f", "CPU of the least, no goal", "rclone copyurl", "ms", 0, "at least",
        LARGE_FLOOR.cpu),
    Row("6bf", "CPU of the least, 100 KB, no goal", "rclone copyurl", "ms", 0, "at least",
        SMALL_FLOOR.cpu),
    Row("7", "callback to object, idle, 3 MB", "curl GET + curl PUT", "ms", 1.2, "at most", latency.callback_to_object),
    Row("8", "peak memory, 8 files of 100 MB at once", "the idle worker", "MB", 80, "at most", pictures.memory),
    Row("9", "claims and settlings with 1,000,000 rows", "beside 1,000 rows", "/s", 0.95, "at least",
        settling.per_second),
    Row("10", "2, 4, 8 workers of one thread, PostgreSQL", "one worker, linear", "/s", 0.95, "at least",
        pictures.scaling),
    Row("11", "ack p99 beside 8 busy archive threads", "idle archive", "ms", 3, "at most", acks.p99_beside_archive),
    Row("11f", "p99 of the least beside rclone's 8 transfers", "alone", "ms", 0, "at least",
        acks.floor_p99_beside_transfers),
    Row("12a", "receiver serve to ready", "imports, one client", "s", 1.4, "at most", start.serve_to_ready),
    Row("12b", "receiver --help", "import typer", "s", 1.5, "at most", start.help_to_end),
    Row("13", "latency-bound, 1, 8, 32 threads, over https", "rclone copyurl", "/s", 0.95, "at least",
        distant.latency_bound),
    Row("14", "CPU per archived 3 MB picture, over https", "rclone copyurl", "ms", 1.6, "at most", distant.tls_cpu),
    Row("15", "slowest statement with 1,000,000 tasks", "beside 20,000", "ms", 2, "at most",
        beside.slowest_statement),
    Row("15b", "the longest of them, and none over 300 ms", "beside 20,000", "ms", 300, "at most",
        beside.longest_statement),
    Row("16", "claim, admission, looks with 100,000 rows", "with 100 rows", "ms", 2, "at most", queues.slowest),
    Row("17a", "transactions of 8 idle workers, PostgreSQL", "the goal", "/s", 20, "at most",
        IDLE.figure("transactions", 20)),
    Row("17b", "their connections, the most", "the goal", "", 24, "at most", IDLE.figure("connections", 24)),
    Row("17c", "their CPU a minute, all together", "the goal", "s", 1, "at most", IDLE.figure("cpu", 1)),
    Row("17d", "memory of its own, the largest of them", "the goal", "MB", 60, "at most", IDLE.figure("memory", 60)),
]  # fmt: skip
if not COMMAND:
    ROWS = [row for row in ROWS if row.name != "5b"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="only these, as 1,2,12a")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="one small round of each; judges nothing")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    wanted = given.rows.split(",") if given.rows else [row.name for row in ROWS]
    rows = [row for row in ROWS if row.name in wanted]
    if len(rows) < len(wanted):
        parser.error(f"rows are {', '.join(row.name for row in ROWS)}")
    compile_sources()  # installed packages, such as the references, have bytecode
    results = list(table.run(rows, 1 if given.smoke else given.rounds, small=given.smoke))
    print(table.show(results))  # noqa: T201
    print(f"\n{table.show_markdown(results)}")  # noqa: T201
    if given.json:
        given.json.write_text(table.as_json(results) + "\n")
    if not given.smoke and not all(result.is_met for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
