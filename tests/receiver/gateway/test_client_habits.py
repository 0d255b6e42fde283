"""Habits of Kling's real clients that its page does not mention."""

from __future__ import annotations

import gzip
import json
from typing import Any
from urllib.parse import quote

import pytest

from receiver.app.wiring import Parts
from receiver.cli import show
from receiver.gateway.creates import DEFAULT_MODEL_NOTE
from receiver.sandbox import Sandbox
from receiver.tasks.adopt import Adopter
from storage.accounts import pauses
from storage.states import ArchiveState
from tests.pipeline import Web, drain, task_of
from tests.receiver.gateway.test_gateway import CHANGES, ID, ON_SQLITE, PATH, PLAIN, call, create, rows, status_and_code
from tests.unreported_tasks import creates, drawn, encoded


@pytest.fixture
def changes() -> dict[str, Any]:
    return dict(CHANGES)


@ON_SQLITE
def test_slashes_that_clients_add_change_nothing(web: Web) -> None:
    for number, path in enumerate(
        (f"/kling/{PATH.removeprefix('/kling')}", f"{PATH}/", "/kling///v1/images/omni-image", f"/{PATH}")
    ):
        assert status_and_code(call(web, "POST", path, json={**PLAIN, "external_task_id": f"id-{number}"})) == (
            200,
            0,
        ), path
        assert len(call(web, "GET", path).json()["data"]) == number + 1
    for path in (f"{PATH}/id-0/", f"{PATH}//id-0", "/kling//v1/images/omni-image/id-0"):
        assert call(web, "GET", path).json()["data"]["task_info"] == {"external_task_id": "id-0"}, path


@ON_SQLITE
def test_a_task_whose_id_has_slashes_is_found_by_it_first(web: Web) -> None:
    for name in ("a", "a/", "/a"):
        create(web, {**PLAIN, "external_task_id": name})
    for name in ("a", "a/", "/a"):
        found = call(web, "GET", f"{PATH}/{quote(name, safe='')}").json()
        assert found["data"]["task_info"] == {"external_task_id": name}


@ON_SQLITE
def test_a_path_without_our_prefix_is_answered_with_the_reason(web: Web) -> None:
    lost = "/v1/images/omni-image"
    for method, path in (("POST", lost), ("POST", f"/{lost}"), ("GET", f"{lost}/x"), ("GET", "/v1/tasks")):
        answer = call(web, method, path)
        assert status_and_code(answer) == (404, 1202)
        assert "/kling/v1/" in answer.json()["message"]


@ON_SQLITE
def test_a_request_without_a_model_is_for_klings_default(web: Web, parts: Parts, sandbox: Sandbox) -> None:
    for fields in ({"prompt": "a"}, {"prompt": "a", "model_name": ""}, {"prompt": "a", "model_name": None}):
        assert status_and_code(create(web, fields)) == (200, 0)
    assert {body["model_name"] for body in creates(sandbox)} == {"kling-image-o1"}
    assert {row.request["model_name"] for row in rows(parts)} == {"kling-image-o1"}


@ON_SQLITE
def test_the_row_notes_a_model_that_was_left_out(web: Web, parts: Parts, capsys: pytest.CaptureFixture[str]) -> None:
    """The note stays until a fault's note replaces it, and is never in a column of faults."""
    create(web, {**PLAIN, "external_task_id": "named"})
    create(web, {"prompt": "a boat", "external_task_id": ID})
    task = drain(parts, ID)
    assert (task.archive, task.note) == (ArchiveState.ARCHIVED, DEFAULT_MODEL_NOTE)
    assert task_of(parts, "named").note is None
    show.show(parts, ID)
    assert f"note: {DEFAULT_MODEL_NOTE}" in capsys.readouterr().out
    show.show_latest(parts, 10)
    assert "default" not in capsys.readouterr().out


@ON_SQLITE
def test_empty_unknown_fields_and_numbers_as_digits_are_accepted(web: Web, sandbox: Sandbox) -> None:
    empty = {"colour": "", "styles": [], "seed": None, "camera": {}}
    assert status_and_code(create(web, {**PLAIN, **empty, "n": "2"})) == (200, 0)
    assert {name: creates(sandbox)[0][name] for name in ("n", *PLAIN)} == {"n": 2, **PLAIN}
    assert not empty.keys() & creates(sandbox)[0].keys()


@ON_SQLITE
def test_a_compressed_body_is_answered_with_the_reason(web: Web) -> None:
    body = gzip.compress(json.dumps(PLAIN).encode())
    for headers in ({"Content-Encoding": "gzip"}, {}):
        answer = call(web, "POST", content=body, headers=headers)
        assert (status_and_code(answer), "compressed" in answer.json()["message"]) == ((400, 1200), True)


def test_an_adopted_task_is_found_by_klings_own_id(web: Web, parts: Parts) -> None:
    theirs = parts.kling.create(PLAIN, external_task_id=ID, callback_url=None).report.provider_task_id
    assert status_and_code(call(web, "GET", f"{PATH}/{theirs}")) == (400, 1201)
    Adopter(parts.database, parts.providers, parts.schedule, parts.read_rate_limit).take([theirs])
    found = call(web, "GET", f"{PATH}/{theirs}").json()["data"]
    assert (found["task_id"], found["receiver"]["provider_task_id"]) == (str(task_of(parts, ID).id), theirs)


def test_newer_clients_ask_for_several_tasks_by_either_kind_of_id(web: Web) -> None:
    ours = [create(web, {**PLAIN, "external_task_id": name}).json()["data"]["task_id"] for name in ("a", "b")]
    unknown = "00000000-0000-0000-0000-000000000000"

    def found(query: str) -> list[tuple[str, str]]:
        answer = call(web, "GET", f"/kling/tasks{query}")
        assert status_and_code(answer) == (200, 0), answer.text
        return [(each["id"], each["external_id"]) for each in answer.json()["data"]]

    both = [(ours[1], "b"), (ours[0], "a")]
    assert found(f"?task_ids={ours[1]},{unknown},,{ours[0]},{ours[1]}") == both
    assert found("/?external_task_ids=b,nobody,a") == both
    assert found("?task_ids=a") == found(f"?external_task_ids={ours[0]}") == []


@ON_SQLITE
def test_several_tasks_are_refused_without_one_kind_of_id_or_with_too_many(web: Web) -> None:
    many = ",".join(map(str, range(20)))
    assert status_and_code(call(web, "GET", f"/kling/tasks?task_ids={many}")) == (200, 0)
    for query in ("", "?task_ids=", "?task_ids=1&external_task_ids=a", f"?task_ids={many},20", "?task_id=1"):
        assert status_and_code(call(web, "GET", f"/kling/tasks{query}")) == (400, 1201), query


@ON_SQLITE
def test_url_safe_base64_is_sent_in_the_alphabet_that_kling_takes(web: Web, sandbox: Sandbox) -> None:
    picture = encoded(drawn(400, 300) + bytes([251, 239, 190, 255]))
    url_safe = picture.translate(str.maketrans("+/", "-_")).rstrip("=")
    assert "-" in url_safe and "_" in url_safe
    assert create(web, {**PLAIN, "image_list": [{"image": url_safe}]}).status_code == 200
    assert creates(sandbox)[0]["image_list"] == [{"image": picture}]


@ON_SQLITE
@pytest.mark.parametrize("changes", [{**CHANGES, "kling_api_key": None}])
def test_web_process_without_credentials_does_not_pause_the_account_of_others(
    web: Web, parts: Parts, sandbox: Sandbox
) -> None:
    assert status_and_code(create(web, {**PLAIN, "external_task_id": ID})) == (401, 1000)
    with parts.database.read() as session:
        assert not pauses.every(session)
    assert (rows(parts), creates(sandbox)) == ([], [])
