"""What a user's past tells of ads that the user never met, by what others took together.

Each ad has a vector, and ads that the same users engage with have alike ones. A table of vectors is
counted several times in the course of a log, each time from what lies before: a request reads the
newest that was there. `taste_tables.py` makes them.

Exported artifacts take this file along: it imports NumPy alone.

Letters: B requests, D tables, A ads, E numbers of a vector, P ads met, N ads asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Tastes(NamedTuple):
  """Tables by the time they were made, earliest first."""

  made_s_D: np.ndarray  # int64, unix seconds; engagements strictly before it are counted
  vector_DAE: np.ndarray  # float16, of length 1, or 0 where too little is known of an ad
  weight_DA: np.ndarray  # float32, of an engagement with each ad: the rarer, the more it tells


def likeness(
  tastes: Tastes, now_s_B: np.ndarray, met_BP: np.ndarray, count_BP: np.ndarray, ad_BN: np.ndarray
) -> np.ndarray:
  """float32 [B, N] in [0, 1], the cosine between a user's past and each ad, 0 where it is less.

  The past is the sum of log (1 + count) weight vector over the ads met.

  Args:
    tastes: all tables; ads beyond them are not known.
    now_s_B: unix seconds of the requests.
    met_BP, count_BP: distinct ads that each user met, and how often; -1 = none.
    ad_BN: ads; -1 = none.
  """
  table_B1 = np.searchsorted(tastes.made_s_D, now_s_B, side="right")[:, None] - 1

  def known(ad_BX: np.ndarray) -> np.ndarray:
    return (table_B1 >= 0) & (ad_BX >= 0) & (ad_BX < tastes.weight_DA.shape[1])

  def of(table_DAX: np.ndarray, ad_BX: np.ndarray) -> np.ndarray:
    return table_DAX[np.maximum(table_B1, 0), np.where(known(ad_BX), ad_BX, 0)].astype(np.float32)

  weight_BP = np.log1p(count_BP) * of(tastes.weight_DA, met_BP) * known(met_BP)
  past_BE = np.einsum("BP,BPE->BE", weight_BP.astype(np.float32), of(tastes.vector_DAE, met_BP))
  past_BE /= np.maximum(np.linalg.norm(past_BE, axis=1, keepdims=True), 1e-9)
  cosine_BN = (of(tastes.vector_DAE, ad_BN) @ past_BE[..., None])[..., 0]
  return np.where(known(ad_BN), np.clip(cosine_BN, 0, 1), 0.0)
