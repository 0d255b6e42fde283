"""Access to the console: keys, sessions, one-time links, the throttle, and forms of other sites."""

from __future__ import annotations

import base64
import html
import re
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from itertools import islice, product
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import event
from sqlmodel import col, select
from structlog.testing import capture_logs

from receiver.app.wiring import Parts
from receiver.base import config
from receiver.base.console_keys import ConsoleKey, parse
from receiver.console import application, live
from receiver.console.access import COOKIE, ONCE, ONCE_SECONDS, Access, LoginThrottle, _derived, one_time_token
from storage.accounts import used_tokens
from storage.accounts.used_tokens import MOST_USED
from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable
from storage.rows.models import Counter
from tests.console_reader import ACT_KEY, PAGES, READ_KEY, Reader
from tests.harness import wait_until
from tests.pipeline import Web, Wired, insert_row

pytestmark = pytest.mark.databases("sqlite")  # who may enter is asked of no database
ANN, BEN = ConsoleKey("ann", True, SecretStr(ACT_KEY)), ConsoleKey("ben", False, SecretStr(READ_KEY))
POSTS = (
    "/act/retry", "/act/read", "/act/dismiss", "/act/delete", "/act/file-retry", "/act/verify", "/act/replay",
    "/act/dismiss-deliveries", "/act/redeliver", "/act/disable", "/act/enable", "/act/batch-retry", "/act/audit",
    "/batches/new", "/ask", "/settings",
)  # fmt: skip


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_session_names_its_person_and_what_they_may() -> None:
    access = Access([ANN, BEN])
    sessions = [access.session(access.log_in(key)) for key in (ACT_KEY, READ_KEY)]
    assert [(each.name, each.may_act) for each in sessions if each] == [("ann", True), ("ben", False)]
    assert access.log_in("another-key-of-more-than-24") is None


def test_session_ends_when_its_key_is_removed_or_its_role_changes() -> None:
    token = Access([ANN, BEN]).log_in(ACT_KEY)
    assert Access([BEN]).session(token) is None
    assert Access([ANN._replace(may_act=False)]).session(token) is None
    assert Access([ANN]).session(token) is not None


def test_session_is_over_after_twelve_hours_and_after_logging_out() -> None:
    clock = Clock()
    access = Access([ANN], clock)
    token = access.log_in(ACT_KEY)
    session = access.session(token)
    assert session is not None
    clock.now += 12 * 3_600 - 1
    assert access.session(token) is not None
    access.end(session)
    assert access.session(token) is None
    clock.now += 2
    assert Access([ANN], clock).session(token) is None


def test_one_time_link_logs_in_once_and_is_not_a_session() -> None:
    access, token = Access([ANN]), one_time_token(ANN)
    assert access.session(token) is None
    session = access.session(access.redeem(token))
    assert session is not None and session.name == "ann"
    assert access.redeem(token) is None and access.is_open(token) is None


def ended_session(access: Access, key: ConsoleKey) -> str | None:
    token = access.log_in(key.key.get_secret_value())
    session = access.session(token)
    assert session is not None
    access.end(session)
    return token


def used_link(access: Access, key: ConsoleKey) -> str | None:
    token = access._token(_derived(key)[1], ONCE, ONCE_SECONDS)
    assert access.redeem(token)
    return token


@pytest.mark.parametrize("use_up", [ended_session, used_link])
def test_nothing_ended_is_valid_again_after_ten_thousand_others(
    use_up: Callable[[Access, ConsoleKey], str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of 10,001 was forgotten, of all people together. Memory is bounded for each person."""
    monkeypatch.setattr(used_tokens, "MOST_USED", 100)
    clock = Clock()
    access = Access([ANN, BEN], clock)
    hers, his = use_up(access, ANN), list[str | None]()
    for _ in range(10_001):
        clock.now += 0.05
        his.append(use_up(access, BEN))
    assert [token for token in (hers, *his) if access.session(token) or access.is_open(token)] == []
    clock.now += 1
    assert access.session(access.log_in(READ_KEY)) and access.session(access.log_in(ACT_KEY))
    counts = {group.partition(" ")[2]: len(used) for group, used in access.used._used.items() if used}
    assert counts == {"ann": 1, "ben": 101}


def test_too_many_ended_sessions_end_the_persons_older_ones_alone() -> None:
    clock = Clock()
    access = Access([ANN, BEN], clock)
    older, hers = access.log_in(READ_KEY), access.log_in(ACT_KEY)
    clock.now += 1
    for _ in range(MOST_USED + 1):
        assert access.session(older)
        session = access.session(access.log_in(READ_KEY))
        assert session is not None
        access.end(session)
    clock.now += 1
    assert access.session(older) is None
    assert access.session(hers) and access.session(access.log_in(READ_KEY))


def test_what_one_process_ended_is_over_in_all_and_after_a_restart(database: Database) -> None:
    """Their rows are deleted once they have expired everywhere, and those of one person are bounded."""
    clock = Clock()
    here, there, late = (Access([ANN, BEN], clock, database) for _ in range(3))
    late.used.catch_up()
    token, stays = ended_session(here, ANN), here.log_in(ACT_KEY)
    link = here._token(_derived(BEN)[1], ONCE, ONCE_SECONDS)
    assert here.redeem(link) and there.redeem(link) is None, "a link logs in once, whoever is asked first"
    there.used.catch_up()
    assert there.session(token) is None and there.is_open(link) is None and there.session(stays)
    assert late.session(token) and not late.used.is_behind, "it asks the database every three seconds"
    clock.now += 12 * 3_600 + used_tokens.KEPT_SECONDS + 1
    Access([ANN], clock, database).used.catch_up()
    assert stored(database) == []


def test_an_ended_session_stays_ended_when_a_clock_three_days_ahead_is_set_back(database: Database) -> None:
    clock = Clock()
    access = Access([ANN], clock, database)
    token = ended_session(access, ANN)
    clock.now += 3 * 86_400
    access.used.catch_up()
    clock.now -= 3 * 86_400
    assert access.session(token) is None
    later = Access([ANN], clock, database)
    later.used.catch_up()
    assert later.session(token) is None


def stored(database: Database) -> list[str]:
    with database.read() as session:
        return list(session.exec(select(Counter.name).where(col(Counter.name).startswith("console"))))


def test_ended_sessions_of_one_person_have_a_bound_in_the_database_too(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(used_tokens, "MOST_USED", 3)
    clock = Clock()
    here, there = Access([ANN, BEN], clock, database), Access([ANN, BEN], clock, database)
    hers, his = ended_session(here, ANN), list[str | None]()
    for _ in range(9):
        clock.now += 1
        his.append(ended_session(here, BEN))
    for each in (there, here, Access([ANN, BEN], clock, database)):
        each.used.catch_up()
        assert [token for token in (hers, *his) if each.session(token)] == []
    assert len(stored(database)) == 1 + 4


def test_session_that_ended_while_the_database_was_away_is_stored_later(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = Access([ANN], database=database), Access([ANN], database=database)
    with monkeypatch.context() as outage:
        outage.setattr(database, "write", away)
        token = ended_session(here, ANN)
        here.used.catch_up()
        assert here.session(token) is None and stored(database) == []
    monkeypatch.setattr(used_tokens, "FRESH_SECONDS", 0)
    here.used._fresh_until = 0
    here.used.catch_up()
    there.used.catch_up()
    assert there.session(token) is None


def away() -> NoReturn:
    raise DatabaseUnavailable("away")


def test_session_of_a_link_ends_with_the_key_that_made_the_link() -> None:
    """Also if its person has another key."""
    other = ConsoleKey("ann", True, SecretStr("another-key-of-ann-and-long"))
    token = Access([ANN, other]).redeem(one_time_token(other))
    assert Access([other]).session(token) and Access([ANN]).session(token) is None


def test_forged_session_tokens_are_refused() -> None:
    access = Access([ANN])
    token = str(access.log_in(ACT_KEY))
    changed = []
    for place in (0, -1):
        raw = bytearray(base64.urlsafe_b64decode(token + "="))
        raw[place] ^= 1
        changed.append(base64.urlsafe_b64encode(raw).rstrip(b"=").decode())
    forged = (*changed, token + "A", "", "é" * 75, "A" * 75, None)
    assert [access.session(each) for each in forged] == [None] * 7


def test_address_with_ten_wrong_keys_is_throttled() -> None:
    clock = Clock()
    throttle = LoginThrottle(clock)
    for _ in range(10):
        assert throttle.wait_seconds("a") == 0
        throttle.failed("a")
    assert 0 < throttle.wait_seconds("a") <= 61 and throttle.wait_seconds("b") == 0
    clock.now += 61
    assert throttle.wait_seconds("a") == 0


KEY = "a-key-of-more-than-24-characters"


@pytest.mark.parametrize("entry", ["ann", "ann=short", f"={KEY}", f"ann(write)={KEY}", f"a b={KEY}"])
def test_a_faulty_entry_stops_the_start_without_showing_the_key(entry: str) -> None:
    with pytest.raises(config.SettingsInvalid) as fault:
        config.load(s3_bucket="b", console_keys=entry)
    assert str(fault.value).startswith("RECEIVER_CONSOLE_KEYS: ") and "a-key-of" not in str(fault.value)


def test_a_name_may_have_two_keys_and_a_key_one_name() -> None:
    assert len(parse([SecretStr(f"ann={ACT_KEY}"), SecretStr(f"ann={READ_KEY}")])) == 2
    with pytest.raises(ValueError, match="same key"):
        parse([SecretStr(f"ann={ACT_KEY}"), SecretStr(f"ben={ACT_KEY}")])


# -- over the real server ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}])
def test_console_is_404_without_keys(web: Web, changes: dict[str, str]) -> None:
    answers = [httpx.get(f"{web.url}/console{path}") for path in ("", "/login", "/tasks", "/static/style.css")]
    assert [each.status_code for each in answers] == [404] * 4


@pytest.mark.parametrize(("kept", "said"), [("other", "RECEIVER_CONSOLE_KEYS"), ("k" * 40, "the file console.key")])
def test_login_page_says_where_the_key_is(parts: Parts, tmp_path: Path, kept: str, said: str) -> None:
    """It named the setting in both cases. A stranger reads no path of the machine."""
    (tmp_path / "console.key").write_text(f"{kept}\n")
    chosen = {"store": tmp_path, "console_keys": (SecretStr(f"me={'k' * 40}"),)}
    with closing(Wired(parts.settings.model_copy(update=chosen), bucket=parts.bucket)) as own, Web(own) as web:
        page = httpx.get(f"{web.url}/console/login").text
    assert said in page and str(tmp_path) not in page


def test_address_with_a_slash_at_its_end_leads_to_the_overview(ann: Reader) -> None:
    answer = ann.get("/")
    assert (answer.status_code, answer.url.path) == (200, "/console")


def test_every_page_redirects_to_the_login_without_a_session(stranger: Reader) -> None:
    for path in (*PAGES, "/live", "/files/x", "/thumbnails/x", "/gallery/zip", "/deliveries/1/body"):
        answer = stranger.get(path, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"].partition("?")[0]) == (303, "/console/login"), path
    assert [stranger.post(path).status_code for path in POSTS] == [401] * len(POSTS)


def test_cookie_is_strict_and_out_of_reach_of_scripts(stranger: Reader) -> None:
    answer = stranger.http.post("/console/login", data={"key": ACT_KEY}, follow_redirects=False)
    cookie = answer.headers["set-cookie"]
    assert all(words in cookie for words in ("HttpOnly", "SameSite=strict", "Path=/console", "Max-Age=43200"))
    assert ACT_KEY not in cookie and "Secure" not in cookie


@pytest.mark.parametrize("changes", [{"console_keys": f"ann={ACT_KEY}", "public_url": "https://receiver.example.com"}])
def test_cookie_is_secure_over_https(web: Web, changes: dict[str, str]) -> None:
    answer = httpx.post(f"{web.url}/console/login", data={"key": ACT_KEY})
    assert "Secure" in answer.headers["set-cookie"]


def test_wrong_keys_are_refused_and_then_throttled(stranger: Reader) -> None:
    statuses = [stranger.http.post("/console/login", data={"key": f"wrong-{n}"}).status_code for n in range(12)]
    assert statuses == [401] * 10 + [429] * 2
    assert stranger.http.post("/console/login", data={"key": ACT_KEY}).status_code == 429


def held_logins(web: Web, count: int, held: ExitStack) -> list[socket.socket]:
    """Login forms with a wrong key, each without its last byte."""
    host, port = web.url.removeprefix("http://").split(":")
    fields = "Host: x\r\nContent-Length: 13\r\nContent-Type: application/x-www-form-urlencoded"
    opened = [held.enter_context(socket.create_connection((host, int(port)), timeout=20)) for _ in range(count)]
    for each in opened:
        each.sendall(f"POST /console/login HTTP/1.1\r\n{fields}\r\n\r\nkey=wrong-ke".encode())
    return opened


def test_wrong_keys_that_come_at_once_are_throttled(web: Web) -> None:
    with ExitStack() as held:
        opened = held_logins(web, 14, held)
        wait_until(lambda: web.requests_under_way == 14)
        for each in opened:
            each.sendall(b"y")
        assert sorted(each.recv(12)[9:] for each in opened) == [b"401"] * 10 + [b"429"] * 4


def test_login_that_ends_early_is_not_logged_as_an_error(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR")
    with capture_logs() as lines:
        with ExitStack() as held:
            held_logins(web, 3, held)
            wait_until(lambda: web.requests_under_way == 3)
        wait_until(lambda: web.requests_under_way == 0)
    assert caplog.records == [] and [line for line in lines if line["log_level"] == "error"] == []


PARTS = b'--x\r\nContent-Disposition: form-data; name="key"%b\r\n\r\nabc\r\n--x--\r\n'
FORM = "multipart/form-data; boundary=x"


@pytest.mark.parametrize("path", ["/login", "/logout"])
@pytest.mark.parametrize("hidden", [";" * 15_000, ';a="b"' * 2_500, "; a=" + "(" * 2_000, ""], ids=len)
def test_no_form_of_a_stranger_stops_the_event_loop(stranger: Reader, path: str, hidden: str) -> None:
    """The standard library's parser of header values took 3 s of CPU for 15 kB of semicolons."""
    before = time.process_time()
    headers = {"Content-Type": FORM + hidden}
    content = PARTS % (b"" if hidden else b";" * 3_900)
    answer = stranger.http.post(f"/console{path}", content=content, headers=headers, follow_redirects=False)
    assert answer.status_code == (400 if path == "/login" else 303)
    assert time.process_time() - before < 0.6


def test_no_head_of_a_part_keeps_a_thread_busy(ann: Reader) -> None:
    before = time.process_time()
    for content_type, named in ((FORM, b";" * 60_000), (FORM + ";" * 15_000, b""), (FORM + "; a=" + "(" * 2_000, b"")):
        answer = ann.http.post("/console/ask", content=PARTS % named, headers={"Content-Type": content_type})
        assert answer.status_code == 400
    assert time.process_time() - before < 1


@pytest.mark.parametrize("path", ["", "/login", "/none"])
def test_no_cookie_stops_the_event_loop(stranger: Reader, path: str) -> None:
    """`http.cookies` took 0.5 s of CPU for each of these."""
    before = time.process_time()
    for quoted in ("\\" * 15_000, "\\a" * 7_500, "\\012" * 3_700):
        sent = {"Cookie": f'a="{quoted}"'}
        assert stranger.get(path, headers=sent, follow_redirects=False).status_code in (200, 303, 404)
    assert time.process_time() - before < 0.4


def test_a_silent_body_at_log_in_is_kept_ten_seconds(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    assert application.LOGIN_SECONDS == 10
    monkeypatch.setattr(application, "LOGIN_SECONDS", 0.2)
    with ExitStack() as held:
        (opened,) = held_logins(web, 1, held)
        assert opened.recv(12)[9:] == b"408"


def test_a_log_out_without_a_session_waits_for_no_body(web: Web) -> None:
    host, port = web.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as opened:
        opened.sendall(b"POST /console/logout HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n")
        assert opened.recv(12)[9:] == b"303"


def test_reader_may_change_nothing(ben: Reader, parts: Parts) -> None:
    for path in POSTS:
        assert ben.post(path, task="x", step="send").status_code == 403, path
    for path in PAGES:
        assert 'action="/console/act/' not in ben.page(path)


def test_a_refused_form_says_why(ann: Reader, ben: Reader, stranger: Reader) -> None:
    """Also one whose session has ended: the page was empty."""
    for reader, words in (
        (ann, "from an old page"),
        (ben, "Your key may only look"),
        (stranger, "Your session has ended"),
    ):
        answer = reader.post("/ask", csrf="0" * 32)
        assert words in answer.text and 'href="/console' in answer.text, words
    for path in ("/act/replay", "/act/redeliver"):
        answer = ann.post(path)
        assert (answer.status_code, "Nothing was chosen" in answer.text) == (400, True), path


def test_an_ended_session_logs_in_to_the_page_that_it_left(stranger: Reader) -> None:
    for came, leads_to in (
        ("http://x/console/batches/new?a=1&b=%20", "?next=%2Fconsole%2Fbatches%2Fnew%3Fa%3D1%26b%3D%2520"),
        ("http://elsewhere/page", ""),
        ("http://x//console", ""),
        ("garbage", ""),
    ):
        answer = stranger.http.post("/console/act/retry", data={"task": "x"}, headers={"Referer": came})
        assert answer.status_code == 401 and f'href="/console/login{leads_to}"' in answer.text, came


def test_forms_of_other_sites_are_refused(ann: Reader, stranger: Reader) -> None:
    """Without the cookie too, which they do not bring: the answer to a log-out deleted it."""
    for path in POSTS:
        assert ann.post(path, csrf="").status_code == 403, path
        assert ann.post(path, csrf="0" * 32).status_code == 403, path
    for headers in (
        {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://["},
    ):  # fmt: skip
        for reader, path in product((ann, stranger), ("/login", "/logout", *POSTS)):
            fields = {"csrf": ann.csrf, "key": ACT_KEY}
            answer = reader.http.post(f"/console{path}", data=fields, headers=headers, follow_redirects=False)
            assert (answer.status_code, answer.headers.get("set-cookie")) == (403, None), (path, headers)
    assert ann.get("").url.path == "/console"


def test_logging_out_ends_a_copied_cookie_too(ann: Reader, web: Web) -> None:
    copied = ann.http.cookies[COOKIE]
    assert ann.post("/logout").url.path == "/console/login"
    answer = httpx.get(f"{web.url}/console", cookies={COOKIE: copied})
    assert answer.headers["location"] == "/console/login"


def test_logging_out_at_another_process_ends_the_session_here_and_its_stream(
    ann: Reader, web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(used_tokens, "FRESH_SECONDS", 0.2)
    monkeypatch.setattr(live, "HEARTBEAT_SECONDS", 0.1)
    cookies = {COOKIE: ann.http.cookies[COOKIE]}
    other = Access([ANN, BEN], database=parts.database)
    session = other.session(cookies[COOKIE])
    assert session is not None
    with httpx.stream("GET", f"{web.url}/console/live", cookies=cookies, timeout=20) as answer:
        lines = answer.iter_lines()
        assert "event: still" in lines
        other.end(session)
        with pytest.raises(httpx.RemoteProtocolError):
            assert len(list(islice(lines, 200))) == 200
    assert ann.get("/tasks").url.path == "/console/login"


def test_sessions_are_checked_without_a_statement_each(ann: Reader, parts: Parts) -> None:
    asked: list[str] = []
    event.listen(parts.database.reader, "before_cursor_execute", lambda *given: asked.append(given[2]))
    began = time.monotonic()
    for _ in range(30):
        ann.get("/tasks", headers={"X-Live": "1"})
    most = (time.monotonic() - began) // used_tokens.FRESH_SECONDS + 1
    assert len([each for each in asked if "SELECT counter.name" in each]) <= most


def test_one_time_link_shows_a_button_first(stranger: Reader, web: Web) -> None:
    link = f"/login?once={one_time_token(ANN)}"
    assert "Log in as ann" in stranger.page(link) and "Log in as ann" in stranger.page(link)
    token = link.partition("=")[2]
    assert stranger.http.post("/console/login", data={"once": token}).url.path == "/console"
    assert "used already" in stranger.page(link)


def switched(reader: Reader, answer: httpx.Response, language: str = "zh") -> httpx.Response:
    """The page behind this one's link to another language."""
    found = re.search(rf'href="(/console/language/{language}[^"]*)"', answer.text)
    assert found is not None, answer.text
    return reader.http.get(html.unescape(found[1]))


def test_switching_the_language_keeps_the_page_asked_for_and_the_one_time_login(stranger: Reader) -> None:
    asked = "/console/tasks?q=%E7%8C%AB+%26+x&state=failed"
    once = one_time_token(ANN)
    answer = switched(stranger, stranger.get("/login", params={"next": asked, "once": once}))
    assert 'lang="zh"' in answer.text and "以 ann 身份登录" in answer.text
    assert dict(answer.url.params) == {"next": asked, "once": once}
    refused = stranger.http.post("/console/login", data={"key": "wrong", "next": asked})
    assert dict(switched(stranger, refused).url.params) == {"next": asked}


def test_throttled_log_in_keeps_the_page_asked_for(stranger: Reader) -> None:
    for _ in range(10):
        stranger.http.post("/console/login", data={"key": "wrong"})
    answer = stranger.http.post("/console/login", data={"key": ACT_KEY, "next": "/console/gallery?size=l"})
    assert answer.status_code == 429 and 'name="next" value="/console/gallery?size=l"' in answer.text


def test_switching_the_language_stays_on_every_page(parts: Parts, ann: Reader) -> None:
    """Also at an id that is no plain part of an address, and on a page with filters and a cursor."""
    for name in ("猫/#?%2F", "a//b"):
        insert_row(parts, external_task_id=name)
    tasks = [f"/tasks/{quote(name, safe='')}" for name in ("猫/#?%2F", "a//b")]
    cursor = quote("2020-01-01T00:00:00+00:00~" + "0" * 32)
    for path in (*PAGES, *tasks, f"/tasks?state=failed&q=%E7%8C%AB%20%26&before={cursor}"):
        answer = ann.get(path)
        again = switched(ann, answer)
        assert (again.status_code, again.url.path, again.url.params) == (200, answer.url.path, answer.url.params), path


def test_log_in_leads_to_the_page_that_was_asked_for(parts: Parts, stranger: Reader) -> None:
    insert_row(parts, external_task_id="猫/#?%2F")
    asked = stranger.get(f"/tasks/{quote('猫/#?%2F', safe='')}?from=0")
    found = re.search('name="next" value="([^"]*)"', asked.text)
    answer = stranger.http.post(
        "/console/login", data={"key": ACT_KEY, "next": html.unescape(found[1] if found else "")}
    )
    assert "猫/#?%2F" in answer.text and dict(answer.url.params) == {"from": "0"}


def test_login_redirects_back_and_never_to_another_site(stranger: Reader) -> None:
    for following, arrives in (
        ("/console/tasks?state=failed", "/console/tasks"), ("https://evil.example", "/console"),
        ("//evil.example", "/console"), ("/console//evil.example", "/console"), ("/consolex", "/console"),
        ("/console\\@evil", "/console"), ("/metrics", "/console"), ("/console/../metrics", "/console"),
        ("/console/%2e%2E/metrics", "/console"), ("/console/tasks/.%2e/../metrics?x", "/console"),
        ("/console/..#x", "/console"), ("/console/..%2fmetrics", "/console"),
        ("/console/tasks?q=../%2e%2e/&url=//x", "/console/tasks"),
    ):  # fmt: skip
        answer = stranger.http.post("/console/login", data={"key": ACT_KEY, "next": following})
        assert (answer.url.path, answer.url.host) == (arrives, "127.0.0.1"), following


def test_a_readers_form_is_refused_before_it_is_read(ben: Reader) -> None:
    answer = ben.http.post("/console/batches/new", content=b"x" * 1_000_000, headers={"Content-Type": "text/plain"})
    assert answer.status_code == 403
