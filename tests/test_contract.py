"""The public contract is complete, compared with the release before (contract.py)."""

from __future__ import annotations

import json

import pytest

from tests.contract import RELEASED, Contract, breaches, contract


@pytest.fixture(scope="module")
def released() -> Contract:
    found: Contract = json.loads(RELEASED.read_text())
    return found


def test_released_contract_is_complete_and_unchanged(released: Contract) -> None:
    assert breaches(released, contract()) == []


@pytest.mark.parametrize("kind", ["settings", "options", "paths", "events", "manifest", "keys", "metrics"])
def test_missing_or_changed_entry_of_the_contract_is_reported(released: Contract, kind: str) -> None:
    gone, differing, *_ = released[kind]
    now = {**contract(), kind: {**released[kind], differing: ["another"]}}
    del now[kind][gone]
    assert len(breaches(released, now)) == 2
