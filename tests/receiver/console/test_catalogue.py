"""The texts: both languages have all of them with the same placeholders, and pages use no missing one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from receiver.app.console_parts import make_console
from receiver.app.wiring import Parts
from receiver.batch import batch
from receiver.console import catalogue
from receiver.console.pages import batches
from receiver.console.words import cause
from receiver.providers.base import RequestInvalid
from receiver.providers.kling.request import parse_request
from receiver.tasks import apply_deliveries
from storage import filters
from storage.accounts.accepted_creates import NEVER_REPORTED
from storage.accounts.batches import STAGES
from storage.archive.audit import FindingKind
from storage.bucket.probe import Capabilities
from storage.bucket.store_errors import REASONS
from storage.rows.events import EventName
from storage.states import ArchiveState, CallbackState, DispatchState, Step, TaskState

HERE = Path(catalogue.__file__).parent
SOURCES = [*HERE.rglob("*.py"), *HERE.rglob("*.html")]
ASKED = re.compile(r"""\b(?:t|text)\(\s*f?"([a-z0-9_.]+)"\s*[,)]""")
CAPABILITIES = [each.name for each in fields(Capabilities)]
# Acts of people: `note_act(…, "action", …)` and `_done(…, "action", …)`.
ACTION_CALLS = re.compile(r"""(?:note_act|_done)\((?:[^"()]|\(\))*"([a-z ]+)",""")
ACTIONS = sorted(
    {action for source in SOURCES for action in ACTION_CALLS.findall(source.read_text())} | {"retry", "accept"}
)
GROUPS = re.compile(r"""\b(?:w|word)\((?:language, )?["']([a-z_]+)["'],""")


def test_both_languages_have_the_same_keys() -> None:
    assert set(catalogue.TEXTS["en"]) == set(catalogue.TEXTS["zh"])


def test_both_languages_have_the_same_placeholders() -> None:
    def blanks(text: str) -> set[str]:
        return set(re.findall(r"{(\w+)}", text))

    wrong = [key for key, text in catalogue.TEXTS["en"].items() if blanks(text) != blanks(catalogue.TEXTS["zh"][key])]
    assert wrong == []


def test_pages_use_existing_texts_only() -> None:
    asked = {key for source in SOURCES for key in ASKED.findall(source.read_text()) if not key.endswith(".")}
    assert len(asked) > 250
    assert asked - set(catalogue.TEXTS["en"]) == set()


def test_no_text_is_unused() -> None:
    sources = "".join(source.read_text() for source in SOURCES)
    own = ("page", "event", "next", "need", "act", "figure", "ask", "error", "delivery", "unread", "verify")
    groups = {*GROUPS.findall(sources), *own}
    asked = set(ASKED.findall(sources)) | set(re.findall(r'"([a-z0-9_]+\.[a-z0-9_.]+)"', sources))
    assert [key for key in catalogue.TEXTS["en"] if key not in asked and key.partition(".")[0] not in groups] == []


def test_every_state_of_a_row_has_a_text() -> None:
    kinds = {
        "state": TaskState, "archive": ArchiveState, "delivery": CallbackState, "dispatch": DispatchState, "next": Step,
        "finding": FindingKind, "files": filters.FILES, "person": ACTIONS, "stage": STAGES,
        "event": [name for name in EventName if not name.startswith("account.")], "capability": CAPABILITIES,
    }  # fmt: skip
    keys = [f"{group}.{value}" for group, values in kinds.items() for value in values]
    assert [key for key in keys if key not in catalogue.TEXTS["en"]] == []


def test_chinese_texts_are_in_chinese() -> None:
    """Except names that are the same in every language."""
    plain = {key: text for key, text in catalogue.TEXTS["zh"].items() if not re.search("[\u4e00-\u9fff]", text)}
    assert set(plain) == {"file.sha"}


@pytest.mark.parametrize(
    ("cookie", "asked", "chosen"),
    [
        (None, "", "en"), (None, "zh-CN,zh;q=0.9,en;q=0.8", "zh"), (None, "en;q=0.5, zh;q=0.6", "zh"),
        (None, "fr,de;q=0.5", "en"), ("zh", "en", "zh"), ("xx", "zh", "zh"), (None, "zh;q=oops,en", "en"),
    ],
)  # fmt: skip
def test_language_is_the_chosen_one_else_the_browsers(cookie: str | None, asked: str, chosen: str) -> None:
    assert catalogue.choose(cookie, asked) == chosen


# -- texts of ours that rows keep -------------------------------------------------------------------------------------

ROOT = HERE.parents[1]
CLOSED = {
    "receiver/providers/webhook_signature.py": {"BadSignature"},
    "receiver/providers/kling/report.py": {"ReportUnreadable"},
    "receiver/tasks/apply_deliveries.py": {"Verdict"},
    "receiver/tasks/operate.py": set(),
    "receiver/events/dispatcher.py": {"SinkRefused"},
    "storage/operations/maintenance.py": {"Retried"},
    "storage/archive/audit.py": {"Finding"},
    "storage/archive/continuous_audit.py": {"Finding"},
    "storage/archive/delete.py": {"Refused"},
    "storage/keys.py": {"IdInvalid"},
    "receiver/batch/batch_file.py": {"Fault", "ValueError"},
    "receiver/batch/batch.py": {"Fault"},
    "receiver/tasks/submit.py": {"Conflict"},
    "receiver/providers/kling/request.py": {"Fault", "refused"},
    "receiver/providers/kling/request_images.py": {"refused"},
}
# Rules of a request are said behind their field and its value.
RULES = ("receiver/providers/kling/request.py", "receiver/providers/kling/request_images.py")

# Their functions return why something differs.
RETURNED = ("receiver/tasks/apply_deliveries.py", "storage/archive/audit.py", RULES[1])


def words_of(node: ast.AST) -> str:
    """A text with 7 for each value in it."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "7" for part in parts)


def closed_texts() -> Iterator[str]:
    """The texts of these calls and of `tally.left[…] = …`, and what the functions of contradictions return."""
    for name, calls in CLOSED.items():
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            given: list[ast.AST] = []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in calls:
                given = [*node.args, *(each.value for each in node.keywords)]
            elif isinstance(node, ast.Assign) and "left[" in ast.unparse(node.targets[0]):
                given = [node.value]
            elif isinstance(node, ast.Return) and node.value and name in RETURNED:
                given.append(node.value)
            texts = [words_of(each) for each in given if isinstance(each, ast.Constant | ast.JoinedStr)]
            found = [text for text in texts if " " in text and not text.startswith("7")]
            yield from (f"n: 7: {text}" if name in RULES else text for text in found)


def rules_of_requests() -> Iterator[str]:
    """What a person reads whose request is refused, or who may not have meant a part of it."""
    model = {"model_name": "kling-image-o1", "prompt": "a boat"}
    pictures = [{"image": "https://cdn.example/a.png"}] * 11
    for odd in (
        {}, {"prompt": ""}, {"prompt": 7}, {"n": "x"}, {"n": 12}, {"resolution": "8k"}, {"resolution": "4k"},
        {"aspect_ratio": "1:9"}, {"result_type": "series"}, {"series_amount": 12}, {"odd": 1}, {"callback_url": "x"},
        {"external_task_id": "x"}, {"image_list": 7}, {"image_list": pictures}, {"watermark_info": {"enabled": 7}},
        {"element_list": [{"element_id": -1}]}, {"image_list": [{"image": "ftp://x"}]},
        {f"x{n}": n for n in range(999)},
    ):  # fmt: skip
        try:
            parse_request({**model, **odd} if odd else {})
        except RequestInvalid as error:
            yield from error.faults
    lookalike = {**model, "model_name": "kling-image-01", "series_amount": 3}
    for sent in (lookalike, {**model, "model_name": "x", "n": 2, "result_type": "series", "prompt": "<<<image_3>>>"}):
        yield from parse_request(sent).warnings()


# A host in a fault comes first. Sinks post to none of a task's hosts, and OpenSSL's words are its own.
NOT_OF_FILES = ("7 receives events", "events go there", "an archive", "text in ", "TLS: ")


def faults_of_downloads() -> Iterator[str]:
    """Why a file cannot be fetched or kept. Those of its structure are said behind its format."""
    for file in (*(ROOT / "storage/fetch").glob("*.py"), ROOT / "storage/archive/archiver.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                texts = [words_of(each) for each in node.exc.args[:1] if isinstance(each, ast.Constant | ast.JoinedStr)]
                yield from (text for text in texts if re.search("[a-z] [a-z]", text))


def test_every_fault_of_a_download_is_translated() -> None:
    found = {text for text in faults_of_downloads() if not text.startswith((*NOT_OF_FILES, "task 7 no longer"))}
    assert len(found) > 60
    known = [{text for text in found if catalogue.cause("zh", before + text)} for before in ("", "png: ")]
    assert found - known[0] - known[1] == set()


def test_every_cause_of_a_closed_set_is_translated() -> None:
    told = apply_deliveries
    own = {told.NOT_READ, told.DECIDED, told.AWAITS_READ, told.BY_READ, told.OTHERWISE, told.KNOWN, told.NO_NEWS}
    own |= {told.DELETED, told.DISMISSED, NEVER_REPORTED}
    own |= {batch.OTHER_FILE.format(name="'night 1'"), batches.NO_FILE, *rules_of_requests()}
    found = {*closed_texts(), *own}
    assert len(found) > 35
    assert sorted(text for text in found if catalogue.cause("zh", text) is None) == []


def test_lines_of_the_check_are_translated(parts: Parts) -> None:
    working, broken = (
        parts.settings.model_copy(update=each) for each in ({}, {"kling_base_url": "http://127.0.0.1:1"})
    )
    lines = [*make_console(Parts(working))._of.check(), *make_console(Parts(broken))._of.check()]
    said = {text for each in lines for text in (each.line, each.advice) if text}
    assert len(said) > 10
    said |= {"through a pooler; workers are woken by 127.0.0.1:5432", "workers are not woken by 127.0.0.1:5432 (no)"}
    said |= {"a pooler stands before PostgreSQL; workers check for work every 2 s"}
    assert {text for text in said if catalogue.cause("zh", text) is None} == set()


def test_translations_of_causes_have_the_same_number_of_values_and_are_in_chinese() -> None:
    for known, said in catalogue.CAUSES["zh"].items():
        assert len(re.findall(r"{\*?}", known)) == len(re.findall(r"{\d?}", said)), known
        assert re.search("[\u4e00-\u9fff]", said), known


def test_no_cause_is_hidden_by_a_wider_one_before_it() -> None:
    for known, pattern in zip(catalogue.CAUSES["zh"], catalogue._causes("zh"), strict=True):
        said = known.replace("{*}", "some words").replace("{}", "word")
        first = next(each for each in catalogue._causes("zh") if each[0].fullmatch(said))
        assert first is pattern, known


def test_what_a_store_answers_is_translated_as_a_whole() -> None:
    down = catalogue.cause("zh", "the store at host:1 cannot be reached (EndpointConnectionError)")
    assert down == "无法连接 host:1 的存储（EndpointConnectionError）"
    for reason in REASONS.values():
        said = str(catalogue.cause("zh", f"the store at host:1 {reason} (bucket b, C, HTTP 403)"))
        assert said.startswith("host:1 的存储") and said.endswith("（存储桶 b，C，HTTP 403）")
        assert not re.search("[a-z]{4}", said.replace("host", "").replace("virtual", "")), said


def test_a_cause_is_translated_with_the_causes_inside_it() -> None:
    assert catalogue.cause("zh", "signature: no signature matches") == "签名：没有匹配的签名"
    assert catalogue.cause("zh", "delivered 3 of 4") == "应有 4 个，仅收到 3 个"
    assert catalogue.cause("en", "signature: no signature matches") is None


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("deleted", "已删除"), ("<b> x", '<span lang="en">&lt;b&gt; x</span>'), ("内容 <b>", "内容 &lt;b&gt;"),
        ("", ""), (None, ""),
    ],
)  # fmt: skip
def test_a_cause_that_no_catalogue_has_is_marked_as_english(said: str | None, shown: str) -> None:
    assert str(cause(said, "zh")) == shown
    assert "<" not in str(cause(said, "en"))
