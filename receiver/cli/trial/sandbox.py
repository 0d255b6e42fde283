"""`receiver sandbox`: the stand-in provider, until Ctrl-C."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from receiver.cli.terminal import say

if TYPE_CHECKING:
    from receiver.sandbox import Knobs, Sandbox

# Retries span 25 s, because a receiver that is started beside the sandbox may still be starting. Tests use three tries
# within 0.6 s.
CALLBACK_TRIES = 8
CTRL_C_INTERVAL_SECONDS = 0.5  # the delay with which Ctrl-C is noticed
ApiKeys = Annotated[list[str] | None, typer.Option(help="API key to accept. Repeatable.")]
WebhookSecrets = Annotated[list[str] | None, typer.Option(help="whsec_… secret that signs every callback. Repeatable.")]
FailRate = Annotated[float | None, typer.Option(help="Share of tasks that fail, 0 to 1.")]
DropRate = Annotated[float | None, typer.Option(help="Share of callbacks never sent, 0 to 1.")]
Shape = Annotated[str | None, typer.Option(help="Body of callbacks: old, new, wrapped or no_task_info.")]
RemoteHost = Annotated[bool, typer.Option("--allow-remote-host", help="Allow a --host outside loopback.")]
RemoteCallbacks = Annotated[
    bool, typer.Option("--allow-remote-callbacks", help="Allow callback URLs outside loopback.")
]
KnobValues = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="Set a knob that --knobs lists. Repeatable.")
]


def sandbox(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65_535)] = 9000,
    api_key: ApiKeys = None,
    webhook_secret: WebhookSecrets = None,
    processing_seconds: Annotated[float | None, typer.Option(help="Seconds a task stays processing.")] = None,
    fail_rate: FailRate = None,
    callback_drop_rate: DropRate = None,
    callback_shape: Shape = None,
    allow_remote_host: RemoteHost = False,
    allow_remote_callbacks: RemoteCallbacks = False,
    knob: KnobValues = None,
    knobs: Annotated[bool, typer.Option("--knobs", help="Print every knob and its default, then exit.")] = False,
) -> None:
    """Run a stand-in for the provider: creates, queries, callbacks and result files, with knobs for its failures.

    A prompt with \\[fail] fails, one with \\[drop] gets no callback, one with \\[expire] gets links dead at first.

    --knobs lists every fault: an error page with status 200 for a minute is --knob cdn_html_seconds=60.

    infra/docs/sandbox.md explains them.

    While it runs, POST /sandbox/knobs changes knobs and GET /sandbox/ledger returns what it did.
    """
    if knobs:
        _print_knobs()
        return
    options = {
        "api_keys": api_key,
        "webhook_secrets": webhook_secret,
        "processing_seconds": processing_seconds,
        "fail_rate": fail_rate,
        "callback_drop_rate": callback_drop_rate,
        "callback_shape": callback_shape,
        "allow_remote_host": allow_remote_host or None,
        "allow_remote_callbacks": allow_remote_callbacks or None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    # A receiver keeps the ids of earlier tasks, so those of this start must differ.
    own = {"callback_tries": CALLBACK_TRIES, "seed": secrets.randbelow(2**31)}
    _run_sandbox(host, port, _knobs({**own, **given, **_pairs(knob or [])}))


def _print_knobs() -> None:
    from receiver.sandbox import Knobs

    for name, field in Knobs.model_fields.items():
        say(f"{name}={json.dumps(field.default)}", f"    {field.description}")


def _pairs(words: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` words as knobs. A value that parses as JSON is JSON, any other is text."""
    values = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise typer.BadParameter(f"write NAME=VALUE, not {word!r}", param_hint="--knob")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def _knobs(values: dict[str, Any]) -> Knobs:
    from pydantic import ValidationError

    from receiver.sandbox import Knobs
    from receiver.sandbox.knobs import faults_of

    try:
        return Knobs(**values)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults_of(error))
        raise typer.BadParameter("; ".join(faults), param_hint="a knob") from None


def _run_sandbox(host: str, port: int, knobs: Knobs) -> None:
    """Serve until SIGINT or SIGTERM."""
    import signal
    from queue import Empty, SimpleQueue

    from receiver.sandbox import Sandbox

    signals = SimpleQueue[int]()  # not an Event, whose lock the interrupted thread may hold
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.put(number))
    try:
        server = Sandbox(host=host, port=port, knobs=knobs).start()
    except ValueError:
        raise typer.BadParameter(f"{host} is not on loopback; --allow-remote-host permits it") from None
    except OSError as error:
        say(f"cannot listen on {host}:{port}: {error.strerror}; --port 0 takes a free port", err=True)
        raise typer.Exit(1) from None
    try:
        say(f"provider  {server.url}", f"API key   {server.api_key}", f"seed      {knobs.seed}", "")
        say("For a receiver beside it, paste this into its shell or .env; the bucket's settings are yours:", "")
        for name, value in _settings(server, knobs).items():
            say(f"export {name}={value}")
        say("", "Ctrl-C ends it.")
        while True:  # polls, because another thread may receive the signal
            with suppress(Empty):
                signals.get(timeout=CTRL_C_INTERVAL_SECONDS)
                break
    finally:
        server.stop()


def _settings(server: Sandbox, knobs: Knobs) -> dict[str, str]:
    """The settings of a receiver that uses this sandbox as its provider."""
    settings = {
        "RECEIVER_KLING_BASE_URL": server.url,
        "RECEIVER_KLING_API_KEY": server.api_key,
        "RECEIVER_PRIVATE_RESULT_HOSTS": server.url.removeprefix("http://"),
        "RECEIVER_PUBLIC_URL": "http://127.0.0.1:8000",
        "RECEIVER_CALLBACK_SECRETS": secrets.token_urlsafe(32),
    }
    if knobs.webhook_secrets:
        settings["RECEIVER_KLING_WEBHOOK_SECRETS"] = ",".join(knobs.webhook_secrets)
    if knobs.allow_remote_host:
        settings["RECEIVER_ALLOW_HTTP"] = "true"
    return settings
