"""The retry schedule of sinks: its delays, their jitter, its end, and what a receiver asks for."""

from __future__ import annotations

import pytest

from receiver.base.retry_schedule import EVENT_RETRY_SECONDS, JITTER, retry_delay


def test_each_retry_has_its_delay_within_the_jitter() -> None:
    for tries, seconds in enumerate(EVENT_RETRY_SECONDS):
        drawn = [retry_delay(EVENT_RETRY_SECONDS, tries, None) or 0 for _ in range(200)]
        assert (1 - JITTER) * seconds <= min(drawn) < max(drawn) <= (1 + JITTER) * seconds


def test_schedule_ends_after_its_last_delay_whatever_the_receiver_asks() -> None:
    tries = len(EVENT_RETRY_SECONDS)
    assert (retry_delay(EVENT_RETRY_SECONDS, tries, None), retry_delay((), 0, 60)) == (None, None)


@pytest.mark.parametrize(("asked", "delay"), [(0.1, 10), (60, 60)])
def test_receiver_may_only_lengthen_a_delay(asked: float, delay: float) -> None:
    assert retry_delay((10,), 0, asked) == pytest.approx(delay, rel=JITTER)
