"""Actions of a person at the console, and their records with the person's name."""

from __future__ import annotations

import base64
import html
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from sqlmodel import col, select

from receiver.app.wiring import Parts
from receiver.batch.batch import Batches, Plan
from receiver.sandbox import Sandbox
from receiver.tasks.task_view import report
from storage.operations import outbox
from storage.operations.sample_audit import SampleAudit
from storage.rows import events
from storage.rows.events import PERSON_ACTED, EventName
from storage.rows.models import Asset, Batch, Dispatch, Event, Task
from storage.states import ArchiveState, AssetState, CallbackState, DispatchState, Step, TaskState
from tests.archived_tasks import archive, flip, work_off
from tests.console_reader import HIDDEN, Reader
from tests.harness import wait_until
from tests.pipeline import assets_of, callbacks_of, deliver, insert_row, run, task_of
from tests.receiver.providers.test_kling_request import picture

pytestmark = pytest.mark.databases("sqlite")  # what a form does and says
BOTH = pytest.mark.databases("sqlite", "postgresql")  # counts, orders, dates, locks, and ids that are taken
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
GOOD = '{"model_name": "kling-image-o1", "prompt": "a boat"}\n'


def with_a_failed_file(parts: Parts) -> tuple[Task, Asset]:
    task = archive(parts, 1, n=2)[0]
    with parts.database.write() as session:
        row, asset = session.get_one(Task, task.id), session.get_one(Asset, assets_of(parts, task)[0].id)
        asset.state, asset.error, row.archive = AssetState.FAILED, "broken inside", ArchiveState.INCOMPLETE
    return task, asset


def facts(parts: Parts, task: Task, name: str) -> list[dict[str, Any]]:
    with parts.database.read() as session:
        return [e.data for e in session.exec(select(Event).where(Event.task_id == task.id, Event.name == name))]


def acts(parts: Parts, task: Task | None) -> list[tuple[str, str]]:
    """The acts on a task, or on something that is no task."""
    with parts.database.read() as session:
        wanted = Event.task_id == task.id if task else col(Event.task_id).is_(None)
        found = session.exec(select(Event).where(wanted, Event.name == PERSON_ACTED).order_by(col(Event.id)))
        return [(each.data["by"], each.data["action"]) for each in found]


def test_retry_brings_a_failed_file_back(parts: Parts, ann: Reader) -> None:
    task, _ = with_a_failed_file(parts)
    assert "It is tried again now" in ann.post("/act/retry", task=task.id).text
    assert acts(parts, task) == [("ann", "retry")]
    work_off(parts)
    assert task_of(parts, task.external_task_id).archive is ArchiveState.ARCHIVED


def test_an_unverified_file_is_accepted_by_hand(parts: Parts, ann: Reader) -> None:
    task, asset = with_a_failed_file(parts)
    ann.post("/act/file-retry", file=asset.id, accept="1")
    with parts.database.read() as session:
        row = session.get_one(Asset, asset.id)
    assert (row.state, row.accept_unverified) == (AssetState.DUE, True)
    assert acts(parts, task) == [("ann", "accept")]


def test_read_now_makes_the_read_due(parts: Parts, ann: Reader) -> None:
    task = insert_row(parts, step=Step.READ)
    ann.post("/act/read", task=task.id)
    now = task_of(parts, task.external_task_id)
    assert now.due_at is not None and now.due_at <= parts.database.now()
    assert acts(parts, task) == [("ann", "read")]


def test_dismissing_needs_a_reason_and_its_events_name_the_person(parts: Parts, ann: Reader) -> None:
    task = insert_row(parts)
    assert "Say why" in ann.post("/act/dismiss", task=task.id, reason=" ").text
    ann.post("/act/dismiss", task=task.id, reason="no longer wanted")
    [fact] = facts(parts, task, "task.incomplete")
    assert (fact["by"], fact["reason"]) == ("ann", "no longer wanted")
    assert "by ann" in ann.page(f"/tasks/{task.external_task_id}")


def test_deleting_needs_the_id_typed(parts: Parts, ann: Reader) -> None:
    task = archive(parts, 1)[0]
    assert "Nothing was deleted" in ann.post("/act/delete", task=task.id, typed="another").text
    assert task_of(parts, task.external_task_id).deleted_at is None
    assert "Deleted, with 2 objects" in ann.post("/act/delete", task=task.id, typed=task.external_task_id).text
    row = task_of(parts, task.external_task_id)
    assert row.deleted_at is not None and row.note == "deleted"
    assert acts(parts, task) == [("ann", "delete")]


@BOTH
def test_presses_that_delete_together_say_what_each_did(parts: Parts, ann: Reader) -> None:
    task = archive(parts, 1)[0]
    with ThreadPoolExecutor(4) as pool:
        press = lambda _: ann.post("/act/delete", task=task.id, typed=task.external_task_id).text  # noqa: E731
        pages = "".join(pool.map(press, range(4))) + ann.page("/tasks")
    assert pages.count("Deleted, with 2 objects.") == 1 and pages.count("It was deleted before") == 3
    assert acts(parts, task) == [("ann", "delete")]


def test_second_dismissal_of_a_task_is_told_and_not_noted(parts: Parts, ann: Reader) -> None:
    task = insert_row(parts)
    ann.post("/act/dismiss", task=task.id, reason="no longer wanted")
    assert "It was dismissed before" in ann.post("/act/dismiss", task=task.id, reason="another").text
    assert acts(parts, task) == [("ann", "dismiss")]


def test_verify_reads_the_object_back(parts: Parts, ann: Reader) -> None:
    asset = assets_of(parts, archive(parts, 1)[0])[0]
    assert "it is what was archived" in ann.post("/act/verify", file=asset.id).text
    flip(parts, str(asset.key))
    assert "NOT what was archived" in ann.post("/act/verify", file=asset.id).text
    parts.bucket.delete(str(asset.key))
    assert "not in the store" in ann.post("/act/verify", file=asset.id).text


def test_same_request_is_sent_again_after_its_price_was_shown(parts: Parts, ann: Reader, sandbox: Sandbox) -> None:
    task = archive(parts, 1, n=2, prompt="a red kite")[0]
    [link] = re.findall(r'href="/console(/ask[^"]*)"', ann.page(f"/tasks/{task.external_task_id}").partition("<h1>")[2])
    shown = ann.get(link)
    assert "a red kite" in shown.text and "16 units" in shown.text and "0.056 USD" in shown.text
    assert len(sandbox.ledger().creates) == 1
    again = task_of(parts, ann.send(shown.text).url.path.rpartition("/")[2])
    assert again.id != task.id and again.request == task.request
    assert facts(parts, again, "task.created")[0]["by"] == "ann"
    assert acts(parts, task) == [("ann", "again")]


def test_one_page_sends_its_request_once(parts: Parts, ann: Reader, sandbox: Sandbox) -> None:
    task = archive(parts, 1)[0]
    address = ann.get(f"/ask?again={task.id}").url
    shown = ann.http.get(address).text
    with ThreadPoolExecutor(4) as pool:  # a double click
        answers = list(pool.map(lambda _: ann.send(shown), range(4)))
    answers.append(
        ann.send(ann.http.get(address).text)
    )  # the way back, and the button of the page that was loaded anew
    assert len({answer.url for answer in answers}) == 1 and "Nothing was sent again" in answers[-1].text
    assert len(sandbox.ledger().creates) == 2 and acts(parts, task) == [("ann", "again")]
    ann.send(ann.get(f"/ask?again={task.id}").text)
    assert len(sandbox.ledger().creates) == 3


def test_a_request_that_cannot_be_sent_again_says_why(parts: Parts, ann: Reader) -> None:
    answer = ann.get(f"/ask?again={insert_row(parts, request={'prompt': 'x', 'n': 99}).id}")
    assert answer.status_code == 422 and "This cannot be sent" in answer.text and "Send it" not in answer.text
    assert ann.get("/ask?again=none").status_code == 404


def test_a_request_is_priced_before_it_is_sent(parts: Parts, ann: Reader, sandbox: Sandbox) -> None:
    fields = {"model_name": "kling-image-o1", "prompt": "a red kite", "n": "2"}
    priced = ann.post("/ask", **fields, step="price").text
    assert "16 units" in priced and "0.056 USD" in priced and not sandbox.ledger().tasks
    answers = [ann.send(priced, **fields) for _ in range(2)]
    task = task_of(parts, answers[0].url.path.rpartition("/")[2])
    assert task.request["n"] == 2 and task.expected == 2 and "The pictures appear here" in answers[0].text
    assert answers[1].url == answers[0].url and len(sandbox.ledger().creates) == 1


def test_price_that_is_not_known_is_not_shown(ann: Reader) -> None:
    shown = ann.post("/ask", model_name="a-model-of-tomorrow", prompt="a boat", n="5", resolution="8k").text
    assert "No price is known for 5 of the pictures" in shown and "USD" not in shown and "At most" not in shown
    lines = GOOD + json.dumps({"model_name": "a-model-of-tomorrow", "prompt": "a boat"})
    shown = batch_form(ann, lines).text
    assert "8 units" in shown and "No price is known for 1 picture." in shown and "At most" not in shown


def test_request_whose_price_was_not_shown_is_not_sent(parts: Parts, ann: Reader, sandbox: Sandbox) -> None:
    fields = {"model_name": "kling-image-o1", "prompt": "a red kite", "n": "2"}
    assert "16 units" in ann.post("/ask", **fields, step="send").text
    priced = ann.post("/ask", **fields, step="price").text
    changed = ann.send(priced, **{**fields, "n": "9"})
    assert "72 units" in changed.text and not sandbox.ledger().creates
    ann.send(changed.text, **{**fields, "n": "9"})
    assert [create.body and create.body["n"] for create in sandbox.ledger().creates] == [9]


def test_one_price_is_for_one_external_id(parts: Parts, ann: Reader, sandbox: Sandbox) -> None:
    fields = {"model_name": "kling-image-o1", "prompt": "a red kite", "external_task_id": "ext-1"}
    priced = ann.post("/ask", **fields, step="price").text
    ann.send(priced, **fields)
    other = ann.send(priced, **fields | {"external_task_id": "ext-2"})
    assert "8 units" in other.text and [each.external_task_id for each in sandbox.ledger().tasks] == ["ext-1"]


@pytest.mark.parametrize("once", ["", "one-of-a-colleague"])
def test_link_gives_no_form_the_identity_of_another(parts: Parts, ann: Reader, sandbox: Sandbox, once: str) -> None:
    fields = {"model_name": "kling-image-o1", "prompt": "a red kite"}
    task = archive(parts, 1)[0]
    for _ in range(2):
        shown = ann.page(f"/ask?once={once}")
        ann.send(ann.send(shown, **fields).text, **fields)
        ann.send(ann.page(f"/ask?again={task.id}&once={once}"))
    assert len(sandbox.ledger().creates) == 5


def test_lost_pictures_are_chosen_again_before_a_request_is_sent_again(
    parts: Parts, ann: Reader, sandbox: Sandbox
) -> None:
    kept, lost = {"image": "https://cdn.example/a.png"}, {"image": {"sha256": "0" * 64, "bytes": 9}}
    request = {"model_name": "kling-image-o1", "prompt": "two boats", "image_list": [lost, kept]}
    shown = ann.get(f"/ask?again={insert_row(parts, request=request).id}")
    assert shown.status_code == 422 and "1 uploaded picture of this request was not kept" in shown.text
    chosen = [("picture", ("a.png", picture(400, 400), "image/png"))]
    hidden = dict(HIDDEN.findall(shown.text))
    priced = ann.http.post("/console/ask", data={**hidden, "step": "price"}, files=chosen)
    assert "8 units" in priced.text and "Choose the pictures again" in priced.text
    ann.http.post("/console/ask", data={**dict(HIDDEN.findall(priced.text)), "step": "send"}, files=chosen)
    [create] = sandbox.ledger().creates
    assert create.body and create.body["image_list"][1] == kept
    assert base64.b64decode(create.body["image_list"][0]["image"]) == chosen[0][1][1]


@BOTH
def test_form_is_kept_when_its_id_is_taken(parts: Parts, ann: Reader) -> None:
    taken = insert_row(parts, request_hash="another")
    fields = {"model_name": "kling-image-o1", "prompt": "a red kite", "external_task_id": taken.external_task_id}
    answer = ann.send(ann.post("/ask", **fields).text, **fields)
    assert answer.status_code == 422 and "choose another id" in answer.text and "a red kite" in answer.text


def test_uploaded_pictures_are_sent_as_base64_and_asked_for_again_behind_the_price(
    parts: Parts, ann: Reader, sandbox: Sandbox
) -> None:
    chosen = [("picture", (f"{side}.png", picture(side, side), "image/png")) for side in (400, 500)]
    fields = {"csrf": ann.csrf, "model_name": "kling-image-o1", "prompt": "two boats", "external_task_id": "boats"}
    priced = ann.http.post("/console/ask", data={**fields, "step": "price"}, files=chosen)
    assert "Choose the pictures again" in priced.text and 'name="uploaded" value="2"' in priced.text
    fields |= {**dict(HIDDEN.findall(priced.text)), "step": "send"}
    without = ann.http.post("/console/ask", data=fields, files=chosen[:1])
    assert (without.status_code, len(sandbox.ledger().creates)) == (422, 0)
    form = {name: (None, value) for name, value in {**fields, "step": ""}.items()}
    switched = ann.http.post("/console/language/zh?next=/console/ask", files=form)
    assert switched.status_code == 422 and "two boats" in switched.text and 'lang="zh"' in switched.text
    assert ann.http.post("/console/ask", data=fields, files=chosen).status_code == 200
    [create] = sandbox.ledger().creates
    assert create.body
    assert [base64.b64decode(each["image"]) for each in create.body["image_list"]] == [each[1][1] for each in chosen]


def test_faulty_request_lists_every_fault(ann: Reader) -> None:
    answer = ann.post("/ask", model_name="none", prompt="", n="99", more="[1]")
    assert answer.status_code == 422 and "JSON object" in answer.text
    assert "model_name" in ann.post("/ask", model_name="none", prompt="x", n="99").text


def test_one_delivery_is_replayed(parts: Parts, ann: Reader) -> None:
    callback = deliver(parts, insert_row(parts), b"no json")
    assert "1 delivery was put back" in ann.post("/act/replay", delivery=callback.id).text
    assert callbacks_of(parts)[0].state is CallbackState.RECEIVED
    run(parts, "callbacks")
    assert callbacks_of(parts)[0].state is CallbackState.UNREADABLE


@BOTH
def test_all_that_match_are_counted_and_then_replayed(parts: Parts, ann: Reader, ben: Reader) -> None:
    for number in range(3):
        deliver(parts, None, {"task_id": f"unknown-{number}", "task_status": "succeed"})
    deliver(parts, insert_row(parts), b"no json")
    assert "3 deliveries match" in ann.page("/deliveries/replay?state=unmatched")
    assert "Replay 3" not in ben.page("/deliveries/replay?state=unmatched")
    assert ann.post("/act/replay").status_code == 400
    told = ann.post("/act/replay", state="unmatched")
    assert (
        "3 deliveries were put back" in told.text and "3 deliveries wait for a worker; they were unmatched" in told.text
    )
    run(parts, "callbacks")
    assert "3 deliveries were unmatched and still are. No task&#39;s state changed." in ann.page(
        f"/deliveries/replay?{told.url.query.decode()}"
    )
    assert ann.get("/deliveries/replay?of=1").status_code == 404


@pytest.mark.parametrize("sink", ["client", "hook"])
def test_a_dead_event_is_sent_again_and_its_sink_disabled_and_enabled(parts: Parts, ann: Reader, sink: str) -> None:
    task = insert_row(parts)
    with parts.database.write() as session:
        event = session.exec(select(Event).where(Event.task_id == task.id)).one()
        now = parts.database.now()
        session.add(Dispatch(sink=sink, event_id=event.id or 0, task_id=task.id, created_at=now,
                             state=DispatchState.DEAD, error="answered 500", tries=14))  # fmt: skip
    assert "answered 500" in ann.page("/events?state=dead")
    wait_until(lambda: "Send 1 again" in ann.page("/events"), every=0.5)
    assert ("1 event was given up" in ann.page("")) is (sink == "hook"), "no fault of the receiver"
    sent = ann.post("/act/redeliver", sink=sink).text
    assert "1 event is sent again" in sent and "Send 1 again" not in sent
    assert "client is not in RECEIVER_EVENT_SINKS" in sent
    assert "1 event was given up" not in ann.page("")
    assert "1 event on its way to this sink is given up" in sent
    assert "<details" in sent.partition("/console/act/disable")[0].rpartition("</form>")[2]
    disabled = ann.post("/act/disable", sink=sink).text
    assert f"{sink} is disabled; 1" in disabled and 'action="/console/act/redeliver"' not in disabled
    assert (
        "Nothing is sent again: it is on its way, or its sink is disabled" in ann.post("/act/redeliver", sink=sink).text
    )
    with parts.database.read() as session:
        assert outbox.disabled(session) == {sink: "by ann: by hand"}
    enabled = ann.post("/act/enable", sink=sink).text
    assert f"{sink} is enabled" in enabled and "Send 1 again" in enabled
    assert ann.post("/act/disable", sink="a slip").status_code == 404


@pytest.mark.parametrize(
    ("page", "act", "form"),
    [
        ("/events?state=dead&sink=client", "/act/redeliver", {"sink": "client"}),
        ("/events?state=dead&sink=client", "/act/disable", {"sink": "client"}),
        ("/events?state=dead&sink=client", "/act/enable", {"sink": "client"}),
        ("/deliveries?state=unmatched&before=9", "/act/dismiss-deliveries", {"state": "unmatched", "reason": "theirs"}),
        ("/tasks/kept?from=20&moment=80", "/act/read", {"task": "{task}"}),
        ("/tasks/kept?from=20", "/act/delete", {"task": "{task}", "typed": "no"}),
    ],
)
def test_an_act_leads_back_to_the_list_as_it_was(
    parts: Parts, ann: Reader, page: str, act: str, form: dict[str, str]
) -> None:
    task = insert_row(parts, external_task_id="kept")
    with parts.database.write() as session:
        session.add(event := Event(task_id=task.id, name="task.failed", data={}, at=task.created_at))
        session.flush()
        values = {"state": DispatchState.DEAD, "due_at": None, "created_at": task.created_at}
        session.add(Dispatch(sink="client", event_id=event.id or 0, task_id=task.id, **values))
    path = f"/console{page.format(task=task.id)}"
    data = {"csrf": ann.csrf, **{name: value.format(task=task.id) for name, value in form.items()}}
    for came, leads_to in (
        (path, path),
        ("/console/gallery?q=x", path.partition("?")[0]),
        ("/x//y", path.partition("?")[0]),
    ):
        headers = {"Referer": f"http://{ann.http.base_url.host}{came}"}
        answer = ann.http.post(f"/console{act}", data=data, headers=headers, follow_redirects=False)
        assert answer.status_code == 303
        assert answer.headers["location"] == leads_to


def test_a_dismissed_task_offers_retry_and_a_deleted_one_says_where_its_files_are(parts: Parts, ann: Reader) -> None:
    task, _ = with_a_failed_file(parts)
    path = f"/tasks/{task.external_task_id}"
    assert 'action="/console/act/dismiss"' in ann.page(path)
    page = ann.post("/act/dismiss", task=task.id, reason="not wanted").text
    assert 'action="/console/act/dismiss"' not in page and 'action="/console/act/retry"' in page
    page = ann.post("/act/delete", task=task.id, typed=task.external_task_id).text
    assert "Its files were deleted" in page and "No file yet" not in page and "0 / " not in page


def test_a_replay_of_all_that_match_keeps_their_filter(parts: Parts, ann: Reader) -> None:
    deliver(parts, None, b"{}")
    path = "/console/deliveries/replay?state=unreadable&since=2026-01-01"
    page = ann.http.get(path).text
    assert 'href="/console/deliveries?state=unreadable&amp;since=2026-01-01"' in page  # Cancel
    form = {"csrf": ann.csrf, "state": "unreadable", "since": "2026-01-01"}
    done = ann.http.post("/console/act/replay", data=form, headers={"Referer": f"http://x{path}"})
    assert "What the replay changed" in done.text and "of=" in str(done.url)
    assert 'href="/console/deliveries?state=unreadable&amp;since=2026-01-01"' in done.text


def batch_form(ann: Reader, content: str, **fields: str) -> httpx.Response:
    files = {"file": ("spring.jsonl", content.encode(), "application/octet-stream")}
    return ann.http.post("/console/batches/new", data={"csrf": ann.csrf, **fields}, files=files)


def send_checked(ann: Reader, answer: httpx.Response) -> httpx.Response:
    """Press the button of the page that shows the price."""
    return ann.http.post("/console/batches/new", data={**dict(HIDDEN.findall(answer.text)), "step": "send"})


def many_lines(prompt: str, most_bytes: int) -> str:
    """Different requests in a file of this size."""
    line = json.dumps({"model_name": "kling-image-o1", "prompt": prompt}, ensure_ascii=False)
    lines = (f'{line[:-1]}, "external_task_id": "t{n}"}}\n' for n in range(most_bytes // len(line.encode())))
    return "".join(lines)


@pytest.mark.parametrize("is_pasted", [False, True])
def test_a_batch_that_passed_its_check_is_sent_whatever_its_script(parts: Parts, ann: Reader, is_pasted: bool) -> None:
    """6 MB of Chinese have 18 MB in a form that is not multipart, and 16 are read."""
    lines = many_lines("船" * 2_400, 6 * 10**6)
    count = lines.count("\n")
    if is_pasted:
        form = {"csrf": (None, ann.csrf), "name": (None, "spring"), "content": (None, lines)}
        checked = ann.http.post("/console/batches/new", files=form)
    else:
        checked = batch_form(ann, lines)
    assert f"{count:,} requests are new" in checked.text and len(checked.content) < 100_000
    assert f"{count:,} tasks are queued" in send_checked(ann, checked).text


def test_a_checked_file_that_is_not_kept_any_more_is_chosen_again(
    parts: Parts, ann: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = batch_form(ann, GOOD)
    for name in "ab":
        batch_form(ann, GOOD, name=name)
    answer = send_checked(ann, first)
    assert answer.status_code == 200 and "Choose it again and check it" in answer.text
    with parts.database.read() as session:
        assert session.exec(select(Task)).all() == []


def test_a_batch_whose_requests_are_all_known_is_not_sent_again(parts: Parts, ann: Reader) -> None:
    own = '{"model_name": "kling-image-o1", "prompt": "a boat", "external_task_id": "mine"}\n'
    fields = json.loads(own)
    external_id = fields.pop("external_task_id")
    parts.submitter.submit(fields, external_task_id=external_id)
    checked = batch_form(ann, own)
    assert "all of its requests were sent before" in checked.text and "Put 1 task into this batch" in checked.text
    assert "0 tasks are queued" in send_checked(ann, checked).text
    page = batch_form(ann, own).text
    assert "all of its requests were sent before" in page and 'value="send"' not in page


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"content": GOOD}, "the batch has no name: give it one"),
        ({"name": "spring"}, "choose a file, or paste its lines"),
        ({}, "choose a file, or paste its lines"),
    ],
)
def test_a_batch_without_a_name_or_without_lines_is_told_what_to_give(
    ann: Reader, form: dict[str, str], said: str
) -> None:
    answer = ann.post("/batches/new", **form)
    assert answer.status_code == 422 and said in answer.text and "printable" not in answer.text


def test_form_shows_no_long_field_again_and_says_so(ann: Reader) -> None:
    for field in ("images", "prompt", "more", "external_task_id", "once"):
        fields = {"csrf": ann.csrf, "model_name": "a-model-of-tomorrow", "prompt": "a boat", field: "a+ " * 60_000}
        answer = ann.http.post("/console/ask", content=urlencode(fields), headers=FORM)
        assert answer.status_code == 422 and "too long for this form" in answer.text and len(answer.content) < 100_000
        assert "a-model-of-tomorrow" in answer.text


@pytest.mark.parametrize("odd", ["'", "字"])
def test_page_with_the_most_of_everything_is_below_its_bound(ann: Reader, odd: str) -> None:
    line = json.dumps({odd * 60: odd * 60}, ensure_ascii=False) + "\n"
    shown = line * (49_000 // len(html.escape(line).encode()))
    form = {"csrf": (None, ann.csrf), "name": (None, odd * 100_000)}
    both = ({**form, "content": (None, lines)} for lines in (shown, line * 5_000))
    answers = [ann.http.post("/console/batches/new", files=each) for each in both]
    assert "too long to be shown again" in answers[1].text
    assert html.escape(line.strip()).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in answers[0].text
    image = {"csrf": ann.csrf, "model_name": "a-model-of-tomorrow", "prompt": "a boat"}
    answers.append(ann.http.post("/console/ask", data={**image, "images": f"{odd * 200} " * 45}))
    assert [(each.status_code, len(each.content) < 100_000) for each in answers] == [(422, True)] * 3


def test_batch_is_sent_as_it_was_priced_and_never_without_a_price(parts: Parts, ann: Reader) -> None:
    unpriced = batch_form(ann, GOOD, step="send")
    assert "8 units" in unpriced.text and "Send 1 request" in unpriced.text
    other = {"content": GOOD.replace("}", ', "n": 9}'), "name": "another", "format": "csv", "step": "send"}
    ann.http.post("/console/batches/new", data={**dict(HIDDEN.findall(unpriced.text)), **other})
    with parts.database.read() as session:
        assert [task.request.get("n", 1) for task in session.exec(select(Task))] == [1]
        assert [batch.name for batch in session.exec(select(Batch))] == ["spring"]


def test_a_batch_with_a_fault_in_line_three_is_not_sent(parts: Parts, ann: Reader) -> None:
    answer = batch_form(ann, GOOD * 2 + '{"model_name": "none", "prompt": 7}\n')
    assert answer.status_code == 422 and "line 3" in answer.text and "Nothing was sent" in answer.text
    with parts.database.read() as session:
        assert session.exec(select(Batch)).all() == []


def test_a_good_batch_is_priced_then_sent_and_followed(parts: Parts, ann: Reader) -> None:
    answer = batch_form(ann, GOOD * 3)
    assert "3 requests are new" in answer.text and "24 units" in answer.text
    sent = send_checked(ann, answer)
    assert "3 tasks are queued" in sent.text
    again = send_checked(ann, answer)
    assert "0 tasks are queued" in again.text and again.url == sent.url
    assert wait_until(lambda: "0 of 3 are over" in ann.get(sent.url.path.removeprefix("/console")).text, seconds=30)
    with parts.database.read() as session:
        rows = session.exec(select(Task).where(col(Task.batch_id).is_not(None))).all()
    assert len(rows) == 3 and all(facts(parts, row, "task.created")[0]["by"] == "ann" for row in rows)
    report = ann.get(f"/batches/{rows[0].batch_id}/report.csv")
    assert report.headers["content-disposition"].startswith("attachment") and report.text.count("\r\n") == 4


@BOTH
def test_a_batch_whose_id_is_taken_meanwhile_keeps_its_lines_in_the_form(
    parts: Parts, ann: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Batches.plan

    def plan_before_another(self: Batches, *given: Any, **named: Any) -> Plan:
        made = plan(self, *given, **named)
        insert_row(parts, external_task_id=made.new[0].external_task_id, request_hash="another")
        return made

    checked = ann.post("/batches/new", name="spring", format="jsonl", content=GOOD)
    monkeypatch.setattr(Batches, "plan", plan_before_another)
    answer = send_checked(ann, checked)
    assert answer.status_code == 422 and "was submitted before" in answer.text
    shown = html.unescape(answer.text)
    assert GOOD.strip() in shown.partition('name="content"')[2] and 'value="spring"' in shown


def test_failed_tasks_of_a_batch_are_tried_again(parts: Parts, ann: Reader) -> None:
    task, _ = with_a_failed_file(parts)
    with parts.database.write() as session:
        batch = Batch(name="spring", created_at=parts.database.now())
        session.add(batch)
        row = session.get_one(Task, task.id)
        row.batch_id, row.batch_line = batch.id, 1
    assert wait_until(lambda: task.external_task_id in ann.page(f"/batches/{batch.id}"), seconds=30)
    assert "1 file or request is tried again" in ann.post("/act/batch-retry", batch=batch.id).text


def test_tasks_that_the_provider_failed_are_said_to_be_read_again(parts: Parts, ann: Reader) -> None:
    """It said that two things were tried again, each time, and their timelines did not show it."""
    with parts.database.write() as session:
        batch = Batch(name="spring", created_at=parts.database.now())
        session.add(batch)
        session.flush()
        batch_id = batch.id
    failed = {"state": TaskState.FAILED, "step": None, "due_at": None, "batch_id": batch_id}
    tasks = [insert_row(parts, provider_task_id=f"p{n}", batch_line=n, **failed) for n in (1, 2)]
    said = html.unescape(ann.post("/act/batch-retry", batch=batch_id).text)
    assert "2 tasks are read again, which costs nothing" in said and "tried again" not in said
    assert "2 tasks failed at the provider" in said and "receiver batch retry --as NEW spring" in said
    assert [acts(parts, task) for task in tasks] == [[("ann", "retry batch")]] * 2
    assert "ann: retry a batch" in ann.page(f"/tasks/{tasks[0].external_task_id}")
    alone = html.unescape(ann.post("/act/retry", task=tasks[0].id).text)
    assert "asked once more, which costs nothing" in alone and "tried again" not in alone


def test_price_of_refused_requests_is_shown_before_a_batch_sends_them_again(parts: Parts, ann: Reader) -> None:
    with parts.database.write() as session:
        batch = Batch(name="spring", created_at=parts.database.now())
        session.add(batch)
        session.flush()
        batch_id = batch.id
    request = {"model_name": "kling-image-o1", "prompt": "a boat", "n": 2}
    of_batch: dict[str, Any] = {"batch_id": batch_id, "request": request, "step": None, "due_at": None}
    refused = insert_row(parts, external_task_id="refused", batch_line=1, state=TaskState.FAILED, **of_batch)
    note = {"state": TaskState.FAILED, "note": "dismissed: not wanted"}
    insert_row(parts, external_task_id="dismissed", batch_line=2, **note, **of_batch)
    shown = ann.post("/act/batch-retry", batch=batch_id).text
    assert "took nothing for it" in shown and "16 units" in shown and "0.056 USD" in shown
    assert task_of(parts, refused.external_task_id).state is TaskState.FAILED and acts(parts, None) == []
    sent = ann.http.post("/console/act/batch-retry", data=dict(HIDDEN.findall(shown.partition("took nothing")[2])))
    assert "1 file or request is tried again" in sent.text and "took nothing" not in sent.text
    assert task_of(parts, refused.external_task_id).state is TaskState.CREATED
    assert task_of(parts, "dismissed").state is TaskState.FAILED


@BOTH
def test_failures_of_a_batch_are_paged_in_the_order_of_their_lines(parts: Parts, ann: Reader) -> None:
    with parts.database.write() as session:
        batch = Batch(name="large", created_at=parts.database.now())
        session.add(batch)
        session.flush()
        batch_id = batch.id
    for number in range(45):
        insert_row(
            parts, batch_id=batch_id, batch_line=number + 1, state=TaskState.FAILED, error=f"error-{number + 1}."
        )
    wait_until(lambda: "1–40 / 45" in ann.page(f"/batches/{batch_id}"), seconds=30)
    pages = [ann.page(f"/batches/{batch_id}"), ann.page(f"/batches/{batch_id}?from=40")]
    assert [re.findall(r"error-(\d+)\.", page) for page in pages] == [
        [str(line) for line in lines] for lines in (range(1, 41), range(41, 46))
    ]
    assert "1–40 / 45" in pages[0] and f"/console/batches/{batch_id}?from=40" in pages[0]


def test_sample_audit_shows_its_findings(parts: Parts, ann: Reader) -> None:
    asset = assets_of(parts, archive(parts, 1)[0])[0]
    parts.bucket.delete(str(asset.key))
    ann.post("/act/audit")

    page = wait_until(lambda: (found := ann.page("/archive")) and "Done" in found and found)
    assert re.search(r"missing</span> <span class=\"mono\">" + re.escape(str(asset.key)), page)


def test_sample_audit_that_got_no_thread_can_be_started_again(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    audit = SampleAudit(parts.database, parts.bucket)
    with monkeypatch.context() as without:
        without.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="new thread"):
            audit.start("ann")
    assert audit.start("ann")
    wait_until(lambda: not audit.is_running)


def test_archive_page_says_what_was_not_tried_at_the_store(ann: Reader) -> None:
    """SeaweedFS refuses a wrong MD5 too, see stores.md; "no" was wrong."""
    found = dict(re.findall(r"<dt>([^<]*)</dt><dd><span class=\"[^\"]*\">([^<]*)</span></dd>", ann.page("/archive")))
    assert (found["Refuses a wrong MD5"], found["Refuses a wrong checksum"]) == ("not tried: SHA-256 is enough", "yes")


def test_check_page_shows_the_results_of_receiver_check(ann: Reader) -> None:
    page = ann.post("/settings").text
    assert "takes writes, schema" in page and "takes our credentials" in page and "/callbacks/kling/" not in page
    assert "below" not in page and "run `receiver check` on the server: it prints what to paste" in page
    assert re.search(r"<dd>ann: run the check\s*(<span class=\"mono\"></span>)?</dd>", page)


def test_acts_of_a_person_are_in_the_timeline_and_in_no_sink(parts: Parts, ann: Reader) -> None:
    everything = [outbox.Subscription("it", frozenset(EventName))]
    parts.database.at_group_end = lambda session: outbox.sequence_recorded(parts.database, session, everything)
    task, asset = with_a_failed_file(parts)
    [good] = [each for each in assets_of(parts, task) if each.state is AssetState.ARCHIVED]
    callback = next(each for each in callbacks_of(parts) if each.source == "push")
    ann.post("/act/file-retry", file=asset.id)
    ann.post("/act/verify", file=good.id)
    ann.post("/act/read", task=task.id)
    ann.send(ann.get(f"/ask?again={task.id}").text)
    ann.post("/act/replay", delivery=callback.id)
    ann.post("/act/dismiss", task=task.id, reason="not wanted")
    ann.post("/act/audit")
    ann.post("/settings")
    done = [action for _, action in acts(parts, task)]
    assert done == ["retry", "verify", "read", "again", "replay", "dismiss"]
    assert [action for _, action in acts(parts, None)] == ["audit", "check"]
    page = ann.page(f"/tasks/{task.external_task_id}")
    assert all(
        f"ann: {each}" in page for each in ("retry", "verify a file: as archived", "replay", "dismiss: not wanted")
    )
    assert "ann: audit a sample" in ann.page("/settings")
    outbox.sequence_all(parts.database, everything)
    with parts.database.read() as session:
        sent = session.exec(select(Event.name).join(Dispatch, col(Dispatch.event_id) == col(Event.id))).all()
        streamed = [event.name for event, _ in events.after(session, 0, 500)]
    told = [each["name"] for each in report(parts.database, parts.bucket, task.external_task_id)["events"]]
    assert all(PERSON_ACTED not in names and len(names) > 3 for names in (sent, streamed, told))
