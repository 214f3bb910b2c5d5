"""Settings of `gr4ad bench`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gr4ad_jax.config import Bounded, Count, NotNegative, Positive, Share, require


@dataclasses.dataclass(frozen=True)
class DecodeConfig(Bounded):
  """A grid of searches on random input."""

  decoders: tuple[Literal["lazy", "autoregressive", "multi_token"], ...] = (
    "lazy", "autoregressive", "multi_token"
  )
  """Decoders of the same width and depth; the first is what the others are compared with."""
  batch_sizes: tuple[Count, ...] = (1, 8)
  """Requests decoded per call."""
  widths: tuple[str, ...] = ("128-256-512",)
  """Beams after each SID level, as 128-256-512."""
  codebook_sizes: tuple[Count, ...] = (4096, 1024, 256)
  """Codes of each level."""
  num_sids: Count = 200_000
  """SIDs that exist."""
  context_tokens: int = 256
  """Tokens of the context of a request."""
  with_value: bool = True
  """Also decode the value bucket of every found SID."""
  compute_dtype: Literal["float32", "bfloat16"] | None = None
  """Type of activations; default that of the preset."""
  repeats: Count = 20
  """Timed calls of each program."""

  def _check(self):
    for name in ("decoders", "batch_sizes", "widths", "codebook_sizes"):
      require(len(getattr(self, name)) > 0, name, getattr(self, name), "needs at least one")
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
class LoadConfig(Bounded, section="load"):
  """A day of traffic, squeezed into minutes: open-loop arrivals at a rate that rises and falls."""

  peak_qps: Positive = 20.0
  """Requests a second at peak."""
  day_s: Positive = 120.0
  """Seconds that the day takes: off-peak, rise, peak, burst, peak, fall, off-peak."""
  off_peak_share: Positive = 0.1
  """Share of the peak's rate at night; a third of Complete Journey's hours lies below a tenth."""
  burst_share: Positive = 1.0
  """Share of the peak's rate for a twentieth of the day; 1 = no burst."""
  users: Count = 2_000
  """Distinct users, who ask again in proportion to 1 / rank ** skew."""
  skew: NotNegative = 0.6
  """0 = all users alike."""
  k: Count = 10
  """Ads asked for."""
  event_share: Share = 0.1
  """Share of the answers that are followed by a click on one of the ads."""
  timeout_s: Positive = 5.0
  """A request without an answer by then is an error."""
  seed: int = 0
  """Seed of arrivals and users."""
