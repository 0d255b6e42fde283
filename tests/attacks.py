"""Attacks on the running product beside honest traffic: how much one attacker delays everybody else.

Real processes on loopback: store, stand-in provider, `receiver serve` and a worker. A separate process attacks while
deliveries arrive at a steady rate and another client's creates are called back. Each attack is bounded in time.

The attacker shares the processors with us, which one over the network does not. So for an attacker that took 5 % of a
processor or more, honest traffic is also measured beside a neighbour: a process that takes as much and sends nothing.
Within twice means twice the worse of alone and beside the neighbour. Where an attack consists of work that a client may
order anyway (ten creates a second, whose callbacks go to a slow host), the same work without the slow host is shown,
and does not count.

    .venv/bin/python -m tests.attacks --seconds 10 --rate 50
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from receiver.sandbox import Knobs
from tests.attackers import ATTACKS, CREATES, KEY, LOADS, PLAIN, Target
from tests.bench.slow_connections import HOST, acknowledge, p99
from tests.bench.stage import cpu_seconds
from tests.forked import Forked
from tests.harness import wait_until
from tests.running_product import Scene
from tests.webhook_receiver import SECRET, Hook

# Of another client.
OTHER_KEY = "a-key-of-another-client-1234567890"
MOST_TIMES = 2.0
# A create is called back some 0.5 s later. A smaller additional delay is not noticeable.
FREE_SECONDS = 1.0
SLOW_HOST_SECONDS = 20.0
PATIENCE_SECONDS = 60
# The time an attack has to begin, or half of a short measurement.
LEAD_SECONDS = 1.5
# An attacker with less of a processor than this has no neighbour beside whom to measure.
LEAST_SHARE = 0.05


@dataclass(frozen=True)
class Honest:
    """Seconds of acknowledgements, and of another client's creates until the callback of their success. Meanwhile, the
    shares of a processor of the web server and of the work beside it.
    """

    acks: list[float]
    callbacks: list[float]
    missing: int
    server_share: float = 0
    beside_share: float = 0

    @property
    def words(self) -> str:
        slowest = max(self.callbacks, default=float("nan"))
        middle = statistics.median(self.callbacks or [float("nan")])
        return (
            f"acks p99 {p99(self.acks) * 1e3:6.1f} ms, callbacks p50 {middle:5.2f} s, worst {slowest:5.2f} s, "
            f"web process {self.server_share:3.0%} of a processor, beside it {self.beside_share:3.0%}"
        )


class Stage(Scene):
    """The product, the webhook receivers of two clients, and what the attackers know."""

    def _build(self) -> None:
        self.start_servers("sqlite", Knobs(submitted_seconds=0.1, processing_seconds=0.1, picture_bytes=2_000_000))
        self.know_the_store()
        self.hook = self.stack.enter_context(Hook())
        self.slow_hook = self.stack.enter_context(Hook(pause_seconds=SLOW_HOST_SECONDS))
        self.start_processes(
            1,
            RECEIVER_API_KEYS=f"{KEY},{OTHER_KEY}",
            RECEIVER_GATEWAY_RESULTS="provider",
            RECEIVER_PRIVATE_CALLBACK_HOSTS=f"{self.hook.host},{self.slow_hook.host}",
            RECEIVER_EVENT_SECRETS=SECRET,
        )
        self.port = self.parts.settings.port
        self.client = self.stack.enter_context(
            httpx.Client(
                base_url=f"http://{HOST}:{self.port}",
                headers={"Authorization": f"Bearer {OTHER_KEY}"},
                timeout=PATIENCE_SECONDS,
                trust_env=False,
            )
        )

    def create(self) -> str:
        answer = self.client.post(CREATES, json=PLAIN | {"callback_url": f"{self.hook.url}"})
        return str(answer.raise_for_status().json()["data"]["task_id"])

    def link(self) -> str:
        """The path of an asset link, once its picture is archived."""
        name = self.create()

        def path() -> str | None:
            images = self.client.get(f"{CREATES}/{name}").json()["data"].get("task_result", {}).get("images", [])
            return next((url.partition(str(self.port))[2] for one in images if "/assets/" in (url := one["url"])), None)

        return str(wait_until(path, seconds=PATIENCE_SECONDS, every=0.2))

    def target(self, seconds: float) -> Target:
        sign = self.parts.tokens.sign
        task, account = (f"/callbacks/kling/{sign('kling', named)}" for named in (uuid.uuid4(), None))
        return Target(
            self.port, task, account, self.asset, self.slow_hook.url, self.hook.url, time.monotonic() + seconds
        )

    async def honest(self, rate: float, seconds: float) -> Honest:
        acks, starts = await asyncio.gather(acknowledge(self.port, rate, seconds), self._creates(seconds))
        with suppress(AssertionError):
            await asyncio.to_thread(wait_until, lambda: starts.keys() <= self._told().keys(), seconds=PATIENCE_SECONDS)
        told = self._told()
        waits = [told[name] - start for name, start in starts.items() if name in told]
        return Honest(acks, waits, len(starts) - len(waits))

    async def _creates(self, seconds: float) -> dict[str, float]:
        """One create a second: when each was answered, by its id."""
        starts: dict[str, float] = {}
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            starts[await asyncio.to_thread(self.create)] = time.monotonic()
            await asyncio.sleep(max(0, min(1, until - time.monotonic())))
        return starts

    def _told(self) -> dict[str, float]:
        ends = [got for got in self.hook.taken if got.json.get("task_status") == "succeed"]
        return {got.json["task_id"]: got.at for got in reversed(ends)}

    def measure(self, rate: float, seconds: float, *words: str) -> Honest:
        """Measure honest traffic beside a separate process with these options, or alone without any."""
        if not words:
            return self._measure(rate, seconds, [self.web_pid])
        target = self.target(seconds + 2)
        log = self.folder / "attack.log"
        words = (*words, "--target", json.dumps(vars(target)))
        other = Forked(words, os.environ, self.folder, out=log, module="tests.attackers")
        try:
            time.sleep(min(LEAD_SECONDS, seconds))
            assert other.poll() is None, log.read_text()
            return self._measure(rate, seconds, [self.web_pid, other.pid])
        finally:
            other.kill()
            other.wait()

    def _measure(self, rate: float, seconds: float, process_ids: list[int]) -> Honest:
        async def both() -> tuple[Honest, list[float]]:
            return await asyncio.gather(self.honest(rate, seconds), shares(process_ids, seconds))

        found, (server, *others) = asyncio.run(both())
        return replace(found, server_share=server, beside_share=sum(others))

    @property
    def web_pid(self) -> int:
        assert self.web._process is not None
        return self.web._process.pid


async def shares(process_ids: list[int], seconds: float) -> list[float]:
    """The share of a processor that each process takes in this time."""
    before, started = [cpu_seconds(each) for each in process_ids], time.monotonic()
    await asyncio.sleep(seconds)
    passed = time.monotonic() - started
    return [(cpu_seconds(each) - at) / passed for each, at in zip(process_ids, before, strict=True)]


def is_within(without: list[Honest], beside: Honest) -> bool:
    """Whether it is within twice of the worst `without` the attack: alone, and beside a neighbour as busy."""
    late = statistics.median(beside.callbacks or [float("inf")]) - FREE_SECONDS
    return (
        not beside.missing
        and p99(beside.acks) <= MOST_TIMES * max(p99(each.acks) for each in without)
        and late <= MOST_TIMES * max(statistics.median(each.callbacks) for each in without)
    )


def play(names: list[str], rate: float, seconds: float, *, is_smoke: bool) -> list[str]:
    """Print some lines for each attack. Returns those beside which honest traffic took more than twice as long, or the
    callbacks did not come. `is_smoke`: measure beside the attacks alone, and only whether the callbacks come.
    """
    beyond = []
    with tempfile.TemporaryDirectory() as folder, Stage(Path(folder)) as stage:
        stage.asset = stage.link()
        for name in names:
            holds, attack = ATTACKS[name]
            show(f"{holds}: {name}")
            without = [] if is_smoke else [stage.measure(rate, seconds)]
            for alone in without:
                show(f"   alone     {alone.words}")
            if name in LOADS and not is_smoke:
                words, load = LOADS[name]
                show(f"   load      {stage.measure(rate, seconds, '--attack', load.__name__).words} ({words})")
            beside = stage.measure(rate, seconds, "--attack", attack.__name__)
            show(f"   attack    {beside.words}")
            if without and (share := min(beside.beside_share, 1)) >= LEAST_SHARE:
                without.append(stage.measure(rate, seconds, "--share", str(share)))
                show(f"   neighbour {without[-1].words}")
            beyond += [name] if beside.missing or (without and not is_within(without, beside)) else []
            if beside.missing:
                show(f"   {beside.missing} callbacks did not come")
    return beyond


def show(words: str) -> None:
    print(words, flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--rate", type=float, default=50, help="deliveries a second")
    parser.add_argument("--only", action="append", choices=sorted(ATTACKS), help="one attack; repeatable")
    parser.add_argument("--smoke", action="store_true", help="beside the attacks alone; judges no duration")
    given: Any = parser.parse_args()
    if beyond := play(given.only or list(ATTACKS), given.rate, given.seconds, is_smoke=given.smoke):
        show(f"honest traffic took more than {MOST_TIMES:g} times as long beside: {', '.join(beyond)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
