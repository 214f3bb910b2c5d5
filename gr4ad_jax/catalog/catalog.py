"""The ads that can be recommended right now: index, columns, prefix tree; one write replaces all.

A search takes one `Catalog` and works on it; nothing in it changes. `LiveCatalog` makes the next
one from new ads (embedded and coded as the tokenizer coded the log's), changed ones and removed
ones, in shapes that compiled searches know.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import jax
import numpy as np
import pandas as pd

from gr4ad_jax.catalog.ad_index import AdIndex
from gr4ad_jax.catalog.legal_prefixes import LegalPrefixes, PrefixTree, build_prefix_tree, refill
from gr4ad_jax.catalog.live_index import IndexChange, LiveAdIndex, Snapshot
from gr4ad_jax.catalog.rooms import NoRoom, Rooms
from gr4ad_jax.catalog.targeting import Allowed, Targeting, allow
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data import tables
from gr4ad_jax.data.pipeline import with_rows
from gr4ad_jax.data.records import AdTable
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.data.trending import Trending
from gr4ad_jax.tokenizer.config import HASH_COLUMNS
from gr4ad_jax.tokenizer.semantic_id import SemanticIds, code_new_ads

MIN_SPARE_SIDS = 1_000
KEPT_BYTES = 64 << 20  # of what conditions allow

_KEEPING = threading.Lock()  # of what conditions allow: the event loop and the engine both ask


class ContextMaker(Protocol):
  """Histories -> what the model reads. It changes never: where ads do, another is made."""

  def context(
    self, examples: Sequence[Example], *, user_ids: Sequence[str] | None = None
  ) -> Any:
    """A pytree of arrays whose first axis counts requests.

    Args:
      examples: one a request.
      user_ids: of users that the log may not know; None = those of the log.
    """
    ...

  def with_ads(self, row_N: np.ndarray, ads: AdTable, code_NL: np.ndarray) -> Self:
    """The same with columns and SIDs of some ads; rows past the end follow without a gap."""
    ...

  def with_trending(self, trending: Trending) -> Self:
    """The same with other shares of engagement."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class Catalog:
  """The ads that can be found, as one whole; a change makes another.

  Attributes:
    snapshot: SIDs and ads.
    ads: columns, row = ad number; rows of removed ads stay.
    codes_AL: int32 SIDs of the same rows.
    targeting: the same columns, for conditions.
    prefixes: of the live SIDs, on the device.
    contexts: with the codes of all ads.
    capacity: of the prefix tree.
  """

  snapshot: Snapshot
  ads: AdTable
  codes_AL: np.ndarray
  targeting: Targeting
  prefixes: LegalPrefixes
  contexts: ContextMaker
  capacity: int

  def is_live(self, ad_id: str) -> bool:
    """Whether an ad can be recommended."""
    row = self.snapshot.find(ad_id)
    return row >= 0 and bool(self.snapshot.index.sid_of_ad_A[row] >= 0)

  @functools.cached_property
  def _allowed(self) -> collections.OrderedDict[tuple[str, ...], Allowed]:
    return collections.OrderedDict()

  def allowed(self, where: tuple[str, ...]) -> Allowed:
    """Which ads meet all conditions; the latest ones are kept for the next request.

    Raises:
      ConfigError: a condition that no ad meets.
    """
    where = tuple(sorted(set(where)))
    found = self._allowed.get(where)
    if found is None:
      index = self.snapshot.index
      keep_A = index.sid_of_ad_A >= 0
      for condition in where:
        keep_A = keep_A & self.targeting.matches(condition)
      found = allow(index, keep_A, self.capacity)
      most = max(8, KEPT_BYTES // (found.keep_A.nbytes + found.word_U.nbytes))
      with _KEEPING:
        self._allowed[where] = found
        while len(self._allowed) > most:
          self._allowed.popitem(last=False)
    return found


class Changed(NamedTuple):
  """What became of ads that were to come."""

  code_of: dict[str, np.ndarray]  # ad id -> int32 [L], of those that have come
  refused: dict[str, ValueError]  # ad id -> why it has not


class _Coded(NamedTuple):
  """Ads as the run's tokenizer codes them."""

  table: AdTable
  code_NL: np.ndarray
  refused: dict[str, ValueError]  # those that are not among the rows


class LiveCatalog:
  """The present catalogue, and the writes that replace it."""

  def __init__(
    self,
    ads: AdTable,
    sids: SemanticIds,
    index: AdIndex,
    contexts: ContextMaker,
    *,
    encode: Callable[[AdTable], np.ndarray],
    spare: float,
  ):
    """Starts with the ads, SIDs and contexts of a run; ads on one SID keep the index's order.

    `encode` embeds ads as the tokenizer's encoder did. `spare` is the room for new SIDs, as a share
    of those there, at least MIN_SPARE_SIDS.
    """
    self._sids = sids
    self._encode, self._lock = encode, threading.Lock()
    priority_A = np.zeros(len(sids.codes_AL))
    priority_A[index.ads_A] = -np.arange(len(index.ads_A))
    sizes = sids.codebook_sizes
    self._index = LiveAdIndex(
      ads.ad_id.tolist(), sids.codes_AL, priority_A, codebook_sizes=sizes
    )
    sids_SL = self._index.snapshot.index.sids_SL
    self._tree: PrefixTree = build_prefix_tree(
      sids_SL, spare=max(spare, MIN_SPARE_SIDS / len(sids_SL)), codebook_sizes=sizes
    )
    self._now = Catalog(
      self._index.snapshot, ads, sids.codes_AL, Targeting(ads),
      jax.device_put(self._tree.arrays), contexts, self._tree.capacity,
    )

  @property
  def now(self) -> Catalog:
    """Take it once a call: the next one may differ."""
    return self._now

  @property
  def tree(self) -> PrefixTree:
    """The static facts that searches are compiled for."""
    return self._tree

  def change(
    self,
    ads: Sequence[Mapping[str, Any]] = (),
    *,
    gone: Sequence[str] = (),
    departed: Sequence[Mapping[str, Any]] = (),
    keep: Callable[[Collection[str]], None] = lambda ad_ids: None,
  ) -> Changed:
    """Adds ads, gives known ones new columns, takes others out, all at once.

    Ads that cannot come are left out, each with its reason. Where a prefix is full, an ad shares
    the SID of another one (`rooms.py`).

    Args:
      ads: columns of the ads table, see `tables.build_logs`.
      gone: live ads to take out.
      departed: ads that went in an earlier life: known to histories, never found.
      keep: remembers the change by the ids of the ads that come; called when it is sure to work,
        and what it raises undoes it.

    Raises:
      LogError, ValueError: an ad stands there twice, one to take out is not live, none would be
        left, or no ad can come, for the reason of the first.
    """
    with self._lock:
      now = self._now
      coded = self._coded([*ads, *departed])
      coming = {str(ad["ad_id"]) for ad in ads}
      placed: dict[str, np.ndarray] = {}
      rooms, row_of_id = Rooms(now.snapshot, self._tree), {}
      for row, (ad, code_L) in enumerate(zip(coded.table.ad_id, coded.code_NL, strict=True)):
        held_L = now.snapshot.codes_of(ad) if now.is_live(ad) else None
        try:
          if ad in coming:
            code_L[:] = rooms.place(code_L, held_L)
            placed[ad] = code_L
        except NoRoom as error:
          coded.refused[ad] = error
          continue
        row_of_id[ad] = row
      if coming and not placed and not gone and not departed:
        raise next(iter(coded.refused.values()))
      if not placed and len(now.snapshot.index.ads_A) <= len(gone):
        raise ConfigError("ads: the last ad cannot be removed")
      live = {ad for ad in placed if now.is_live(ad)}
      rows_N = np.array([*row_of_id.values()], np.int64)
      self._replace(now, coded, [*row_of_id], rows_N, IndexChange(
        add_ids=(new := [ad for ad in placed if ad not in live]),
        add_codes_NL=coded.code_NL[[row_of_id[ad] for ad in new]],
        reencode_ids=(known := [ad for ad in placed if ad in live]),
        reencode_codes_ML=coded.code_NL[[row_of_id[ad] for ad in known]],
        retire_ids=gone,
        departed_ids=[ad for ad in row_of_id if ad not in placed],
      ), lambda: keep(placed))
    return Changed(placed, coded.refused)

  def _replace(
    self, now: Catalog, coded: _Coded, ids: Sequence[str], taken_N: np.ndarray,
    change: IndexChange, keep: Callable[[], None],
  ) -> None:
    """Makes the next catalogue the present one: rows `taken_N` of what is coded are `ids`."""
    snapshot, prefixes = self._applied(change, keep)
    changed = dataclasses.replace(now, snapshot=snapshot, prefixes=prefixes)
    if len(ids):
      row_N = np.array([snapshot.row_of(ad) for ad in ids], np.int64)
      table, code_NL = _at(coded.table, taken_N), coded.code_NL[taken_N]
      # A departed ad may have no free suffix; nothing finds it, and its code must be one.
      code_NL = np.minimum(code_NL, np.array(self._sids.codebook_sizes, np.int32) - 1)
      changed = dataclasses.replace(
        changed,
        ads=_with_ads(now.ads, row_N, table),
        codes_AL=with_rows(now.codes_AL, row_N, code_NL),
        targeting=now.targeting.updated(row_N, table),
        contexts=now.contexts.with_ads(row_N, table, code_NL),
      )
    self._now = changed

  def _coded(self, ads: Sequence[Mapping[str, Any]]) -> _Coded:
    """Ads with the codes that they get where there is room; unfit ones are found one by one."""
    num_levels = len(self._sids.codebook_sizes)
    if not ads:
      no_rows = np.zeros(0, np.int64)
      return _Coded(_at(self._now.ads, no_rows), np.zeros((0, num_levels), np.int32), {})
    try:
      return _Coded(*self._codes(ads), {})
    except ValueError:
      if len(ads) == 1:
        raise
    refused: dict[str, ValueError] = {}
    fit = []
    for ad in ads:
      try:
        self._codes([ad])
        fit.append(ad)
      except ValueError as error:
        refused[str(ad["ad_id"])] = error
    if not fit:
      raise next(iter(refused.values()))
    return _Coded(*self._codes(fit), refused)

  def _codes(self, ads: Sequence[Mapping[str, Any]]) -> tuple[AdTable, np.ndarray]:
    """Columns, and int32 [N, L] SIDs; an ad whose quantised codes stay keeps its suffix."""
    table = tables.ad_table(pd.DataFrame(list(ads)), "ads", {})
    now, held_AL = self._now, self._now.codes_AL
    columns = {name: getattr(table, name) for name in HASH_COLUMNS}
    code_NL = code_new_ads(self._sids, self._encode(table), columns, held_codes_AL=held_AL)
    if self._sids.config.last_level == "suffix":
      for code_L, ad in zip(code_NL, table.ad_id, strict=True):
        row = now.snapshot.find(ad)
        if row >= 0 and (held_AL[row, :-1] == code_L[:-1]).all():
          code_L[:] = held_AL[row]
    return table, code_NL

  def _applied(
    self, change: IndexChange, keep: Callable[[], None]
  ) -> tuple[Snapshot, LegalPrefixes]:
    """The index and the device's arrays after a change.

    An index that no program can search, or that nobody remembers, does not come about.
    """
    ready: list[tuple[PrefixTree, LegalPrefixes]] = []

    def accept(snapshot: Snapshot) -> None:
      try:
        tree = refill(self._tree, snapshot.index.sids_SL)
      except ValueError as error:
        raise NoRoom(f"{error}; start the server with a larger serving.spare") from None
      ready.append((tree, jax.device_put(tree.arrays)))
      keep()

    snapshot = self._index.apply(change, accept=accept)
    ((self._tree, prefixes),) = ready
    return snapshot, prefixes


def _at(ads: AdTable, row_N: np.ndarray) -> AdTable:
  """Some rows, without given embeddings."""
  columns = vars(ads) | {"embedding_AD": None}
  return AdTable(**{name: x if x is None else x[row_N] for name, x in columns.items()})


def _with_ads(ads: AdTable, row_N: np.ndarray, new: AdTable) -> AdTable:
  columns = {
    field.name: with_rows(getattr(ads, field.name), row_N, getattr(new, field.name))
    for field in dataclasses.fields(AdTable) if field.name != "embedding_AD"
  }
  return AdTable(embedding_AD=None, **columns)
