"""The API's envelopes, and its error table: code → HTTP status and message."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

ERRORS: dict[int, tuple[int, str]] = {
    1000: (401, "Authentication failed"),
    1001: (401, "Authorization is empty"),
    1002: (401, "Authorization is invalid"),
    1003: (401, "Authorization is not yet valid"),
    1004: (401, "Authorization has expired"),
    1100: (429, "Account exception"),
    1101: (429, "Account in arrears"),
    1102: (429, "Resource pack depleted or expired"),
    1103: (403, "Unauthorized access to requested resource"),
    1200: (400, "Invalid request parameters"),
    1201: (400, "Invalid parameters"),
    1202: (404, "The requested method is invalid"),
    1203: (404, "The requested resource does not exist"),
    1300: (400, "Trigger strategy of the platform"),
    1301: (400, "Trigger the content security policy of the platform"),
    1302: (429, "API request too fast"),
    1303: (429, "parallel task over resource pack limit"),
    1304: (429, "Trigger the platform's IP whitelist policy"),
    5000: (500, "Server internal error"),
    5001: (503, "Server temporarily unavailable"),
    5002: (504, "Server internal timeout"),
}


Breakage = Literal["", "html", "broken", "hang"]


class Answer(NamedTuple):
    """An answer of the API. `breakage`: how the answer is damaged on its way out, '' = not."""

    http_status: int
    body: dict[str, Any]
    breakage: Breakage = ""


class Refused(Exception):
    """A refusal of the API. `code`: a key of ERRORS (an unknown one counts as 5000)."""

    def __init__(self, code: int, message: str | None = None) -> None:
        self.code = code
        self.http_status, usual = ERRORS.get(code, ERRORS[5000])
        self.message = message or usual
        super().__init__(f"{code} {self.message}")

    def body(self, request_id: str) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "request_id": request_id}


def success(request_id: str, data: Any) -> dict[str, Any]:
    return {"code": 0, "message": "SUCCEED", "request_id": request_id, "data": data}
