"""The public contract is complete, compared with the release before (contract.py)."""

from __future__ import annotations

import json

import pytest

from tests.contract import RELEASED, Contract, breaches, contract


@pytest.fixture(scope="module")
def released() -> Contract:
    found: Contract = json.loads(RELEASED.read_text())
    return found


@pytest.fixture(scope="module")
def present() -> Contract:
    """The contract of this tree. To read it takes 0.3 s of CPU."""
    return contract()


def test_released_contract_is_complete_and_unchanged(released: Contract, present: Contract) -> None:
    assert breaches(released, present) == []


@pytest.mark.parametrize("kind", ["settings", "options", "paths", "events", "manifest", "keys", "metrics"])
def test_missing_or_changed_entry_of_the_contract_is_reported(released: Contract, present: Contract, kind: str) -> None:
    gone, differing, *_ = released[kind]
    now = {**present, kind: {**released[kind], differing: ["another"]}}
    del now[kind][gone]
    assert len(breaches(released, now)) == 2
