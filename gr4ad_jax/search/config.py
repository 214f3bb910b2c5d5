"""Settings of the beam search."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from gr4ad_jax.config import Bounded, ConfigError, Count, require


def check_widths(widths: Sequence[int], num_levels: int) -> None:
  """Raises ConfigError unless there is one beam width per SID level."""
  if len(widths) != num_levels:
    raise ConfigError(
      f"search.widths={tuple(widths)}: the SIDs have {num_levels} levels; one width for each"
    )


@dataclasses.dataclass(frozen=True)
class SearchConfig(Bounded, section="search"):
  """Beam search over SID levels. Source: paper 4.2 (progressive widths)."""

  widths: tuple[Count, ...] = (64, 96, 128)
  """Beams kept after each SID level."""
  batch_size: Count = 64
  """Requests decoded per call."""
  value_exponent: float = 0.0
  """gamma: rank by log p(SID) + gamma * log(expected value); 0 = by probability alone."""
  exclude_seen: bool = False
  """Prospecting: no ad whose product the user has engaged with before, promoted or not; a request
  may say otherwise. `gr4ad evaluate` measures both, whatever stands here."""
  precision: Literal["trained", "bfloat16", "int8", "fp8"] = "trained"
  """Number type of the decoder in search: as it was trained, bfloat16, int8 weights, or fp8 weights
  and activations (int8 and fp8 need qwix)."""

  def _check(self):
    require(len(self.widths) > 0, "search.widths", self.widths, "needs one width per SID level")
