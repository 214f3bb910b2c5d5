"""How good predicted probabilities are: AUC, log loss, calibration; and Platt scaling."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats


class Platt(NamedTuple):
  """p = sigmoid(slope * logit + offset)."""

  slope: float = 1.0
  offset: float = 0.0

  def __call__(self, logit: np.ndarray) -> np.ndarray:
    """float64 probabilities."""
    return scipy.special.expit(self.slope * np.asarray(logit, np.float64) + self.offset)


def fit_platt(logit_N: np.ndarray, label_N: np.ndarray) -> Platt:
  """The scaling of least log loss on held-out rows; identity where one label is missing."""
  logit_N, label_N = np.asarray(logit_N, np.float64), np.asarray(label_N, np.float64)
  if label_N.min(initial=1) == label_N.max(initial=0):
    return Platt()

  def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
    z_N = x[0] * logit_N + x[1]
    residual_N = scipy.special.expit(z_N) - label_N
    value = np.mean(np.logaddexp(0, z_N) - label_N * z_N)
    return value, np.array([np.mean(residual_N * logit_N), np.mean(residual_N)])

  found = scipy.optimize.minimize(loss, np.array([1.0, 0.0]), jac=True, method="BFGS")
  return Platt(float(found.x[0]), float(found.x[1]))


def probability_metrics(
  p_N: np.ndarray, label_N: np.ndarray, *, bins: int = 20
) -> dict[str, float]:
  """auc, log_loss, calibration_error and mean_ratio of predictions.

  Args:
    p_N: probabilities.
    label_N: bool or 0/1.
    bins: equally filled bins of the calibration error, which is the mean |p - share| over rows.

  Returns:
    `auc` is NaN where one label is missing; `mean_ratio` is mean p / mean label, 1 = calibrated
    overall.
  """
  p_N, label_N = np.asarray(p_N, np.float64), np.asarray(label_N, np.float64)
  inside_N = np.clip(p_N, 1e-12, 1 - 1e-12)
  entropy_N = -label_N * np.log(inside_N) - (1 - label_N) * np.log1p(-inside_N)
  positives, rows = label_N.sum(), len(label_N)
  auc = np.nan
  if 0 < positives < rows:
    rank_N = scipy.stats.rankdata(p_N)
    auc = (rank_N[label_N > 0].sum() - positives * (positives + 1) / 2) / (
      positives * (rows - positives)
    )
  order_N = np.argsort(p_N, kind="stable")
  gaps = [
    abs(p_N[part].sum() - label_N[part].sum())
    for part in np.array_split(order_N, min(bins, max(rows, 1)))
  ]
  return {
    "auc": float(auc),
    "log_loss": float(entropy_N.mean()),
    "calibration_error": float(sum(gaps) / max(rows, 1)),
    "mean_ratio": float(p_N.mean() / label_N.mean()) if positives else float("nan"),
  }
