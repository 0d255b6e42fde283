"""Values as people read them: sizes, numbers, times and durations."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime

from markupsafe import Markup, escape

from receiver.base.visible import short
from receiver.console import catalogue
from receiver.console.catalogue import text, word

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
HAN = re.compile("[\u3400-\u9fff]")
# Each unit with its length, and the seconds from which the next one is used.
SPANS = ((90, 1, "s"), (5_400, 60, "min"), (2 * 86_400, 3_600, "h"), (math.inf, 86_400, "d"))


def size(count: int | float | None) -> str:
    """Bytes in a unit with at most three digits."""
    if count is None:
        return "–"
    value, place = float(count), 0
    while value >= 1_000 and place < len(UNITS) - 1:
        value, place = value / 1_000, place + 1
    return f"{value:.{0 if not place or value >= 100 else 1}f} {UNITS[place]}"


def seconds(value: float | None, language: str) -> str:
    """A duration in its largest unit."""
    if value is None:
        return "–"
    length, unit = next((length, unit) for most, length, unit in SPANS if value < most)
    return f"{value / length:.{1 if value < 10 else 0}f} {word(language, 'unit', unit)}"


def relative(moment: datetime, now: datetime, language: str) -> str:
    """`3 min ago`, `in 2 h`. The console's script does the same in the browser."""
    away = (now - moment).total_seconds()
    if abs(away) < 5:
        return text(language, "time.now")
    span = f"{abs(away):.0f} {word(language, 'unit', 's')}" if abs(away) < 10 else seconds(round(abs(away)), language)
    return text(language, "time.ago" if away > 0 else "time.in", span=span)


def when(moment: datetime | None, language: str) -> Markup | str:
    """A time element: relative text, and the exact time on hover."""
    if moment is None:
        return "–"
    exact = moment.astimezone(UTC)
    iso, shown = exact.isoformat(), escape(relative(exact, datetime.now(UTC), language))
    # `Markup.format` took a third of a list's time.
    made = f'<time datetime="{iso}" title="{iso[:10]} {iso[11:19]} UTC">{shown}</time>'
    return Markup(made)  # noqa: S704 - only digits, and escaped text


def cause(said: str | None, language: str, most: int = 160) -> Markup:
    """A text that a row keeps: ours translated, another as it is, and marked as English where the page is not."""
    translated = catalogue.cause(language, said or "")
    shown = escape(short(translated or said, most))
    is_english = language != catalogue.DEFAULT and not translated and shown and not HAN.search(shown)
    return Markup(f'<span lang="en">{shown}</span>') if is_english else shown  # noqa: S704 - escaped


def bars(values: Sequence[float]) -> list[tuple[str, str, str, str]]:
    """x, y, width and height of a bar for each value, in 240 by 44 pixels. One above zero is at least 1.5 high."""
    most, step = max(values, default=0) or 1, 240 / max(len(values), 1)
    tall = [max(1.5, value / most * 44) if value else 0 for value in values]
    return [(f"{n * step:.1f}", f"{44 - h:.1f}", f"{step * 0.72:.1f}", f"{h:.1f}") for n, h in enumerate(tall)]


def ratio_class(width: int | None, height: int | None) -> str:
    """The class of `ratios.css` closest to a picture's aspect ratio: the CSP allows no style attributes."""
    if not width or not height:
        return "r70"
    return f"r{max(0, min(140, round(math.log(width / height) / math.log(1.02)) + 70))}"
