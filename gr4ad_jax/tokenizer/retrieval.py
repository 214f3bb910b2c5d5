"""Do nearest neighbours share a label: recall of embeddings, ties counted by expectation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gr4ad_jax.embedding.rows import distinct_rows

RECALL_AT = (1, 5, 10)
MAX_QUERIES = 5_000  # ads whose neighbours are looked up: a standard error below 0.8 points
TIE = 1e-6  # cosines this close are equal: float32 products of unit rows differ by less
VALUES_PER_CHUNK = 2**24  # similarities in memory at once


def unit_rows(x_ND: np.ndarray) -> np.ndarray:
  """float32 rows of length 1; a row without direction stays 0, so its cosines are 0."""
  x_ND = np.asarray(x_ND, np.float32)
  norm_N = np.linalg.norm(x_ND, axis=-1, keepdims=True)
  return x_ND / np.where(norm_N > 0, norm_N, 1)


def retrieval_hits(
  x_AD: np.ndarray, label_A: np.ndarray, *, max_queries: int = MAX_QUERIES
) -> dict[int, float]:
  """Share of ads that have an ad of their own label among their k nearest by cosine.

  The ad itself is not among its neighbours; ads whose label nobody shares are candidates, but not
  queries. Ads at one distance count by expectation, as if drawn in random order: equal rows win
  nothing by standing first in the table.

  Args:
    x_AD: [A, D] float, finite.
    label_A: [A] int; negative = unknown, never a hit.
    max_queries: sample of queries where there are more; by content, not by row.

  Returns:
    k -> share, for k in `RECALL_AT`; empty where no label occurs twice.

  Source: GR4AD (arXiv 2602.22732) Table 2, photo-to-photo recall; the rule for ties is our choice.
  """
  x_AD = np.asarray(x_AD, np.float32)
  rows = distinct_rows(x_AD)
  held_U = np.bincount(rows.of_N)  # ads at each distinct row
  query_row_Q, query_label_Q, weight_Q = _queries(rows.of_N, label_A, max_queries)
  if not len(query_row_Q):
    return {}
  label_P, row_P, held_P = _members(rows.of_N, label_A)
  unit_UD = unit_rows(x_AD[rows.first_U])
  largest = min(max(RECALL_AT), len(x_AD) - 1)
  num_near = min(largest + 1, len(unit_UD))
  hits = dict.fromkeys(RECALL_AT, 0.0)
  chunk = max(1, VALUES_PER_CHUNK // len(unit_UD))
  for start in range(0, len(query_row_Q), chunk):
    row_B = query_row_Q[start : start + chunk]
    cosine_BU = unit_UD[row_B] @ unit_UD.T
    alone_B = held_U[row_B] == 1
    cosine_BU[np.flatnonzero(alone_B), row_B[alone_B]] = -np.inf
    near_BN = np.argpartition(cosine_BU, len(unit_UD) - num_near, axis=1)[:, -num_near:]
    near_cosine_BN = np.take_along_axis(cosine_BU, near_BN, 1)
    order_BN = np.argsort(-near_cosine_BN, axis=1)
    near_BN = np.take_along_axis(near_BN, order_BN, 1)
    near_cosine_BN = np.take_along_axis(near_cosine_BN, order_BN, 1)
    near_held_BN = held_U[near_BN] - (near_BN == row_B[:, None])
    for b, row in enumerate(row_B):
      q = start + b
      first, last = np.searchsorted(label_P, query_label_Q[q] + np.arange(2))
      member_cosine_M = cosine_BU[b, row_P[first:last]]
      member_held_M = held_P[first:last] - (row_P[first:last] == row)
      reached_N = near_held_BN[b].cumsum()
      for k in RECALL_AT:
        at = min(k, len(x_AD) - 1)
        bound = near_cosine_BN[b, np.searchsorted(reached_N, at)]
        if member_held_M[member_cosine_M > bound + TIE].any():
          hits[k] += weight_Q[q]
          continue
        tied_hits = member_held_M[np.abs(member_cosine_M - bound) <= TIE].sum()
        if tied_hits:
          tied = _held_at(bound, cosine_BU[b], near_cosine_BN[b], near_held_BN[b], held_U, row)
          free = at - near_held_BN[b][near_cosine_BN[b] > bound + TIE].sum()
          hits[k] += weight_Q[q] * _any_hit(tied, tied_hits, free)
  return {k: float(value / weight_Q.sum()) for k, value in hits.items()}


def _queries(row_A, label_A, max_queries):
  """Distinct (row, label) of ads whose label occurs again, with the number of such ads."""
  held_C = np.bincount(label_A[label_A >= 0], minlength=1)
  ads = np.flatnonzero((label_A >= 0) & (held_C[np.maximum(label_A, 0)] > 1))
  ads = ads[np.lexsort((label_A[ads], row_A[ads]))]
  if len(ads) > max_queries:
    ads = ads[np.sort(np.random.default_rng(0).permutation(len(ads))[:max_queries])]
  pair_2Q, weight_Q = np.unique(
    np.stack([row_A[ads], label_A[ads]]), axis=1, return_counts=True
  )
  return pair_2Q[0], pair_2Q[1], weight_Q


def _members(row_A, label_A):
  """(label, distinct row, ads there), sorted by label."""
  known_A = label_A >= 0
  (label_P, row_P), held_P = np.unique(
    np.stack([label_A[known_A], row_A[known_A]]), axis=1, return_counts=True
  )
  return label_P, row_P, held_P


def _held_at(bound, cosine_U, near_cosine_N, near_held_N, held_U, row):
  """Ads at the distance `bound` from a query."""
  if near_cosine_N[-1] < bound - TIE:  # all of them are among the nearest
    return near_held_N[np.abs(near_cosine_N - bound) <= TIE].sum()
  tied_U = np.abs(cosine_U - bound) <= TIE
  return held_U[tied_U].sum() - int(tied_U[row])


def _any_hit(among, hits, drawn):
  """Chance that `drawn` of `among` things, `hits` of them right, hold a right one."""
  i = np.arange(drawn)
  return 1 - np.prod(np.maximum(among - hits - i, 0) / (among - i))


def chance_hits(label_A: np.ndarray) -> dict[int, float]:
  """`retrieval_hits` of neighbours in random order, over all queries.

  Args:
    label_A: [A] int; negative = unknown.
  """
  held_C = np.bincount(label_A[label_A >= 0], minlength=1)
  held_G, times_G = np.unique(held_C[held_C > 1], return_counts=True)
  queries_G, others = held_G * times_G, len(label_A) - 1
  if not len(held_G):
    return {}
  return {
    k: float(queries_G @ [_any_hit(others, n - 1, min(k, others)) for n in held_G])
    / int(queries_G.sum())
    for k in RECALL_AT
  }


def held_out_retrieval(
  x_AD: np.ndarray,
  label_A: np.ndarray,
  query_A: np.ndarray,
  *,
  ks: Sequence[int] = RECALL_AT,
) -> dict[int, float]:
  """Share of held-out ads that have an ad of their label among their k nearest of the others.

  The gallery is every ad that is not a query. Only queries whose label some gallery ad has count.
  Ads at one distance count by expectation, as if drawn in random order.

  Args:
    x_AD: [A, D] float, finite.
    label_A: [A] int; negative = unknown: such an ad is no query, and in the gallery never a hit.
    query_A: [A] bool, the held-out ads.
    ks: numbers of neighbours.

  Returns:
    k -> share, for k in `ks`; empty where no query counts.

  Source: GR4AD (arXiv 2602.22732) Table 2, with queries that the training has not seen.
  """
  gallery = np.flatnonzero(~query_A)
  queries = np.flatnonzero(query_A & (label_A >= 0) & np.isin(label_A, label_A[gallery]))
  if not len(queries):
    return {}
  unit_AD = unit_rows(x_AD)
  hits = dict.fromkeys(ks, 0.0)
  chunk = max(1, VALUES_PER_CHUNK // len(gallery))
  for start in range(0, len(queries), chunk):
    rows = queries[start : start + chunk]
    for row, cosine_G in zip(rows, unit_AD[rows] @ unit_AD[gallery].T, strict=True):
      same_G = label_A[gallery] == label_A[row]
      best = cosine_G[same_G].max()
      for k in ks:
        at = min(k, len(gallery))
        bound = np.partition(cosine_G, len(gallery) - at)[len(gallery) - at]
        if best > bound + TIE:
          hits[k] += 1
        elif best >= bound - TIE:
          tied_G = np.abs(cosine_G - bound) <= TIE
          free = at - (cosine_G > bound + TIE).sum()
          hits[k] += _any_hit(tied_G.sum(), (tied_G & same_G).sum(), free)
  return {k: float(value / len(queries)) for k, value in hits.items()}
