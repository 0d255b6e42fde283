"""Commands about the archive: audit, rebuild, export, delete."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from receiver.base.visible import visible
from receiver.cli.opening import opened
from receiver.cli.options import DryRun, Json, Since, Until
from receiver.cli.terminal import json_text, say, say_json, write, writing_to
from storage.operations.counted import counted

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from receiver.app.wiring import Parts
    from receiver.cli.audit_log import AuditLog
    from storage.archive.audit import Audit, Batch, Counts, Finding
    from storage.archive.repair import Repairer
    from storage.bucket.bucket import Bucket
    from storage.rows.models import Task

# The longest that a single request to a healthy store takes. Its timeout is 60 s, and it is repeated once.
STALLED_SECONDS = 15.0
REPAIR = "`receiver audit --repair` makes due again what a worker can fetch or write again"


def audit(
    deep: Annotated[bool, typer.Option("--deep", help="Read every file back and hash it.")] = False,
    sample: Annotated[int | None, typer.Option(help="Hash only this many files, chosen at random.", min=1)] = None,
    max_bytes_per_second: Annotated[
        int | None, typer.Option(help="Limit of the read rate of all files together.", min=1)
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Store findings and progress in this file, and continue from it."),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make faults due that a worker can repair by fetching or writing again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare rows and objects in both directions: missing, unknown, damaged, absent or different manifests.

    Exit code 1 if there is a fault. Sizes and manifests are always checked, files with --deep or --sample. Changes
    no task and no object without --repair, which moves a damaged file to a key with its own hash before it is fetched
    again.
    """
    from storage.archive.audit import Audit
    from storage.archive.repair import Repairer

    with opened(starts_store=True) as parts:
        looking = Audit(
            parts.database, parts.bucket, deep=deep or sample is not None, sample=sample,
            max_bytes_per_second=max_bytes_per_second,
        )  # fmt: skip
        repairer = Repairer(parts.database, parts.bucket, parts.schedule, spool_dir=parts.settings.spool_dir)
        with writing_to(resume) if resume else nullcontext():
            counts = _print_audit(looking, resume, repairer if repair else None, as_json)
    if counts.faults:
        if not repair and not as_json:
            say(REPAIR, err=True)
        raise typer.Exit(1)


def rebuild(
    deep: Annotated[bool, typer.Option("--deep", help="Read every file back and hash it.")] = False,
    as_json: Json = False,
) -> None:
    """Restore rows from the bucket alone: every finished task and its files, from verified manifests.

    May be repeated: existing tasks are not changed. Exit code 1 if something could not be restored. Each such item is
    listed with the command that restores it.
    """
    from collections import Counter

    from storage.archive.rebuild import Rebuild
    from storage.rows import events

    counts: Counter[str] = Counter()

    def problems() -> Iterator[Any]:
        for restored in Rebuild(parts.database, parts.bucket, deep=deep).run():
            counts.update(restored.counts)
            counts["problems"] += len(restored.problems)
            advance(restored.counts["folders"])
            yield from restored.problems

    with opened(migrate=True, starts_store=True) as parts, _progress("rebuilding", parts.bucket, None) as advance:
        with parts.database.write() as session:
            events.skip_numbers(session)  # above those of the rows that are lost
        _write_list("problems", problems(), as_json, _problem_line)
    if as_json:
        _close_json(counts, is_good=not counts["problems"])
    else:
        restored = f"restored {counted(counts['tasks'], 'task')} with {counted(counts['assets'], 'file')}"
        known = counted(counts["known"], "was there already", "were there already")
        say(f"{restored}; {known}; {counted(counts['problems'], 'problem')}")
    if counts["problems"]:
        raise typer.Exit(1)


def _problem_line(problem: Any) -> str:
    return f"{problem.key}: {problem.detail}" + (f"; try `{problem.advice}`" if problem.advice else "")


def export(
    folder: Annotated[Path, typer.Argument(help="Folder for the files. Created if missing.")],
    task: Annotated[list[str] | None, typer.Option(help="External id of a task. Repeatable.")] = None,
    since: Since = None,
    until: Until = None,
    everything: Annotated[bool, typer.Option("--all", help="Export every task.")] = False,
    as_json: Json = False,
) -> None:
    """Copy archived files and manifests into a folder, and verify each hash on the way.

    Exit code 1 if a file is missing or corrupted: it is named and left out. A loss that `receiver dismiss` accepted is
    named, too, and is no fault. It may be repeated: existing files are verified and kept.
    """
    if not (task or since or until or everything):
        raise typer.BadParameter("select tasks: --task, --since, --until or --all")
    from storage.archive.export import Export

    files = copied_bytes = 0
    faults: list[dict[str, str]] = []
    accepted: list[dict[str, str]] = []
    again = "; repeat the command then: the files that are there are kept"
    with (
        opened(starts_store=True) as parts,
        writing_to(folder, again),
        _progress("exporting", parts.bucket, None) as advance,
    ):
        for exported in Export(parts.database, parts.bucket, folder).run(_chosen(parts, task, since, until)):
            advance(1)
            files, copied_bytes = files + exported.files, copied_bytes + exported.bytes
            for key, detail in exported.faults:
                faults.append({"task": exported.task, "key": key, "detail": detail})
                say(f"{key}: {detail}", err=True)
            for key, detail in exported.accepted:
                accepted.append({"task": exported.task, "key": key, "detail": detail})
                say(f"accepted  {key}: {detail}", err=True)
    if as_json:
        done = {"files": files, "bytes": copied_bytes, "faults": faults, "accepted": accepted}
        say_json({"ok": not faults, **done})
    else:
        lost = f"; {len(accepted):,} accepted as lost" if accepted else ""
        say(
            f"{counted(files, 'file')}, {copied_bytes:,} bytes, all verified; "
            f"{len(faults):,} could not be exported{lost}"
        )
    if faults:
        raise typer.Exit(1)


def delete(
    external_task_id: Annotated[str, typer.Argument(help="The task to delete.")],
    yes: Annotated[bool, typer.Option("--yes", help="Delete without a question.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Remove a task's files and manifests permanently, and erase its prompt and URLs. Its row stays and says so.

    Removes all versions of every object in its folder. Refused while the task is not over, and under Object Lock.
    """
    from receiver.tasks import task_view
    from storage.archive import delete as deletion

    with opened(starts_store=True) as parts:
        external_task_id = task_view.find(parts.database, external_task_id)[0].external_task_id
        if dry_run:
            _, _, folders = deletion.objects_of_task(parts.database, parts.bucket, external_task_id)
            _show_deletable([each.key for folder in sorted(folders) for each in parts.bucket.list(folder)], as_json)
            return
        if not yes:
            typer.confirm(f"Delete {visible(external_task_id)} and its files for good?", abort=True, err=True)
        done = deletion.delete(parts.database, parts.bucket, external_task_id)
    if as_json:
        say_json({"ok": True, "dry_run": False, **vars(done)})
    else:
        before = "; it had been deleted before" if done.again else ""
        say(f"deleted; {counted(done.objects, 'object')} removed{before}")


def _show_deletable(keys: list[str], as_json: bool) -> None:
    if as_json:
        say_json({"ok": True, "dry_run": True, "keys": keys})
    else:
        say("dry run, nothing was deleted:", *keys)


def _chosen(parts: Parts, names: list[str] | None, since: datetime | None, until: datetime | None) -> Iterator[Task]:
    from receiver.tasks import task_view
    from storage.archive.export import tasks_between

    if names:
        return iter([task_view.find(parts.database, name)[0] for name in names])
    return tasks_between(parts.database, since, until)


def _print_audit(looking: Audit, resume: Path | None, repairer: Repairer | None, as_json: bool) -> Counts:
    from receiver.cli.audit_log import AuditLog
    from storage.archive.audit import Counts

    log = AuditLog(resume) if resume else None
    counts = Counts.from_json(log.counts.as_json()) if log else Counts()
    total = counts.assets + looking.count_assets(log.after if log else "")
    with _progress("auditing", looking.bucket, total, counts.assets) as advance:
        _write_list("findings", _findings(looking, log, repairer, counts, advance), as_json, _finding_line)
    if log:
        log.end()
    if as_json:
        _close_json(counts.as_json(), is_good=not counts.faults)
    else:
        say(_audit_line(counts))
    return counts


def _findings(
    looking: Audit, log: AuditLog | None, repairer: Repairer | None, counts: Counts, advance: Callable[[int], None]
) -> Iterator[Finding]:
    """Yield the findings of an earlier run, then the new ones. Each batch is stored before it is printed."""
    if log:
        yield from log.findings()
    for batch in looking.run(log.after if log else "", counts.hashed):
        repaired = _repaired(batch, repairer)
        if log:
            log.add(repaired)
        counts.add(repaired.counts)
        advance(repaired.counts.assets)
        yield from repaired.findings


def _repaired(batch: Batch, repairer: Repairer | None) -> Batch:
    if repairer is None:
        return batch
    return replace(batch, findings=[replace(each, repair=repairer.repair(each)) for each in batch.findings])


def _audit_line(counts: Counts) -> str:
    files = f"{counted(counts.assets, 'file')} in {counted(counts.folders, 'folder')}"
    looked = f"{files}, {counts.hashed:,} of them read and hashed"
    found = ", ".join(f"{kind.replace('_', ' ')}: {count:,}" for kind, count in sorted(counts.found.items()))
    return f"{looked}; {found or 'nothing is wrong'}"


def _finding_line(finding: Finding) -> str:
    return f"{finding.kind}  {finding.key}: {finding.detail}" + (f"; {finding.repair}" if finding.repair else "")


def _write_list(name: str, items: Iterable[Any], as_json: bool, line: Callable[[Any], str]) -> None:
    """Print each item when it arrives, so that a million of them need no memory. The JSON object is left open."""
    if as_json:
        write(f'{{"{name}": [')
    for number, item in enumerate(items):
        if as_json:
            write((",\n" if number else "\n") + json_text(item.as_json()))
        else:
            say(line(item))
    if as_json:
        write("]")


def _close_json(counts: Any, *, is_good: bool) -> None:
    write(f', "counts": {json_text(counts)}, "ok": {json_text(is_good)}}}\n')


@contextmanager
def _progress(what: str, bucket: Bucket, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, if that is a terminal, and everywhere a log line while nothing advances."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from storage.background import background_thread

    console, went_on = Console(file=sys.stderr, markup=False, highlight=False, soft_wrap=True), threading.Event()

    def watch(ended: threading.Event) -> None:
        while not ended.wait(STALLED_SECONDS):
            if not went_on.is_set():
                console.print(f"{what}: nothing was finished for {STALLED_SECONDS:g} s, waiting for {bucket.place}")
            went_on.clear()

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(what, total=total, completed=done)

        def advance(count: int) -> None:
            went_on.set()
            progress.advance(bar, count)

        with background_thread("progress", watch):
            yield advance
