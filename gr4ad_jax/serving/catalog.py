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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd

from gr4ad_jax.catalog.legal_prefixes import LegalPrefixes, PrefixTree, build_prefix_tree, refill
from gr4ad_jax.catalog.live_index import IndexChange, LiveAdIndex, Snapshot
from gr4ad_jax.catalog.subsets import pack_subsets
from gr4ad_jax.catalog.targeting import Targeting
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data import tables
from gr4ad_jax.data.pipeline import hash_ids
from gr4ad_jax.data.records import AdTable
from gr4ad_jax.gr4ad.batch_maker import BatchMaker
from gr4ad_jax.gr4ad.run import Inputs
from gr4ad_jax.tokenizer.semantic_id import HASH_COLUMNS, SemanticIds, code_new_ads

MIN_SPARE_SIDS = 1_000
KEPT_BYTES = 64 << 20  # of what conditions allow

_KEEPING = threading.Lock()  # of what conditions allow: the event loop and the engine both ask


class NoRoom(ConfigError):
  """The compiled programs have no room for so many SIDs."""


class Allowed(NamedTuple):
  """What a request with conditions may get."""

  keep_A: np.ndarray  # bool, live ads that meet them
  word_U: np.ndarray  # uint32, bitmap over SIDs as `pack_subsets` makes it


@dataclasses.dataclass(frozen=True, eq=False)
class Catalog:
  """Attributes:
    snapshot: SIDs and ads.
    ads: columns, row = ad number; rows of removed ads stay.
    targeting: the same columns, for conditions.
    prefixes: of the live SIDs, on the device.
    make_batch: with the codes of all ads.
    capacity: of the prefix tree.
  """

  snapshot: Snapshot
  ads: AdTable
  targeting: Targeting
  prefixes: LegalPrefixes
  make_batch: BatchMaker
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
      member_1S = np.zeros((1, len(index.sids_SL)), bool)
      member_1S[0, index.sid_of_ad_A[keep_A]] = True
      found = Allowed(keep_A, pack_subsets(member_1S, self.capacity)[0])
      most = max(8, KEPT_BYTES // (found.keep_A.nbytes + found.word_U.nbytes))
      with _KEEPING:
        self._allowed[where] = found
        while len(self._allowed) > most:
          self._allowed.popitem(last=False)
    return found


class LiveCatalog:
  """The present catalogue, and the writes that replace it."""

  def __init__(
    self, inputs: Inputs, encode: Callable[[AdTable], np.ndarray], *, spare: float
  ):
    """Starts with the ads of a run.

    Args:
      inputs: of the run.
      encode: embeds ads as the tokenizer's encoder did.
      spare: room for new SIDs, as a share of those there, at least MIN_SPARE_SIDS.
    """
    self._sids: SemanticIds = inputs.sids
    self._encode, self._lock = encode, threading.Lock()
    codes_AL = inputs.sids.codes_AL
    # Where an SID holds several ads: those with more engagements first, as in the run's index.
    priority_A = np.zeros(len(codes_AL))
    priority_A[inputs.index.ads_A] = -np.arange(len(inputs.index.ads_A))
    sizes = inputs.sids.codebook_sizes
    self._index = LiveAdIndex(
      inputs.logs.ads.ad_id.tolist(), codes_AL, priority_A, codebook_sizes=sizes
    )
    sids_SL = self._index.snapshot.index.sids_SL
    self._tree: PrefixTree = build_prefix_tree(
      sids_SL, spare=max(spare, MIN_SPARE_SIDS / len(sids_SL)), codebook_sizes=sizes
    )
    self._now = Catalog(
      self._index.snapshot, inputs.logs.ads, Targeting(inputs.logs.ads),
      jax.device_put(self._tree.arrays), inputs.make_batch, self._tree.capacity,
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
    keep: Callable[[], None] = lambda: None,
  ) -> list[np.ndarray]:
    """Adds ads, gives known ones new columns, takes others out; all or nothing.

    Args:
      ads: columns of the ads table, see `tables.build_logs`.
      gone: live ads to take out.
      keep: remembers the change; called when it is sure to work, and what it raises undoes it.

    Returns:
      The SIDs of `ads`.

    Raises:
      LogError, ValueError: a column is missing or invalid, an ad stands there twice, encoder
        "given" meets an ad without embedding, an ad to take out is not live, or none would be left.
      NoRoom: more SIDs than the compiled programs have room for.
    """
    table, embedding_ND = None, None
    if ads:
      table = tables.ad_table(pd.DataFrame(list(ads)), "ads", {})
      embedding_ND = self._encode(table)
    with self._lock:
      now = self._now
      if not ads and len(now.snapshot.index.ads_A) <= len(gone):
        raise ConfigError("ads: the last ad cannot be removed")
      ids = [str(ad_id) for ad_id in table.ad_id] if ads else []
      code_NL = np.zeros((0, len(self._sids.codebook_sizes)), np.int32)
      if ads:
        code_NL = self._codes(now, ids, embedding_ND, table)
      live_N = np.array([now.is_live(ad) for ad in ids], bool)
      snapshot, prefixes = self._applied(IndexChange(
        add_ids=[ad for ad, live in zip(ids, live_N, strict=True) if not live],
        add_codes_NL=code_NL[~live_N],
        reencode_ids=[ad for ad, live in zip(ids, live_N, strict=True) if live],
        reencode_codes_ML=code_NL[live_N],
        retire_ids=gone,
      ), keep)
      row_N = np.array([snapshot.row_of(ad) for ad in ids], np.int64)
      columns, targeting, make_batch = now.ads, now.targeting, now.make_batch
      if ads:
        columns = _with_ads(columns, row_N, table)
        targeting = targeting.updated(row_N, table)
        make_batch = dataclasses.replace(
          make_batch, codes_AL=_with_rows(make_batch.codes_AL, row_N, code_NL)
        )
        if make_batch.ad_hash_A is not None:
          make_batch = dataclasses.replace(
            make_batch, ad_hash_A=_with_rows(make_batch.ad_hash_A, row_N, hash_ids(table.ad_id))
          )
      self._now = Catalog(snapshot, columns, targeting, prefixes, make_batch, now.capacity)
    return list(code_NL)

  def _codes(
    self, now: Catalog, ids: Sequence[str], embedding_ND: np.ndarray, table: AdTable
  ) -> np.ndarray:
    """int32 [N, L] SIDs; an ad whose quantised codes stay keeps its suffix."""
    columns = {name: getattr(table, name) for name in HASH_COLUMNS}
    held_AL = now.make_batch.codes_AL
    code_NL = code_new_ads(self._sids, embedding_ND, columns, held_codes_AL=held_AL)
    if self._sids.config.last_level == "suffix":
      for code_L, ad in zip(code_NL, ids, strict=True):
        row = now.snapshot.find(ad)
        if row >= 0 and (held_AL[row, :-1] == code_L[:-1]).all():
          code_L[:] = held_AL[row]
    return code_NL

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


def _with_rows(x_AD: np.ndarray, row_N: np.ndarray, new_ND: np.ndarray) -> np.ndarray:
  """Other values in some rows; rows past the end follow without a gap."""
  num_rows = max(len(x_AD), int(row_N.max()) + 1)
  grown = np.concatenate([x_AD, np.zeros((num_rows - len(x_AD), *x_AD.shape[1:]), x_AD.dtype)])
  grown[row_N] = new_ND
  return grown


def _with_ads(ads: AdTable, row_N: np.ndarray, new: AdTable) -> AdTable:
  columns = {
    field.name: _with_rows(getattr(ads, field.name), row_N, getattr(new, field.name))
    for field in dataclasses.fields(AdTable) if field.name != "embedding_AD"
  }
  return AdTable(embedding_AD=None, **columns)
