"""A client written from the seed's endpoint page alone (shared with this project's first commit), with plain httpx.

It knows `POST {base}/v1/images/omni-image`, the fields of that page and `Authorization: Bearer`; nothing of ours.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import httpx

PATH = "/v1/images/omni-image"
# The page's own example, its commented-out lines left out: unused fields are sent as empty strings.
EXAMPLE: dict[str, Any] = {
    "model_name": "kling-image-o1",
    "prompt": "生成一张海边跳舞的图片",
    "element_list": [{"element_id": 835266081714884677}],
    "resolution": "",
    "n": 1,
    "aspect_ratio": "",
    "callback_url": "",
    "external_task_id": "",
}


class Failed(Exception):
    """The API's error. `code`, `message`: from its answer."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(f"{status} {code} {message}")
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class SeedClient:
    """`base_url`: the only difference between the provider and its stand-in."""

    base_url: str
    api_key: str

    def create(self, **fields: Any) -> dict[str, Any]:
        """The new task in the answer's record."""
        return self._request("POST", PATH, json=fields)

    def task(self, name: str) -> dict[str, Any]:
        """The task by its `task_id` or `external_task_id`."""
        return self._request("GET", f"{PATH}/{name}")

    def wait(self, name: str, seconds: float = 30) -> dict[str, Any]:
        """The task once it succeeded or failed."""
        deadline = time.monotonic() + seconds
        while (task := self.task(name))["task_status"] not in ("succeed", "failed"):
            assert time.monotonic() < deadline, f"still {task['task_status']}"
            time.sleep(0.1)
        return task

    def _request(self, method: str, path: str, **options: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.api_key}"}
        answer = httpx.request(method, self.base_url + path, headers=headers, timeout=30, **options)
        body = answer.json()
        if answer.status_code != 200 or body["code"] != 0:
            raise Failed(answer.status_code, body["code"], body["message"])
        return body["data"]
