"""The rows of the benchmark, the interleaving of its rounds, and the printed table."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Judgement = Literal["at least", "at most"]


@dataclass(frozen=True)
class Sample:
    """One round: ours and the reference, measured right after each other. `value` decides; default ours / reference."""

    ours: float
    reference: float
    value: float | None = None

    @property
    def figure(self) -> float:
        return self.ours / self.reference if self.value is None else self.value


@dataclass(frozen=True)
class Row:
    """One measure. `measure(small)` is one round of it; `small` for the smoke form, which judges nothing."""

    name: str
    title: str
    reference: str
    unit: str
    goal: float
    judgement: Judgement
    measure: Callable[[bool], Sample]


@dataclass
class Result:
    row: Row
    samples: list[Sample] = field(default_factory=list)

    @property
    def figure(self) -> float:
        return statistics.median(sample.figure for sample in self.samples)

    @property
    def is_met(self) -> bool:
        row = self.row
        if not self.samples:
            return False
        return self.figure >= row.goal if row.judgement == "at least" else self.figure <= row.goal

    def as_json(self) -> dict[str, Any]:
        if not self.samples:
            return {"row": self.row.name, "title": self.row.title, "met": False}
        figures = [sample.figure for sample in self.samples]
        return {
            "row": self.row.name,
            "title": self.row.title,
            "reference": self.row.reference,
            "unit": self.row.unit,
            "ours": [sample.ours for sample in self.samples],
            "against": [sample.reference for sample in self.samples],
            "figure": {"median": self.figure, "least": min(figures), "most": max(figures)},
            "goal": f"{self.row.judgement} {self.row.goal:g}",
            "met": self.is_met,
        }

    def line(self) -> str:
        if not self.samples:
            return f"{self.row.name:>4}  {self.row.title:<46} no round of it came to its end  NOT MET"
        figures = [sample.figure for sample in self.samples]
        ours = statistics.median(sample.ours for sample in self.samples)
        against = statistics.median(sample.reference for sample in self.samples)
        goal = f"{'≥' if self.row.judgement == 'at least' else '≤'} {self.row.goal:g}"
        spread = f"{min(figures):.2f}–{max(figures):.2f}"
        return (f"{self.row.name:>4}  {self.row.title:<46} {ours:>10.2f} {against:>10.2f} {self.row.unit:<8} "
                f"{self.figure:>6.2f}  {spread:>11}  {goal:>7}  {'met' if self.is_met else 'NOT MET'}")  # fmt: skip

    def markdown(self) -> str:
        if not self.samples:
            return f"| {self.row.name} | {self.row.title} | | {self.row.reference} | | | | no round ended |"
        figures = sorted(sample.figure for sample in self.samples)
        ours = statistics.median(sample.ours for sample in self.samples)
        against = statistics.median(sample.reference for sample in self.samples)
        goal = f"{'≥' if self.row.judgement == 'at least' else '≤'} {self.row.goal:g}" if self.row.goal else ""
        verdict = ("met" if self.is_met else "not met") if self.row.goal else ""
        cells = [f"{_short(ours)} {self.row.unit}", f"{self.row.reference}, {_short(against)} {self.row.unit}"]
        return (f"| {self.row.name} | {self.row.title} | {' | '.join(map(str.rstrip, cells))} | {self.figure:.2f} "
                f"| {figures[0]:.2f}–{figures[-1]:.2f} | {goal} | {verdict} |")  # fmt: skip


def _short(figure: float) -> str:
    """Three digits, because no more agree between two runs."""
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


MARKDOWN_HEADING = """\
| row | measure | ours | reference | figure | least–most | goal | |
|---|---|---:|---:|---:|---|---|---|"""

HEADING = (
    f"{'row':>4}  {'measure':<46} {'ours':>10} {'reference':>10} {'unit':<8} {'figure':>6}  {'spread':>11}  {'goal':>7}"
)


def run(rows: Sequence[Row], rounds: int, *, small: bool = False) -> Iterator[Result]:
    """Run every row once, then every row again, so that other load of the machine meets all rows alike."""
    results = [Result(row) for row in rows]
    for number in range(rounds):
        for result in results:
            started = time.monotonic()
            try:
                result.samples.append(result.row.measure(small))
            except Exception as error:
                if small:
                    raise
                say(f"round {number + 1}/{rounds}, row {result.row.name} failed: {error!r}")  # the other rows continue
                continue
            say(f"round {number + 1}/{rounds}, row {result.row.name}: {result.samples[-1].figure:.2f} "
                f"({time.monotonic() - started:.0f} s)")  # fmt: skip
    yield from results


def say(words: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {words}", flush=True)  # noqa: T201


def show(results: Sequence[Result]) -> str:
    return "\n".join([HEADING, *(result.line() for result in results)])


def show_markdown(results: Sequence[Result]) -> str:
    """The table in the form of README.md beside this file."""
    return "\n".join([MARKDOWN_HEADING, *(result.markdown() for result in results)])


def as_json(results: Sequence[Result]) -> str:
    return json.dumps([result.as_json() for result in results], indent=1)
