"""What time it is for a server's model, whose log may be of the past."""

from __future__ import annotations

import time
from typing import Literal

from gr4ad_jax.data.records import DAY_S

ClockKind = Literal["real", "log", "replay"]
MOST_AHEAD_S = DAY_S  # an event's time beyond the server's clock
MOST_REPLAYED_S = 40 * DAY_S  # the same where events move the clock


class Clock:
  """The machine's time, or one that begins where the log ends."""

  def __init__(self, kind: ClockKind, *, begin_s: int):
    """A "log" clock runs from `begin_s` on, unix seconds; a "replay" clock stands there."""
    self._late_s = time.time() - begin_s if kind == "log" else 0.0
    self._replayed_s = begin_s if kind == "replay" else None
    self.most_ahead_s = MOST_REPLAYED_S if kind == "replay" else MOST_AHEAD_S

  @property
  def now_s(self) -> float:
    """Unix seconds."""
    return time.time() - self._late_s if self._replayed_s is None else self._replayed_s

  def reached(self, time_s: int) -> None:
    """An event was accepted of this time, to which it moves a "replay" clock."""
    if self._replayed_s is not None:
      self._replayed_s = max(self._replayed_s, time_s)
