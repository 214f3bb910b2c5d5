"""How good predicted probabilities are: AUC, log loss, calibration; and Platt scaling."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.special


class Platt(NamedTuple):
  """p = sigmoid(slope * logit + offset)."""

  slope: float = 1.0
  offset: float = 0.0

  def __call__(self, logit: np.ndarray) -> np.ndarray:
    """float64 probabilities."""
    return scipy.special.expit(self.slope * np.asarray(logit, np.float64) + self.offset)


def fit_platt(logit_N: np.ndarray, label_N: np.ndarray) -> Platt:
  """The scaling of least log loss on N held-out predictions.

  Where one label is missing it is the identity; where all logits are the same, its slope is 0.
  """
  from sklearn.linear_model import LogisticRegression  # slow to import

  label_N = np.asarray(label_N, bool)
  if label_N.all() or not label_N.any():
    return Platt()
  # Predictions are many and parameters two, so there is no penalty.
  regression = LogisticRegression(C=np.inf, tol=1e-8)
  regression.fit(np.asarray(logit_N, np.float64)[:, None], label_N)
  return Platt(float(regression.coef_[0, 0]), float(regression.intercept_[0]))


def probability_metrics(
  p_N: np.ndarray, label_N: np.ndarray, *, bins: int = 20
) -> dict[str, float]:
  """auc, log_loss, calibration_error and mean_ratio of predictions.

  Args:
    p_N: probabilities of N predictions.
    label_N: bool or 0/1.
    bins: equally filled bins of the calibration error, which is the mean |p - share| over rows.

  Returns:
    `auc` is NaN where one label is missing, and all but the calibration error where there are no
    rows; `mean_ratio` is mean p / mean label, 1 = calibrated overall.
  """
  from sklearn.metrics import log_loss, roc_auc_score  # slow to import

  p_N, label_N = np.asarray(p_N, np.float64), np.asarray(label_N, np.float64)
  rows, positives = len(label_N), label_N.sum()
  order_N = np.argsort(p_N, kind="stable")
  gaps = [
    abs(p_N[part].sum() - label_N[part].sum())
    for part in np.array_split(order_N, min(bins, max(rows, 1)))
  ]
  inside_N = np.clip(p_N, 1e-12, 1 - 1e-12)  # one sure miss must not be all of the loss
  nan = float("nan")
  return {
    "auc": float(roc_auc_score(label_N, p_N)) if 0 < positives < rows else nan,
    "log_loss": float(log_loss(label_N, inside_N, labels=[0, 1])) if rows else nan,
    "calibration_error": float(sum(gaps) / max(rows, 1)),
    "mean_ratio": float(p_N.mean() / label_N.mean()) if positives else nan,
  }
