"""How soon a task is first read, by the settings that were given."""

from __future__ import annotations

from typing import Any

import pytest

from receiver.app.wiring import Parts
from receiver.base import config

PUBLIC = {"public_url": "https://pictures.example.com", "callback_secrets": "s" * 40}


@pytest.mark.parametrize(
    ("given", "delays"),
    [
        ({}, [5, 10, 20, 40, 60, 120]),
        (PUBLIC, [60, 120, 240]),
        ({"poll_after_seconds": 60}, [60, 120, 240]),
        ({"poll_max_seconds": 30}, [5, 10, 20, 30, 30]),
    ],
)
def test_first_reads_come_soon_if_nothing_calls_back(given: dict[str, Any], delays: list[float]) -> None:
    parts = Parts(config.load(s3_bucket="pictures", **given))
    for polls, wanted in enumerate(delays):
        assert wanted * 0.8 <= parts.schedule.poll_delay(polls) <= wanted * 1.2
    parts.close()


def test_poll_delay_of_the_environment_replaces_the_early_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECEIVER_POLL_AFTER_SECONDS", "60")
    parts = Parts(config.load(s3_bucket="pictures"))
    assert parts.schedule.first_poll_seconds == ()
    parts.close()
