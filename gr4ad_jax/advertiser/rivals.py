"""Rivals without a language model: popularity, history, company, two towers, a linear logit.

Each gives a score of every advertiser; equal scores rank by the advertiser's number, so that no
rival gains by chance from what it cannot tell apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize

from gr4ad_jax.advertiser.histories import Rows, drawn
from gr4ad_jax.advertiser.prepared import Prepared
from gr4ad_jax.advertiser.rival_features import (
  FEATURES,
  count,
  cross_fitted,
  embed_titles,
  features,
)
from gr4ad_jax.advertiser.two_tower import fit_towers

MOST_FITTED = 5_000  # training rows of the linear logit; each costs A numbers a feature
RIDGE = 1e-4


@dataclasses.dataclass(frozen=True)
class Logit:
  """A softmax over advertisers of a weighted sum of features.

  Attributes:
    weight_F: float64, of standardised features.
    mean_F, scale_F: float64, what standardises them.
  """

  weight_F: np.ndarray
  mean_F: np.ndarray
  scale_F: np.ndarray

  def __call__(self, x_RAF: np.ndarray) -> np.ndarray:
    """float64 [R, A], log-probabilities."""
    weight_F = self.weight_F / self.scale_F
    score_RA = np.einsum("RAF,F->RA", x_RAF, weight_F) - self.mean_F @ weight_F
    return score_RA - _log_sum(score_RA)[:, None]


def _log_sum(score_RA: np.ndarray) -> np.ndarray:
  most_R = score_RA.max(axis=1)
  return most_R + np.log(np.exp(score_RA - most_R[:, None]).sum(axis=1))


def fit_logit(x_RAF: np.ndarray, target_R: np.ndarray) -> Logit:
  """Minimises the mean of -log p(target) + RIDGE |weights|^2.

  Args:
    x_RAF: float32 features.
    target_R: int32 advertisers.
  """
  mean_F = x_RAF.mean(axis=(0, 1), dtype=np.float64)
  scale_F = np.maximum(x_RAF.std(axis=(0, 1), dtype=np.float64), 1e-6)
  z_RAF = ((x_RAF - mean_F.astype(np.float32)) / scale_F.astype(np.float32))
  picked_RF = z_RAF[np.arange(len(z_RAF)), target_R].astype(np.float64)

  def cost(weight_F: np.ndarray) -> tuple[float, np.ndarray]:
    score_RA = z_RAF @ weight_F.astype(np.float32)
    log_sum_R = _log_sum(score_RA)
    p_RA = np.exp(score_RA - log_sum_R[:, None])
    value = (log_sum_R - picked_RF @ weight_F).mean() + RIDGE * weight_F @ weight_F
    mean_RF = np.matmul(p_RA[:, None], z_RAF)[:, 0]
    return float(value), (mean_RF - picked_RF).mean(axis=0) + 2 * RIDGE * weight_F

  found = minimize(cost, np.zeros(x_RAF.shape[-1]), jac=True, method="L-BFGS-B",
                   options={"maxiter": 200})
  return Logit(found.x, mean_F, scale_F)


class Rivals(NamedTuple):
  """Scores of one split.

  Attributes:
    score_RA: name -> [R, A], the larger the better.
    x_RAF: the features they are made of.
    features_of: the same of other rows.
  """

  score_RA: dict[str, np.ndarray]
  x_RAF: np.ndarray
  features_of: Callable[[Rows], np.ndarray]


def rivals(data: Prepared, rows: Rows) -> Rivals:
  """All rivals on some rows of a split; the linear logit learns from training rows alone."""
  vectors, train = embed_titles(data), data.splits["train"]
  if len(train) > MOST_FITTED:
    train = train.take(drawn(np.arange(len(train)), MOST_FITTED))
  logit = fit_logit(cross_fitted(data, train, vectors), train.target_R)
  counts = count(data)

  def features_of(rows: Rows) -> np.ndarray:
    return features(data, rows, counts, vectors)

  x_RAF = features_of(rows)
  of = {name: x_RAF[..., f].astype(np.float64) for f, name in enumerate(FEATURES)}
  # Popularity fills up behind each: below the smallest step of what stands before it.
  rest = of["popularity"] / (1 + of["popularity"].max())
  # Times are log (1 + n) and n <= max_history; recency is 1 / m, both with steps above 1e-3.
  score_RA = {
    "popularity": of["popularity"],
    "frequency": np.expm1(of["times"]) + 0.9 * of["recency"] + 1e-3 * rest,
    "recency": of["recency"] + 1e-4 * rest,
    # An own advertiser's cosine with itself is 1.
    "cooccurrence": of["cooccurrence"] + of["bought"] + 1e-6 * rest,
    "two_tower": fit_towers(data, vectors)(rows),
    "linear": logit(x_RAF),
  }
  return Rivals(score_RA, x_RAF, features_of)


def ranked(score_RA: np.ndarray, k: int) -> np.ndarray:
  """int32 [R, k], best first; equal scores by number; -1 behind the last advertiser."""
  best_RA = np.argsort(-score_RA, axis=1, kind="stable")[:, :k].astype(np.int32)
  return np.pad(best_RA, ((0, 0), (0, k - best_RA.shape[1])), constant_values=-1)
