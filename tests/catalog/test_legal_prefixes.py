"""The prefix tree against sets of prefixes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr4ad_jax.catalog.legal_prefixes import build_prefix_tree, find_sids, refill

EVERY = build_prefix_tree(np.array([*itertools.product(range(5), range(4), range(7))], np.int32))


@settings(deadline=None)
@given(
  st.sets(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 6)), min_size=1)
)
def test_walking_the_tree_visits_exactly_the_sids(sids):
  table_SL = np.array(sorted(sids), np.int32)
  tree = build_prefix_tree(table_SL)
  start_LN, code_LN, _ = tree.arrays
  paths = {(): 0}
  for level in range(3):
    children = {}
    for path, node in paths.items():
      first, last = start_LN[level, node], start_LN[level, node + 1]
      codes = code_LN[level, first:last].tolist()
      assert codes == sorted({s[level] for s in sids if s[:level] == path})
      assert 1 <= len(codes) <= tree.branching_L[level]
      children |= {(*path, code): first + i for i, code in enumerate(codes)}
    paths = children
  assert {path: table_SL[row].tolist() for path, row in paths.items()} == {s: list(s) for s in sids}
  assert tree.num_sids == len(sids)


@settings(deadline=None, max_examples=30)
@given(
  st.sets(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 6)), min_size=1)
)
def test_finds_the_row_of_every_sid_and_no_other(sids):
  """In a tree of just these, and in one that was made for more."""
  table = sorted(sids)
  asked = [*itertools.product(range(-1, 6), range(-1, 5), range(-1, 8))]
  expected = [table.index(sid) if sid in sids else -1 for sid in asked]
  tree = build_prefix_tree(np.array(table, np.int32))
  for room in tree, refill(EVERY, np.array(table, np.int32)):
    found = find_sids(room, np.array(asked, np.int32)[None])
    assert found[0].tolist() == expected


@pytest.mark.parametrize(
  ("sids", "rule"),
  [
    (np.zeros((0, 3), np.int32), "at least one"),
    (np.array([[1, 2], [0, 5]]), "lexicographic"),
    (np.array([[1, 2], [1, 2]]), "distinct"),
    (np.array([[0, -1]]), "negative"),
  ],
)
def test_bad_tables_are_refused(sids, rule):
  with pytest.raises(ValueError, match=rule):
    build_prefix_tree(sids)
