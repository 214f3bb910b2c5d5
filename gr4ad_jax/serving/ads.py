"""Ads that come, change and go while a server runs: in its catalogue, and on disk for the next."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from gr4ad_jax.catalog.catalog import Catalog, Changed, LiveCatalog
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.validation import LogError
from gr4ad_jax.machine.progress import console
from gr4ad_jax.serving.journal import Journal
from gr4ad_jax.serving.messages import AdFields
from gr4ad_jax.serving.metrics import Metrics

SHOWN_COLUMNS = ("advertiser_id", "category", "text")
MOST_DEPARTED = 10_000  # ads that went, were none of the log, and are still known after a restart


class UnknownAd(ConfigError):
  """An ad that is not, or no longer, in the index."""


class Ads:
  """Writes the catalogue, one change after the other."""

  def __init__(self, catalog: LiveCatalog, journal: Journal, *, encoder: str, metrics: Metrics):
    """`encoder` makes the embeddings that SIDs come from; with "given", ads bring their own."""
    self._catalog, self._journal = catalog, journal
    self._encoder, self._metrics = encoder, metrics
    self._writing, self._finding = asyncio.Lock(), asyncio.Lock()

  async def put(self, ads: Sequence[AdFields]) -> Changed:
    """Adds or changes ads; those that come are on disk and in the index then.

    Raises:
      ConfigError: a rule is broken, and none can come; see `LiveCatalog.change`.
      NoRoom: there is room for none.
    """
    for at, ad in enumerate(ads):
      if ad.embedding is not None and self._encoder != "given":
        raise ConfigError(f"ads[{at}].embedding: these semantic IDs are made by {self._encoder!r}")
    # Without embeddings there is no such column, not one of nothing.
    rows = [ad.model_dump(exclude={"embedding"} if ad.embedding is None else None) for ad in ads]
    fields = {row["ad_id"]: row for row in rows}
    async with self._writing:
      try:
        changed = await asyncio.to_thread(
          self._catalog.change, rows,
          keep=lambda ad_ids: self._journal.put_ads({ad: fields[ad] for ad in ad_ids}),
        )
      except (ConfigError, LogError):
        raise
      except ValueError as error:
        raise ConfigError(str(error)) from None
    self._metrics.index_changes.inc()
    return changed

  async def remove(self, ad_id: str) -> None:
    """Takes an ad out of the index.

    Raises:
      UnknownAd: it is not there.
      ConfigError: it is the last one.
    """
    async with self._writing:
      if not self._catalog.now.is_live(ad_id):
        raise UnknownAd(f"ad_id {ad_id!r} is not in the index")
      await asyncio.to_thread(
        self._catalog.change, gone=[ad_id], keep=lambda _: self._journal.remove_ad(ad_id)
      )
    self._metrics.index_changes.inc()

  async def find(self, query: str, limit: int) -> list[dict[str, str]]:
    """Live ads whose id, advertiser, category or text holds all words of `query`."""
    async with self._finding:  # one look through all ads at a time leaves room for requests
      return await asyncio.to_thread(_find, self._catalog.now, query, limit)

  def restore(self) -> None:
    """Ads that came and went in an earlier life; what no longer fits is left out and named.

    Of those that went, the last MOST_DEPARTED are known to late events; others are forgotten.
    """
    rows, now = self._journal.ads(), self._catalog.now
    come = [fields for _, fields, live in rows if live and fields is not None]
    gone = [ad for ad, _, live in rows if not live and now.is_live(ad)]
    departed = {ad: fields for ad, fields, live in rows if not live and now.snapshot.find(ad) < 0}
    self._journal.forget_ads([*departed][:-MOST_DEPARTED])
    late = [fields for fields in [*departed.values()][-MOST_DEPARTED:] if fields is not None]
    if not come and not gone and not late:
      return
    try:
      refused = self._catalog.change(come, gone=gone, departed=late).refused
    except ValueError:  # one misfit must not keep the others out
      refused = {}
      for change in ({"ads": come}, *({"gone": [ad]} for ad in gone), {"departed": late}):
        try:
          refused |= self._catalog.change(**change).refused
        except ValueError as error:
          named = change.get("gone") or [row["ad_id"] for row in next(iter(change.values()))]
          refused |= dict.fromkeys(named, error)
    for ad, error in refused.items():
      console.print(f"ad {ad!r} of the store is left out: {error}")


def _find(now: Catalog, query: str, limit: int) -> list[dict[str, str]]:
  words, found = query.lower().split(), []
  for row in np.flatnonzero(now.snapshot.index.sid_of_ad_A >= 0).tolist():
    columns = {name: str(getattr(now.ads, name)[row]) for name in ("ad_id", *SHOWN_COLUMNS)}
    text = " ".join(columns.values()).lower()
    if all(word in text for word in words):
      found.append(columns)
      if len(found) == limit:
        break
  return found
