"""A trained run as a row beside another one, whatever system trained it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from gr4ad_jax.data.engagements import SeenAds
from gr4ad_jax.data.sequences import Example


@dataclasses.dataclass(frozen=True)
class Baseline:
  """What evaluation asks of it.

  Attributes:
    name: of its row.
    rank: (examples of R requests, k, seen) -> ranked_RK, int32 ads, best first, -1 = nothing; with
      `seen`, without what each user had seen before.
    held_out: splits of the data that it has not learned from.
  """

  name: str
  rank: Callable[[Sequence[Example], int, SeenAds | None], np.ndarray]
  held_out: tuple[str, ...] = ("validation", "test")
