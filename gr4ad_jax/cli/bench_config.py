"""Settings of `gr4ad bench`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gr4ad_jax.config import require


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
  """A grid of searches on random input."""

  decoders: tuple[Literal["lazy", "autoregressive", "multi_token"], ...] = (
    "lazy", "autoregressive", "multi_token"
  )
  """Decoders of the same width and depth; the first is what the others are compared with."""
  batch_sizes: tuple[int, ...] = (1, 8)
  """Requests decoded per call."""
  widths: tuple[str, ...] = ("128-256-512",)
  """Beams after each SID level, as 128-256-512."""
  codebook_sizes: tuple[int, ...] = (4096, 1024, 256)
  """Codes of each level."""
  num_sids: int = 200_000
  """SIDs that exist."""
  context_tokens: int = 256
  """Tokens of the context of a request."""
  with_value: bool = True
  """Also decode the value bucket of every found SID."""
  compute_dtype: Literal["float32", "bfloat16"] | None = None
  """Type of activations; default that of the preset."""
  repeats: int = 20
  """Timed calls of each program."""

  def __post_init__(self):
    for name in ("decoders", "batch_sizes", "widths", "codebook_sizes"):
      if not getattr(self, name):
        raise ValueError(f"{name}: empty, needs at least one")
    for name in ("batch_sizes", "codebook_sizes"):
      require(min(getattr(self, name)) >= 1, name, getattr(self, name), "each must be at least 1")
    require(self.repeats >= 1, "repeats", self.repeats, "must be at least 1")
    levels = len(self.codebook_sizes)
    for schedule in self.schedules:
      require(len(schedule) == levels and min(schedule) >= 1, "widths", schedule,
              f"needs one positive width for each of the {levels} levels")

  @property
  def schedules(self) -> tuple[tuple[int, ...], ...]:
    """`widths` as numbers."""
    try:
      return tuple(tuple(int(width) for width in text.split("-")) for text in self.widths)
    except ValueError:
      raise ValueError(f"widths={self.widths}: write them as 128-256-512") from None


@dataclasses.dataclass(frozen=True)
class LoadConfig:
  """A day of traffic, squeezed into minutes: open-loop arrivals at a rate that rises and falls."""

  peak_qps: float = 20.0
  """Requests a second at peak."""
  day_s: float = 120.0
  """Seconds that the day takes: off-peak, rise, peak, burst, peak, fall, off-peak."""
  off_peak_share: float = 0.1
  """Share of the peak's rate at night; a third of Complete Journey's hours lies below a tenth."""
  burst_share: float = 1.0
  """Share of the peak's rate for a twentieth of the day; 1 = no burst."""
  users: int = 2_000
  """Distinct users, who ask again in proportion to 1 / rank ** skew."""
  skew: float = 0.6
  """0 = all users alike."""
  k: int = 10
  """Ads asked for."""
  event_share: float = 0.1
  """Share of the answers that are followed by a click on one of the ads."""
  timeout_s: float = 5.0
  """A request without an answer by then is an error."""
  seed: int = 0
  """Seed of arrivals and users."""

  def __post_init__(self):
    for name in ("peak_qps", "day_s", "off_peak_share", "burst_share", "users", "k", "timeout_s"):
      require(getattr(self, name) > 0, f"load.{name}", getattr(self, name), "must be positive")
    require(self.skew >= 0, "load.skew", self.skew, "must be >= 0")
    require(0 <= self.event_share <= 1, "load.event_share", self.event_share, "needs [0, 1]")
