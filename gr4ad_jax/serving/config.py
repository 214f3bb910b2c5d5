"""Settings of a server."""

from __future__ import annotations

import dataclasses

from gr4ad_jax.config import require


@dataclasses.dataclass(frozen=True)
class ServingConfig:
  """How a server answers. Source: paper 4.2."""

  widths: tuple[int, ...] = ()
  """Beams after each SID level at peak; () = those of the run."""
  batch_sizes: tuple[int, ...] = (1, 4, 16)
  """Requests of one compiled call; as many as wait, filled up to the next of these."""
  beam_factors: tuple[float, ...] = (0.5, 1.0, 1.6)
  """Beam schedules, as multiples of the run's widths: 1 at peak, larger ones while traffic leaves
  room, smaller ones in overload only."""
  widen_last: bool = False
  """Whether larger ones widen the last level, too. It holds the SIDs that are answered with: the
  levels before it make them better, more of them only serve answers of more ads."""
  calls_at_once: int = 2
  """Calls that may run side by side: who comes during another's call need not wait for its end."""
  max_wait_ms: float = 2.0
  """How long a request may wait for others to share its call while another call could begin."""
  target_ms: float = 80.0
  """Beams are only wider than at peak where the search still ends within this time."""
  deadline_ms: float = 500.0
  """A request that has waited so long is given up (503)."""
  max_queue: int = 64
  """Requests that may wait; more are refused (429)."""
  cache_ttl_s: float = 60.0
  """How long an answer may be given again to the same user with the same context; 0 = never."""
  cache_size: int = 100_000
  """Answers kept, where the cache is in this process."""
  max_k: int = 100
  """Ads that a request may ask for."""
  max_history: int = 512
  """Events of a user that the model reads, or that a request may bring. What a user has seen
  (`exclude_seen`) is known of all events."""
  max_body_bytes: int = 1 << 20
  """Larger request bodies are refused (413)."""
  body_timeout_s: float = 10.0
  """Slower request bodies are refused (408)."""
  segment_s: float = 60.0
  """Seconds between log segments written for `gr4ad online`."""
  keep_days: float = 90.0
  """Older events that are in a segment are removed from the store."""
  spare: float = 0.25
  """Room for new SIDs without recompilation, as a share of those at the start (at least 1,000)."""

  def __post_init__(self):
    sizes, factors = self.batch_sizes, self.beam_factors
    require(all(width >= 1 for width in self.widths), "serving.widths", self.widths,
            "needs one positive width per SID level")
    require(len(sizes) > 0 and min(sizes) >= 1 and list(sizes) == sorted(set(sizes)),
            "serving.batch_sizes", sizes, "needs ascending sizes of at least 1")
    require(len(factors) > 0 and min(factors) > 0 and list(factors) == sorted(set(factors)),
            "serving.beam_factors", factors, "needs ascending positive factors")
    require(1.0 in factors, "serving.beam_factors", factors, "needs 1.0, the widths at peak")
    require(self.calls_at_once >= 1, "serving.calls_at_once", self.calls_at_once,
            "must be at least 1")
    for name in ("max_wait_ms", "cache_ttl_s", "spare"):
      require(getattr(self, name) >= 0, f"serving.{name}", getattr(self, name), "must be >= 0")
    for name in ("target_ms", "deadline_ms", "max_queue", "cache_size", "max_k", "max_history",
                 "max_body_bytes", "body_timeout_s", "segment_s", "keep_days"):
      require(getattr(self, name) > 0, f"serving.{name}", getattr(self, name), "must be positive")

  def call_size(self, requests: int) -> int:
    """The batch size that so many requests are filled up to; at most the largest one."""
    return next(size for size in self.batch_sizes if size >= requests)
