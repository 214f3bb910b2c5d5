"""Which beam widths to search with at the present load (traffic-aware adaptive beams, TABS).

B_t = B_base * f(Q_t, C_avail): the base widths at peak, wider ones while traffic leaves room,
narrower ones in overload alone. Source: paper 4.2; f is that of reference section 8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

PEAK_SHARE = 0.6  # of the capacity: from here on, base widths
LOW_SHARE = 0.3  # of the capacity: from here down, the widest
MAX_LOAD = 0.7  # of the machine that a wider schedule may fill
MARGIN = 1.1  # a wider schedule must hold at this multiple of the rate, too: no flapping
OVERLOAD_SHARE = 0.5  # of the waiting room


def scaled_widths(widths: Sequence[int], factor: float) -> tuple[int, ...]:
  """Widths times a factor; multiples of 8 where they are 16 or more."""
  scaled = [max(1, round(width * factor)) for width in widths]
  return tuple(width if width < 16 else round(width / 8) * 8 for width in scaled)


class ArrivalRate:
  """Arrivals a second, forgotten with a time constant."""

  def __init__(self, seconds: float = 5.0):
    self._seconds, self._count, self._at, self._began = seconds, 0.0, 0.0, None

  def add(self, now_s: float) -> None:
    """One arrival."""
    self._began = now_s if self._began is None else self._began
    self._decay(now_s)
    self._count += 1

  def __call__(self, now_s: float) -> float:
    """Arrivals a second; before a time constant has passed, those since the first one."""
    if self._began is None:
      return 0.0
    self._decay(now_s)
    seen = 1 - math.exp(-max(now_s - self._began, 1.0) / self._seconds)
    return self._count / (self._seconds * seen)

  def _decay(self, now_s: float) -> None:
    self._count *= math.exp(-max(0.0, now_s - self._at) / self._seconds)
    self._at = max(self._at, now_s)


class TrafficAwareBeams:
  """Chooses a factor for every call of the search."""

  def __init__(
    self,
    request_s: Mapping[float, float],
    *,
    call_s: Mapping[float, float] | None = None,
    max_call_s: float = math.inf,
    dwell_s: float = 2.0,
  ):
    """Starts at base widths.

    Args:
      request_s: factor -> seconds that a request costs in a full batch. 1.0 is among them.
      call_s: factor -> seconds of the longest call; None = no limit.
      max_call_s: factors above 1 whose calls take longer are never chosen.
      dwell_s: a wider schedule is only tried so long after the last change.
    """
    self._request_s = dict(request_s)
    self._dwell_s, self._changed_s = dwell_s, -math.inf
    self._usable = sorted(
      factor for factor in request_s
      if factor <= 1 or call_s is None or call_s[factor] <= max_call_s
    )
    self.factor = 1.0

  @property
  def capacity(self) -> float:
    """Requests a second at base widths."""
    return 1 / self._request_s[1.0]

  def choose(self, now_s: float, *, rate: float, queue_share: float) -> float:
    """The factor for the next call.

    Args:
      now_s: a clock.
      rate: Q_t, requests a second that need a search.
      queue_share: how full the waiting room is, 0 to 1.
    """
    narrower, wider = self._target(rate, queue_share), self._target(MARGIN * rate, queue_share)
    rested = now_s - self._changed_s >= self._dwell_s
    if narrower < self.factor or (wider > self.factor and rested):
      self.factor = narrower if narrower < self.factor else wider
      self._changed_s = now_s
    return self.factor

  def _target(self, rate: float, queue_share: float) -> float:
    narrower = [factor for factor in self._usable if factor < 1]
    if queue_share > OVERLOAD_SHARE and narrower:
      return narrower[-1] if queue_share < 0.8 else narrower[0]
    load = rate / self.capacity
    if load >= PEAK_SHARE:
      # Back from overload only when the queue has shrunk well below what brought it about.
      return min(self.factor, 1.0) if queue_share > OVERLOAD_SHARE / 2 else 1.0
    most = self._usable[-1]
    free = (1 - load) / max(load, 1e-9)  # C_avail, relative to what base widths use
    wanted = min(
      most, 1 + (most - 1) * (PEAK_SHARE - load) / (PEAK_SHARE - LOW_SHARE), 1 + free
    )
    fits = [
      factor for factor in self._usable
      if 1 <= factor <= wanted and rate * self._request_s[factor] <= MAX_LOAD
    ]
    return max(fits, default=1.0)
