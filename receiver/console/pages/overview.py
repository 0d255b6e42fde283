"""`/console`: what needs a person, then figures of the day and the month."""

from __future__ import annotations

from starlette.responses import Response

from receiver.console.installation import Installation
from receiver.console.needs import Needs
from receiver.console.visit import Visit
from receiver.console.words import bars, seconds, size
from storage.filters import understood
from storage.operations import ended, rollups

# A page that shows no later change looks again this many seconds after it: the figures have been read anew by then.
LATE_SECONDS = rollups.FRESH_SECONDS + 5
PATIENCE_MINUTES = ended.CALLBACK_PATIENCE_SECONDS // 60


class Overview:
    """The page."""

    def __init__(self, of: Installation, needs: Needs) -> None:
        self._of = of
        self._needs = needs
        self._rollups = rollups.Rollups(of.database)
        self.close = self._rollups.close

    def show(self, visit: Visit) -> Response:
        is_month = understood(visit.query, span=("24h", "30d"))["span"] == "30d"
        stands = self._needs.now()
        span = self._rollups.span(rollups.MONTH_HOURS if is_month else 24)
        return visit.page(
            "overview.html", needs=stands.needs, workers=stands.workers, measures=stands.measures,
            span=span, is_month=is_month, figures=self._figures(visit, span), late_seconds=LATE_SECONDS,
        )  # fmt: skip

    def _figures(self, visit: Visit, span: rollups.Span) -> list[dict[str, object]]:
        """name, value, the text below it, and the bars of its chart."""
        total, t = span.total, visit.text
        rate = total.lost / total.expected if total.expected else 0.0
        spent = f"{total.units * self._of.usd_per_unit:,.2f} USD"
        if total.priced < total.succeeded:
            spent += " · " + t("figure.units_of", n=total.succeeded, known=total.priced)
        lost = "of" if total.lost else "none_lost" if total.expected else "none_expected"
        each = size(total.bytes / total.pictures) if total.pictures else "–"
        shown = [
            ("callbacks", f"{total.callbacks:,}", t("figure.expected", n=total.expected, minutes=PATIENCE_MINUTES)),
            ("pictures", f"{total.pictures:,}", t("figure.pictures_help")),
            ("bytes", size(total.bytes), t("figure.bytes_help", value=each)),
            ("failures", f"{total.failures:,}", t("figure.failures_help")),
            ("median", seconds(span.median, visit.language), t("figure.latency_help")),
            ("p95", seconds(span.p95, visit.language), t("figure.p95_help")),
            ("lost", f"{rate:.1%}", t(f"figure.{lost}", n=total.lost, all=total.expected)),
            ("units", f"{total.units:,.0f}", spent),
        ]
        return [
            {"name": name, "value": value, "below": below, "bars": bars(span.series[name]),
             "is_bad": name in ("lost", "failures")}
            for name, value, below in shown
        ]  # fmt: skip
