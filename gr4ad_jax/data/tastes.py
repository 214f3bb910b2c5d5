"""What a user's past tells of ads that the user never met, by what others took together.

Each ad has a vector, and ads that the same users engage with have alike ones. A table of vectors is
counted several times in the course of a log, each time from what lies before: a request reads the
newest that was there. `taste_tables.py` makes them.

Exported artifacts take this file along: it imports NumPy alone.

Letters: D tables, A ads, E numbers of a vector, P ads met, N ads asked for.
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
  tastes: Tastes, now_s: int, met_P: np.ndarray, count_P: np.ndarray, ad_N: np.ndarray
) -> np.ndarray:
  """float64 [N] in [0, 1], the cosine between a user's past and each ad, 0 where it is less.

  The past is the sum of log (1 + count) weight vector over the ads met.

  Args:
    tastes: all tables; ads beyond them are not known.
    now_s: unix seconds of the request.
    met_P, count_P: distinct ads that the user met, and how often.
    ad_N: ads.
  """
  table = int(np.searchsorted(tastes.made_s_D, now_s, side="right")) - 1
  if table < 0:
    return np.zeros(len(ad_N))
  vector_AE, weight_A = tastes.vector_DAE[table], tastes.weight_DA[table]
  count_P, met_P = (x[met_P < len(weight_A)] for x in (count_P, met_P))
  weight_P = np.log1p(count_P.astype(np.float64)) * weight_A[met_P]
  user_E = weight_P @ vector_AE[met_P].astype(np.float64)
  known_N = ad_N < len(weight_A)
  vector_NE = vector_AE[np.where(known_N, ad_N, 0)].astype(np.float64)
  cosine_N = vector_NE @ user_E / max(float(np.linalg.norm(user_E)), 1e-9)
  return np.where(known_N, np.clip(cosine_N, 0, 1), 0.0)
