"""The command line. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import receiver
from receiver.base.collector import collector_paused

with collector_paused():  # collections over the imports were a sixth of `--help`
    import typer

    from receiver.base.visible import visible
    from receiver.cli import archive, batch, check, events, operate, serve, status, submit
    from receiver.cli.terminal import say
    from receiver.cli.trial import demo, sandbox

app = typer.Typer(
    name="receiver",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120},
    rich_markup_mode=None,  # drawing boxes takes longer than the rest of `--help`
    help="Submit requests to an image model, receive its callbacks, "
    "and archive its pictures byte for byte in S3-compatible storage.\n\n"
    "New here? `receiver demo` shows everything working on this machine, without an account.",
)
VERBS: tuple[Callable[..., None], ...] = (
    *(serve.serve, serve.work, submit.submit, status.status, check.check, serve.migrate, sandbox.sandbox, demo.demo),
    *(operate.retry, operate.replay, operate.reconcile, operate.adopt, operate.dismiss, operate.prune),
    *(archive.audit, archive.rebuild, archive.export, archive.delete),
)
for verb in VERBS:
    app.command()(verb)
app.add_typer(batch.app, name="batch")
app.add_typer(events.app, name="events")


def _version(wanted: bool) -> None:
    if wanted:
        say(receiver.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _open_standard_streams() -> None:
    """Open /dev/null in place of each standard stream that was closed before the start. Otherwise a socket or the
    database would get its number, and with it all that is printed.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the least free number
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))


def main() -> None:
    """Entry point. A known fault prints its own lines and exits with 1; anything else is a bug with a traceback."""
    _open_standard_streams()
    threading.excepthook = lambda bug: _show_bug(bug.exc_value) if bug.exc_value else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as Ctrl-C: a command says what it leaves
    try:
        _refuse_undecodable(sys.argv[1:])
        code = app(standalone_mode=False) or 0
    except typer.exceptions.TyperException as error:
        code = _show_usage(error)
    except typer.Abort:
        _show("Aborted!")
        code = 1
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:  # noqa: BLE001 - shown whole, but for secrets
        _show(str(error)) if _is_known(error) else _show_bug(error)
        code = 1
    sys.exit(code)


def _refuse_undecodable(words: Sequence[str]) -> None:
    """Refuse arguments with bytes that are no text. They become lone surrogates, which no database stores."""
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word) and not os.path.lexists(word):
            raise typer.BadParameter(f"{word} is not {sys.getfilesystemencoding()} text")


def _show_usage(error: Any) -> int:
    """Print typer's usage error, which may quote a foreign file name. Returns the exit code."""
    if type(error).__name__ != "NoArgsIsHelpError":  # its message is the help, and its class is private to typer
        error.message = visible(error.message)
    shown = io.StringIO()
    error.show(file=shown)
    _show(shown.getvalue().rstrip())
    return int(error.exit_code)


def _show_bug(error: BaseException) -> None:
    import traceback

    _show("".join(traceback.format_exception(error)).rstrip())


def _show(text: str) -> None:
    """Print one of our own messages, without anything that looks like a secret."""
    from receiver.base.telemetry import scrub

    say(*scrub(text).split("\n"), err=True)


def _is_known(error: Exception) -> bool:
    from storage.errors import DatabaseUnavailable, StoreUnavailable, UserError

    return isinstance(error, UserError | DatabaseUnavailable | StoreUnavailable)
