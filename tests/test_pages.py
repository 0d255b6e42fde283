"""The pages agree with the code: settings, commands, events, metrics, log lines, links and paths."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Counter
from typer.main import get_command

from receiver.base import config, telemetry
from receiver.cli.main import app
from receiver.sandbox import Knobs
from storage.rows.events import EventName
from storage.states import ArchiveState, TaskState

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "infra" / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "infra").rglob("*.md"), *(ROOT / "tests").rglob("*.md")])
# Pages about the product. The others also name commands of other programs.
MANUAL = [ROOT / "README.md", ROOT / "README-recipes.md", *sorted(DOCS.glob("*.md"))]
SETTINGS = {f"RECEIVER_{name.upper()}": field for name, field in config.Settings.model_fields.items()}
FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
# Where a shell expects a command; in compose the image's entry point is `receiver`.
COMMAND = re.compile(r"(?:^|&&|\||;|\.venv/bin/)\s*receiver (.+)|\brun --rm (?:web|worker) (.+)")
LOG_LEVELS = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error"}
# The verbs of log events whose past does not end in "ed".
PAST_VERBS = {"found", "lost", "read", "sent", "set", "split", "written"}
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(name: str) -> str:
    return (DOCS / name).read_text()


def rows_of(page: str, first: str) -> list[list[str]]:
    """The cells of the table whose first heading is `first`; of all such tables of the page."""
    rows, is_inside = [], False
    for line in page.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        is_inside = bool(cells) and (is_inside or cells[0] == first)
        if is_inside and cells[0] != first and set(cells[0]) != {"-"}:
            rows.append(cells)
    return rows


def prose_of(page: str) -> str:
    return FENCED.sub("", page)


# Settings


def test_settings_page_documents_every_setting_once() -> None:
    names = [row[0].strip("`") for row in rows_of(text_of("settings.md"), "variable")]
    assert sorted(names) == sorted(SETTINGS)


def test_settings_page_shows_each_default() -> None:
    for name, default, _ in rows_of(text_of("settings.md"), "variable"):
        field = SETTINGS[name.strip("`")]
        if field.is_required():
            assert default == "required", name
        elif field.default not in (None, (), ""):
            assert default == f"`{_written(field.default)}`", name
        else:
            assert "`" not in default, name


def _written(value: Any) -> str:
    """A default as a user would write it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return str(value.get_secret_value() if hasattr(value, "get_secret_value") else value)


@every_page
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"RECEIVER_[A-Z0-9_]+[A-Z0-9](?!…|[A-Z0-9_])", page.read_text()))
    image = {"RECEIVER_IMAGE"} if page.parent.name == "infra" else set()  # a word of compose.yaml alone
    assert {name.removesuffix("_FILE") for name in named} <= SETTINGS.keys() | image


# The command line


def options_of(command: Any, name: str = "") -> dict[str, set[str]]:
    """The options of each command, by its name."""
    if not hasattr(command, "commands"):
        return {name: {option for each in command.params for option in (*each.opts, *each.secondary_opts)}}
    found = [options_of(each, f"{name} {word}".strip()) for word, each in command.commands.items()]
    return {verb: options for verbs in found for verb, options in verbs.items()}


VERBS = options_of(get_command(app))


def test_command_line_page_documents_every_command_once() -> None:
    names = [row[0].strip("`").removeprefix("receiver ") for row in rows_of(text_of("command-line.md"), "command")]
    assert sorted(names) == sorted(VERBS)


@pytest.mark.parametrize(("column", "option"), [(2, "--dry-run"), (3, "--json")])
def test_command_line_page_marks_the_commands_with_the_option(column: int, option: str) -> None:
    rows = {row[0].strip("`").removeprefix("receiver "): row for row in rows_of(text_of("command-line.md"), "command")}
    for verb, options in VERBS.items():
        assert rows[verb][column] == ("yes" if option in options else "–"), verb


def test_command_line_page_names_only_options_of_the_command() -> None:
    for row in rows_of(text_of("command-line.md"), "command"):
        verb = row[0].strip("`").removeprefix("receiver ")
        named = {word.split()[0] for word in INLINE.findall(row[1]) if word.startswith("--")}
        assert named <= VERBS[verb], verb


@pytest.mark.parametrize(("column", "states"), [("state", TaskState), ("archive", ArchiveState)])
def test_command_line_page_documents_every_state_in_order(column: str, states: type[StrEnum]) -> None:
    assert [row[0].strip("`") for row in rows_of(text_of("command-line.md"), column)] == list(states)


# The sandbox


def test_sandbox_page_documents_every_knob_as_the_command_does() -> None:
    rows = {name.strip("`"): (default, text) for name, default, text in rows_of(text_of("sandbox.md"), "knob")}
    fields = Knobs.model_fields.items()
    assert rows == {name: (f"`{json.dumps(field.default)}`", field.description) for name, field in fields}


def test_sandbox_page_names_only_knobs_that_exist() -> None:
    for knob, value in re.findall(r"`([a-z_0-9]+)=([^`\s]+)`", text_of("sandbox.md")):
        Knobs(**{knob: json.loads(value) if value[0] in '[0123456789tf"' else value})


def commands_in(page: str) -> Iterator[list[str]]:
    """The words after `receiver` of every command that a page shows."""
    lines = [line for block in FENCED.findall(page) for line in block.replace("\\\n", " ").splitlines()]
    spans = [span for span in INLINE.findall(prose_of(page)) if span.startswith("receiver ")]
    for line in [*lines, *spans]:
        for found in COMMAND.finditer(line):
            yield shlex.split(re.split(r"&&|[|;>]", found[1] or found[2])[0], comments=True)


@every_page
def test_every_command_that_a_page_shows_exists(page: Path) -> None:
    for words in commands_in(page.read_text()):
        if words[0] in ("--help", "--version"):
            continue
        verb = " ".join(words[: 2 if words[0] in ("batch", "events") else 1])
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        is_group = verb in ("batch", "events") and len(words) == 1
        assert is_group or options <= VERBS[verb] | {"--help"}, words


@pytest.mark.parametrize("page", MANUAL, ids=lambda page: page.name)
def test_every_option_that_the_manual_names_exists(page: Path) -> None:
    known = set().union(*VERBS.values(), {"--help", "--version"})
    named = {re.split("[ =]", span)[0] for span in INLINE.findall(prose_of(page.read_text())) if span.startswith("--")}
    assert named <= known


def test_readme_has_the_test_command_that_ci_runs() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line.startswith(("python3", ".venv"))]
    commands.remove(".venv/bin/mypy")  # the one check of CI that is no test: 13 s of CPU
    assert len(commands) == 4
    assert f"\n{' && '.join(commands)}\n" in (ROOT / "README.md").read_text()


# Events, metrics, log lines


def test_events_page_documents_every_event() -> None:
    assert sorted(row[0].strip("`") for row in rows_of(text_of("events.md"), "event")) == sorted(map(str, EventName))


@cache
def metrics() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Type and labels of each registered metric, by the name that `/metrics` shows."""
    found = {}
    for collector in telemetry.REGISTRY._collector_to_names:  # the library has no public list
        [family] = collector.describe()
        suffix = "_total" if isinstance(collector, Counter) else ""
        found[family.name + suffix] = (family.type, collector._labelnames)  # type: ignore[attr-defined]
    return found


def test_operations_page_documents_every_metric() -> None:
    rows = rows_of(text_of("operations.md"), "metric")
    documented = {row[0].strip("`"): (row[1], tuple(INLINE.findall(row[2]))) for row in rows}
    assert len(rows) == len(documented)
    assert documented == metrics()


def test_deprecated_metrics_name_a_successor_that_exists() -> None:
    rows = rows_of(text_of("operations.md"), "metric")
    documented = {name.strip("`"): successor.strip("`") for name, *_, successor in rows}
    changes = (ROOT / "CHANGELOG.md").read_text()
    for field, gauge in telemetry.DEPRECATED.items():
        name, successor = f"receiver_{field}", telemetry.SUCCESSORS[field]
        assert gauge.describe()[0].documentation == f"Deprecated, use {successor}"  # type: ignore[no-untyped-call]
        assert documented[name] == successor
        assert f"`{name}` → `{successor}`" in changes
        assert re.findall(r"receiver_\w+", successor)[0] in metrics()


def test_metrics_follow_the_conventions_of_prometheus() -> None:
    """Base units, `_total` for counters alone, ratios instead of rates and percentages, no window in a name."""
    for name, (kind, _) in metrics().items():
        is_current = name.removeprefix("receiver_") not in telemetry.DEPRECATED
        assert name.endswith("_total") == (kind == "counter"), name
        assert not is_current or not re.search(r"_(day|hour|rate|share|percent|ms|minutes|kb|mb)$", name), name


@every_page
def test_every_metric_that_a_page_names_exists(page: Path) -> None:
    spans = [
        span for span in INLINE.findall(prose_of(page.read_text())) if re.fullmatch(r"receiver_[a-z_]+[a-z]", span)
    ]
    assert set(spans) <= metrics().keys()


def log_calls() -> Iterator[tuple[str, str]]:
    """(event, level) of every call of a structlog logger."""
    for path in sorted([*(ROOT / "receiver").rglob("*.py"), *(ROOT / "storage").rglob("*.py")]):
        source = path.read_text()
        for call in ast.walk(ast.parse(source)) if "log = structlog.get_logger()" in source else ():
            match call:
                case ast.Call(func=ast.Attribute(value=ast.Name("log"), attr=level), args=[name, *_]):
                    assert isinstance(name, ast.Constant), f"{path}:{call.lineno}: the event's name is no constant"
                    yield name.value, LOG_LEVELS[level]


def test_operations_page_documents_every_log_event_with_its_levels() -> None:
    logged = defaultdict(set)
    for name, level in log_calls():
        logged[name].add(level)
    rows = rows_of(text_of("operations.md"), "event")
    assert [row[0] for row in rows] == sorted({row[0] for row in rows})
    assert {row[0].strip("`"): set(row[1].split(", ")) for row in rows} == logged


def test_every_log_event_is_a_noun_and_a_verb_in_the_past() -> None:
    """Except a line that has the name of the event that sinks receive for the same fact."""
    for name in {name for name, _ in log_calls()} - set(EventName):
        assert re.fullmatch(r"[a-z_]+\.(?:[a-z_]+_)?([a-z]+)", name), name
        assert name.endswith("ed") or re.split(r"[._]", name)[-1] in PAST_VERBS, name


# Links, paths, programs


def anchors_of(page: str) -> set[str]:
    """The headings' addresses, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_no_page_has_the_markers_of_a_merge(page: Path) -> None:
    assert not re.search(r"^(<{7}|={7}|>{7})", page.read_text(), re.MULTILINE)


@every_page
def test_every_link_leads_to_a_page_and_a_heading_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page.read_text())):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            linked = page.parent / name if name else page
            assert linked.is_file(), target
            assert not anchor or anchor in anchors_of(linked.read_text()), target


@every_page
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    for span in INLINE.findall(prose_of(page.read_text())):
        if re.fullmatch(r"(?:receiver|storage|tests|infra|\.ci)/[\w./-]*", span):
            assert (ROOT / span).exists(), span
        elif module := re.match(r"(?:\.venv/bin/)?python -m (tests[\w.]*)", span):
            path = ROOT / module[1].replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), span


def test_readme_links_every_page() -> None:
    linked = set(re.findall(r"\]\(([^)#]+\.md)", (ROOT / "README.md").read_text()))
    wanted = {*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "infra" / "README.md"} - {ROOT / "README.md"}
    assert {str(page.relative_to(ROOT)) for page in wanted} <= linked


@pytest.mark.parametrize("page", MANUAL, ids=lambda page: page.name)
def test_every_python_example_compiles(page: Path) -> None:
    for example in re.findall(r"^```python[^\n]*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        compile(example, page.name, "exec")


@pytest.mark.parametrize(
    "page", [*MANUAL, ROOT / "SECURITY.md", ROOT / "infra" / "README.md"], ids=lambda page: page.name
)
def test_prose_is_wrapped(page: Path) -> None:
    prose = [line for line in prose_of(page.read_text()).splitlines() if not line.lstrip().startswith("|")]
    assert [line for line in prose if len(line) > 125] == []


def test_every_line_of_who_can_do_what_names_tests_that_exist() -> None:
    table = (ROOT / "SECURITY.md").read_text().partition("## Who holds what")[2].partition("\n## ")[0]
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(lines) >= 15
    for holder, *_, tests in lines:
        named = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", tests)
        assert ", ".join(f"`{file}::{test}`" for file, test in named) == tests.removesuffix(" |"), holder
        for file, test in named:
            assert re.search(rf"^(?:async )?def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{test}"
