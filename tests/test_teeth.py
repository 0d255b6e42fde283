"""The mutations of `python -m tests.chaos.teeth` fit the code as it is; whether they are noticed takes minutes."""

from __future__ import annotations

import ast

import pytest

from tests.chaos.processes import ROOT
from tests.chaos.teeth import MUTATIONS, Mutation, mutated


@pytest.mark.parametrize("mutation", MUTATIONS[1:], ids=lambda mutation: mutation.name)
def test_a_mutation_fits(mutation: Mutation) -> None:
    ast.parse(mutated(mutation, ROOT))
