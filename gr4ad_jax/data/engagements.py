"""Which events are engagements with an ad: clicks, conversions, organic events of its product."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gr4ad_jax.data.records import Action, Logs


class Engagements(NamedTuple):
  """N engagements, in the order of the events (by user, then time)."""

  event_N: np.ndarray  # int64, rows of the event table
  ad_N: np.ndarray  # int32, the ads engaged with


def engagements(logs: Logs) -> Engagements:
  """Clicks and conversions of ads; an organic event, whatever its action, counts for its ad."""
  events = logs.events
  ad_E = np.where(events.ad >= 0, events.ad, np.append(logs.contents.ad, -1)[events.content])
  event_N = np.flatnonzero((ad_E >= 0) & ((events.ad < 0) | (events.action >= Action.CLICK)))
  return Engagements(event_N, ad_E[event_N].astype(np.int32))
