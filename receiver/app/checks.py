"""The checks of `receiver check`, each with a remedy. One result per problem; no result contains a secret.

settings ─┬─▶ database ─▶ schema ─▶ callback secrets, workers ─┐
          ├─▶ bucket and its capabilities                      ├─▶ clock ─▶ lines to paste
          ├─▶ provider                                         │
          └─▶ each sink of events                              ┘
              (in parallel, each bounded in time)
"""

from __future__ import annotations

import secrets
import shlex
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from functools import partial
from http import HTTPStatus
from threading import Thread

from sqlalchemy.exc import DBAPIError
from sqlmodel import col, or_, select

from receiver.app import check_database, check_events, check_secrecy, check_store, database_faults
from receiver.app.findings import MAX_SKEW_SECONDS, SYNCHRONISE, Result, Status, refused, start_command
from receiver.app.wiring import Parts
from receiver.base import config, env_file
from receiver.providers.base import Provider, ProxyUnavailable, Unavailable
from receiver.providers.kling.answers import NotKling
from receiver.providers.kling.client import Kling
from storage import states
from storage.accounts import pauses
from storage.database.urls import place
from storage.errors import (
    AccountRefused,
    DatabaseUnavailable,
    ProviderRejected,
    ProviderThrottled,
    ProviderUnavailable,
    SpoolUnavailable,
    UserError,
)
from storage.operations import heartbeats
from storage.operations.counted import counted
from storage.own_files import is_writable_by_others
from storage.rows.models import Task
from storage.spool import room
from storage.url_parts import host_and_port

# The limit for all checks together, which run in parallel. A slow store's twenty requests fit into it, and an operator
# still waits for it.
BOUND_SECONDS = 10.0
MAX_LINE_CHARS = 300
SECRET_BYTES = 32  # 43 characters, none of them a comma

SET_KEY = (
    "set RECEIVER_KLING_API_KEY (or RECEIVER_KLING_ACCESS_KEY and RECEIVER_KLING_SECRET_KEY) as the provider shows it"
)
SETTLE = "settle it in the provider's console; nothing can be submitted until then"
# A check hangs if the network drops its packets.
HANGING = {
    "database": "check RECEIVER_DATABASE_URL, that no other program holds the database, and no firewall is in between",
    "bucket": "check RECEIVER_S3_ENDPOINT_URL, and that no firewall is in between",
    "provider": "check RECEIVER_KLING_BASE_URL, and that no firewall is in between",
    "store's name": "check RECEIVER_S3_ENDPOINT_URL, and that the name server answers",
}
# Advice by the provider's own code, KLING §6.
PROVIDER_ADVICE = {
    **dict.fromkeys((1000, 1001, 1002), SET_KEY),
    **dict.fromkeys((1003, 1004), SYNCHRONISE),
    **dict.fromkeys((1100, 1101, 1102), SETTLE),
    1103: "ask the provider for access to this API",
    1304: "allow this machine's address in the provider's console",
}
Look = Callable[[Parts], Iterable[Result]]


def run(
    settings: config.Settings, *, bound_seconds: float = BOUND_SECONDS, started_store: bool = False
) -> list[Result]:
    """Run all checks. Nothing that they write stays. A check without a result within `bound_seconds` is a fault.

    `started_store`: the store of `--store` runs for this check alone.
    """
    parts = Parts(settings)
    looks: dict[str, Look] = {"database": database, "bucket": check_store.bucket, "provider": provider}
    looks["store's name"] = check_secrecy.clear_text
    for entry in settings.event_entries:
        looks[check_events.name_of(entry)] = partial(check_events.sink, entry)
    pending = {name: _start(look, parts) for name, look in looks.items()}
    late = wait(pending.values(), bound_seconds).not_done
    results = [*environment()]
    for name, future in pending.items():
        advice = HANGING.get(name, check_events.HANGING)
        silence = Result(name, Status.FAULT, f"gave no answer within {bound_seconds:g} s", advice)
        results += [silence] if future in late else future.result()
    results += check_store.of_workers(parts, results, started_store)
    own = [
        *files(parts),
        *spooling(settings),
        *clock(parts),
        *callbacks(parts),
        *check_events.gateway(settings),
        *check_events.callbacks(settings),
        *check_events.proxies(settings),
    ]
    results += [*own, *check_secrecy.weak_secrets(settings)]
    if not late:  # A thread that hangs still uses them. The end of the process closes them.
        parts.close()
    return results


def _start(look: Look, parts: Parts) -> Future[list[Result]]:
    """Start a check in a thread that ends with the process, because a call that hangs in a library never ends."""
    future: Future[list[Result]] = Future()

    def work() -> None:
        try:
            future.set_result(list(look(parts)))
        except BaseException as error:  # noqa: BLE001 - raised again by result() in the thread that waits
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future


def refused_settings(error: config.SettingsInvalid) -> Iterator[Result]:
    """The results for wrong settings: these faults alone, and a new secret to paste if one is missing."""
    lines = str(error).splitlines()
    for line in lines:
        yield Result("settings", Status.FAULT, line)
    yield from environment(read=False)
    if any("RECEIVER_CALLBACK_SECRETS:" in line for line in lines):
        yield _fresh_secret()


def environment(*, read: bool = True) -> Iterator[Result]:
    """Check that a setting reads every RECEIVER_ variable of the environment, and that every line of `.env` counts."""
    unknown = config.unknown_variables()
    for name in unknown:
        nearest = config.nearest_variable(name)
        # A name that resembles none of ours may belong to another program.
        status = Status.FAULT if nearest else Status.NOTE
        advice = f"{nearest} is the nearest there is" if nearest else "correct its name, or remove it"
        yield Result("settings", status, f"nothing reads {name}", advice)
    if overridden := config.overridden_lines():
        line = f"the environment has other values than .env, and wins: {', '.join(overridden)}"
        yield Result("settings: .env", Status.NOTE, line, "if .env is meant, unset them or open a new terminal")
    if unexported := config.unexported_lines():
        line = f"boto3 and OpenSSL read the environment, not .env: {', '.join(unexported)}"
        yield Result("settings: not exported", Status.NOTE, line, "export them")
    if read and not unknown:
        path = env_file.find()
        yield Result("settings", Status.OK, f"complete; {path} was read" if path else "complete")


def files(parts: Parts) -> Iterator[Result]:
    """Check whether other users of this machine may read or change our rows, settings and secrets."""
    found = {".env": env_file.find(), **config.secret_files(), **parts.database.files}
    if parts.settings.store:
        found["store.json"] = parts.settings.store / "store.json"
    for what, path in found.items():
        if path is None or not path.exists():
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        remedy = f"run `chmod 600 {shlex.quote(str(path))}`"
        name, line = f"file: {what}", f"{path} has mode {mode:04o}: other users may"
        if is_writable_by_others(path.stat()):
            yield Result(name, Status.FAULT, f"{line} write it", f"make it your own, and {remedy}")
        elif mode & stat.S_IROTH:
            yield Result(name, Status.NOTE, f"{line} read it", remedy)


def spooling(settings: config.Settings) -> Iterator[Result]:
    """Check that the spool folder has room for a download that does not fit into memory."""
    try:
        folder, free = room(settings.spool_dir)
    except SpoolUnavailable as error:
        yield Result("spool", Status.FAULT, str(error), "files over 4 MiB are archived once it is mended")
        return
    if free < settings.max_asset_bytes:
        most = settings.max_asset_bytes / 2**20
        line = f"{folder} has {free / 2**20:,.0f} MiB free, and one file may have {most:,.0f}"
        yield Result("spool", Status.NOTE, line, "free space there, or set RECEIVER_SPOOL_DIR to a larger disk")


def database(parts: Parts) -> Iterator[Result]:
    """Check that the database answers, accepts writes and has our schema, and then what its rows show."""
    yield from check_database.variables(parts)
    try:
        database_faults.check_file(parts.database)
        schema = check_database.missing_file(parts) or check_database.schema(parts)
        yield schema
        yield from check_database.durability(parts)
        yield from check_database.waking(parts)
        if schema.status is Status.OK:
            yield from check_database.room(parts)
            yield _callback_secrets(parts)
            yield _workers(parts)
            yield _slots(parts)
            yield from _pauses(parts)
            yield from check_events.numbers(parts)
            yield from check_events.undelivered(parts)
            yield from check_events.left_behind(parts)
            yield from check_events.disabled(parts)
    except (DatabaseUnavailable, database_faults.DatabaseRefused, DBAPIError, OSError) as error:
        url = parts.database.url
        line = f"{place(url)} cannot be used ({database_faults.reason(url, error)})"
        yield Result("database", Status.FAULT, line, database_faults.remedy(parts.database, error))


def _callback_secrets(parts: Parts) -> Result:
    """Check whether today's secrets verify the callbacks of unfinished tasks."""
    unfinished = select(Task.provider, Task.callback_url).where(
        # An unfinished task has one of these two. Their partial indexes leave out the finished millions.
        or_(col(Task.due_at).is_not(None), col(Task.queued_at).is_not(None)),
        col(Task.state).not_in(states.TERMINAL),
        col(Task.callback_url).is_not(None),
    )
    count = unlisted = older = 0
    with parts.database.read() as session:
        for name, url in session.exec(unfinished.execution_options(yield_per=1_000)):
            token = str(url).rpartition("/")[2]
            named = parts.tokens.read(name, token)
            count += 1
            unlisted += named is None
            older += named is not None and token != parts.tokens.sign(name, named)
    of_all = f"of {counted(count, 'unfinished task')}"
    if unlisted:
        line = f"{unlisted} {of_all} {'has' if unlisted == 1 else 'have'} a callback URL that no listed secret made"
        advice = "list the secret of that time after the others in RECEIVER_CALLBACK_SECRETS until they have ended"
        return Result("callback secrets", Status.FAULT, line, advice)
    if older:
        line = f"{older} {of_all} {'needs' if older == 1 else 'need'} an older secret than the first one"
        advice = "keep the older ones listed until these tasks have ended"
        return Result("callback secrets", Status.NOTE, line, advice)
    have = counted(count, "unfinished task has", "unfinished tasks have")
    return Result("callback secrets", Status.OK, f"{have} a callback URL, and the first listed secret made each")


def _workers(parts: Parts) -> Result:
    alive = heartbeats.count_alive(parts.database)
    if alive:
        return Result("workers", Status.NOTE, f"worker processes alive: {alive}")
    advice = f"start `{start_command(parts.settings)}` or `receiver work`"
    return Result("workers", Status.NOTE, "no worker process is alive", advice)


def _slots(parts: Parts) -> Result:
    """Report how many of the account's slots our tasks use, and how many tasks wait for slots."""
    with parts.database.read() as session:
        held, limit = sum(parts.slots.held(session).values()), parts.slots.limit(session)
        waiting = parts.slots.count_queued(session)
    if limit is None:
        advice = (
            "set RECEIVER_KLING_SLOTS to what the account's pack allows, so that no create is refused for lack of slots"
        )
        pictures = counted(held, "picture is in progress", "pictures are in progress")
        return Result("slots", Status.NOTE, f"no limit of our own; {pictures}", advice)
    lowered = (
        f" (lowered from {parts.slots.setting}: the provider said it was full)" if limit != parts.slots.setting else ""
    )
    waits = counted(waiting, "task waits for slots", "tasks wait for slots")
    return Result("slots", Status.NOTE, f"{held} of {limit}{lowered} are held, {waits}")


def _pauses(parts: Parts) -> Iterator[Result]:
    """Check whether creates wait because the provider refuses the account."""
    with parts.database.read() as session:
        found = pauses.every(session)
    for each in found:
        advice = _advice(each.code, each.http_status)
        yield Result("account", Status.FAULT, pauses.line(each), f"{advice}; waiting tasks continue by themselves")


def _advice(code: int | None, refuses_account_by: int | None) -> str:
    """What to do about a refusal. `refuses_account_by`: the HTTP status by which a gateway refused the account in its
    own words. A 402 or 403 is of an empty balance then.
    """
    return PROVIDER_ADVICE.get(code or 0, SETTLE if refuses_account_by in (402, 403) else SET_KEY)


def provider(parts: Parts) -> Iterator[Result]:
    """Check whether the provider accepts our credentials, by a call that costs nothing."""
    chosen = parts.settings
    if not (chosen.kling_api_key or chosen.kling_access_key):
        yield Result("provider", Status.FAULT, "no provider credentials are set", SET_KEY)
        return
    try:
        kling = parts.kling
    except UserError as error:
        yield Result("provider", Status.FAULT, str(error), "correct the RECEIVER_KLING_… setting")
        return
    host = host_and_port(chosen.kling_base_url)
    try:
        _call_without_cost(kling)
    except (ProviderRejected, AccountRefused) as error:
        yield _refused(host, error, kling.clock_ahead_seconds)
    except ProviderThrottled as error:
        yield Result("provider", Status.NOTE, f"{host} is busy ({error})", "check again in a minute")
    except ProxyUnavailable as error:
        advice = f"check RECEIVER_EGRESS_PROXY, and that the proxy runs and permits connections to {host}"
        yield Result("provider", Status.FAULT, str(error), advice)
    except ProviderUnavailable as error:
        yield _unavailable(host, error)
    else:
        yield Result("provider", Status.OK, f"{host} takes our credentials")


def _unavailable(host: str, error: ProviderUnavailable) -> Result:
    if not isinstance(error, NotKling) and isinstance(error, Unavailable) and error.sent:
        advice = "if it lasts, ask the provider; tasks wait for it and are tried again by themselves"
        return Result("provider", Status.FAULT, f"{host} is reached and does not work ({error})", advice)
    advice = "check RECEIVER_KLING_BASE_URL and the way to it, or set RECEIVER_EGRESS_PROXY"
    if "WRONG_VERSION_NUMBER" in str(error):  # OpenSSL's message for an answer that is not TLS
        advice = "its port speaks no TLS: correct the port, or write http:// in RECEIVER_KLING_BASE_URL"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        advice = "add the CA of its certificate to those that this host trusts, or set SSL_CERT_FILE to its file"
    line = "did not answer in Kling's format" if isinstance(error, NotKling) else "cannot be reached"
    return Result("provider", Status.FAULT, f"{host} {line} ({error})", advice)


def _call_without_cost(provider: Provider) -> None:
    """List tasks, or where a gateway has no list, read a task that cannot exist. "Not found" proves a valid key."""
    try:
        provider.list_page(1, 1)
    except (ProviderRejected, Unavailable) as error:
        known = isinstance(error, ProviderRejected) and error.code in PROVIDER_ADVICE
        unreached = isinstance(error, Unavailable) and not error.sent
        if known or unreached:
            raise
        provider.read(provider_task_id=None, external_task_id=str(uuid.uuid4()))


def _refused(host: str, error: ProviderRejected | AccountRefused, skew_seconds: float | None) -> Result:
    advice = _advice(error.code, error.http_status if isinstance(error, AccountRefused) else None)
    if isinstance(error, ProviderRejected) and error.code is None and error.http_status == HTTPStatus.NOT_FOUND:
        advice = "check RECEIVER_KLING_BASE_URL and its path: Kling's API is not there"
    return Result("provider", refused(error.code, skew_seconds), f"{host} refuses us ({error})", advice)


def clock(parts: Parts) -> Iterator[Result]:
    """Compare this machine's clock with the `Date` headers of the store and the provider."""
    asked = {"the bucket's": vars(parts).get("bucket"), "the provider's": vars(parts).get("kling")}
    skews = {whose: one.clock_ahead_seconds for whose, one in asked.items() if one is not None}
    known = {whose: seconds for whose, seconds in skews.items() if seconds is not None}
    wrong = {whose: seconds for whose, seconds in known.items() if abs(seconds) > MAX_SKEW_SECONDS}
    if wrong:
        told = (f"{abs(s):,.0f} s {'ahead of' if s > 0 else 'behind'} {whose}" for whose, s in wrong.items())
        yield Result("clock", Status.FAULT, f"this machine's clock is {' and '.join(told)}", SYNCHRONISE)
    elif known:
        yield Result("clock", Status.OK, f"within {MAX_SKEW_SECONDS:g} s of {' and '.join(known)}")
    else:
        yield Result("clock", Status.NOTE, "neither bucket nor provider sent its time", "check again when one answers")


def callbacks(parts: Parts) -> Iterator[Result]:
    """Check whether creates ask for callbacks, and print what the operator has to paste for that."""
    chosen = parts.settings
    if not chosen.callback_secrets:
        yield _fresh_secret()
    if not chosen.public_url:
        line, advice = "RECEIVER_PUBLIC_URL is not set, so tasks are polled", "set it to be called back"
        yield Result("callbacks", Status.NOTE, line, advice)
        return
    if not chosen.kling_webhook_secrets and chosen.confirm != "always":
        line = (
            "nothing proves the sender of a callback: the holder of its URL can report success, and the links to "
            "files on the provider's hosts are archived until a later report differs"
        )
        advice = "set RECEIVER_KLING_WEBHOOK_SECRETS if the provider signs, else RECEIVER_CONFIRM=always (a read each)"
        yield Result("callbacks: unsigned", Status.NOTE, line, advice)
    if chosen.callback_secrets:
        url = f"{chosen.public_url}/callbacks/{Kling.name}/{parts.tokens.sign(Kling.name, None)}"
        line = "for tasks made elsewhere, the provider's console can call back too"
        yield Result("callbacks", Status.NOTE, line, "paste the address below there and keep it secret", url)


def _fresh_secret() -> Result:
    line, advice = "no usable callback secret is set", "paste the line below, a fresh one, into the environment or .env"
    paste = f"RECEIVER_CALLBACK_SECRETS={secrets.token_urlsafe(SECRET_BYTES)}"
    return Result("callback secrets: fresh", Status.NOTE, line, advice, paste)
