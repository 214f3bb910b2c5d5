"""The ad index of a server: ads come, go and change their SID while requests read it.

A reader takes `LiveAdIndex.snapshot` once and works on that; it needs no lock and nothing in it
ever changes. A writer merges its change into copies of the sorted arrays, linear in the number of
ads, and publishes the result with one assignment.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gr4ad_jax.catalog.ad_index import AdIndex, find_keys, move_ads, pack_codes

_BYTES_PER_INT = 32  # a Python int, as the allocator rounds it


class IndexChange(NamedTuple):
  """One write: all of it is applied together, or nothing. No ad may stand in it twice."""

  add_ids: Sequence[str] = ()  # unknown ads, or retired ones that come back
  add_codes_NL: np.ndarray | None = None  # int [N, L], their SIDs
  add_priority_N: np.ndarray | None = None  # float [N], higher comes first in an SID; None = 0
  retire_ids: Sequence[str] = ()  # live ads
  reencode_ids: Sequence[str] = ()  # live ads
  reencode_codes_ML: np.ndarray | None = None  # int [M, L], their new SIDs
  reencode_priority_M: np.ndarray | None = None  # float [M]; None = as it was
  departed_ids: Sequence[str] = ()  # unknown ads that get a row and no SID, as if they had gone


class _AdIds:
  """Ad ids by row and rows by ad id. It only grows, so that all snapshots can share it.

  A snapshot of A rows reads rows below A alone. What lies above is of a write that is not
  published yet, or that was interrupted: `extend` overwrites it and `row` does not believe it.
  """

  def __init__(self):
    self.of_row: list[str] = []
    self._row_of: dict[str, int] = {}
    self._bytes_of_ids = 0

  def row(self, ad_id: str, num_rows: int) -> int:
    """The ad's row; -1 = not among the first `num_rows`."""
    row = self._row_of.get(ad_id, -1)
    return row if 0 <= row < num_rows and self.of_row[row] == ad_id else -1

  def extend(self, num_rows: int, new_ids: list[str]) -> None:
    """Gives `new_ids` the rows from `num_rows`."""
    del self.of_row[num_rows:]
    self.of_row.extend(new_ids)
    self._row_of.update(zip(new_ids, range(num_rows, num_rows + len(new_ids)), strict=True))
    self._bytes_of_ids += sum(-(-sys.getsizeof(ad_id) // 16) * 16 for ad_id in new_ids)

  @property
  def nbytes(self) -> int:
    tables = sys.getsizeof(self.of_row) + sys.getsizeof(self._row_of)
    return tables + self._bytes_of_ids + _BYTES_PER_INT * len(self.of_row)


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
  """The index after one write. Its arrays are read-only.

  Attributes:
    version: grows by one with every write.
    index: SIDs and ads by row number. Rows of SIDs are of this snapshot alone; rows of ads are for
      ever, those of retired ads with sid_of_ad_A = -1.
    codebook_sizes: L sizes.
    keys_S: [S] int64, each SID as one number, ascending like `index.sids_SL`.
    priority_A: [A] float64.
  """

  version: int
  index: AdIndex
  codebook_sizes: tuple[int, ...]
  keys_S: np.ndarray
  priority_A: np.ndarray
  _ids: _AdIds = dataclasses.field(repr=False)

  def find(self, ad_id: str) -> int:
    """The ad's row number, also where it is retired; -1 = an unknown ad."""
    return self._ids.row(ad_id, len(self.priority_A))

  def row_of(self, ad_id: str) -> int:
    """The ad's row number, also where it is retired.

    Raises:
      KeyError: an unknown ad.
    """
    row = self.find(ad_id)
    if row < 0:
      raise KeyError(f"ad_id {ad_id!r} is not in the index (version {self.version})")
    return row

  def codes_of(self, ad_id: str) -> np.ndarray:
    """[L] int32, the ad's SID.

    Raises:
      KeyError: an unknown or retired ad.
    """
    sid = self.index.sid_of_ad_A[self.row_of(ad_id)]
    if sid < 0:
      raise KeyError(f"ad_id {ad_id!r} is retired (version {self.version})")
    return self.index.sids_SL[sid]

  def find_sids(self, codes_NL: np.ndarray) -> np.ndarray:
    """Row numbers of SIDs, also of those that a search found on another snapshot.

    Args:
      codes_NL: [..., L] int; rows with a code outside its codebook (-1 = empty) are found nowhere.

    Returns:
      [...] int32 rows of `index.sids_SL`, -1 = no live ad holds the SID.

    Raises:
      ValueError: not L codes.
    """
    codes_NL, sizes = np.asarray(codes_NL), self.codebook_sizes
    if codes_NL.shape[-1:] != (len(sizes),):
      raise ValueError(f"codes_NL: shape {codes_NL.shape}, expected [..., {len(sizes)}]")
    legal_N = ((codes_NL >= 0) & (codes_NL < sizes)).all(-1)
    keys_N = pack_codes(np.where(legal_N[..., None], codes_NL, 0), sizes)
    return np.where(legal_N, find_keys(self.keys_S, keys_N), -1)

  def ads_with(self, codes_L: Sequence[int]) -> list[str]:
    """Ids of the ads that hold an SID, by descending priority; none where nothing holds it.

    Raises:
      ValueError: not L codes.
    """
    sid = int(self.find_sids(np.asarray(codes_L)))
    if sid < 0:
      return []
    start, end = self.index.ads_start[sid : sid + 2]
    return [self._ids.of_row[row] for row in self.index.ads_A[start:end].tolist()]

  def ad_ids(self, ad_N: np.ndarray) -> np.ndarray:
    """Ids of ads given by row number, for example by `expand`.

    Args:
      ad_N: [...] int, -1 = none.

    Returns:
      [...] object, str or None.

    Raises:
      ValueError: a row outside [-1, A).
    """
    ad_N, num_rows = np.asarray(ad_N), len(self.priority_A)
    if ad_N.size and not -1 <= ad_N.min() <= ad_N.max() < num_rows:
      raise ValueError(f"ad_N: rows {ad_N.min()} to {ad_N.max()}, allowed -1 to {num_rows - 1}")
    result_N = np.empty(ad_N.size, object)
    result_N[:] = [None if row < 0 else self._ids.of_row[row] for row in ad_N.reshape(-1).tolist()]
    return result_N.reshape(ad_N.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of the arrays and of the id table, which all snapshots of an index share."""
    arrays = [self.keys_S, self.priority_A, *vars(self.index).values()]
    return sum(array.nbytes for array in arrays) + self._ids.nbytes


class LiveAdIndex:
  """The present snapshot, and the writes that replace it. Any thread may read and write."""

  def __init__(
    self,
    ad_ids: Sequence[str],
    codes_AL: np.ndarray,
    priority_A: np.ndarray,
    *,
    codebook_sizes: Sequence[int],
  ):
    """Starts with some ads (or none), as version 0.

    Args:
      ad_ids: A distinct ids; an ad's place here is its row.
      codes_AL: [A, L] int, their SIDs.
      priority_A: [A] float; where an SID holds several ads, higher comes first, then lower rows.
      codebook_sizes: L sizes.

    Raises:
      ValueError: as `apply`, or sizes outside [1, 2^31], or 2^63 or more possible SIDs.
    """
    sizes = tuple(int(size) for size in codebook_sizes)
    if not sizes or min(sizes) < 1 or max(sizes) > 2**31 or math.prod(sizes) >= 2**63:
      raise ValueError(f"codebook_sizes: {sizes}, must be in [1, 2^31], their product < 2^63")
    self._write_lock = threading.Lock()
    empty = AdIndex(
      sids_SL=np.empty((0, len(sizes)), np.int32),
      ads_start=np.zeros(1, np.int64),
      ads_A=np.empty(0, np.int32),
      sid_of_ad_A=np.empty(0, np.int32),
    )
    self._snapshot = Snapshot(-1, empty, sizes, np.empty(0, np.int64), np.empty(0), _AdIds())
    self.apply(IndexChange(ad_ids, codes_AL, priority_A))

  @property
  def snapshot(self) -> Snapshot:
    """The index after the last write. Take it once a request: the next one may differ."""
    return self._snapshot

  def apply(
    self, change: IndexChange, *, accept: Callable[[Snapshot], None] | None = None
  ) -> Snapshot:
    """One atomic write; readers see all of it or nothing.

    Args:
      change: ads to add, retire and re-encode.
      accept: sees the new snapshot before any reader does; what it raises undoes the write.

    Returns:
      The new snapshot.

    Raises:
      ValueError: an id that is no string, empty, or twice in the change; an added ad that is live;
        a retired or re-encoded one that is not; codes or priorities of the wrong shape, outside
        their codebook, or not finite. Nothing is changed then.
    """
    with self._write_lock:
      old = self._snapshot
      num_old = len(old.priority_A)
      add_ids, retire_ids, reencode_ids, departed_ids = _checked_ids(change)
      add_N = _checked_rows("add_ids", add_ids, old, live=False)
      retire_M = _checked_rows("retire_ids", retire_ids, old, live=True)
      reencode_M = _checked_rows("reencode_ids", reencode_ids, old, live=True)
      known_N = _checked_rows("departed_ids", departed_ids, old, live=False) >= 0
      departed_ids = [ad for ad, known in zip(departed_ids, known_N, strict=True) if not known]

      sizes = old.codebook_sizes
      add_keys_N = _checked_keys("add_codes_NL", change.add_codes_NL, add_ids, sizes)
      new_codes_ML = change.reencode_codes_ML
      new_keys_M = _checked_keys("reencode_codes_ML", new_codes_ML, reencode_ids, sizes)
      add_priority_N = _checked_priority(
        "add_priority_N", change.add_priority_N, add_ids, default=np.zeros(len(add_ids))
      )
      new_priority_M = _checked_priority(
        "reencode_priority_M", change.reencode_priority_M, reencode_ids,
        default=old.priority_A[reencode_M],
      )

      new_ids = [ad_id for ad_id, row in zip(add_ids, add_N, strict=True) if row < 0]
      add_N[add_N < 0] = num_old + np.arange(len(new_ids))
      new_ids += departed_ids
      coming_N = np.concatenate([add_N, reencode_M])
      priority_A = np.concatenate([old.priority_A, np.zeros(len(new_ids))])
      priority_A[coming_N] = np.concatenate([add_priority_N, new_priority_M])
      index = move_ads(
        old.index,
        keys_S=old.keys_S,
        codebook_sizes=sizes,
        priority_A=priority_A,
        leaving_M=np.concatenate([retire_M, reencode_M]),
        coming_N=coming_N,
        keys_N=np.concatenate([add_keys_N, new_keys_M]),
      )
      keys_S = pack_codes(index.sids_SL, sizes)
      for array in (keys_S, priority_A, *vars(index).values()):
        array.flags.writeable = False
      new = Snapshot(old.version + 1, index, sizes, keys_S, priority_A, old._ids)
      if accept is not None:
        accept(new)
      old._ids.extend(num_old, new_ids)  # before it is published: its readers look rows up there
      self._snapshot = new
      return new


def _checked_ids(change: IndexChange) -> list[list[str]]:
  """Ids of added, retired, re-encoded and departed ads."""
  result, seen = [], set()
  for name in ("add_ids", "retire_ids", "reencode_ids", "departed_ids"):
    ad_ids = getattr(change, name)
    if isinstance(ad_ids, str):
      raise ValueError(f"{name}: {ad_ids!r}, expected a sequence of ids")
    for ad_id in ad_ids:
      if not isinstance(ad_id, str) or not ad_id:
        raise ValueError(f"{name}: {ad_id!r}, expected a string that is not empty")
      if ad_id in seen:
        raise ValueError(f"{name}: {ad_id!r} is in the change twice; an ad may be in it once")
      seen.add(ad_id)
    result.append([str(ad_id) for ad_id in ad_ids])  # numpy strings are larger
  return result


def _checked_rows(name: str, ad_ids: list[str], old: Snapshot, *, live: bool) -> np.ndarray:
  """Rows of ads that must be live, or must not be (-1 = new)."""
  row_N = np.array([old._ids.row(ad_id, len(old.priority_A)) for ad_id in ad_ids], np.int64)
  live_N = row_N >= 0
  live_N[live_N] = old.index.sid_of_ad_A[row_N[live_N]] >= 0
  if (live_N != live).any():
    n = int(np.argmax(live_N != live))
    state = "live" if live_N[n] else "retired" if row_N[n] >= 0 else "not in the index"
    rule = "only live ads can be retired or re-encoded" if live else "only other ads can be added"
    raise ValueError(f"{name}: {ad_ids[n]!r} is {state}; {rule}")
  return row_N


def _checked_keys(
  name: str, codes: np.ndarray | None, ad_ids: list[str], sizes: tuple[int, ...]
) -> np.ndarray:
  expected = (len(ad_ids), len(sizes))
  codes_NL = np.empty((0, len(sizes)), np.int32) if codes is None else np.asarray(codes)
  if codes_NL.shape != expected and (codes_NL.size or ad_ids):
    raise ValueError(f"{name}: shape {codes_NL.shape}, expected {expected}, a row for each ad")
  if not len(ad_ids):
    return np.empty(0, np.int64)
  if not np.issubdtype(codes_NL.dtype, np.integer):
    raise ValueError(f"{name}: dtype {codes_NL.dtype}, expected integers")
  bad_NL = (codes_NL < 0) | (codes_NL >= np.array(sizes))
  if bad_NL.any():
    row, level = np.argwhere(bad_NL)[0]
    raise ValueError(
      f"{name}: code {codes_NL[row, level]} of {ad_ids[row]!r} at level {level + 1}, must be in"
      f" [0, {sizes[level]})"
    )
  return pack_codes(codes_NL.astype(np.int64), sizes)


def _checked_priority(
  name: str, priority: np.ndarray | None, ad_ids: list[str], *, default: np.ndarray
) -> np.ndarray:
  priority_N = default if priority is None else np.asarray(priority, np.float64)
  if priority_N.shape != (len(ad_ids),):
    raise ValueError(f"{name}: shape {priority_N.shape}, expected {(len(ad_ids),)}")
  bad_N = ~np.isfinite(priority_N)
  if bad_N.any():
    row = np.argmax(bad_N)
    raise ValueError(f"{name}: {priority_N[row]} of {ad_ids[row]!r}, must be finite")
  return priority_N
