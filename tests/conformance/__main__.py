"""`python -m tests.conformance [--json] [--keys N]`: tries the S3 store that the environment names and reports the
result.

RECEIVER_S3_BUCKET (it exists; only a prefix of our own is used), RECEIVER_S3_ENDPOINT_URL, RECEIVER_S3_CHECKSUMS,
RECEIVER_S3_ADDRESSING and boto3's own AWS_… variables for credentials and region. Takes one to three minutes and some
1,100 small objects, all removed at the end. Exit code 0 if every promise of ours holds, whatever the store lacks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from receiver.base import telemetry
from storage.errors import StoreUnavailable
from tests.conformance import capabilities, promises
from tests.conformance.stage import Broken, Case, Lacks, Stage, stage

YES, LACKS, BROKEN = "yes", "lacks", "BROKEN"
CASES = (*capabilities.CASES, *promises.CASES)


@dataclass(frozen=True)
class Result:
    name: str
    is_promise: bool
    word: str
    detail: str
    seconds: float = 0.0

    @property
    def is_fault(self) -> bool:
        return self.word == BROKEN or (self.is_promise and self.word == LACKS)


def run(on: Stage, cases: Sequence[Case] = CASES) -> Iterator[Result]:
    for case in cases:
        started = time.monotonic()
        yield replace(try_one(on, case), seconds=round(time.monotonic() - started, 1))


def try_one(on: Stage, case: Case) -> Result:
    """Run one case. An unexpected error counts as a broken promise, or as a missing capability."""
    try:
        return Result(case.name, case.is_promise, YES, case.run(on) or "")
    except Lacks as error:
        return Result(case.name, case.is_promise, LACKS, str(error))
    except (Broken, AssertionError) as error:
        return Result(case.name, case.is_promise, BROKEN, _line(error))
    except (StoreUnavailable, on.client.exceptions.ClientError) as error:
        return Result(case.name, case.is_promise, BROKEN if case.is_promise else LACKS, _line(error))
    except Exception as error:  # noqa: BLE001 - a store may answer with anything; the other cases are to be run
        return Result(case.name, case.is_promise, BROKEN, _line(error))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.conformance", description=str(__doc__).split("\n\n")[0])
    options.add_argument("--json", action="store_true", help="print JSON for machines")
    options.add_argument("--keys", type=int, default=1_005, help="how many objects the listing is tried with")
    chosen = options.parse_args()
    telemetry.configure("error")
    results = []
    with stage(chosen.keys) as on:
        for result in run(on):
            results.append(result)
            if not chosen.json:
                kind = "promise" if result.is_promise else "capability"
                sys.stdout.write(f"{result.word:7} {kind:11} {result.name}  {result.detail}".rstrip() + "\n")
                sys.stdout.flush()
        proof = on.bucket.capabilities().proof
    faults = [result.name for result in results if result.is_fault]
    summary = {"ok": not faults, "believed": proof == "sha256", "proof": proof, "faults": faults}
    if chosen.json:
        sys.stdout.write(json.dumps({**summary, "results": [asdict(each) for each in results]}, indent=1) + "\n")
    else:
        how = {"sha256": "its checksums are believed", "md5": "its MD5 is believed", "read": "everything is read back"}
        sys.stdout.write(f"\n{len(results)} cases, {len(faults)} promises broken; {how[proof]}\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
