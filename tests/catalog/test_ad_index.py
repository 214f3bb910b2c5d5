"""The index between SIDs and ads: round trips, and expansion against a plain loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr4ad_jax.catalog.ad_index import build_ad_index, expand, find_keys, move_ads, pack_codes

CODES = np.array([[1, 0], [0, 2], [1, 0], [0, 1], [1, 0]])
PRIORITY = np.array([1.0, 5.0, 3.0, 0.0, 3.0])


def test_by_hand():
  index = build_ad_index(CODES, PRIORITY)
  assert index.sids_SL.tolist() == [[0, 1], [0, 2], [1, 0]]
  assert index.ads_start.tolist() == [0, 1, 2, 5]
  assert index.ads_A.tolist() == [3, 1, 2, 4, 0]  # 2 before 4: equal priority, lower index
  assert index.sid_of_ad_A.tolist() == [2, 1, 2, 0, 2]
  beams = np.array([[2, 0, -1], [-1, 1, 2], [-1, -1, -1]])
  assert expand(index, beams, 3).tolist() == [[2, 4, 0], [1, 2, 4], [-1, -1, -1]]
  assert expand(index, beams, 5).tolist() == [
    [2, 4, 0, 3, -1], [1, 2, 4, 0, -1], [-1, -1, -1, -1, -1]
  ]  # fmt: skip


catalogues = st.lists(
  st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30
)


@settings(max_examples=60, deadline=None)
@given(codes=catalogues, seed=st.integers(0, 1000))
def test_sid_to_ads_to_sid(codes, seed):
  codes = np.array(codes)
  index = build_ad_index(codes, np.random.default_rng(seed).random(len(codes)))
  np.testing.assert_array_equal(index.sids_SL[index.sid_of_ad_A], codes)
  assert [tuple(sid) for sid in index.sids_SL] == sorted({tuple(sid) for sid in codes})
  assert sorted(index.ads_A.tolist()) == list(range(len(codes)))
  for s in range(len(index.sids_SL)):
    held = index.ads_A[index.ads_start[s] : index.ads_start[s + 1]]
    assert len(held) and (index.sid_of_ad_A[held] == s).all()


@settings(max_examples=60, deadline=None)
@given(
  codes=catalogues,
  k=st.integers(1, 12),
  beams=st.integers(0, 6),
  requests=st.integers(0, 4),
  seed=st.integers(0, 1000),
)
def test_expand_equals_a_loop(codes, k, beams, requests, seed):
  rng = np.random.default_rng(seed)
  priority = rng.integers(0, 3, len(codes)).astype(float)  # with ties
  index = build_ad_index(np.array(codes), priority)
  sid_RW = rng.integers(-1, len(index.sids_SL), (requests, beams))
  expected = np.full((requests, k), -1)
  for r in range(requests):
    ads = []
    for s in sid_RW[r]:
      if s >= 0:
        held = [a for a in range(len(codes)) if tuple(index.sids_SL[s]) == codes[a]]
        ads += sorted(held, key=lambda a: (-priority[a], a))
    expected[r, : min(k, len(ads))] = ads[:k]
  result = expand(index, sid_RW, k)
  assert result.dtype == np.int32
  np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
  ("codes", "priority", "message"),
  [
    (CODES[:0], PRIORITY[:0], "shape"),
    (CODES, PRIORITY[:2], "priority_A: shape"),
    (np.array([[0, 1], [2, -1]]), PRIORITY[:2], "ad 1 has a negative code"),
    (CODES, np.where(PRIORITY == 5, np.nan, PRIORITY), "nan of ad 1"),
  ],
)
def test_bad_input_is_named(codes, priority, message):
  with pytest.raises(ValueError, match=message):
    build_ad_index(codes, priority)


def test_expand_checks_its_arguments():
  index = build_ad_index(CODES, PRIORITY)
  with pytest.raises(ValueError, match="k: 0"):
    expand(index, np.array([[0]]), 0)
  with pytest.raises(ValueError, match="allowed -1 to 2"):
    expand(index, np.array([[3]]), 1)


def test_keys_keep_the_order_of_sids():
  sids = np.array([[0, 0, 2], [0, 1, 0], [1, 0, 0], [1, 3, 2]])
  keys = pack_codes(sids, (2, 4, 3))
  assert keys.tolist() == [2, 3, 12, 23]  # (code 1 * 4 + code 2) * 3 + code 3
  assert find_keys(keys, np.array([[12, 4], [23, 99]])).tolist() == [[2, -1], [3, -1]]
  assert find_keys(keys[:0], keys).tolist() == [-1, -1, -1, -1]
  with pytest.raises(ValueError):
    pack_codes(np.array([[0, 4, 0]]), (2, 4, 3))


def test_moving_ads_by_hand():
  """Ad 1 goes, ad 2 leaves (1, 0) for (0, 1), and the new ad 5 enters (1, 0) between 4 and 0."""
  index = build_ad_index(CODES, PRIORITY)
  moved = move_ads(
    index,
    keys_S=pack_codes(index.sids_SL, (2, 3)),
    codebook_sizes=(2, 3),
    priority_A=np.append(PRIORITY, 2.0),
    leaving_M=np.array([1, 2]),
    coming_N=np.array([2, 5]),
    keys_N=pack_codes(np.array([[0, 1], [1, 0]]), (2, 3)),
  )
  assert moved.sids_SL.tolist() == [[0, 1], [1, 0]]
  assert moved.ads_start.tolist() == [0, 2, 5]
  assert moved.ads_A.tolist() == [2, 3, 4, 5, 0]
  assert moved.sid_of_ad_A.tolist() == [1, -1, 0, 0, 1, 1]
  assert index.ads_A.tolist() == [3, 1, 2, 4, 0]  # as before
