"""The live index: equal to one built from scratch, whole at every moment, unharmed by errors."""

import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr4ad_jax.catalog.ad_index import build_ad_index, expand
from gr4ad_jax.catalog.live_index import IndexChange, LiveAdIndex

SIZES = (4, 3, 2)
AD_IDS = ["shoe", "coat", "hat", "bag"]
CODES = np.array([[1, 0, 0], [0, 2, 1], [1, 0, 0], [0, 1, 1]])
PRIORITY = np.array([1.0, 5.0, 3.0, 0.0])


def small():
  return LiveAdIndex(AD_IDS, CODES, PRIORITY, codebook_sizes=SIZES)


def contents(snapshot):
  """All that a reader can see, as plain values."""
  arrays = {name: x.tolist() for name, x in vars(snapshot.index).items()}
  ids = snapshot.ad_ids(np.arange(len(snapshot.priority_A))).tolist()
  return snapshot.version, ids, arrays, snapshot.priority_A.tolist()


def assert_equals_scratch(snapshot, rows, live):
  """The oracle: `build_ad_index` of the live ads in row order.

  Args:
    snapshot: to check.
    rows: all ids ever added, in the order of their first addition.
    live: id -> (codes, priority).
  """
  index = snapshot.index
  assert snapshot.ad_ids(np.arange(len(rows))).tolist() == rows
  live_rows = np.array([row for row, ad_id in enumerate(rows) if ad_id in live], int)
  retired = np.setdiff1d(np.arange(len(rows)), live_rows)
  assert (index.sid_of_ad_A[retired] == -1).all() and len(index.sid_of_ad_A) == len(rows)
  for ad_id in (rows[row] for row in retired):
    with pytest.raises(KeyError, match="is retired"):
      snapshot.codes_of(ad_id)
  if not live:
    assert [len(x) for x in (index.sids_SL, index.ads_start, index.ads_A)] == [0, 1, 0]
    return
  codes = np.array([live[rows[row]][0] for row in live_rows])
  scratch = build_ad_index(codes, np.array([live[rows[row]][1] for row in live_rows]))
  for name in ("sids_SL", "ads_start"):
    np.testing.assert_array_equal(getattr(index, name), getattr(scratch, name))
    assert getattr(index, name).dtype == getattr(scratch, name).dtype
  np.testing.assert_array_equal(index.ads_A, live_rows[scratch.ads_A])
  np.testing.assert_array_equal(index.sid_of_ad_A[live_rows], scratch.sid_of_ad_A)
  assert index.ads_A.dtype == index.sid_of_ad_A.dtype == np.int32
  assert snapshot.find_sids(index.sids_SL).tolist() == list(range(len(index.sids_SL)))
  for ad_id, (sid, _) in live.items():
    assert snapshot.codes_of(ad_id).tolist() == list(sid)


def test_by_hand():
  live = small()
  first = live.snapshot
  assert first.version == 0
  assert first.ads_with([1, 0, 0]) == ["hat", "shoe"]  # by descending priority
  assert first.ads_with([3, 2, 1]) == []
  second = live.apply(
    IndexChange(
      add_ids=["sock"], add_codes_NL=np.array([[1, 0, 0]]), add_priority_N=np.array([2.0]),
      retire_ids=["coat"],
      reencode_ids=["bag"], reencode_codes_ML=np.array([[3, 2, 1]]),
    )
  )  # fmt: skip
  assert second is live.snapshot and second.version == 1
  assert second.index.sids_SL.tolist() == [[1, 0, 0], [3, 2, 1]]
  assert second.index.ads_A.tolist() == [2, 4, 0, 3]
  assert second.index.sid_of_ad_A.tolist() == [0, -1, 0, 1, 0]
  assert second.ads_with([1, 0, 0]) == ["hat", "sock", "shoe"]
  assert second.codes_of("bag").tolist() == [3, 2, 1]
  assert second.row_of("coat") == 1  # rows outlive their ads
  ad_RK = expand(second.index, second.find_sids(np.array([[[3, 2, 1], [1, 0, 0]]])), 5)
  assert second.ad_ids(ad_RK).tolist() == [["bag", "hat", "sock", "shoe", None]]


def test_a_retired_ad_comes_back_in_its_row_with_its_new_codes_and_priority():
  live = small()
  live.apply(IndexChange(retire_ids=["hat"]))
  back = live.apply(IndexChange(["hat"], np.array([[0, 2, 1]]), np.array([9.0])))
  assert back.row_of("hat") == 2 and len(back.priority_A) == 4
  assert back.ads_with([0, 2, 1]) == ["hat", "coat"] and back.ads_with([1, 0, 0]) == ["shoe"]


def test_a_reencoded_ad_keeps_its_priority_unless_given_another():
  live = small()
  sid = np.array([[0, 2, 1]])
  live.apply(IndexChange(reencode_ids=["hat"], reencode_codes_ML=sid))
  assert live.snapshot.ads_with(sid[0]) == ["coat", "hat"]
  live.apply(
    IndexChange(
      reencode_ids=["hat"], reencode_codes_ML=sid, reencode_priority_M=np.array([6.0])
    )
  )
  assert live.snapshot.ads_with(sid[0]) == ["hat", "coat"]


codes = st.tuples(*(st.integers(0, size - 1) for size in SIZES))
ads = st.dictionaries(st.sampled_from("abcdefghijkl"), st.tuples(codes, st.integers(-1, 1)))


@settings(max_examples=60, deadline=None)
@given(start=ads, writes=st.lists(st.tuples(ads, ads, st.sets(st.sampled_from("abcdefghijkl")))))
def test_any_writes_equal_an_index_from_scratch(start, writes):
  """Each write is random ads; which are added, re-encoded or retired follows from what is live."""

  def columns(table):
    codes_NL = np.array([sid for sid, _ in table.values()], int).reshape(-1, len(SIZES))
    return list(table), codes_NL, np.array([priority for _, priority in table.values()], float)

  index = LiveAdIndex(*columns(start), codebook_sizes=SIZES)
  rows, live = list(start), dict(start)
  history = [(index.snapshot, list(rows), dict(live))]
  for added, reencoded, retired in writes:
    added = {ad_id: ad for ad_id, ad in added.items() if ad_id not in live}
    reencoded = {ad_id: ad for ad_id, ad in reencoded.items() if ad_id in live}
    retired = [ad_id for ad_id in retired if ad_id in live and ad_id not in reencoded]
    change = IndexChange(*columns(added), retired, *columns(reencoded))
    assert index.apply(change).version == len(history)
    rows += [ad_id for ad_id in added if ad_id not in rows]
    live |= added | reencoded
    for ad_id in retired:
      del live[ad_id]
    history.append((index.snapshot, list(rows), dict(live)))
  for snapshot, rows, live in history:  # the old ones too: no later write shows in them
    assert_equals_scratch(snapshot, rows, live)


def test_large_writes_equal_an_index_from_scratch():
  """Large groups with ties, so that every insertion point needs its search."""
  rng = np.random.default_rng(0)
  sizes, ids = (3, 2), [f"ad{i}" for i in range(2000)]
  codes_AL = rng.integers(0, sizes, (2000, 2))
  priority_A = rng.integers(0, 5, 2000).astype(float)
  index = LiveAdIndex(ids, codes_AL, priority_A, codebook_sizes=sizes)
  live = dict(zip(ids, zip(codes_AL.tolist(), priority_A, strict=True), strict=True))
  for write in range(5):
    chosen = rng.permutation(sorted(live))[:600].tolist()
    add_ids = [f"new{write}-{i}" for i in range(300)]
    add_codes, new_codes = rng.integers(0, sizes, (300, 2)), rng.integers(0, sizes, (300, 2))
    add_priority = rng.integers(0, 5, 300).astype(float)
    moved, retired = chosen[:300], chosen[300:]
    index.apply(IndexChange(add_ids, add_codes, add_priority, retired, moved, new_codes))
    ids += add_ids
    live |= dict(zip(add_ids, zip(add_codes.tolist(), add_priority, strict=True), strict=True))
    live |= {a: (c, live[a][1]) for a, c in zip(moved, new_codes.tolist(), strict=True)}
    for ad_id in retired:
      del live[ad_id]
    assert_equals_scratch(index.snapshot, ids, live)


def test_an_old_snapshot_does_not_know_later_ads():
  live = small()
  old = live.snapshot
  before = contents(old)
  live.apply(IndexChange(["sock"], np.array([[1, 0, 0]]), retire_ids=["shoe"]))
  assert contents(old) == before and old.ads_with([1, 0, 0]) == ["hat", "shoe"]
  with pytest.raises(KeyError, match="'sock' is not in the index .version 0"):
    old.codes_of("sock")
  with pytest.raises(ValueError, match="ad_N: rows 4 to 4, allowed -1 to 3"):
    old.ad_ids(np.array([4]))
  with pytest.raises(ValueError, match="read-only"):
    old.index.ads_A[0] = 3


GOOD = IndexChange(
  add_ids=["sock", "belt"], add_codes_NL=np.array([[0, 0, 0], [1, 1, 1]]),
  add_priority_N=np.array([1.0, 2.0]), retire_ids=["coat"],
  reencode_ids=["hat"], reencode_codes_ML=np.array([[2, 2, 0]]),
)  # fmt: skip


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"add_ids": ["sock", "sock"]}, "add_ids: 'sock' is in the change twice"),
    ({"add_ids": ["sock", "coat"]}, "retire_ids: 'coat' is in the change twice"),
    ({"reencode_ids": ["coat"]}, "reencode_ids: 'coat' is in the change twice"),
    ({"add_ids": ["sock", "bag"]}, "add_ids: 'bag' is live"),
    ({"retire_ids": ["gone"]}, "retire_ids: 'gone' is retired"),
    ({"retire_ids": ["boot"]}, "retire_ids: 'boot' is not in the index"),
    ({"reencode_ids": ["gone"]}, "reencode_ids: 'gone' is retired"),
    ({"reencode_ids": ["boot"]}, "reencode_ids: 'boot' is not in the index"),
    ({"add_ids": ["sock", 7]}, "add_ids: 7, expected a string"),
    ({"add_ids": ["sock", ""]}, "add_ids: '', expected a string"),
    ({"retire_ids": "coat"}, "retire_ids: 'coat', expected a sequence"),
    ({"add_codes_NL": None}, r"add_codes_NL: shape \(0, 3\), expected \(2, 3\)"),
    ({"add_codes_NL": np.zeros((2, 2), int)}, r"add_codes_NL: shape \(2, 2\)"),
    ({"reencode_codes_ML": np.zeros((2, 3), int)}, r"reencode_codes_ML: shape \(2, 3\)"),
    ({"add_codes_NL": np.zeros((2, 3))}, "add_codes_NL: dtype float64"),
    (
      {"add_codes_NL": np.array([[0, 0, 0], [1, 3, 1]])},
      r"add_codes_NL: code 3 of 'belt' at level 2, must be in \[0, 3\)",
    ),
    ({"reencode_codes_ML": np.array([[2, 2, -1]])}, "code -1 of 'hat' at level 3"),
    ({"add_priority_N": np.array([1.0])}, r"add_priority_N: shape \(1,\), expected \(2,\)"),
    ({"add_priority_N": np.array([1.0, np.nan])}, "add_priority_N: nan of 'belt'"),
    ({"reencode_priority_M": np.array([np.inf])}, "reencode_priority_M: inf of 'hat'"),
  ],
)
def test_a_bad_change_is_named_and_changes_nothing(fields, message):
  live = small()
  live.apply(IndexChange(["gone"], np.array([[3, 0, 0]])))
  live.apply(IndexChange(retire_ids=["gone"]))
  snapshot, before, nbytes = live.snapshot, contents(live.snapshot), live.snapshot.nbytes
  with pytest.raises(ValueError, match=message):
    live.apply(GOOD._replace(**fields))
  assert live.snapshot is snapshot and contents(snapshot) == before and snapshot.nbytes == nbytes
  live.apply(GOOD)


@pytest.mark.parametrize(("module", "function"), [(np, "insert"), (sys, "getsizeof")])
def test_a_write_that_fails_half_way_leaves_no_trace(monkeypatch, module, function):
  """In the merge of the arrays, and at the end of the id table's growth."""
  live = small()
  snapshot, before = live.snapshot, contents(live.snapshot)

  def no_memory(*_, **__):
    raise MemoryError

  with monkeypatch.context() as patch:
    patch.setattr(module, function, no_memory)
    with pytest.raises(MemoryError):
      live.apply(GOOD)
  assert live.snapshot is snapshot and contents(snapshot) == before
  with pytest.raises(KeyError, match="'sock' is not in the index"):
    snapshot.codes_of("sock")
  after = live.apply(IndexChange(["boot", "sock"], np.array([[0, 0, 0], [1, 1, 1]])))
  assert after.ad_ids(np.arange(6)).tolist() == [*AD_IDS, "boot", "sock"]
  with pytest.raises(KeyError, match="'belt' is not in the index"):
    after.codes_of("belt")


@pytest.mark.parametrize("sizes", [(), (4, 0, 2), (2**21, 2**21, 2**21), (2**32, 2)])
def test_bad_codebook_sizes_are_named(sizes):
  with pytest.raises(ValueError, match="codebook_sizes: "):
    LiveAdIndex([], np.empty((0, len(sizes)), int), np.empty(0), codebook_sizes=sizes)


def test_keys_reach_the_largest_allowed_codebooks():
  sizes = (2**31, 2**31, 1)
  codes_AL = np.array([[2**31 - 1, 2**31 - 1, 0], [0, 2**31 - 1, 0], [2**31 - 1, 0, 0]])
  snapshot = LiveAdIndex(list("abc"), codes_AL, np.zeros(3), codebook_sizes=sizes).snapshot
  assert snapshot.index.sids_SL.tolist() == codes_AL[[1, 2, 0]].tolist()


def test_lookups_of_what_is_not_there():
  snapshot = small().snapshot
  with pytest.raises(KeyError, match="'boot' is not in the index"):
    snapshot.codes_of("boot")
  assert snapshot.find_sids(np.array([[-1, -1, -1], [1, 0, 0], [4, 0, 0]])).tolist() == [-1, 2, -1]
  with pytest.raises(ValueError, match=r"codes_NL: shape \(2,\), expected \[\.\.\., 3\]"):
    snapshot.ads_with([1, 0])


@pytest.fixture
def threads_switch_often():
  before = sys.getswitchinterval()
  sys.setswitchinterval(1e-5)
  yield
  sys.setswitchinterval(before)


@pytest.mark.usefixtures("threads_switch_often")
def test_readers_never_see_half_a_write():
  """Every write moves a pair of ads to one other SID, adds a pair and retires a pair."""
  pairs, writes = 50, 300
  ids = [f"{side}{i}" for i in range(pairs) for side in "ab"]
  rng = np.random.default_rng(0)
  codes_AL = rng.integers(0, SIZES, (pairs, 3)).repeat(2, axis=0)
  live = LiveAdIndex(ids, codes_AL, np.zeros(2 * pairs), codebook_sizes=SIZES)
  done, errors, versions = threading.Event(), [], [set(), set()]

  def read(seen):
    try:
      while not done.is_set():
        snapshot = live.snapshot
        index, version = snapshot.index, snapshot.version
        assert version >= max(seen, default=0)
        seen.add(version)
        assert len(index.ads_A) == 2 * pairs  # as many added as retired
        assert len(index.sid_of_ad_A) == len(snapshot.priority_A) == 2 * (pairs + version)
        assert index.ads_start[-1] == len(index.ads_A)
        holder_A = np.repeat(np.arange(len(index.sids_SL)), np.diff(index.ads_start))
        np.testing.assert_array_equal(index.sid_of_ad_A[index.ads_A], holder_A)
        for i in range(version, version + pairs):  # the live pairs of this version
          sid = snapshot.codes_of(f"a{i}")
          assert (sid == snapshot.codes_of(f"b{i}")).all()
          assert {f"a{i}", f"b{i}"} <= set(snapshot.ads_with(sid))
        for i in (version - 1, version + pairs):  # retired by this version; added by the next
          with pytest.raises(KeyError):
            snapshot.codes_of(f"a{i}")
    except BaseException as error:
      errors.append(error)

  readers = [threading.Thread(target=read, args=(seen,)) for seen in versions]
  for reader in readers:
    reader.start()
  for write in range(writes):
    sid_2L, moved_2L = (rng.integers(0, SIZES, (1, 3)).repeat(2, axis=0) for _ in range(2))
    new, moved = write + pairs, write + 1 + int(rng.integers(pairs - 1))
    live.apply(
      IndexChange(
        [f"a{new}", f"b{new}"], sid_2L, None, [f"a{write}", f"b{write}"],
        [f"a{moved}", f"b{moved}"], moved_2L,
      )
    )  # fmt: skip
  done.set()
  for reader in readers:
    reader.join()
  assert not errors, errors[0]
  assert live.snapshot.version == writes and all(versions)


@pytest.mark.usefixtures("threads_switch_often")
def test_writers_queue_up():
  live = LiveAdIndex([], np.empty((0, 3), int), np.empty(0), codebook_sizes=SIZES)

  def write(name):
    for i in range(50):
      live.apply(IndexChange([f"{name}{i}"], np.array([[i % 4, 0, 0]])))

  writers = [threading.Thread(target=write, args=(name,)) for name in "abc"]
  for writer in writers:
    writer.start()
  for writer in writers:
    writer.join()
  snapshot = live.snapshot
  ids = snapshot.ad_ids(np.arange(150)).tolist()
  assert snapshot.version == 150
  assert sorted(ids) == sorted(f"{name}{i}" for name in "abc" for i in range(50))
  assert_equals_scratch(snapshot, ids, {a: ((int(a[1:]) % 4, 0, 0), 0.0) for a in ids})


def test_memory_per_ad():
  """Under the 500 bytes that one million ads in 500 MB allow, with another snapshot being built."""
  rng = np.random.default_rng(0)
  sizes, num_ads = (4096, 1024, 256), 50_000
  ids = [f"advertiser-{i % 700:05d}/ad-{i:012d}" for i in range(num_ads)]
  codes_AL = rng.integers(0, sizes, (num_ads, 3))
  live = LiveAdIndex(ids, codes_AL, rng.random(num_ads), codebook_sizes=sizes)
  per_ad = live.snapshot.nbytes / num_ads
  array_bytes = 12 + 8 + 4 + 4 + 8 + 8  # sids, start, ads, sid_of_ad, priority, keys
  assert array_bytes + 50 < per_ad and per_ad + array_bytes < 400
