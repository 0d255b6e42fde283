"""The command `submit`."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from receiver.cli.opening import opened
from receiver.cli.options import AllowHttp, Store
from receiver.cli.terminal import OutputFailed, say, say_json
from storage.errors import DatabaseUnavailable, UserError
from storage.keys import as_argument

if TYPE_CHECKING:
    from receiver.app.wiring import Parts
    from storage.rows.models import Task


Images = Annotated[
    list[str] | None, typer.Option(help="Reference image: https URL or a file (jpg, png, ≤ 10 MB). Repeatable.")
]
RequestFile = Annotated[
    Path | None, typer.Option(help="Read the request from a JSON file (- for standard input) instead.")
]
ExternalId = Annotated[str | None, typer.Option(help="The task's external id.", show_default="a fresh UUID")]
Adopt = Annotated[bool, typer.Option("--adopt", help="Take over a task that has this id at the provider.")]
BatchFile = Annotated[
    str | None,
    typer.Option("--batch", metavar="FILE", help="Send all requests of a JSON lines or CSV file (- for stdin)."),
]
BatchName = Annotated[
    str | None, typer.Option(help="Name of the batch. Ids contain it.", show_default="the file's name")
]
Format = Annotated[
    Literal["jsonl", "csv"] | None,
    typer.Option(help="Format of the batch's file.", show_default="by its name or header"),
]
Prices = Annotated[
    Path | None, typer.Option(help="Price table for --dry-run, as JSON.", show_default="Kling's of 2026-09")
]
Reports = Annotated[list[Path] | None, typer.Option(help="Write a batch's final report, JSON or .csv. Repeatable.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait until the pictures are archived, with progress.")]

# A picture of 300 by 300 pixels, the fewest that are accepted, has 124 in one colour as a PNG of one bit.
MIN_BASE64_CHARS = 100


# Longer than usual, because typer needs every option as a parameter.
def submit(
    model_name: Annotated[str | None, typer.Option(help="The model: kling-image-o1 or kling-v3-omni.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The prompt: at most 2,500 characters; inputs as <<<image_1>>>.")
    ] = None,
    image: Images = None,
    element_id: Annotated[list[int] | None, typer.Option(help="Element to use. Repeatable.")] = None,
    resolution: Annotated[
        str | None, typer.Option(help="The resolution: 1k, 2k, or 4k where the model has it.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="How many pictures: 1 to 9.")] = None,
    result_type: Annotated[str | None, typer.Option(help="The kind of result: single or series.")] = None,
    series_amount: Annotated[str | None, typer.Option(help="Pictures of a series: 2 to 9, or auto.")] = None,
    aspect_ratio: Annotated[str | None, typer.Option(help="One of 16:9 9:16 1:1 4:3 3:4 3:2 2:3 21:9 auto.")] = None,
    watermark: Annotated[bool | None, typer.Option(help="Also ask for watermarked copies.")] = None,
    request: RequestFile = None,
    external_task_id: ExternalId = None,
    adopt: Adopt = False,
    batch_file: BatchFile = None,
    name: BatchName = None,
    format: Format = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check a batch and print its price.")] = False,
    prices: Prices = None,
    report: Reports = None,
    wait: Wait = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the task as JSON.")] = False,
    store: Store = None,
    allow_http: AllowHttp = False,
) -> None:
    """Send a request for pictures. Prints the external id; with --wait also the s3:// addresses of archived files.

    --batch checks a whole file and inserts all its lines, or lists every fault and sends nothing. The same file with
    the same name continues with what is missing. Paying again needs another --name.
    """
    from receiver.cli import batch

    given = _fields(
        image, element_id, watermark, model_name=model_name, prompt=prompt, resolution=resolution, n=n,
        result_type=result_type, series_amount=series_amount, aspect_ratio=aspect_ratio,
    )  # fmt: skip
    if batch_file is None:
        if name or format or dry_run or prices or report:
            raise typer.BadParameter("--name, --format, --dry-run, --prices and --report belong to --batch")
        fields = {**_from_file(request), **given}
        with opened(allow_http, migrate=True, store=store, asks_provider=True, pays=True) as parts:
            if external_task_id is None:
                named = fields.get("external_task_id")
                external_task_id = str(uuid.uuid4()) if named in (None, "") else named
            with _named(external_task_id, DatabaseUnavailable):
                task = _submit(parts, fields, external_task_id, adopt)
            with _named(external_task_id):
                _answer(parts, task, wait=wait, as_json=as_json)
    elif given or request or external_task_id or adopt:
        raise typer.BadParameter("the file contains the request: remove the other fields", param_hint="--batch")
    else:
        batch.submit(
            batch_file, name=name, format=format, dry_run=dry_run, prices=prices, report=report or (),
            wait=wait, as_json=as_json, allow_http=allow_http, store=store,
        )  # fmt: skip


def _fields(
    image: list[str] | None, element_id: list[int] | None, watermark: bool | None, **plain: Any
) -> dict[str, Any]:
    """The fields of the request that the options give."""
    fields = {
        "image_list": [{"image": _image(one)} for one in image or []] or None,
        "element_list": [{"element_id": one} for one in element_id or []] or None,
        "watermark_info": None if watermark is None else {"enabled": watermark},
        **plain,
    }
    return {field: value for field, value in fields.items() if value is not None}


def _image(given: str) -> str:
    """A URL or Base64 unchanged, or a file's bytes as Base64."""
    import base64
    import os

    if given.startswith(("http://", "https://", "data:")):
        return given
    # os.path, because a Path raises for Base64 that is longer than a file name
    if not os.path.isfile(given):
        if _looks_like_a_file(given):
            raise typer.BadParameter(f"{given}: no such file", param_hint="--image")
        return given
    return base64.b64encode(Path(given).read_bytes()).decode()


def _looks_like_a_file(given: str) -> bool:
    """Whether it has a dot, which no Base64 has, or a slash, and is too short for a picture's Base64."""
    return "://" not in given and ("." in given or ("/" in given and len(given) < MIN_BASE64_CHARS))


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        text = typer.get_text_stream("stdin").read() if str(path) == "-" else path.read_text(encoding="utf-8-sig")
        fields = json.loads(text.removeprefix("\ufeff"))
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error.strerror}", param_hint="--request") from None
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{path} is not UTF-8 text; save it as UTF-8", param_hint="--request") from None
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{path} is not JSON: {error}", param_hint="--request") from None
    if not isinstance(fields, dict):
        raise typer.BadParameter(f"{path} holds no JSON object", param_hint="--request")
    return fields


@contextmanager
def _named(external_task_id: str, *told: type[Exception]) -> Iterator[None]:
    """Name the task where Ctrl-C or a fault ends the command, because it may be paid by now.

    `told`: faults that name it themselves if it may be paid.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, OutputFailed) or not isinstance(error, (UserError, typer.Exit, *told)):
            option = f"--external-task-id {as_argument(external_task_id)}"
            with suppress(OutputFailed, BrokenPipeError):
                say(f"the task is {external_task_id}; the same command with `{option}` sends nothing twice", err=True)
        raise


def _submit(parts: Parts, fields: dict[str, Any], external_task_id: str, adopt: bool) -> Task:
    fields.pop("external_task_id", None)
    fields.pop("callback_url", None)
    request = parts.submitter.parse(fields)
    for warning in request.warnings():
        say(f"warning: {warning}", err=True)
    from receiver.cli import show
    from storage.states import TaskState

    submitted = parts.submitter.submit(request, external_task_id=external_task_id, adopt=adopt)
    with suppress(OutputFailed, BrokenPipeError):  # standard output may still take the id
        if not submitted.new:
            say("the same request was submitted before; nothing was sent", err=True)
        elif submitted.task.queued_at is not None:
            why = "; ".join(show.pausing(parts, submitted.task)) or "all slots of the account are held"
            say(f"{why}: a worker sends it when its turn comes", err=True)
        elif submitted.task.state is TaskState.CREATED and submitted.task.note:
            say(f"the provider has not accepted it yet ({submitted.task.note}): a worker tries again; "
                "`receiver check` checks its address", err=True)  # fmt: skip
    return submitted.task


def _answer(parts: Parts, task: Task, *, wait: bool, as_json: bool) -> None:
    try:
        if wait:
            _wait(parts, task, as_json)
        else:
            _acknowledge(parts, task, as_json)
    except (KeyboardInterrupt, SystemExit):  # SIGTERM
        command = f"receiver status {as_argument(task.external_task_id)}"
        say(f"stopped waiting; the workers go on; `{command}` shows the task", err=True)
        raise typer.Exit(1) from None


def _acknowledge(parts: Parts, task: Task, as_json: bool) -> None:
    from receiver.cli import show
    from storage.operations import heartbeats
    from storage.states import TaskState

    if as_json:
        _print(parts, task)
    else:
        say(task.external_task_id)
    if task.state is TaskState.FAILED:
        say(f"failed: {task.error}", err=True)
        raise typer.Exit(1)
    if not heartbeats.count_alive(parts.database):
        say(show.no_worker(parts, " on this database"), err=True)


def _wait(parts: Parts, task: Task, as_json: bool) -> None:
    from receiver.cli import show
    from storage.states import ArchiveState

    if not as_json:
        say(task.external_task_id)  # before the wait, which may be killed: the id of the paid task is known then
    finished = show.wait(parts, task.external_task_id)
    if as_json:
        _print(parts, task)
    if finished is None:
        say(f"submitted, but {show.no_worker(parts)}", err=True)
        raise typer.Exit(1)
    if not as_json:
        say(*show.uris(parts, finished))
    if finished.archive is not ArchiveState.ARCHIVED:
        say(f"{finished.state}: {finished.error or finished.note or finished.archive}", err=True)
        raise typer.Exit(1)


def _print(parts: Parts, task: Task) -> None:
    from receiver.tasks import task_view

    say_json(task_view.report(parts.database, parts.bucket, task.external_task_id), indent=1)
