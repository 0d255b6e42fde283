"""The mutations of `python -m tests.chaos.mutations` fit the current code. Whether they are noticed takes minutes."""

from __future__ import annotations

import ast

import pytest

from tests.chaos.mutations import MUTATIONS, Mutation, mutated
from tests.chaos.processes import ROOT


@pytest.mark.parametrize("mutation", MUTATIONS[1:], ids=lambda mutation: mutation.name)
def test_text_of_each_mutation_occurs_once(mutation: Mutation) -> None:
    ast.parse(mutated(mutation, ROOT))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_tests_that_a_mutation_names_exist(mutation: Mutation) -> None:
    file, _, name = mutation.tests.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert not name or name in defined
