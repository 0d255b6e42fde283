"""Mutations: with a promise broken on purpose, the chaos campaigns or the tests that a mutation names must fail.

`python -m tests.chaos.mutations`

Each mutation replaces exact text in a copy of the tree; the unchanged copy must pass. Exit 1 if a mutation goes
unnoticed, or if a test fails without one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.processes import ROOT

NOT_COPIED = (".git", ".venv", "__pycache__", ".*_cache", ".hypothesis")
TEST_SECONDS = 400
CAMPAIGNS = "tests/flows/test_chaos.py"
CAMPAIGN = f"{CAMPAIGNS}::test_nothing_is_lost_or_doubled_when_processes_and_servers_die"
ACCOUNT = "tests/receiver/tasks/test_account_pauses.py"
UNUSABLE = "tests/storage/archive/test_unusable.py"
AHEAD = "tests/receiver/workers/test_ahead.py"
STRANGERS = "tests/receiver/tasks/test_account_url.py"
DOUBT = "tests/receiver/tasks/test_creates_in_doubt.py"
UNSIGNED = "tests/receiver/tasks/test_unsigned_deliveries.py"
BODIES = "tests/receiver/web/test_request_bodies.py"


@dataclass(frozen=True)
class Mutation:
    """`file`: its `text`, which occurs once, becomes `instead`. `tests`: those that have to notice it."""

    name: str
    file: str = ""
    text: str = ""
    instead: str = ""
    tests: str = CAMPAIGNS


MUTATIONS = (
    Mutation("nothing broken"),
    Mutation(
        "no lease check in settle",
        "storage/rows/claims.py",
        "update(model.__table__).where(*same)",
        "update(model.__table__).where(same[0] & (same[0] | same[-1]))",
    ),
    Mutation(
        "answered before the commit",
        "receiver/web/callbacks.py",
        "intake = await self._group_commit.commit(delivery)",
        "asyncio.ensure_future(self._group_commit.commit(delivery))\n            intake = Intake.NEW",
    ),
    Mutation(
        "answered before the commit in the loop",
        "storage/rows/group_commit.py",
        "new = await self._connection.insert(deliveries)",
        "_answer(batch, {each.key for each in deliveries})\n"
        "        await asyncio.sleep(0.05)\n"
        "        new = await self._connection.insert(deliveries)",
        "tests/storage/rows/test_group_commit.py",
    ),
    Mutation(
        "no task lock before an asset is settled",
        "storage/rows/tasks.py",
        "_LOCKED_ROW = _LOCKED_ROW.with_for_update()",
        "_LOCKED_ROW = _LOCKED_ROW.limit(1)",
        # Not the campaign, which may miss it: two processes seldom settle the last files of a task at the same time.
        f"{CAMPAIGNS}::test_exactly_one_of_two_pictures_settled_at_once_is_the_last",
    ),
    Mutation(
        "settle acknowledged before the commit of its group",
        "storage/database/group_writer.py",
        "done[write] = write.operation(session)",
        "done[write] = write.operation(session)\n"
        "                        write.durable.set_result(done[write])\n"
        '                        object.__setattr__(write, "durable", Future())',
        "tests/storage/database/test_group_writer.py",
    ),
    Mutation(
        "one lost lease fails its group",
        "storage/database/group_writer.py",
        "failed = group if isinstance(error, DatabaseUnavailable) and not waits else at_fault",
        "failed = group",
        "tests/storage/database/test_group_writer.py",
    ),
    Mutation(
        "an error page ends its file",
        "storage/archive/archiver.py",
        "            self._unusable(asset, error)\n",
        "            self._fail(asset, str(error))\n",
        CAMPAIGN,
    ),
    Mutation(
        "a redirect to itself ends its file",
        "storage/fetch/client.py",
        'raise FetchUnusable(f"{target.host} redirected to the same link")',
        'raise FetchRefused(f"{target.host} redirected to the same link")',
        CAMPAIGN,
    ),
    Mutation(
        "a cut file is kept",
        "storage/fetch/client.py",
        "media = media_types.inspect(sink, accept_unverified=accept_unverified)",
        "media = media_types.inspect(sink, accept_unverified=True)",
        # The campaign may miss this fault: after a killed worker or a lost put the whole file is fetched again.
        f"{UNUSABLE}::test_files_cut_without_a_length_half_of_the_time_are_all_archived",
    ),
    Mutation(
        "an account that is refused fails its tasks",
        "receiver/tasks/create_step.py",
        "            self._wait_for_account(task, error, outcome_listener)\n        except Unavailable",
        "            self._fail(task, str(error))\n        except Unavailable",
        CAMPAIGN,
    ),
    Mutation(
        "the pause of an account is forgotten",
        "receiver/tasks/create_step.py",
        "pauses.pause(session, task.provider, task.model, error)",
        "pass",
        f"{ACCOUNT}::test_a_refused_account_pauses_and_fails_nothing",
    ),
    Mutation(
        "a create that never left uses up the trial",
        "receiver/tasks/create_step.py",
        "pauses.give_back(session, trial)",
        "pass",
        f"{ACCOUNT}::test_trial_that_never_reached_the_provider_is_given_back",
    ),
    Mutation(
        "a create that was called back is sent again",
        "receiver/tasks/create_step.py",
        "if not _is_called_back(session, task):",
        "if True:",
        f"{DOUBT}::test_a_create_that_waits_for_its_turn_is_not_sent_once_it_was_called_back",
    ),
    Mutation(
        "a read under an id that a sender chose binds another's task",
        "receiver/tasks/reconcile.py",
        "record.report.external_task_id == row.external_task_id",
        "True",
        f"{DOUBT}::test_no_read_binds_an_id_of_a_record_that_does_not_name_our_task",
    ),
    Mutation(
        "an account that goes on has as many creates under way as any other",
        "storage/accounts/pauses.py",
        "*others) < CAREFUL_CREATES",
        "*others) < 1_000",
        "tests/storage/accounts/test_careful_accounts.py",
    ),
    Mutation(
        "a trial that never reached the store counts as one",
        "storage/circuit.py",
        "self._trial, self._next_trial_at = None, self._trial_was_due_at",
        "self._trial = None",
        "tests/storage/test_circuit.py::test_trial_without_a_result_is_given_back",
    ),
    Mutation(
        "a file that is refused alone is an outage",
        "storage/errors.py",
        "class ObjectRefused(StoreUnavailable):\n    is_outage = False",
        "class ObjectRefused(StoreUnavailable):\n    is_outage = True",
        "tests/storage/archive/test_store_circuit.py::test_file_that_is_refused_alone_delays_no_other",
    ),
    Mutation(
        "an unsigned delivery gives a task an id of the provider",
        "storage/rows/reports.py",
        "if confirmed and report.provider_task_id is not None:",
        "if report.provider_task_id is not None:",
        UNSIGNED,
    ),
    Mutation(
        "an unsigned delivery at the account URL is applied as the task's own",
        "receiver/tasks/apply_deliveries.py",
        "if not (by_token or confirmed):",
        "if False:",
        STRANGERS,
    ),
    Mutation(
        "a delivery is called confirmed although the read found otherwise",
        "receiver/tasks/apply_deliveries.py",
        "BY_READ if states.agrees(facts, report) else OTHERWISE",
        "BY_READ",
        STRANGERS,
    ),
    Mutation(
        "an unreadable delivery that comes again causes no read",
        "storage/rows/group_commit.py",
        "apply_unreadable_again(self._database, known)",
        "None",
        "tests/receiver/web/test_unreadable.py",
    ),
    Mutation(
        "the body behind an offer of HTTP/2 is lost",
        "receiver/web/http_protocol.py",
        "self._head_without_offer() + data[offer.args[0] :]",
        'self._head_without_offer().replace(b"content-length", b"content-length: 0\\r\\nx-length")',
        BODIES,
    ),
    Mutation(
        "a part of a body passes for the whole",
        "receiver/web/http_protocol.py",
        "if self._delivered != self._announced:",
        "if False:",
        BODIES,
    ),
    Mutation(
        "rows claimed ahead wait behind slow work",
        "receiver/workers/worker.py",
        "self._leases.give_back(batches.take_back(LASTING_SECONDS))",
        "self._leases.give_back([])",
        AHEAD,
    ),
    Mutation(
        "a row that was not begun loses what is known of it",
        "storage/rows/claims.py",
        "settle(session, row, due_in=0, counts=False, losses=row.losses)",
        "settle(session, row, due_in=0, counts=False)",
        AHEAD,
    ),
    Mutation(
        "workers outlive their supervisor",
        "receiver/workers/supervisor.py",
        "for descriptor in (self._alive, self._held_open, self._woken, self._wakes):",
        "for descriptor in (self._alive, self._woken, self._wakes):",
        "tests/receiver/workers/test_supervisor.py",
    ),
    Mutation(
        "more connections than descriptors",
        "receiver/app/process.py",
        "    return connections\n",
        "    return MAX_CONNECTIONS\n",
        "tests/receiver/web/test_connections.py::test_deliveries_are_stored_beside_more_silent_connections_than_descriptors",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.mutations", description=__doc__)
    parser.add_argument("--tests", default="", help="as pytest's -k: only these tests")
    parser.add_argument("--only", default="", help="mutations whose names hold this text")
    given = parser.parse_args()
    good = True
    for mutation in (each for each in MUTATIONS if given.only in each.name):
        failed, reasons, words = run(mutation, ["-k", given.tests] if given.tests else [])
        as_wanted = bool(failed) == bool(mutation.file)
        good = good and as_wanted
        print(f"{'ok  ' if as_wanted else 'BAD '} {mutation.name}: {words}", flush=True)  # noqa: T201
        for line in [f"failed: {name}" for name in failed] + [f"campaign: {reason}" for reason in reasons]:
            print(f"     {line}", flush=True)  # noqa: T201
    return 0 if good else 1


def run(mutation: Mutation, options: Sequence[str]) -> tuple[list[str], list[str], str]:
    """The tests that failed with it, the campaigns' results, and pytest's last line.

    Raises RuntimeError if they could not be run.
    """
    with tempfile.TemporaryDirectory(prefix="receiver-teeth-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_COPIED))
        apply(mutation, tree)
        command = [
            sys.executable,
            "-m",
            "pytest",
            mutation.tests,
            "-p",
            "no:cacheprovider",
            "-rfE",
            *options,
        ]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TEST_SECONDS, check=False
        )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"the tests could not be run:\n{done.stdout[-3_000:]}\n{done.stderr[-3_000:]}")
    failed = re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", done.stdout, re.MULTILINE)
    reasons = Counter(re.findall(r"^E\s+FAILED ([a-z ]+): ", done.stdout, re.MULTILINE))
    told = [f"{count} × {reason}" for reason, count in reasons.items()]
    return failed, told, done.stdout.strip().splitlines()[-1]


def apply(mutation: Mutation, tree: Path) -> None:
    if not mutation.file:
        return
    (tree / mutation.file).write_text(mutated(mutation, tree), encoding="utf-8")


def mutated(mutation: Mutation, tree: Path) -> str:
    """The file with the mutation. Raises RuntimeError if its text does not occur exactly once."""
    before = (tree / mutation.file).read_text(encoding="utf-8")
    if before.count(mutation.text) != 1:
        raise RuntimeError(f"{mutation.file} does not hold this once: {mutation.text}")
    return before.replace(mutation.text, mutation.instead)


if __name__ == "__main__":
    sys.exit(main())
