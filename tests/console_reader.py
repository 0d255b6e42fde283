"""A client of the console: a browser without script, on a real connection."""

from __future__ import annotations

import re
from typing import Any

import httpx

ACT_KEY, READ_KEY = "act-key-of-more-than-24-characters", "read-key-of-more-than-24-characters"
KEYS = f"ann={ACT_KEY},ben(read)={READ_KEY}"
LISTS = ("/tasks", "/gallery", "/deliveries", "/events", "/batches")
PAGES = ("", "?span=30d", *LISTS, "/batches/new", "/ask", "/archive", "/settings")
CSRF = re.compile(r'name="csrf" value="([0-9a-f]{32})"')
HIDDEN = re.compile(r'<input type="hidden" name="(\w+)" value="([^"]*)">')


class Reader:
    """Follows redirects as a browser does, and sends the token of the page it is on with every form."""

    def __init__(self, url: str, key: str | None = ACT_KEY, language: str = "en") -> None:
        self.http = httpx.Client(base_url=url, timeout=30, follow_redirects=True, headers={"Accept-Language": language})
        self.csrf = ""
        if key is not None:
            answer = self.http.post("/console/login", data={"key": key})
            assert answer.status_code == 200, answer.text
            self.csrf = self._token(answer)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(f"/console{path}", **options)

    def page(self, path: str) -> str:
        answer = self.get(path)
        assert answer.status_code == 200, (path, answer.status_code, answer.text[-2000:])
        return answer.text

    def post(self, path: str, *, csrf: str | None = None, **fields: Any) -> httpx.Response:
        return self.http.post(f"/console{path}", data={"csrf": self.csrf if csrf is None else csrf, **fields})

    def send(self, page: str, **fields: Any) -> httpx.Response:
        """Press the button that sends the request whose price this page of `/ask` shows."""
        return self.http.post("/console/ask", data={**dict(HIDDEN.findall(page)), **fields, "step": "send"})

    def _token(self, answer: httpx.Response) -> str:
        found = CSRF.search(answer.text)
        return found[1] if found else ""
