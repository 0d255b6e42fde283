"""Tokens in URLs: a token is valid for the task, provider and purpose it was signed for, and for nothing else."""

from __future__ import annotations

import base64
import hmac
import re
import string
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from receiver.base import tokens
from receiver.base.tokens import ASSET_PURPOSE, NO_TASK, Tokens

OLD, NEW, FOREIGN = (
    SecretStr(f"{word} secret of more than thirty-two characters") for word in ("old", "new", "foreign")
)
TASK = uuid.UUID("3b241101-e2bb-4255-8caf-4136c566a962")
BOTH = Tokens([NEW, OLD])
GOOD = BOTH.sign("kling", TASK)
ALPHABET = string.ascii_letters + string.digits + "-_"


def raw(token: str) -> bytes:
    return base64.urlsafe_b64decode(token + "=")


def text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def test_token_names_its_task() -> None:
    assert BOTH.read("kling", GOOD) == TASK


def test_token_of_the_account_names_no_task() -> None:
    assert BOTH.read("kling", BOTH.sign("kling", None)) == NO_TASK


def test_token_has_the_documented_form() -> None:
    """At most 64 characters of `A-Za-z0-9_-`, the same form for all tokens."""
    made = [BOTH.sign("kling", uuid.uuid4()) for _ in range(200)] + [BOTH.sign("kling", None), GOOD]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{55}", token) for token in made)
    assert {len(raw(token)) for token in made} == {1 + 16 + 24} and {raw(token)[0] for token in made} == {1}
    assert len(set(made)) == len(made)
    fixed = Tokens([SecretStr("x" * 32)]).sign("kling", TASK)
    assert fixed == "ATskEQHiu0JVjK9BNsVmqWIVqnumd9XGCcThGuCW6YLYnUqGcNigXnU"  # URLs are valid for months


def test_rotation_signs_with_the_first_secret_and_accepts_all() -> None:
    before = Tokens([OLD]).sign("kling", TASK)
    assert BOTH.read("kling", before) == TASK
    assert Tokens([OLD, NEW]).read("kling", GOOD) == TASK
    assert before != GOOD


def test_removed_secret_opens_nothing() -> None:
    before = Tokens([OLD]).sign("kling", TASK)
    assert Tokens([NEW]).read("kling", before) is None
    assert Tokens([OLD]).read("kling", GOOD) is None
    assert Tokens([FOREIGN]).read("kling", GOOD) is None
    assert Tokens([]).read("kling", GOOD) is None


def test_change_of_any_bit_is_refused() -> None:
    whole = raw(GOOD)
    for bit in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        assert BOTH.read("kling", text(bytes(flipped))) is None


@pytest.mark.parametrize("place", range(len(GOOD)))
def test_change_of_any_character_is_refused(place: int) -> None:
    """The last one is included, although its two lowest bits are padding."""
    others = [GOOD[:place] + other + GOOD[place + 1 :] for other in ALPHABET if other != GOOD[place]]
    assert len(others) == 63 and not any(BOTH.read("kling", other) for other in others)


def test_shorter_and_longer_tokens_are_refused() -> None:
    for end in range(len(GOOD)):
        assert BOTH.read("kling", GOOD[:end]) is None
        assert BOTH.read("kling", GOOD[end + 1 :]) is None
    for added in ("=", "A", "\0", "\n", " ", "%00", "/", ".png"):
        assert BOTH.read("kling", GOOD + added) is None and BOTH.read("kling", added + GOOD) is None
        assert BOTH.read("kling", GOOD[: len(GOOD) - len(added)] + added) is None


def test_token_opens_no_other_task() -> None:
    other = uuid.uuid4()
    swapped = raw(GOOD)[:1] + other.bytes + raw(GOOD)[17:]
    assert BOTH.read("kling", text(swapped)) is None
    assert BOTH.read("kling", text(raw(GOOD)[:1] + bytes(16) + raw(GOOD)[17:])) is None


@pytest.mark.parametrize("purpose", [ASSET_PURPOSE, "event", "", "callback\0", "callbac"])
def test_token_serves_no_other_purpose(purpose: str) -> None:
    other = BOTH.sign("kling", TASK, purpose=purpose)
    assert BOTH.read("kling", other, purpose=purpose) == TASK
    assert BOTH.read("kling", other) is None
    assert BOTH.read("kling", GOOD, purpose=purpose) is None


def test_token_opens_no_other_provider() -> None:
    assert BOTH.read("fal", GOOD) is None and BOTH.read("", GOOD) is None
    assert BOTH.read("kling", BOTH.sign("fal", TASK)) is None


def test_signed_fields_have_unambiguous_borders() -> None:
    """Moving a character from purpose to provider changes the token."""
    made = {BOTH.sign(provider, TASK, purpose=purpose) for provider, purpose in (("ab", "c"), ("b", "ca"), ("", "cab"))}
    assert len(made) == 3


@pytest.mark.parametrize("version", [0, 2, 255])
def test_other_version_is_refused(version: int) -> None:
    assert BOTH.read("kling", text(bytes([version]) + raw(GOOD)[1:])) is None


@given(st.text(max_size=70) | st.text(ALPHABET, min_size=55, max_size=55))
def test_any_text_is_refused_without_an_error(token: str) -> None:
    assert BOTH.read("kling", token) is None


def test_every_secret_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time must not reveal which secret matched. This test counts calls, because times prove nothing here."""
    calls: list[tuple[str, str]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(tokens.hmac, "compare_digest", lambda a, b: calls.append((a, b)) or real(a, b))
    three = Tokens([NEW, OLD, FOREIGN])
    for token in (three.sign("kling", TASK), Tokens([FOREIGN]).sign("kling", TASK), text(raw(GOOD)[:17] + bytes(24))):
        calls.clear()
        three.read("kling", token)
        assert len(calls) == 3 and {len(each) for pair in calls for each in pair} == {55}
