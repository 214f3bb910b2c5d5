"""Which beam widths to search with at the present load (traffic-aware adaptive beams, TABS).

B_t = B_base * f(Q_t, C_avail): the base widths at peak, wider ones while traffic leaves room,
narrower ones in overload alone. Source: paper 4.2, which leaves f open.
"""

from __future__ import annotations

import bisect
import collections
import math
from collections.abc import Mapping, Sequence

PEAK_SHARE = 0.6  # of the capacity: from here on, base widths
LOW_SHARE = 0.3  # of the capacity: from here down, the widest
MAX_LOAD = 0.5  # of the time that calls of a wider schedule may fill
SLOWDOWN_SHARE = 0.05  # of the latest call in the mean slowdown
RECENT = 300  # calls that tell how often one would be late
RARE = 0.01  # of the requests may be late
STALLED = 1.2  # or so many times what would be late at base widths, too: the machine stalls
MARGIN = 1.1  # a wider schedule must hold at this multiple of the rate, too: no flapping
OVERLOAD_SHARE = 0.5  # of the waiting room


def scaled_widths(
  widths: Sequence[int], factor: float, *, widen_last: bool
) -> tuple[int, ...]:
  """Widths times a factor; multiples of 8 where they are 16 or more.

  Without `widen_last` a factor above 1 leaves the last level as it is: its beams are the SIDs that
  are answered with, and the levels before decide how probable these are.
  """
  scaled = [max(1, round(width * factor)) for width in widths]
  scaled = [width if width < 16 else round(width / 8) * 8 for width in scaled]
  if factor > 1 and not widen_last:
    scaled[-1] = widths[-1]
  return tuple(scaled)


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
    call_s: Mapping[tuple[float, int], float],
    *,
    at_once: int = 1,
    together: float = 1.0,
    target_s: float = math.inf,
    dwell_s: float = 2.0,
  ):
    """Starts at base widths.

    Args:
      call_s: (factor, requests of a call) -> seconds, measured alone. Factor 1.0 is among them.
      at_once: calls that may run side by side.
      together: how many times as long a call takes when so many run.
      target_s: beams are only wider where at most RARE of the requests are answered later, or
        hardly more than at base widths.
      dwell_s: a wider schedule is only tried so long after the last change.
    """
    smallest = min(size for _, size in call_s)  # what a single request is filled up to
    self._call_s = {(factor, 1): s for (factor, size), s in call_s.items() if size == smallest}
    self._call_s |= call_s
    self._target_s = target_s
    self._at_once, self._together = at_once, together
    self._factors = sorted({factor for factor, _ in call_s})
    self._dwell_s, self._changed_s = dwell_s, -math.inf
    # A call takes what it took alone times the mean slowdown of late, and so many seconds more; the
    # latest of these, by time and ascending.
    self._slowdown = 1.0
    self._latest = collections.deque([0.0] * RECENT, RECENT)
    self._more_s = list(self._latest)
    self.factor = 1.0

  @property
  def capacity(self) -> float:
    """Requests a second at base widths, in full calls, on the machine as it is now."""
    cheapest = min(s / size for (factor, size), s in self._call_s.items() if factor == 1.0)
    return self._at_once / (self._together * cheapest * self._slowdown)

  def observe(self, factor: float, size: int, seconds: float, *, beside: bool = False) -> None:
    """What a call has taken: other work on the machine makes all of them slower.

    Args:
      factor, size: of the call.
      seconds: from its begin to its end.
      beside: another call ran meanwhile.
    """
    expected_s = self._call_s[factor, size] * (self._together if beside else 1.0)
    self._latest.append(seconds - self._slowdown * expected_s)
    self._more_s = sorted(self._latest)
    slowdown = min(max(seconds / expected_s, 0.5), 4.0)
    self._slowdown += SLOWDOWN_SHARE * (slowdown - self._slowdown)

  def choose(
    self, now_s: float, *, rate: float, queue_share: float = 0.0, size: int = 1,
    waited_s: float = 0.0, beside: bool = False,
  ) -> float:
    """The factor for the next call.

    Args:
      now_s: a clock.
      rate: Q_t, requests a second that need a search.
      queue_share: how full the waiting room is, 0 to 1.
      size: of the call.
      waited_s: how long its first request has waited.
      beside: another call is running.
    """
    narrower, wider = self._target(rate, queue_share), self._target(MARGIN * rate, queue_share)
    rested = now_s - self._changed_s >= self._dwell_s
    if narrower < self.factor or (wider > self.factor and rested):
      self.factor = narrower if narrower < self.factor else wider
      self._changed_s = now_s
    # A call whose requests have waited is served with what their time allows.
    left_s, slower = self._target_s - waited_s, self._together if beside else 1.0
    rare = max(RARE, STALLED * self._share_later(self._target_s, self._call_s[1.0, size]))
    in_time = [
      factor for factor in self._factors if 1 <= factor <= self.factor
      and self._share_later(left_s, slower * self._call_s[factor, size]) <= rare
    ]
    return max(in_time, default=min(self.factor, 1.0))

  def _share_later(self, left_s: float, call_s: float) -> float:
    """The share of calls that take longer than `left_s` where one measured alone takes `call_s`."""
    return 1 - bisect.bisect_right(self._more_s, left_s - self._slowdown * call_s) / RECENT

  def _target(self, rate: float, queue_share: float) -> float:
    narrower = [factor for factor in self._factors if factor < 1]
    if queue_share > OVERLOAD_SHARE and narrower:
      return narrower[-1] if queue_share < 0.8 else narrower[0]
    load = rate / self.capacity
    if load >= PEAK_SHARE:
      # Back from overload only when the queue has shrunk well below what brought it about.
      return min(self.factor, 1.0) if queue_share > OVERLOAD_SHARE / 2 else 1.0
    most = self._factors[-1]
    free = (1 - load) / max(load, 1e-9)  # C_avail, relative to what base widths use
    wanted = min(
      most, 1 + (most - 1) * (PEAK_SHARE - load) / (PEAK_SHARE - LOW_SHARE), 1 + free
    )
    rare = max(RARE, STALLED * self._late(1.0, rate))
    possible = [factor for factor in self._factors if 1 <= factor <= wanted]
    return max((
      factor for factor in possible
      if self._busy(factor, rate) <= MAX_LOAD and self._late(factor, rate) <= rare
    ), default=1.0)

  def _busy(self, factor: float, rate: float) -> float:
    """How many calls of one request run at a time on average."""
    return rate * self._slowdown * self._call_s[factor, 1]

  def _late(self, factor: float, rate: float) -> float:
    """The share of requests that are late if all that find a free call get this factor.

    Calls are of one request, as they are where traffic is low.
    """
    call_s = self._call_s[factor, 1]
    busy = self._busy(factor, rate)
    late = self._share_later(self._target_s, call_s)
    if self._at_once > 1:  # another one begins while it runs
      late += min(1.0, busy) * self._share_later(self._target_s, self._together * call_s)
    # Who finds as many calls running as may run waits for the rest of one, and is then answered at
    # base widths.
    waits = busy**self._at_once / math.factorial(self._at_once)
    slower = self._slowdown * self._together
    longest_s, left_s = slower * call_s, self._target_s - slower * self._call_s[1.0, 1]
    first = bisect.bisect_right(self._more_s, left_s - longest_s)
    too_early = (min(1.0, 1 - (left_s - more_s) / longest_s) for more_s in self._more_s[first:])
    return late + waits * sum(too_early) / RECENT
