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
  count_BT: np.ndarray  # int32 buckets: how often it was met
  age_BT: np.ndarray  # int32 buckets: how long ago
  organic_BT: np.ndarray  # int32, 1 = met as an organic content, 0 = promoted
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
    columns = zip(*map(self._history, examples), strict=True)
    history = [
      np.ascontiguousarray(pad(list(column), self.max_history)[:, ::-1]) for column in columns
    ]
    return HistoryBatch(*history, pad([e.target_C for e in examples], self.max_targets))

  def _history(self, example: Example) -> list[np.ndarray]:
    """Ads, counts, ages and kinds, the newest first."""
    product_O = look_up(self.content_ad_O, example.organic_O)
    known_O = product_O >= 0
    columns = (
      np.append(example.ad_T, product_O[known_O]),
      np.append(example.ad_count_T, example.organic_count_O[known_O]),
      np.append(example.ad_age_T, example.organic_age_O[known_O]),
      np.repeat([0, 1], [len(example.ad_T), known_O.sum()]),
    )
    # Each kind is in order; between the two, ages are known by bucket.
    newest_N = np.argsort(columns[2], kind="stable")[: self.max_history]
    return [column[newest_N] for column in columns]
