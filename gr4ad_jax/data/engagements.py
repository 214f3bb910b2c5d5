"""Which events engage with an ad, by two rules, and how many there were in each period.

The narrow rule takes clicks and conversions of the ad itself: what a model is trained to bring
about. The wide rule also takes organic events of the ad's product: what a user cares for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gr4ad_jax.data.records import Action, EventTable, Logs
from gr4ad_jax.data.shortlist import PERIOD_S


def engaged_with_ad(events: EventTable) -> np.ndarray:
  """The narrow rule: bool [E], clicks and conversions of ads."""
  return (events.ad >= 0) & (events.action >= Action.CLICK)


class ProductEngagements(NamedTuple):
  """N engagements, in the order of the events (by user, then time)."""

  event_N: np.ndarray  # int64, rows of the event table
  ad_N: np.ndarray  # int32, the ads whose product was engaged with


def product_engagements(logs: Logs) -> ProductEngagements:
  """The wide rule: clicks and conversions of ads, and every organic event of an ad's product."""
  events = logs.events
  ad_E = np.where(events.ad >= 0, events.ad, np.append(logs.contents.ad, -1)[events.content])
  event_N = np.flatnonzero((ad_E >= 0) & ((events.ad < 0) | engaged_with_ad(events)))
  return ProductEngagements(event_N, ad_E[event_N].astype(np.int32))


class SeenAds:
  """Ads whose product a user of the logs has engaged with, by the wide rule."""

  def __init__(self, logs: Logs):
    event_N, self._ad_N = product_engagements(logs)
    self._time_s_N = logs.events.time_s[event_N]
    users = np.arange(len(logs.users.user_id) + 1)
    self._begin_U = np.searchsorted(logs.events.user[event_N], users)

  def before(self, user: int, time_s: int) -> np.ndarray:
    """int32, distinct ads that were met strictly before a time, unix seconds."""
    begin, end = self._begin_U[user : user + 2]
    end = begin + np.searchsorted(self._time_s_N[begin:end], time_s)
    return np.unique(self._ad_N[begin:end])


class PeriodEngagements(NamedTuple):
  """How often ads were engaged with, narrow rule; one row for each period and ad, in this order.

  Attributes:
    period: int64, times of PERIOD_S since 1970.
    ad: int64, ad numbers.
    count: int64.
  """

  period: np.ndarray
  ad: np.ndarray
  count: np.ndarray


def count_engagements(events: EventTable) -> PeriodEngagements:
  """Counts the events of some users."""
  rows = engaged_with_ad(events)
  ad = events.ad[rows].astype(np.int64)
  period = events.time_s[rows] // PERIOD_S
  return add_counts([PeriodEngagements(period, ad, np.ones_like(ad))])


def add_counts(parts: Sequence[PeriodEngagements]) -> PeriodEngagements:
  """Adds up the counts of parts."""
  period, ad, count = (np.concatenate(column) for column in zip(*parts, strict=True))
  order = np.lexsort((ad, period))  # equal pairs side by side, `first` where each begins
  period, ad = period[order], ad[order]
  first = np.flatnonzero(np.append(True, (np.diff(period) != 0) | (np.diff(ad) != 0))[: len(ad)])
  total = np.append(0, np.cumsum(count[order]))
  return PeriodEngagements(period[first], ad[first], np.diff(total[np.append(first, len(ad))]))
