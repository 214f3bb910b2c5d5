"""Stage 2: what a label weighs by what it is worth (VAFT). Source: GPR 3.2, eq. 4.

The paper's value of an action is eCPM / pCTR of a click and eCPM / (pCTR pCVR) of a conversion. A
conversion's is what the log says it paid, a click's is taken from its logged eCPM: rates are not in
a log, and one rate for all clicks cancels, as values count against the mean of their action.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gr4ad_jax.data.records import Action
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.data.splits import SPLITS

ACTION_WEIGHTS = np.array([1.0, 2.0, 4.0])  # c: shown, clicked, converted
_LEAST, _MOST = 0.25, 4.0  # of what value may do within an action


def value_weights(value_N: np.ndarray, action_N: np.ndarray, mean_A: np.ndarray) -> np.ndarray:
  """w^V = c_a clip(log1p(v / m_a) / log 2, 1/4, 4), float32: c_a where v is the mean.

  Args:
    value_N: of the actions, any unit, NaN = not known, which counts as the mean.
    action_N: int, an Action.
    mean_A: m, of each Action in training; where it is not above 0 all count as the mean.
  """
  mean_N = mean_A[action_N]
  known_N = np.isfinite(value_N) & (mean_N > 0)
  share_N = np.where(known_N, value_N, 1.0) / np.where(known_N, mean_N, 1.0)
  scaled_N = np.clip(np.log1p(np.maximum(share_N, 0)) / np.log(2), _LEAST, _MOST)
  return (ACTION_WEIGHTS[action_N] * scaled_N).astype(np.float32)


class LabelWeights(NamedTuple):
  """w^V of every ad that was engaged with in a request."""

  key_N: np.ndarray  # int64, ascending: request x num_ads + ad
  weight_N: np.ndarray  # float32
  num_ads: int

  def of(self, request: int, ad: int) -> float:
    """Of an ad that was engaged with in a request of the logs."""
    key = request * self.num_ads + int(ad)
    return float(self.weight_N[np.searchsorted(self.key_N, key)])


def label_weights(users: ExampleMaker) -> LabelWeights:
  """Of all labels of all splits; means are those of training, the same at every opening."""
  events, num_ads = users.logs.events, len(users.logs.ads.ad_id)
  rows = np.flatnonzero(users.engaged_E)
  key_N, inverse = np.unique(
    events.request[rows].astype(np.int64) * num_ads + events.ad[rows], return_inverse=True
  )
  action_N = np.zeros(len(key_N), np.int64)
  np.maximum.at(action_N, inverse, events.action[rows])
  paid_N = np.bincount(inverse, events.value[rows].astype(np.float64), len(key_N))
  ecpm_N = np.full(len(key_N), np.nan)
  np.fmax.at(ecpm_N, inverse, events.ecpm[rows])
  value_N = np.where(action_N == Action.CONVERSION, paid_N, ecpm_N)
  learned_N = users.split_R[key_N // num_ads] == SPLITS.index("train")
  mean_A = np.zeros(len(Action))
  for action in Action:
    known_N = value_N[learned_N & (action_N == action) & np.isfinite(value_N)]
    mean_A[action] = known_N.mean() if len(known_N) else 0.0
  return LabelWeights(key_N, value_weights(value_N, action_N, mean_A), num_ads)
