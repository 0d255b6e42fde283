"""Every field of the provider's page: valid values reach the provider as documented, others are named and not sent."""

from __future__ import annotations

from typing import Any

import pytest

from receiver.app.wiring import Parts
from receiver.providers.base import RequestInvalid
from receiver.sandbox import Sandbox
from storage.rows.models import Task
from storage.states import TaskState
from tests.pipeline import task_of
from tests.unreported_tasks import REQUEST, creates, drawn, encoded

ID = "order-4711"


@pytest.fixture(autouse=True)
def slow_tasks(sandbox: Sandbox) -> None:
    """The provider changes no task by itself, so a row shows what its create returned."""
    sandbox.set(submitted_seconds=600, processing_seconds=600)


def submit_request(parts: Parts, external_task_id: str | None = ID, adopt: bool = False, **fields: Any) -> Task:
    return parts.submitter.submit({**REQUEST, **fields}, external_task_id=external_task_id, adopt=adopt).task


URL = "https://p2-fdl.klingai.com/ksc2/z3PF.png?cacheKey=Chtz&x-kcdn-pid=112757&pkey=AAXA_-~"
PICTURE = encoded(drawn(300, 300))
ACCEPTED: list[tuple[str, Any, Any]] = [
    ("model_name", "kling-image-o1", "kling-image-o1"),
    ("prompt", "生成一张海边跳舞的图片" + "×" * 2489, "生成一张海边跳舞的图片" + "×" * 2489),
    ("image_list", [{"image": URL}], [{"image": URL}]),
    ("image_list", [{"image": f"data:image/png;base64,{PICTURE}"}], [{"image": PICTURE}]),
    ("element_list", [{"element_id": 835266081714884677}], [{"element_id": 835266081714884677}]),
    ("resolution", "4k", "4k"),
    ("n", 9, 9),
    ("result_type", "series", "series"),
    ("series_amount", 9, 9),
    ("series_amount", "auto", "auto"),
    ("aspect_ratio", "21:9", "21:9"),
    ("watermark_info", {"enabled": True}, {"enabled": True}),
]
REFUSED: list[tuple[str, Any]] = [
    ("model_name", ""),
    ("prompt", "×" * 2501),
    ("image_list", [{"image": ""}]),
    ("image_list", [{"image": encoded(drawn(299, 300))}]),
    ("image_list", [{"image": URL}] * 11),
    ("element_list", [{"element_id": 2**63}]),
    ("resolution", "8k"),
    ("n", 10),
    ("result_type", "grid"),
    ("series_amount", 1),
    ("aspect_ratio", "5:4"),
    ("watermark_info", {}),
    ("callback_url", "https://elsewhere.example/"),
    ("external_task_id", "in-the-request"),
]


@pytest.mark.parametrize(("name", "given", "sent"), ACCEPTED)
@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_an_accepted_field_reaches_the_provider_as_documented(
    parts: Parts, sandbox: Sandbox, name: str, given: Any, sent: Any
) -> None:
    task = submit_request(parts, **{name: given})
    ours = {"external_task_id": ID, "callback_url": task.callback_url}
    assert creates(sandbox) == [{**REQUEST, **ours, name: sent}]
    assert task.state is TaskState.SUBMITTED


@pytest.mark.parametrize(("name", "given"), REFUSED)
@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_refused_field_is_named_and_nothing_is_sent(parts: Parts, sandbox: Sandbox, name: str, given: Any) -> None:
    with pytest.raises(RequestInvalid, match=rf"^{name}"):
        parts.submitter.submit({**REQUEST, name: given}, external_task_id=ID)
    with pytest.raises(AssertionError):
        task_of(parts, ID)
    assert creates(sandbox) == []


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_element_ids_beyond_doubles_are_sent_as_numbers(parts: Parts, sandbox: Sandbox) -> None:
    submit_request(parts, element_list=[{"element_id": "835266081714884677"}])
    assert b'"element_id": 835266081714884677}' in sandbox.ledger().creates[0].raw


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_any_external_id_arrives_as_given(parts: Parts, sandbox: Sandbox) -> None:
    given = "order/4711 ü?&#%"
    submit_request(parts, given)
    assert creates(sandbox)[0]["external_task_id"] == given
    with pytest.raises(ValueError, match="200"):
        submit_request(parts, "ü" * 34)


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_the_pages_own_example_is_sent_without_its_empty_strings(parts: Parts, sandbox: Sandbox) -> None:
    empty = {"resolution": "", "aspect_ratio": "", "callback_url": "", "external_task_id": ""}
    element = {"element_list": [{"element_id": 835266081714884677}], "n": 1}
    parts.submitter.submit({**REQUEST, **element, **empty})
    assert creates(sandbox)[0].keys() == {*REQUEST, *element, "callback_url", "external_task_id"}


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_an_empty_id_is_refused_where_the_caller_names_it(parts: Parts, sandbox: Sandbox) -> None:
    """It would be a new task at each repetition, and each is paid."""
    with pytest.raises(ValueError, match="external_task_id is empty"):
        submit_request(parts, "")
    assert not creates(sandbox)
