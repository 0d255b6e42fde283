"""`receiver demo`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from receiver.cli.terminal import say


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running until Ctrl-C.")] = False,
    directory: Annotated[
        Path | None,
        typer.Option(help="A new directory for rows, objects and log. It is kept.", show_default="a temporary one"),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which the sandbox gives up.", min=0.1)] = 120,
) -> None:
    """Show everything working on this machine: five requests, their callbacks, their pictures in an S3 bucket.

    Starts an S3 server, a stand-in for the provider and the receiver, on loopback only.

    Compares every object with what was served, then cleans up. Exit code 1 if anything is wrong.

    Needs no account and no network, and reads none of your settings.
    """
    from rich.console import Console

    from receiver.demo.demo import DemoFailed, run

    try:
        run(Console(), directory=directory, keep=keep, timeout_seconds=timeout, program=_program())
    except DemoFailed as error:
        say("", *f"The demo failed: {error}".split("\n"), err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        say("", "Stopped before the end; everything it had started has ended.", err=True)
        raise typer.Exit(1) from None


def _program() -> str:
    """The command with which the user can start this program again."""
    if shutil.which("receiver"):
        return "receiver"
    return sys.argv[0] if Path(sys.argv[0]).name == "receiver" else f"{sys.executable} -m receiver"
