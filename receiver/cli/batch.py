"""Commands for many requests at once: submit --batch, and batch status, retry, export, list."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import typer

from receiver.cli.opening import opened
from receiver.cli.options import AllowHttp, DryRun, Json
from receiver.cli.terminal import CsvOutput, JsonOutput, cell, say, say_json, say_tally, writing_to
from storage.keys import as_argument
from storage.operations.counted import counted

if TYPE_CHECKING:
    from receiver.app.wiring import Parts
    from receiver.batch.batch import Batches, Plan
    from receiver.batch.batch_file import BatchInvalid, Line
    from receiver.providers.base import Estimate
    from storage.accounts.batches import Counts

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Submitted batches: progress, retries, reports. `receiver submit --batch FILE` submits one.",
)

Name = Annotated[str, typer.Argument(help="Name of the batch, as in `receiver batch list`.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait until all its tasks are over, with progress.")]
# Faults that are printed; `--json` has all. A file with more usually has the same fault in every line.
MAX_SHOWN = 200


@app.command("status")
def status(name: Name, wait: Wait = False, as_json: Json = False) -> None:
    """Show the progress of a batch. Exit code 1 unless all its tasks are archived."""
    with opened(needs_bucket=False) as parts:
        counts = _watch(parts, name) if wait else _batches(parts).counts(name)
        _show(parts, name, counts, as_json=as_json)


@app.command("list")
def list_(limit: Annotated[int, typer.Option(min=1, max=1_000)] = 20, as_json: Json = False) -> None:
    """List the newest batches and their progress."""
    from receiver.batch.batch_view import words

    with opened(needs_bucket=False) as parts:
        found = _batches(parts).newest(limit)
    if as_json:
        say_json([{"batch": batch.name, **_counts(counts)} for batch, counts in found])
        return
    for batch, counts in found:
        say(f"{batch.created_at:%Y-%m-%d %H:%M}  {batch.name}  {words(counts)}")


@app.command("retry")
def retry(
    name: Name,
    as_new: Annotated[
        str | None,
        typer.Option("--as", metavar="NAME", help="Submit what failed at the provider as new tasks of this new batch."),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    allow_http: AllowHttp = False,
) -> None:
    """Try again what failed: files that were given up, and creates that the provider refused (these cost nothing).

    Tasks that failed at the provider are only read again. With --as they alone are submitted, as new tasks that are
    paid for again; --dry-run prints their price. Dismissed tasks are left alone.
    """
    with opened(allow_http, asks_provider=True) as parts:
        if as_new is not None:
            _submit_again(parts, name, as_new, dry_run=dry_run, as_json=as_json)
            return
        tally = _batches(parts).retry(name, dry_run=dry_run)
        failed = _batches(parts).failed_at_provider(name)
    if failed:
        say(f"{failed:,} failed at the provider and are only read again: {_again(name)}", err=True)
    say_tally(tally, dry_run, as_json, f"nothing of it failed; {_shown(name)}")


def _shown(name: str) -> str:
    return f"`receiver batch status {as_argument(name)}` shows how it stands"


def _again(name: str) -> str:
    return f"`receiver batch retry --as NAME {as_argument(name)}` submits them as new tasks, paid for again"


def _submit_again(parts: Parts, name: str, new_name: str, *, dry_run: bool, as_json: bool) -> None:
    from receiver.batch.batch_file import BatchInvalid

    try:
        plan, left = _batches(parts).plan_again(name, new_name)
        if not (plan.new or plan.known or left or as_json):
            say("nothing to do")
            say(f"nothing of {name} failed at the provider; {_shown(name)}", err=True)
        elif dry_run:
            _show_estimate(parts, plan, plan.new, None, as_json=as_json)
        else:
            _show_put(parts, plan, _put(parts, plan), as_json=as_json)
    except BatchInvalid as error:
        _show_faults(new_name, error, as_json=as_json)
        raise typer.Exit(1) from None
    for external_id, why in list(left.items())[:MAX_SHOWN]:
        say(f"{external_id}: {why}", err=True)
    if left:
        raise typer.Exit(1)


@app.command("export")
def export(
    name: Name,
    output: Annotated[
        Path | None,
        typer.Option(help="Write to this file, as CSV if its name ends with .csv.", show_default="standard output"),
    ] = None,
    format: Annotated[Literal["json", "csv"], typer.Option(help="The format on standard output.")] = "json",
) -> None:
    """Write the report: every task in the order of the file, with the keys of its archived files."""
    from receiver.batch import batch_report

    with opened(needs_bucket=False) as parts:
        lines = batch_report.lines(parts.database, _batches(parts), name)
        _batches(parts).counts(name)  # fails for an unknown batch before the file is created
        if output is not None and str(output) != "-":
            with writing_to(output):
                batch_report.write(output, name, lines)
        elif format == "csv":
            batch_report.write_csv(CsvOutput(), lines)
        else:
            batch_report.write_json(JsonOutput(), name, lines)


def submit(
    file: str,
    *,
    name: str | None,
    format: str | None,
    dry_run: bool,
    prices: Path | None,
    report: Sequence[Path],
    wait: bool,
    as_json: bool,
    allow_http: bool,
    store: Path | None,
) -> None:
    """`receiver submit --batch FILE`. Inserts rows, which workers send."""
    if report and not wait:
        raise typer.BadParameter("needs --wait; `receiver batch export` writes the report later", param_hint="--report")
    is_file_name, name = name is None, name or _name_of(file)
    if not dry_run:
        for path in report:
            _check_report(path, file)
    from receiver.batch.batch_file import BatchInvalid

    with _parts_of(allow_http, store, dry_run=dry_run) as parts:
        try:
            plan, lines = _plan(parts, file, name, format, is_file_name=is_file_name)
            if dry_run:
                _show_estimate(parts, plan, lines, prices, as_json=as_json)
                return
            new = _put(parts, plan)
            name = plan.name
        except BatchInvalid as error:
            _show_faults(file, error, as_json=as_json)
            if is_file_name and not as_json and any(not fault.line for fault in error.faults):
                say("--name NAME gives the batch a name", err=True)
            raise typer.Exit(1) from None
        except (KeyboardInterrupt, SystemExit):  # SIGTERM
            again = "stopped: the inserted lines go on; the same command inserts the rest, and none twice"
            say(again, err=True)
            raise typer.Exit(1) from None
        if wait:
            _show(parts, name, _watch(parts, name, report), as_json=as_json)
        else:
            _show_put(parts, plan, new, as_json=as_json)


def _check_report(path: Path, file: str) -> None:
    """Refuse a report that could not be written before anything is sent: a batch may take all night."""
    from receiver.batch import batch_report

    if str(path) == "-":
        raise typer.BadParameter("name a file; `receiver batch export` prints the report", param_hint="--report")
    if path.exists() and Path(file).exists() and path.samefile(file):
        raise typer.BadParameter(f"{path} is the batch itself", param_hint="--report")
    with writing_to(path):
        batch_report.check(path)


def _name_of(file: str) -> str:
    """The batch's name from its file. A pipe has none: its name is its descriptor's number, and ids contain the name,
    so the same lines would be paid twice.
    """
    path = Path(file)
    if file == "-" or (path.exists() and not path.is_file() and not path.is_dir()):
        what = "standard input" if file == "-" else f"{file} (no regular file)"
        raise typer.BadParameter(f"{what} has no name: give --name", param_hint="--name")
    return path.stem


@contextmanager
def _parts_of(allow_http: bool, store: Path | None, *, dry_run: bool) -> Iterator[Parts]:
    """The parts of any command that makes rows. A dry run neither makes nor needs a database."""
    if not dry_run:
        with opened(allow_http, migrate=True, store=store, asks_provider=True) as parts:
            yield parts
        return
    with opened(allow_http, ready=False, store=store) as parts:
        from receiver.app import process

        if not _is_missing(parts):
            process.ready_schema(parts.database, migrate=False)
        yield parts


def _is_missing(parts: Parts) -> bool:
    return parts.database.is_sqlite and not Path(parts.database.url.database or "").exists()


def _batches(parts: Parts) -> Batches:
    from receiver.batch.batch import Batches

    return Batches(parts.database, parts.submitter, parts.schedule)


def _plan(parts: Parts, file: str, name: str, format: str | None, *, is_file_name: bool) -> tuple[Plan, list[Line]]:
    named = format or Path(file).suffix.lstrip(".").lower()
    kind: Literal["csv", "jsonl"] | None = "csv" if named == "csv" else "jsonl" if named == "jsonl" else None
    if file == "-":
        return _read(parts, sys.stdin.buffer, kind, name, is_file_name=is_file_name)
    try:
        with Path(file).open("rb") as opened:
            return _read(parts, opened, kind, name, is_file_name=is_file_name)
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}", param_hint="--batch") from None


def _read(
    parts: Parts, file: BinaryIO, kind: Literal["csv", "jsonl"] | None, name: str, *, is_file_name: bool
) -> tuple[Plan, list[Line]]:
    """The file compared with the rows. A dry run may have no database."""
    from receiver.batch import batch_file
    from receiver.batch.batch import Plan

    of = _batches(parts)
    if not _is_missing(parts):
        return of.read(file, kind, name, is_file_name=is_file_name)
    lines = batch_file.read(file, kind, name, of.check)
    return Plan(name, new=lines), lines


def _put(parts: Parts, plan: Plan) -> int:
    """Insert the rows. Returns how many were new, because another command may insert the same file's meanwhile."""
    from rich.console import Console

    with Console(stderr=True).status(cell(f"{plan.name}: putting in")) as status:
        total = len(plan.new)
        return _batches(parts).put(plan, lambda done: status.update(cell(f"{plan.name}: {done:,} of {total:,} put in")))


def _watch(parts: Parts, name: str, report: Sequence[Path] = ()) -> Counts:
    """Wait until the batch is over. Ctrl-C prints the command that shows the progress again."""
    from rich.console import Console

    from receiver.batch import batch_report, batch_view
    from receiver.cli import show
    from storage.operations import heartbeats

    of = _batches(parts)
    counts = of.counts(name)
    try:
        if counts.over < counts.total and not show.await_worker(parts):
            say(f"{name}: {batch_view.words(counts)}")
            say(show.no_worker(parts, ", so nothing is sent"), err=True)
            raise typer.Exit(1)
        counts = batch_view.watch(
            lambda: of.counts(name),
            lambda: heartbeats.count_alive(parts.database),
            Console(stderr=True),
            lambda: show.pausing(parts),
            lambda: show.waiting(parts),
        )
    except (KeyboardInterrupt, SystemExit):  # SIGTERM
        say(f"stopped watching; the workers go on; {_next(name)}", err=True)
        raise typer.Exit(1) from None
    for path in report:
        with writing_to(path, f"; `receiver batch export --output FILE {as_argument(name)}` writes it again"):
            batch_report.write(path, name, batch_report.lines(parts.database, of, name))
    return counts


def _counts(counts: Counts) -> dict[str, Any]:
    return {**vars(counts), "total": counts.total}


def _show(parts: Parts, name: str, counts: Counts, *, as_json: bool) -> None:
    from receiver.batch.batch_view import words
    from receiver.cli import show
    from receiver.tasks.task_view import is_over

    paused = show.pausing(parts)
    with parts.database.read() as session:
        held, limit = sum(parts.slots.held(session).values()), parts.slots.limit(session)
    failures = [task for task in _batches(parts).failures(name) if is_over(task)]
    if as_json:
        slots = {"held": held, "limit": limit, "setting": parts.slots.setting}
        failed = [{"external_task_id": task.external_task_id, "error": task.error or task.note} for task in failures]
        say_json({"batch": name, **_counts(counts), "slots": slots, "paused": paused, "failures": failed})
    else:
        say(f"{name}: {words(counts)}")
        say(f"slots of the account: {held} held of {limit}" if limit else f"slots of the account: {held} held")
        say(*paused)
        for task in failures:
            say(f"line {task.batch_line}: {task.external_task_id}: {task.error or task.note}", err=True)
    if counts.archived < counts.total:
        raise typer.Exit(1)


def _show_put(parts: Parts, plan: Plan, new: int, *, as_json: bool) -> None:
    from receiver.cli import show
    from storage.operations import heartbeats

    alive = heartbeats.count_alive(parts.database)
    known = plan.known + len(plan.new) - new
    found = {"batch": plan.name, "new": new, "known": known, "left_over": plan.left_over}
    if as_json:
        say_json({**found, "workers": alive})
    else:
        say(f"{plan.name}: {new:,} new, {known:,} submitted before; {_next(plan.name)}")
    if plan.left_over:
        say(f"not in the file: {counted(plan.left_over, 'task')} of this batch, which go on all the same", err=True)
    say(*show.pausing(parts), err=True)
    if not alive:
        say(show.no_worker(parts, ", so nothing is sent yet"), err=True)


def _next(name: str) -> str:
    return f"`receiver batch status --wait {as_argument(name)}` watches it"


def _show_estimate(parts: Parts, plan: Plan, lines: Sequence[Line], prices: Path | None, *, as_json: bool) -> None:
    from receiver.providers.base import PricesUnreadable

    try:
        found = parts.kling.estimate((line.request.wire() for line in plan.new), prices)
    except PricesUnreadable as error:
        raise typer.BadParameter(str(error), param_hint="--prices") from None
    warnings = {warning for line in lines for warning in line.request.warnings()}
    if as_json:
        known = {"batch": plan.name, "dry_run": True, "new": len(plan.new), "known": plan.known}
        say_json({**known, **found.as_dict(), "warnings": sorted(warnings)})
        return
    say(f"{plan.name}: {len(plan.new):,} new, {plan.known:,} submitted before; dry run, nothing was written")
    say(_cost(found))
    for warning in sorted(warnings)[:MAX_SHOWN]:
        say(f"warning: {warning}", err=True)


def _cost(found: Estimate) -> str:
    most = "at most " if found.auto else ""
    text = f"{most}{counted(found.pictures, 'picture')} ({counted(found.slots, 'slot')})"
    if found.unpriced < found.pictures or not found.pictures:
        text += f", {most}{found.units:,f} units = {most}{found.usd:,.3f} USD by prices of {found.date}"
    if found.auto:
        series = counted(found.auto, "series of automatic length counts", "series of automatic length count")
        text += f"; {series} as nine pictures"
    if found.unpriced:
        text += f"; no price is known for {found.unpriced:,} of the pictures"
    return text


def _show_faults(file: str, error: BatchInvalid, *, as_json: bool) -> None:
    if as_json:
        faults = [fault._asdict() for fault in error.faults]
        say_json({"ok": False, "inserted": error.inserted, "faults": faults})
        return
    for fault in error.faults[:MAX_SHOWN]:
        say(f"{file}:{fault.line}: {fault.text}", err=True)
    if len(error.faults) > MAX_SHOWN:
        say(f"… and {len(error.faults) - MAX_SHOWN:,} more; --json shows all", err=True)
    sent = (
        f"{counted(error.inserted, 'line was', 'lines were')} put in before and will be sent"
        if error.inserted
        else "nothing was sent"
    )
    say(f"{counted(len(error.faults), 'fault')}; {sent}", err=True)
