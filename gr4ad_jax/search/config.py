"""Settings of the beam search."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from gr4ad_jax.config import ConfigError, require


def check_widths(widths: Sequence[int], num_levels: int) -> None:
  """Raises ConfigError unless there is one beam width per SID level."""
  if len(widths) != num_levels:
    raise ConfigError(
      f"search.widths={tuple(widths)}: the SIDs have {num_levels} levels; one width for each"
    )


@dataclasses.dataclass(frozen=True)
class SearchConfig:
  """Beam search over SID levels. Source: paper 4.2 (progressive widths)."""

  widths: tuple[int, ...] = (64, 96, 128)
  """Beams kept after each SID level."""
  batch_size: int = 64
  """Requests decoded per call."""
  value_exponent: float = 0.0
  """gamma: rank by log p(SID) + gamma * log(expected value); 0 = by probability alone."""
  exclude_seen: bool = False
  """Prospecting: no ad whose product the user has engaged with before, promoted or not; a request
  may say otherwise. `gr4ad evaluate` measures both, whatever stands here."""
  precision: Literal["trained", "bfloat16", "int8", "fp8"] = "trained"
  """Number type of the decoder in search: as it was trained, bfloat16, int8 weights, or fp8 weights
  and activations (int8 and fp8 need qwix)."""

  def __post_init__(self):
    require(
      len(self.widths) > 0 and min(self.widths) >= 1, "search.widths", self.widths,
      "needs one positive width per SID level",
    )
    require(self.batch_size >= 1, "search.batch_size", self.batch_size, "must be at least 1")
