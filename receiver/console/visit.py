"""One request of a logged-in person: the query and form, the session, and the page that is returned."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, pass_context
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from receiver.base.forms import Upload, address_of, came_from
from receiver.base.visible import seen, short
from receiver.console import catalogue, words
from receiver.console.access import Session
from receiver.tasks.changes import Tally
from storage.filters import read_page

HERE = Path(__file__).parent
# Sessions whose messages are kept.
REMEMBERED = 1_000
# What a form shows of its own fields, escaped. A page has less than 100 kB.
MAX_SHOWN_BYTES = 50_000
PAGES = ("overview", "tasks", "gallery", "deliveries", "events", "batches", "ask", "archive", "settings")


@functools.cache
def versions() -> dict[str, str]:
    """The first digits of each static file's hash, so that browsers never use an older release's file."""
    files = sorted((HERE / "static").iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files}


@functools.cache
def environment() -> Environment:
    """The templates, compiled once per process. All values are escaped."""
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"size": words.size, "short": short, "seen": seen}
    made.filters["seconds"] = pass_context(lambda page, value: words.seconds(value, page["language"]))
    made.globals |= {
        "versions": versions(),
        "languages": catalogue.LANGUAGES,
        "quote": lambda part: quote(part, safe=""),
    }
    return made


class Notices:
    """Messages for a person's next page, by session. Each is shown once."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[bytes, list[tuple[str, str]]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, session: Session, kind: str, words: str) -> None:
        with self._lock:
            self._waiting.setdefault(session.head, []).append((kind, words))
            while len(self._waiting) > REMEMBERED:
                self._waiting.popitem(last=False)

    def pop(self, session: Session) -> list[tuple[str, str]]:
        with self._lock:
            return self._waiting.pop(session.head, [])


@dataclass
class Visit:
    """`form`: the fields of a POST. `uploads`: its files. `counts`: numbers beside the names of pages."""

    request: Request
    session: Session
    language: str
    templates: Environment
    notices: Notices
    form: Mapping[str, str] = field(default_factory=dict)
    chosen: list[str] = field(default_factory=list)  # the values of every field called `id`
    uploads: Mapping[str, Upload] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def query(self) -> Mapping[str, str]:
        return self.request.query_params

    @property
    def is_live(self) -> bool:
        """Whether the script fetches the page to update it."""
        return "x-live" in self.request.headers

    def path(self, name: str) -> str:
        return str(self.request.path_params[name])

    def text(self, key: str, /, **values: Any) -> str:
        return catalogue.text(self.language, key, **values)

    def word(self, group: str, value: str) -> str:
        return catalogue.word(self.language, group, value)

    def cause(self, said: str | None, most: int = 160) -> Markup:
        return words.cause(said, self.language, most)

    def say(self, words: str, *, bad: bool = False) -> None:
        """Show this text on the person's next page."""
        self.notices.add(self.session, "bad" if bad else "ok", words)

    def say_left(self, tally: Tally) -> None:
        """Show the first reasons why something was not done."""
        for why in list(dict.fromkeys(tally.left.values()))[:3]:
            self.say(self.cause(why, 200), bad=True)

    def page(self, template: str, *, status: int = 200, **values: Any) -> Response:
        """A whole page."""
        notices = [] if self.is_live else self.notices.pop(self.session)
        values |= {"visit": self, "session": self.session, "notices": notices, "page": template.partition(".")[0]}
        return HTMLResponse(render(self.templates, template, self.language, **values), status)

    def redirect(self, to: str) -> Response:
        return RedirectResponse(to, status_code=303)

    def back(self, page: str) -> Response:
        """Redirect to this page, with the filter and the part of the list that it showed when its form was sent."""
        came = came_from(self.request.headers)
        return self.redirect(came if came.partition("?")[0] == page else page)

    def link(self, **changes: str | None) -> str:
        """This page's address with other query fields. None removes one."""
        return address_of(self.request.scope["path"], {**dict(self.query), **changes})

    def without(self, names: Iterable[str]) -> str:
        """This page's address without these query fields."""
        return address_of(self.request.scope["path"], {**dict(self.query), **dict.fromkeys(names)})


def render(templates: Environment, template: str, language: str, **values: Any) -> str:
    """Render a template. `t`: the text of a key; `w`: the text of a value; `c`: see `words.cause`; `when`: a time."""
    values |= {
        "t": lambda key, **given: catalogue.text(language, key, **given),
        "w": lambda group, value: catalogue.word(language, group, value),
        "when": lambda moment: words.when(moment, language),
        "c": lambda said, most=160: words.cause(said, language, most),
        "language": language,
        "pages": PAGES,
    }
    return templates.get_template(template).render(values)


def is_short(*given: str) -> bool:
    """Whether a form may show again what it was given."""
    return sum(map(len, given)) <= MAX_SHOWN_BYTES and len(escape("".join(given)).encode()) <= MAX_SHOWN_BYTES


class Part(NamedTuple):
    """A part of a list that is held whole. `before`, `after`: links to the parts beside it, "" for none."""

    rows: Sequence[Any]
    says: str
    before: str
    after: str


def part(visit: Visit, field: str, rows: Sequence[Any], most: int, *, newest: bool = False) -> Part:
    """The part of `rows` that the query's `field` names; without it the first one, or the last one if `newest`."""
    last = max(0, (len(rows) - 1) // most * most)
    wanted = read_page(visit.query, field)
    start = (last if newest else 0) if wanted is None else min(wanted // most * most, last)
    says = f"{start + 1}–{min(start + most, len(rows))} / {len(rows)}" if len(rows) > most else ""
    before, after = ({field: str(each)} for each in (start - most, start + most))
    return Part(
        rows[start : start + most], says, visit.link(**before) if start else "",
        visit.link(**after) if start < last else "",
    )  # fmt: skip
