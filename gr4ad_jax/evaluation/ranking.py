"""Metrics of ranked lists of ads: recall, NDCG, value captured, coverage; intervals over users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MAX_CELLS = 1 << 22  # cells of one block of targets x ranks, or resamples x users


@dataclass(frozen=True)
class EvalRequests:
  """Held-out requests: what each user engaged with, to be found in a ranked list.

  Raises:
    ValueError: shapes that differ, a request without a target or with the same target twice, a
      value that is negative or not finite.
  """

  user_R: np.ndarray  # int32, user index
  time_s_R: np.ndarray  # int64, unix s
  target_RC: np.ndarray  # int32, distinct ads; -1 = padding
  value_RC: np.ndarray  # float32, currency; padding is ignored
  new_RC: np.ndarray  # bool, the user had no event with this ad or its product before

  def __post_init__(self):
    num = len(self.user_R)
    if num == 0:
      raise ValueError("EvalRequests holds no request; it needs at least one")
    if self.time_s_R.shape != (num,):
      raise ValueError(f"time_s_R has shape {self.time_s_R.shape}, not ({num},) like user_R")
    for name in ("target_RC", "value_RC", "new_RC"):
      shape = getattr(self, name).shape
      if len(shape) != 2 or shape[0] != num or shape != self.target_RC.shape:
        raise ValueError(f"{name} has shape {shape}; target_RC, value_RC, new_RC are all [{num}, C]")
    real_RC = self.target_RC >= 0
    if not real_RC.any(axis=1).all():
      raise ValueError(f"request {np.argmin(real_RC.any(axis=1))} has no target")
    sorted_RC = np.sort(self.target_RC, axis=1)
    twice_R = ((sorted_RC[:, 1:] == sorted_RC[:, :-1]) & (sorted_RC[:, 1:] >= 0)).any(axis=1)
    if twice_R.any():
      raise ValueError(f"request {np.argmax(twice_R)} has the same target twice")
    value = self.value_RC[real_RC]
    if not (np.isfinite(value) & (value >= 0)).all():
      raise ValueError(f"value_RC holds {value[~(value >= 0)][:1]}; values are finite and >= 0")


def recall_per_request(ranked_RK: np.ndarray, requests: EvalRequests, *, k: int) -> np.ndarray:
  """Share of each request's targets among the first k of its list.

  Args:
    ranked_RK: int32 ad indices, best first; -1 = nothing.
    requests: R requests with their targets.
    k: how many of the list count.

  Returns:
    recall_R: float64 in [0, 1].
  """
  real_RC = requests.target_RC >= 0
  hit_RC = _rank_of_targets(ranked_RK, requests) < k
  return hit_RC.sum(axis=1) / real_RC.sum(axis=1)


def ranking_metrics(
  ranked_RK: np.ndarray,
  requests: EvalRequests,
  *,
  advertiser_A: np.ndarray,
  ks: Sequence[int] = (10, 50),
  bootstrap: int = 1000,
  seed: int = 0,
) -> dict[str, float]:
  """Quality of ranked lists over all targets and, as `new/...`, over targets new to the user.

  With targets T of a request, list y and K = max(ks):

      recall@k               mean over requests of |T & y_:k| / |T|
      ndcg@k                 mean of sum_{r <= k, y_r in T} 1 / log2(r + 1), divided by its value
                             for a list that starts with min(k, |T|) targets
      value_recall@K         held-out value of targets in y_:K / held-out value, over all requests
      advertiser_coverage@K  advertisers with an ad in any y_:K / advertisers of the catalogue

  `new/...` keeps the lists, leaves out the targets that are not new, and then the requests without
  a target. recall@K and value_recall@K come with 95 % percentile intervals, `.../ci_low` and
  `.../ci_high`, from a bootstrap over users: a drawn user brings all of their requests.

  Args:
    ranked_RK: int32 ad indices, best first; -1 = nothing.
    requests: R requests with their targets.
    advertiser_A: int32, advertiser of every ad of the catalogue.
    ks: depths of the lists.
    bootstrap: resamples.
    seed: of the resampling.

  Returns:
    Metric name -> value; NaN where nothing is held out (no new target, no value).

  Raises:
    ValueError: shapes that differ, an ad outside the catalogue, ks or bootstrap below 1.
  """
  if not ks or min(ks) < 1 or bootstrap < 1:
    raise ValueError(f"ks = {tuple(ks)} and bootstrap = {bootstrap} must be at least 1")
  if max(ranked_RK.max(initial=-1), requests.target_RC.max()) >= len(advertiser_A):
    raise ValueError(f"an ad index is outside the catalogue of {len(advertiser_A)} ads")
  rank_RC = _rank_of_targets(ranked_RK, requests)
  real_RC = requests.target_RC >= 0
  depth = max(ks)
  metrics = {}
  for prefix, target_RC in (("", real_RC), ("new/", real_RC & requests.new_RC)):
    keep_R = target_RC.any(axis=1)
    num_R = target_RC.sum(axis=1)
    for k in ks:
      hit_RC = target_RC & (rank_RC < k)
      gain_RC = np.where(hit_RC, 1 / np.log2(rank_RC + 2.0), 0)
      ideal_R = np.cumsum(1 / np.log2(np.arange(k) + 2.0))[np.minimum(k, np.maximum(num_R, 1)) - 1]
      metrics[f"{prefix}recall@{k}"] = _mean(hit_RC.sum(axis=1)[keep_R] / num_R[keep_R])
      metrics[f"{prefix}ndcg@{k}"] = _mean((gain_RC.sum(axis=1) / ideal_R)[keep_R])
    found_R, captured_R, held_out_R = _request_sums(rank_RC, requests, target_RC, depth)
    metrics[f"{prefix}value_recall@{depth}"] = _ratio(captured_R.sum(), held_out_R.sum())
    shown = ranked_RK[keep_R, :depth]
    shown = np.unique(advertiser_A[shown[shown >= 0]])
    metrics[f"{prefix}advertiser_coverage@{depth}"] = len(shown) / len(np.unique(advertiser_A))
    user_sums = _sum_by_user(
      requests.user_R[keep_R], found_R[keep_R], keep_R[keep_R], captured_R[keep_R],
      held_out_R[keep_R],
    )  # fmt: skip
    found_X, requests_X, captured_X, held_out_X = _resample(user_sums, bootstrap, seed)
    metrics |= _interval(f"{prefix}recall@{depth}", _ratio(found_X, requests_X))
    metrics |= _interval(f"{prefix}value_recall@{depth}", _ratio(captured_X, held_out_X))
  return metrics


def paired_difference(
  ranked_a_RK: np.ndarray,
  ranked_b_RK: np.ndarray,
  *,
  requests: EvalRequests,
  k: int = 50,
  bootstrap: int = 1000,
  seed: int = 0,
) -> dict[str, float]:
  """How much more a finds than b, with 95 % intervals from the same resampled users for both.

  Differences between users, large beside those between methods, cancel: an interval without 0 is a
  finer test than two intervals that do not overlap.

  Args:
    ranked_a_RK: int32 ad indices, best first; -1 = nothing.
    ranked_b_RK: the same of the other method.
    requests: R requests with their targets.
    k: how many of each list count.
    bootstrap: resamples.
    seed: of the resampling.

  Returns:
    a - b of recall@k and value_recall@k, of all and of `new/...` targets, each with `.../ci_low`
    and `.../ci_high`; NaN where nothing is held out.
  """
  if k < 1 or bootstrap < 1:
    raise ValueError(f"k = {k} and bootstrap = {bootstrap} must be at least 1")
  rank_a_RC = _rank_of_targets(ranked_a_RK, requests)
  rank_b_RC = _rank_of_targets(ranked_b_RK, requests)
  real_RC = requests.target_RC >= 0
  differences = {}
  for prefix, target_RC in (("", real_RC), ("new/", real_RC & requests.new_RC)):
    keep_R = target_RC.any(axis=1)
    found_a_R, captured_a_R, held_out_R = _request_sums(rank_a_RC, requests, target_RC, k)
    found_b_R, captured_b_R, _ = _request_sums(rank_b_RC, requests, target_RC, k)
    user_sums = _sum_by_user(
      requests.user_R[keep_R], (found_a_R - found_b_R)[keep_R], keep_R[keep_R],
      (captured_a_R - captured_b_R)[keep_R], held_out_R[keep_R],
    )  # fmt: skip
    found, num, captured, held_out = user_sums.sum(axis=1)
    found_X, num_X, captured_X, held_out_X = _resample(user_sums, bootstrap, seed)
    differences[f"{prefix}recall@{k}"] = _ratio(found, num)
    differences |= _interval(f"{prefix}recall@{k}", _ratio(found_X, num_X))
    differences[f"{prefix}value_recall@{k}"] = _ratio(captured, held_out)
    differences |= _interval(f"{prefix}value_recall@{k}", _ratio(captured_X, held_out_X))
  return differences


def _rank_of_targets(ranked_RK: np.ndarray, requests: EvalRequests) -> np.ndarray:
  """int64 [R, C]: place of each target's first occurrence in its list, 0 = top; K = not in it."""
  target_RC = requests.target_RC
  if ranked_RK.ndim != 2 or len(ranked_RK) != len(target_RC):
    raise ValueError(f"ranked lists of shape {ranked_RK.shape} for {len(target_RC)} requests")
  far = np.iinfo(np.int32).max
  rank_RC = np.full(target_RC.shape, far, np.int64)
  if ranked_RK.shape[1] == 0:
    return rank_RC
  step = max(1, _MAX_CELLS // (target_RC.shape[1] * ranked_RK.shape[1]))
  for at in range(0, len(target_RC), step):
    rows = slice(at, at + step)
    match_RCK = target_RC[rows, :, None] == ranked_RK[rows, None, :]
    found_RC = match_RCK.any(axis=2) & (target_RC[rows] >= 0)
    rank_RC[rows] = np.where(found_RC, match_RCK.argmax(axis=2), far)
  return rank_RC


def _request_sums(rank_RC, requests, target_RC, k):
  """Recall, captured value and held-out value of every request (0 where it has no target)."""
  hit_RC = target_RC & (rank_RC < k)
  value_RC = np.where(target_RC, requests.value_RC, 0).astype(np.float64)
  recall_R = hit_RC.sum(axis=1) / np.maximum(target_RC.sum(axis=1), 1)
  return recall_R, (value_RC * hit_RC).sum(axis=1), value_RC.sum(axis=1)


def _sum_by_user(user_R, *columns_R) -> np.ndarray:
  """float64 [columns, users with a request]."""
  users, user_R = np.unique(user_R, return_inverse=True)
  return np.stack([np.bincount(user_R, column_R, len(users)) for column_R in columns_R])


def _resample(sums_NU: np.ndarray, bootstrap: int, seed: int) -> np.ndarray:
  """float64 [columns, bootstrap]: the sums over users drawn with replacement."""
  num_users = sums_NU.shape[1]
  if num_users == 0:
    return np.zeros((len(sums_NU), bootstrap))
  rng = np.random.default_rng(seed)
  step = max(1, _MAX_CELLS // num_users)
  parts = []
  for at in range(0, bootstrap, step):
    rows = min(step, bootstrap - at)
    # Times each user is drawn: multinomial, and faster than rng.multinomial.
    drawn = rng.integers(num_users, size=(rows, num_users)) + num_users * np.arange(rows)[:, None]
    count_XU = np.bincount(drawn.ravel(), minlength=rows * num_users).reshape(rows, num_users)
    parts.append(sums_NU @ count_XU.T)
  return np.concatenate(parts, axis=1)


def _mean(values: np.ndarray) -> float:
  return float(values.mean()) if len(values) else float("nan")


def _ratio(numerator, denominator):
  """numerator / denominator, NaN where the denominator is 0."""
  denominator = np.asarray(denominator, np.float64)
  ratio = np.divide(
    numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator != 0
  )
  return ratio if ratio.ndim else float(ratio)


def _interval(name: str, values_X: np.ndarray) -> dict[str, float]:
  values_X = values_X[np.isfinite(values_X)]
  low, high = np.percentile(values_X, (2.5, 97.5)) if len(values_X) else (np.nan, np.nan)
  return {f"{name}/ci_low": float(low), f"{name}/ci_high": float(high)}
