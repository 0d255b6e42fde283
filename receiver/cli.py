"""The command line. Every verb imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import receiver
from receiver.commands import ask, check, look, run

app = typer.Typer(
    name="receiver",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Ask an image model, never lose its callback, keep every picture byte for byte in S3-compatible storage.\n\n"
    "New here? [bold]receiver demo[/bold] shows everything working on this machine, without an account.",
)
for verb in (run.serve, run.work, ask.submit, look.status, check.check, run.migrate):
    app.command()(verb)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(receiver.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point. A fault we know ends in its own clear lines and exit code 1; anything else is a bug and shows."""
    try:
        app()
    except Exception as error:
        if not _is_known(error):
            raise
        print(error, file=sys.stderr)  # noqa: T201 - the command line's own words
        sys.exit(1)


def _is_known(error: Exception) -> bool:
    from receiver.config import SettingsInvalid
    from receiver.process import SchemaBehind
    from receiver.submit import Conflict
    from storage.errors import StoreUnavailable

    return isinstance(error, SettingsInvalid | SchemaBehind | Conflict | StoreUnavailable | LookupError | ValueError)
