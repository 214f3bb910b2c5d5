"""The prefix tree against sets of prefixes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr4ad_jax.catalog.legal_prefixes import build_prefix_tree


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
