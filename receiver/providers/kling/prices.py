"""Prices of pictures, from a dated table: the provider's own (KLING §7), or one from a file."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from receiver.providers.base import Estimate, PricesUnreadable
from receiver.providers.kling.request import DEFAULTS, MODELS, facts_of

MAX_BYTES = 64 * 1024
FORM = '{"date": "2026-09", "usd_per_unit": "0.0035", "units_per_picture": {"1k": 8, "2k": 8, "4k": 16}}'


@dataclass(frozen=True)
class Prices:
    """`date`: when they were valid. `units_per_picture`: by resolution. `usd_per_unit`: US dollars for one unit.
    `models`: those that they are for, None = all.
    """

    date: str
    usd_per_unit: Decimal
    units_per_picture: dict[str, Decimal]
    models: Collection[str] | None = None

    def units(self, model: str | None, resolution: str) -> Decimal | None:
        """Units of one picture; None if the table does not have the resolution, or is not for the model."""
        has_model = self.models is None or model in self.models
        return self.units_per_picture.get(resolution) if has_model else None


# Kling's price page as of 2026-09: 8 units are 0.028 USD, taken at completion.
KLING = Prices("2026-09", Decimal("0.0035"), {"1k": Decimal(8), "2k": Decimal(8), "4k": Decimal(16)}, MODELS)


def estimate(requests: Iterable[Mapping[str, Any]], prices: Prices) -> Estimate:
    """Add up the cost of requests with these checked fields. `slots`: of all together, if all ran at once."""
    tasks = slots = auto = unpriced = 0
    units = Decimal(0)
    for request in requests:
        facts = facts_of(request)
        pictures = facts.slots  # watermarked copies are free
        each = prices.units(facts.model, request.get("resolution", DEFAULTS["resolution"]))
        tasks, slots = tasks + 1, slots + pictures
        auto += facts.expected is None
        unpriced += pictures if each is None else 0
        units += pictures * (each or 0)
    return Estimate(tasks, slots, slots, units, units * prices.usd_per_unit, auto, unpriced, prices.date)


def read_prices(path: Path) -> Prices:
    """Read a table of the form FORM. Raises `PricesUnreadable`."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(MAX_BYTES + 1)[:MAX_BYTES])
        table = {str(name): _amount(units) for name, units in found["units_per_picture"].items()}
        return Prices(str(found["date"]), _amount(found["usd_per_unit"]), table)
    except OSError as error:
        raise PricesUnreadable(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, InvalidOperation, RecursionError):
        raise PricesUnreadable(f"{path} is not a price table; write {FORM}") from None


def _amount(value: Any) -> Decimal:
    amount = Decimal(str(value))
    if not amount.is_finite() or amount < 0:
        raise ValueError(value)
    return amount
