"""Which key `serve --store` names for the console, where its output is no terminal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr

from receiver.base.console_keys import parse
from receiver.cli.serve import _name_console

KEY = "a-key-of-more-than-24-characters"


@pytest.mark.parametrize(
    ("kept", "named"),
    [(None, "a key of RECEIVER_CONSOLE_KEYS"), ("x" * 30, "a key of RECEIVER_CONSOLE_KEYS"), (KEY, "console.key")],
)
def test_the_file_of_a_key_is_named_only_if_it_has_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: str | None, named: str
) -> None:
    """It was named where keys are set, and where there is no such file."""
    if kept:
        (tmp_path / "console.key").write_text(f"{kept}\n")
    people = parse([SecretStr(f"ann={KEY}")])
    settings: Any = SimpleNamespace(host="127.0.0.1", store=tmp_path, console_people=people, event_entries=[])
    _name_console(settings, 8000)
    said = capsys.readouterr().out
    assert "http://127.0.0.1:8000/console" in said and named in said
    assert ("console.key" in said) == (kept == KEY) and KEY not in said


def test_standard_output_that_is_a_sink_has_events_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [SimpleNamespace(kind="stdout")]
    settings: Any = SimpleNamespace(
        host="127.0.0.1",
        store=tmp_path,
        console_people=parse([SecretStr(f"ann={KEY}")]),
        event_entries=entries,
    )
    _name_console(settings, 8000)
    said = capsys.readouterr()
    assert (said.out, "console: http" in said.err) == ("", True)
