"""Metrics of ranked lists of ads: recall, NDCG, value captured, coverage; intervals over users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

_MAX_CELLS = 1 << 22  # cells of one block of targets x ranks, or resamples x users
_NOT_FOUND = 1 << 31  # rank of a target that the list does not hold


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
        raise ValueError(f"{name} has shape {shape}; target, value and new are all [{num}, C]")
    real_RC = self.target_RC >= 0
    if not real_RC.any(axis=1).all():
      raise ValueError(f"request {np.argmin(real_RC.any(axis=1))} has no target")
    sorted_RC = np.sort(self.target_RC, axis=1)
    twice_R = ((sorted_RC[:, 1:] == sorted_RC[:, :-1]) & (sorted_RC[:, 1:] >= 0)).any(axis=1)
    if twice_R.any():
      raise ValueError(f"request {np.argmax(twice_R)} has the same target twice")
    value = self.value_RC[real_RC]
    wrong = ~(np.isfinite(value) & (value >= 0))
    if wrong.any():
      raise ValueError(f"value_RC holds {value[wrong][0]}; values are finite and >= 0")

  @property
  def has_new_R(self) -> np.ndarray:
    """bool, the requests with a target that is new to the user."""
    return (self.new_RC & (self.target_RC >= 0)).any(axis=1)

  def rows(self, index: np.ndarray) -> EvalRequests:
    """Some of the requests, by number or mask."""
    return EvalRequests(*(column[index] for column in vars(self).values()))


def recall_per_request(ranked_RK: np.ndarray, requests: EvalRequests, *, k: int) -> np.ndarray:
  """Share of each request's targets among the first k of its list.

  Args:
    ranked_RK: int32 ad indices, best first; -1 = nothing.
    requests: R requests with their targets.
    k: how many of the list count.

  Returns:
    recall_R: float64 in [0, 1].
  """
  hit_RC = _rank_of_targets(ranked_RK, requests) < k
  return hit_RC.sum(axis=1) / (requests.target_RC >= 0).sum(axis=1)


def only_new(requests: EvalRequests) -> EvalRequests:
  """The requests with a target that is new to the user, and these targets of theirs.

  Raises:
    ValueError: there is none.
  """
  kept = requests.rows(requests.has_new_R)
  return replace(kept, target_RC=np.where(kept.new_RC, kept.target_RC, -1))


def prospecting_metrics(
  ranked_RK: np.ndarray, requests: EvalRequests, **how: Any
) -> dict[str, float]:
  """The `new/...` metrics of `ranking_metrics` as `prospecting/...`.

  Prospecting is finding what a user does not know yet: the lists hold no product that the user has
  engaged with before the request, and only targets that are new to the user count. Arguments
  are those of `ranking_metrics`; {} where no target is new.
  """
  if not _target_sets(requests)[1][1].any():
    return {}
  metrics = ranking_metrics(ranked_RK, requests, **how)
  return {
    name.replace("new/", "prospecting/", 1): value
    for name, value in metrics.items() if name.startswith("new/")
  }


def mean_metrics(
  ranked_RK: np.ndarray, requests: EvalRequests, *, k: int
) -> dict[str, float]:
  """recall@k, ndcg@k and value_recall@k as `ranking_metrics` has them, without intervals.

  value_recall@k is NaN where the targets have no value.
  """
  rank_RC, real_RC = _rank_of_targets(ranked_RK, requests), requests.target_RC >= 0
  found = _found(rank_RC, requests, real_RC, k)
  held_out = np.where(real_RC, requests.value_RC, 0).sum(dtype=np.float64)
  return {
    f"recall@{k}": _mean(found.recall_R), f"ndcg@{k}": _mean(found.ndcg_R),
    f"value_recall@{k}": float(_ratio(found.value_R.sum(), held_out)),
  }


def ranking_metrics(
  ranked_RK: np.ndarray,
  requests: EvalRequests,
  *,
  advertiser_A: np.ndarray,
  ks: Sequence[int] = (10, 50),
  bootstrap: int = 1000,
) -> dict[str, float]:
  """Quality of ranked lists over all targets and, as `new/...`, over targets new to the user.

  With targets T of a request, list y and K = max(ks):

      recall@k               mean over requests of |T & y_:k| / |T|
      ndcg@k                 mean of sum_{r <= k, y_r in T} 1 / log2(r + 1), divided by its value
                             for a list that starts with min(k, |T|) targets
      value_recall@K         held-out value of targets in y_:K / held-out value, over all requests
      advertiser_coverage@K  advertisers with an ad in any y_:K / advertisers of the catalogue

  `new/...` keeps the lists, leaves out the targets that are not new, and then the requests without
  a target. recall@K, ndcg@K and value_recall@K come with 95 % percentile intervals, `.../ci_low`
  and `.../ci_high`, from a bootstrap over users: a drawn user brings all of their requests.

  Args:
    ranked_RK: int32 ad indices, best first; -1 = nothing.
    requests: R requests with their targets.
    advertiser_A: int32, advertiser of every ad of the catalogue.
    ks: depths of the lists.
    bootstrap: resamples.

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
  depth = max(ks)
  metrics = {}
  for prefix, target_RC in _target_sets(requests):
    keep_R = target_RC.any(axis=1)
    found = {k: _found(rank_RC, requests, target_RC, k) for k in ks}
    for k, of_k in found.items():
      metrics[f"{prefix}recall@{k}"] = _mean(of_k.recall_R[keep_R])
      metrics[f"{prefix}ndcg@{k}"] = _mean(of_k.ndcg_R[keep_R])
    shown = ranked_RK[keep_R, :depth]
    shown = np.unique(advertiser_A[shown[shown >= 0]])
    metrics[f"{prefix}advertiser_coverage@{depth}"] = len(shown) / len(np.unique(advertiser_A))
    metrics |= _with_intervals(prefix, requests, target_RC, found[depth], depth, bootstrap)
  return metrics


def paired_difference(
  ranked_a_RK: np.ndarray,
  ranked_b_RK: np.ndarray,
  *,
  requests: EvalRequests,
  k: int = 50,
  bootstrap: int = 1000,
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

  Returns:
    a - b of recall@k, ndcg@k and value_recall@k, of all and of `new/...` targets, each with
    `.../ci_low` and `.../ci_high`; NaN where nothing is held out.
  """
  if k < 1 or bootstrap < 1:
    raise ValueError(f"k = {k} and bootstrap = {bootstrap} must be at least 1")
  rank_a_RC = _rank_of_targets(ranked_a_RK, requests)
  rank_b_RC = _rank_of_targets(ranked_b_RK, requests)
  differences = {}
  for prefix, target_RC in _target_sets(requests):
    a, b = (_found(rank_RC, requests, target_RC, k) for rank_RC in (rank_a_RC, rank_b_RC))
    more = _Found(*(x_R - y_R for x_R, y_R in zip(a, b, strict=True)))
    differences |= _with_intervals(prefix, requests, target_RC, more, k, bootstrap)
  return differences


def _target_sets(requests: EvalRequests) -> tuple[tuple[str, np.ndarray], ...]:
  """Prefix of the metrics and bool [R, C] of the targets that count."""
  real_RC = requests.target_RC >= 0
  return ("", real_RC), ("new/", real_RC & requests.new_RC)


def _rank_of_targets(ranked_RK: np.ndarray, requests: EvalRequests) -> np.ndarray:
  """int64 [R, C]: place of each target's first occurrence in its list, 0 = top."""
  target_RC = requests.target_RC
  if ranked_RK.ndim != 2 or len(ranked_RK) != len(target_RC):
    raise ValueError(f"ranked lists of shape {ranked_RK.shape} for {len(target_RC)} requests")
  rank_RC = np.full(target_RC.shape, _NOT_FOUND, np.int64)
  step = max(1, _MAX_CELLS // max(1, target_RC.shape[1] * ranked_RK.shape[1]))
  for at in range(0, len(target_RC) if ranked_RK.shape[1] else 0, step):
    rows = slice(at, at + step)
    match_RCK = target_RC[rows, :, None] == ranked_RK[rows, None, :]
    found_RC = match_RCK.any(axis=2) & (target_RC[rows] >= 0)
    rank_RC[rows] = np.where(found_RC, match_RCK.argmax(axis=2), _NOT_FOUND)
  return rank_RC


def _ndcg(rank_RC: np.ndarray, target_RC: np.ndarray, k: int) -> np.ndarray:
  """float64 [R]; 0 where a request has no target."""
  gain_RC = np.where(target_RC & (rank_RC < k), 1 / np.log2(rank_RC + 2.0), 0)
  best_K = np.cumsum(1 / np.log2(np.arange(k) + 2.0))
  return gain_RC.sum(axis=1) / best_K[np.clip(target_RC.sum(axis=1), 1, k) - 1]


class _Found(NamedTuple):
  """What the first k of each list hold of the targets, or how much more than another list's."""

  recall_R: np.ndarray  # float64, as the others; 0 without targets
  ndcg_R: np.ndarray
  value_R: np.ndarray


def _found(
  rank_RC: np.ndarray, requests: EvalRequests, target_RC: np.ndarray, k: int
) -> _Found:
  hit_RC = target_RC & (rank_RC < k)
  recall_R = hit_RC.sum(axis=1) / np.maximum(target_RC.sum(axis=1), 1)
  value_R = np.where(hit_RC, requests.value_RC, 0).sum(axis=1, dtype=np.float64)
  return _Found(recall_R, _ndcg(rank_RC, target_RC, k), value_R)


def _with_intervals(
  prefix: str,
  requests: EvalRequests,
  target_RC: np.ndarray,
  found: _Found,
  k: int,
  bootstrap: int,
) -> dict[str, float]:
  """recall@k, ndcg@k and value_recall@k, and their intervals over resampled users."""
  keep_R = target_RC.any(axis=1)
  held_out_R = np.where(target_RC, requests.value_RC, 0).sum(axis=1, dtype=np.float64)
  users, user_R = np.unique(requests.user_R[keep_R], return_inverse=True)
  columns = (*found, keep_R, held_out_R)  # S = 5 sums of every user with a target
  sums_SU = np.stack([np.bincount(user_R, column[keep_R], len(users)) for column in columns])
  sums_SX = _resample(sums_SU, bootstrap)
  metrics = {}
  for name, *rows in (("recall", 0, 3), ("ndcg", 1, 3), ("value_recall", 2, 4)):
    name = f"{prefix}{name}@{k}"
    metrics[name] = float(_ratio(*sums_SU[rows].sum(axis=1)))
    values_X = _ratio(*sums_SX[rows])
    values_X = values_X[np.isfinite(values_X)]
    low, high = np.percentile(values_X, (2.5, 97.5)) if len(values_X) else (np.nan, np.nan)
    metrics |= {f"{name}/ci_low": float(low), f"{name}/ci_high": float(high)}
  return metrics


def _resample(sums_SU: np.ndarray, bootstrap: int) -> np.ndarray:
  """float64 [S, X]: sums over as many users as there are, drawn with replacement, X times."""
  num_users = sums_SU.shape[1]
  if num_users == 0:
    return np.zeros((len(sums_SU), bootstrap))
  rng = np.random.default_rng(0)
  step = max(1, _MAX_CELLS // num_users)
  parts = []
  for at in range(0, bootstrap, step):
    rows = min(step, bootstrap - at)
    # How often each user is drawn: multinomial, and faster than rng.multinomial.
    drawn = rng.integers(num_users, size=(rows, num_users)) + num_users * np.arange(rows)[:, None]
    count_XU = np.bincount(drawn.ravel(), minlength=rows * num_users).reshape(rows, num_users)
    parts.append(sums_SU @ count_XU.T)
  return np.concatenate(parts, axis=1)


def _mean(values: np.ndarray) -> float:
  return float(values.mean()) if len(values) else float("nan")


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
  """NaN where the denominator is 0."""
  out = np.full(np.shape(denominator), np.nan)
  return np.divide(numerator, denominator, out=out, where=np.asarray(denominator) != 0)
