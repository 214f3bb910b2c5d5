"""The ads that can be recommended right now: index, columns, prefix tree; one write replaces all.

A search takes one `Catalog` and works on it; nothing in it changes. `LiveCatalog` makes the next
one from new ads (embedded and coded as the tokenizer coded the log's), changed ones and removed
ones, in shapes that compiled searches know.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd

from gr4ad_jax.config import ConfigError
from gr4ad_jax.data import tables
from gr4ad_jax.data.pipeline import BatchMaker, hash_ids
from gr4ad_jax.data.records import AdTable
from gr4ad_jax.run import Inputs
from gr4ad_jax.search.legal_prefixes import LegalPrefixes, PrefixTree, build_prefix_tree, refill
from gr4ad_jax.search.subsets import pack_subsets
from gr4ad_jax.search.targeting import Targeting
from gr4ad_jax.tokenizer.live_index import IndexChange, LiveAdIndex, Snapshot
from gr4ad_jax.tokenizer.semantic_id import HASH_COLUMNS, SemanticIds, code_new_ads

MIN_SPARE_SIDS = 1_000


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
  def _allowed(self) -> dict[tuple[str, ...], Allowed]:
    return {}

  def allowed(self, where: tuple[str, ...]) -> Allowed:
    """Which ads meet all conditions; kept for the next request.

    Raises:
      ConfigError: a condition that no ad meets.
    """
    if where not in self._allowed:
      index = self.snapshot.index
      keep_A = index.sid_of_ad_A >= 0
      for condition in where:
        keep_A = keep_A & self.targeting.matches(condition)
      member_1S = np.zeros((1, len(index.sids_SL)), bool)
      member_1S[0, index.sid_of_ad_A[keep_A]] = True
      if len(self._allowed) >= 1000:
        self._allowed.clear()
      self._allowed[where] = Allowed(keep_A, pack_subsets(member_1S, self.capacity)[0])
    return self._allowed[where]


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

  def upsert(self, ads: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """Adds ads, or gives known ones new columns; all or none.

    Args:
      ads: columns of the ads table, see `schema.build_logs`.

    Returns:
      The SID of each.

    Raises:
      LogError, ValueError: a column is missing or invalid, an ad stands there twice, or encoder
        "given" meets an ad without embedding.
      NoRoom: more SIDs than the compiled programs have room for.
    """
    table = tables.ad_table(pd.DataFrame(list(ads)), "ads", {})
    embedding_ND = self._encode(table)
    columns = {name: getattr(table, name) for name in HASH_COLUMNS}
    with self._lock:
      now = self._now
      code_NL = code_new_ads(
        self._sids, embedding_ND, columns, held_codes_AL=now.make_batch.codes_AL
      )
      ids = [str(ad_id) for ad_id in table.ad_id]
      live_N = np.array([now.is_live(ad) for ad in ids])
      change = IndexChange(
        add_ids=[ad for ad, live in zip(ids, live_N, strict=True) if not live],
        add_codes_NL=code_NL[~live_N],
        reencode_ids=[ad for ad, live in zip(ids, live_N, strict=True) if live],
        reencode_codes_ML=code_NL[live_N],
      )
      snapshot, prefixes = self._applied(change)
      row_N = np.array([snapshot.row_of(ad) for ad in ids])
      make_batch = dataclasses.replace(
        now.make_batch, codes_AL=_with_rows(now.make_batch.codes_AL, row_N, code_NL)
      )
      if make_batch.ad_hash_A is not None:
        make_batch = dataclasses.replace(
          make_batch, ad_hash_A=_with_rows(make_batch.ad_hash_A, row_N, hash_ids(table.ad_id))
        )
      self._now = Catalog(
        snapshot, _with_ads(now.ads, row_N, table), now.targeting.updated(row_N, table), prefixes,
        make_batch, now.capacity,
      )
    return list(code_NL)

  def remove(self, ad_ids: Sequence[str]) -> None:
    """Takes ads out of the recommendable ones; all or none.

    Raises:
      KeyError: an ad is not there.
      ConfigError: it would leave none.
    """
    with self._lock:
      now = self._now
      for ad_id in ad_ids:
        now.snapshot.codes_of(ad_id)
      if len(now.snapshot.index.ads_A) <= len(ad_ids):
        raise ConfigError("ads: the last ad cannot be removed")
      snapshot, prefixes = self._applied(IndexChange(retire_ids=ad_ids))
      self._now = dataclasses.replace(now, snapshot=snapshot, prefixes=prefixes)

  def set_trending(self, trending: Any) -> None:
    """Other current shares of engagement."""
    with self._lock:
      self._now = dataclasses.replace(
        self._now, make_batch=dataclasses.replace(self._now.make_batch, trending=trending)
      )

  def _applied(self, change: IndexChange) -> tuple[Snapshot, LegalPrefixes]:
    """The index and the device's arrays after a change.

    An index that no program can search does not come about.
    """
    trees: list[PrefixTree] = []

    def accept(snapshot: Snapshot) -> None:
      try:
        trees.append(refill(self._tree, snapshot.index.sids_SL))
      except ValueError as error:
        raise NoRoom(f"{error}; start the server with a larger serving.spare") from None

    snapshot = self._index.apply(change, accept=accept)
    (self._tree,) = trees
    return snapshot, jax.device_put(self._tree.arrays)


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
