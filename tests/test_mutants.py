"""The list of mutants is up to date: each changes one line, and names tests that are there."""

from pathlib import Path

import pytest

import gr4ad_jax
from tests.mutants import MUTANTS, mutated

TESTS = Path(__file__).parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.intent)
def test_every_mutant_stands_in_the_code(mutant):
  mutated(mutant, Path(gr4ad_jax.__file__).parent)
  for test in mutant.tests:
    path, _, name = test.partition("::")
    name = name.partition("[")[0]
    assert f"def {name}" in (TESTS / path).read_text(), test


def test_no_two_mutants_are_the_same():
  assert len({(m.file, m.code, m.wrong) for m in MUTANTS}) == len(MUTANTS) >= 60
