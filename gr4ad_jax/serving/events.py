"""What users did: accepted once it is on disk, then seen by everything that a reply depends on."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import numpy as np

from gr4ad_jax.catalog.catalog import Catalog, LiveCatalog
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.records import DAY_S, Action
from gr4ad_jax.data.trending import LiveTrending
from gr4ad_jax.serving.clock import Clock
from gr4ad_jax.serving.engine import Engine
from gr4ad_jax.serving.histories import Histories
from gr4ad_jax.serving.journal import Event, Journal, Kept
from gr4ad_jax.serving.messages import HistoryItem, UserEvent
from gr4ad_jax.serving.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class Trends:
  """What is engaged with these days: goes on from the log's counts with accepted events."""

  counts: LiveTrending | None  # None: the model reads no trending, and nothing is done here
  engine: Engine  # reads the shares of its day with every call
  clock: Clock

  def show(self) -> None:
    """The engine's next calls see the shares of today, which may have begun a moment ago."""
    if self.counts is not None:
      self.engine.trending = self.counts.at(self.clock.now_s)

  def count(self, events: Sequence[Event], catalog: Catalog) -> None:
    """Adds the engagements among events that have just been accepted."""
    if self.counts is not None:
      self.show()
      self.counts.add(_engaged(events, catalog))

  def restore(self, journal: Journal, catalog: Catalog) -> None:
    """Counts the events of an earlier life, day by day."""
    at = 0
    while self.counts is not None and (rows := journal.after(at, 10_000)):
      for _, event in rows:
        if (ad_N := _engaged([event], catalog)).size:
          self.counts.at(min(event.time_s, self.clock.now_s))
          self.counts.add(ad_N)
      at = rows[-1][0]
    self.show()


def _engaged(events: Sequence[Event], catalog: Catalog) -> np.ndarray:
  """int64 [N] numbers of the ads that were clicked or converted."""
  return np.array([
    catalog.snapshot.find(event.ad_id) for event in events
    if event.ad_id is not None and event.action >= Action.CLICK
  ], np.int64)


@dataclasses.dataclass(frozen=True)
class Events:
  """Takes events in, and tells the parts that they change."""

  journal: Journal
  catalog: LiveCatalog
  clock: Clock
  trends: Trends
  histories: Histories
  feature_names: Sequence[str]  # of the log's requests
  metrics: Metrics

  async def add(self, items: Sequence[UserEvent]) -> Kept:
    """Keeps events, all or none, each id of a user once; they are on disk then.

    Raises:
      ConfigError: an ad that the index has never had, a time in the future, or a feature that
        requests of the log do not have, which nothing could learn from.
    """
    catalog, now_s, ahead_s = self.catalog.now, int(self.clock.now_s), self.clock.most_ahead_s
    for at, item in enumerate(items):
      if (item.time or 0) > now_s + ahead_s:
        raise ConfigError(
          f"events[{at}].time={item.time:.0f}: more than {ahead_s // DAY_S} days in the future"
        )
      if item.ad_id is not None and catalog.snapshot.find(item.ad_id) < 0:
        raise ConfigError(f"events[{at}].ad_id={item.ad_id!r}: not in the index")
      for name in item.features:
        if name not in self.feature_names:
          known = ", ".join(self.feature_names) or "it has none"
          raise ConfigError(
            f"events[{at}].features: {name!r} is no request feature of the log ({known}); leave it "
            "out"
          )
    events = [
      event_of(item, item.user_id, now_s)._replace(
        request_id=item.request_id, ecpm=item.ecpm, features=dict(item.features)
      )
      for item in items
    ]
    ids = [item.event_id for item in items]
    kept = await asyncio.to_thread(self.journal.add_events, events, ids, now_s=now_s)
    if kept.events:
      self.clock.reached(max(event.time_s for event in kept.events))
      self.trends.count(kept.events, catalog)
      self.histories.added()
      self.metrics.events.inc(len(kept.events))
    return kept


def event_of(item: HistoryItem, user_id: str, now_s: int) -> Event:
  """What was done; nothing of the request that it belongs to."""
  return Event(
    user_id=user_id, time_s=now_s if item.time is None else int(item.time), ad_id=item.ad_id,
    content_id=item.content_id, action=Action[item.action.upper()], request_id=None,
    value=item.value, ecpm=None, features={},
  )
