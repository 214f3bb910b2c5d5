"""Settings of a server."""

from __future__ import annotations

import dataclasses

from gr4ad_jax.config import Bounded, Count, NotNegative, Positive, require


@dataclasses.dataclass(frozen=True)
class ServingConfig(Bounded, section="serving"):
  """How a server answers. Source: paper 4.2."""

  widths: tuple[Count, ...] = ()
  """Beams after each SID level at peak; () = those of the run."""
  batch_sizes: tuple[Count, ...] = (1, 4, 16)
  """Requests of one compiled call; as many as wait, filled up to the next of these."""
  beam_factors: tuple[Positive, ...] = (0.5, 1.0, 1.6)
  """Beam schedules, as multiples of the run's widths: 1 at peak, larger ones while traffic leaves
  room, smaller ones in overload only."""
  widen_last: bool = False
  """Whether larger ones widen the last level, too. It holds the SIDs that are answered with: the
  levels before it make them better, more of them only serve answers of more ads."""
  calls_at_once: Count = 2
  """Calls that may run side by side: who comes during another's call need not wait for its end."""
  max_wait_ms: NotNegative = 2.0
  """How long a request may wait for others to share its call while another call could begin."""
  target_ms: Positive = 80.0
  """Beams are only wider than at peak where the search still ends within this time."""
  deadline_ms: Positive = 500.0
  """A request that has waited so long is given up (503)."""
  max_queue: Count = 64
  """Requests that may wait; more are refused (429)."""
  cache_ttl_s: NotNegative = 60.0
  """How long an answer may be given again to the same user with the same context; 0 = never."""
  cache_size: Count = 100_000
  """Answers kept, where the cache is in this process."""
  max_k: Count = 100
  """Ads that a request may ask for."""
  max_history: Count = 512
  """Events of a user that the model reads, or that a request may bring. What a user has seen
  (`exclude_seen`) is known of all events."""
  max_body_bytes: Count = 1 << 20
  """Larger request bodies are refused (413)."""
  body_timeout_s: Positive = 10.0
  """Slower request bodies are refused (408)."""
  segment_s: Positive = 60.0
  """Seconds between log segments written for `gr4ad online`."""
  keep_days: Positive = 90.0
  """Older events that are in a segment are removed from the store."""
  spare: NotNegative = 0.25
  """Room for new SIDs without recompilation, as a share of those at the start (at least 1,000)."""

  def _check(self):
    for name in ("batch_sizes", "beam_factors"):
      values = getattr(self, name)
      require(len(values) > 0 and list(values) == sorted(set(values)), f"serving.{name}", values,
              "needs ascending values, at least one")
    require(1.0 in self.beam_factors, "serving.beam_factors", self.beam_factors,
            "needs 1.0, the widths at peak")

  def call_size(self, requests: int) -> int:
    """The batch size that so many requests are filled up to; at most the largest one."""
    return next(size for size in self.batch_sizes if size >= requests)
