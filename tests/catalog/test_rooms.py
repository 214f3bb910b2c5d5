"""Room for new SIDs: whatever is placed fits the programs, and only new prefixes can fail."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr4ad_jax.catalog.legal_prefixes import build_prefix_tree, refill
from gr4ad_jax.catalog.live_index import IndexChange, LiveAdIndex
from gr4ad_jax.catalog.rooms import NoRoom, Rooms

SIZES = (4, 3, 5)
codes = st.tuples(*(st.integers(0, size - 1) for size in SIZES))


def index_of(sids):
  codes_NL = np.array(sids, np.int32).reshape(-1, 3)
  ids = [f"ad{i}" for i in range(len(codes_NL))]
  return LiveAdIndex(ids, codes_NL, np.zeros(len(ids)), codebook_sizes=SIZES)


@settings(max_examples=150, deadline=None)
@given(
  there=st.lists(codes, min_size=1, max_size=12),
  new=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 6)), max_size=40),
  spare=st.sampled_from([0.0, 0.3, 1.0, 20.0]),
)
def test_whatever_is_placed_can_be_searched_and_only_a_new_prefix_can_fail(there, new, spare):
  live = index_of(there)
  sids = {tuple(sid) for sid in live.snapshot.index.sids_SL.tolist()}
  tree = build_prefix_tree(live.snapshot.index.sids_SL, spare=spare, codebook_sizes=SIZES)
  rooms, placed = Rooms(live.snapshot, tree), []
  for own in new:  # a last code of 5 or 6 is none: any free one
    try:
      sid = tuple(rooms.place(own))
    except NoRoom:
      assert len(sids) == tree.capacity and own[:2] not in {known[:2] for known in sids}
      continue
    assert sid[:2] == own[:2] and sid[2] < SIZES[2]
    siblings = [known for known in sids if known[:2] == own[:2]]
    full = len(sids) == tree.capacity or len(siblings) == tree.branching_L[2]
    if own in sids or (own[2] < SIZES[2] and not full):
      assert sid == own
    elif not full:
      assert sid not in sids  # a free one
    else:
      assert sid in siblings
    sids.add(sid)
    placed.append(sid)
  snapshot = live.apply(
    IndexChange([f"new{i}" for i in range(len(placed))], np.array(placed, int).reshape(-1, 3))
  )
  assert refill(tree, snapshot.index.sids_SL).num_sids == len(sids)


def test_a_full_prefix_is_shared_evenly():
  live = index_of([(0, 0, 0), (0, 0, 0), (0, 0, 1), (0, 0, 2), (3, 2, 4)])
  tree = build_prefix_tree(live.snapshot.index.sids_SL, spare=0.0, codebook_sizes=SIZES)
  rooms = Rooms(live.snapshot, tree)
  shared = [tuple(rooms.place((0, 0, 4))) for _ in range(7)]
  # Two ads were on the first SID, one on each of the others: now eleven on three.
  assert sorted([2 + shared.count((0, 0, 0)), *(1 + shared.count((0, 0, x)) for x in (1, 2))]) == [
    3, 4, 4
  ]
  # Who is there already stays where it is.
  assert rooms.place((0, 0, 4), held_L=(0, 0, 0)) == [0, 0, 0]
  with pytest.raises(NoRoom, match="serving.spare"):
    rooms.place((1, 0, 0))


def test_departed_ads_have_a_row_and_are_never_found():
  live = index_of([(0, 0, 0), (1, 0, 0)])
  snapshot = live.apply(IndexChange(["new"], np.array([[0, 0, 1]]), departed_ids=["went"]))
  assert snapshot.find("went") == 3 and snapshot.find("new") == 2
  assert snapshot.index.sid_of_ad_A.tolist() == [0, 2, 1, -1]
  back = live.apply(IndexChange(["went"], np.array([[1, 0, 0]])))
  assert back.row_of("went") == 3 and back.ads_with([1, 0, 0]) == ["ad1", "went"]
