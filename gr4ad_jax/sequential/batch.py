"""Examples -> ordered histories of ads, the newest in the last place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gr4ad_jax.data.pipeline import look_up, pad
from gr4ad_jax.data.sequences import Example


class HistoryBatch(NamedTuple):
  """B requests: T places of their histories, C targets each. Padding is -1, of a history first."""

  ad_BT: np.ndarray  # int32 ads, the newest in the last place
  target_BC: np.ndarray  # int32 ads engaged with


@dataclasses.dataclass(frozen=True)
class HistoryMaker:
  """Puts the ads that a user met, promoted or as an organic content, in one order.

  Attributes:
    max_history: T.
    max_targets: C.
    content_ad_O: int32, the ad of each content's product, -1 = none; those do not count.
  """

  max_history: int
  max_targets: int
  content_ad_O: np.ndarray

  def __call__(self, examples: Sequence[Example]) -> HistoryBatch:
    """A batch; examples without targets give padding."""
    newest_first_BT = pad(list(map(self._history, examples)), self.max_history)
    return HistoryBatch(
      np.ascontiguousarray(newest_first_BT[:, ::-1]),
      pad([e.target_C for e in examples], self.max_targets),
    )

  def _history(self, example: Example) -> np.ndarray:
    """Ads, the newest first."""
    product_O = look_up(self.content_ad_O, example.organic_O)
    known_O = product_O >= 0
    ad_N = np.append(example.ad_T, product_O[known_O])
    age_N = np.append(example.ad_age_T, example.organic_age_O[known_O])
    # Each kind is in order; between the two, ages are known by bucket.
    return ad_N[np.argsort(age_N, kind="stable")[: self.max_history]]
