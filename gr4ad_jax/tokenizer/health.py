"""How good semantic IDs are before anything is trained on them: numbers from plain arrays.

Any SIDs can be measured, whoever made them; `health_verdicts.py` says what the numbers mean. A
*prefix* of length l is the first l codes of an SID, a node of the tree that the search walks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gr4ad_jax.embedding.rows import check_embeddings, distinct_rows
from gr4ad_jax.tokenizer.retrieval import MAX_QUERIES, chance_hits, retrieval_hits, unit_rows

ROWS_PER_CHUNK = 65_536  # rows whose float64 copies are in memory at once


# Ten parameters: each array that is there allows more numbers.
def measure(
  codes_AL: np.ndarray,
  codebook_sizes: Sequence[int],
  *,
  num_quantised: int | None = None,
  embedding_AD: np.ndarray | None = None,
  reconstruction_AD: np.ndarray | None = None,
  product_A: np.ndarray | None = None,
  events_A: np.ndarray | None = None,
  value_A: np.ndarray | None = None,
  content_codes_OL: np.ndarray | None = None,
  max_queries: int = MAX_QUERIES,
) -> dict[str, float]:
  """All numbers of the health report that the given arrays allow.

  Args:
    codes_AL: [A, L] integers, the SID of each ad; code l in [0, codebook_sizes[l]).
    codebook_sizes: V_l of each level.
    num_quantised: levels that come from the embedding, the first ones; the others are a hash or a
      suffix. None = all.
    embedding_AD: [A, D] float, finite: what was quantised.
    reconstruction_AD: [A, D]: what the codes stand for (sum of centroids, or a decoder's output).
    product_A: [A] labels of "the same product", strings or integers; "" and negative = unknown.
      A coarser label (category) does where products are unknown.
    events_A: [A] events of each ad.
    value_A: [A] value of each ad, currency, >= 0.
    content_codes_OL: [O, L] codes of contents; -1 in a row = the content has no code.
    max_queries: the ads whose neighbours are looked up for the retrieval numbers are a sample of
      this size where the labelled ads are more; it does not depend on the order of rows.

  Returns:
    name -> finite number. A number that is undefined (no SID with two ads, no label twice) is
    left out.

    The codes alone give num_ads, num_sids, codebook_space, num_levels, num_quantised;
    cpr = ads / SIDs; col = share of SIDs that hold several ads; util = SIDs / codebook space;
    util_as_printed = ads / codebook space (the paper's equation, which its table contradicts);
    sid_collision_rate = share of ads that share their SID; max_ads_per_sid;
    prefix_collision_rate and max_ads_per_prefix, the same for the quantised levels alone where
    another level follows. For each level l from 1: level{l}/used_share of its codes (CUR),
    level{l}/entropy_bits of the code over ads, level{l}/perplexity = 2^entropy,
    level{l}/balance = perplexity / V_l, level{l}/max_share of ads on the largest code,
    level{l}/prefixes of length l, level{l}/children_mean and level{l}/children_max of the prefixes
    one shorter (the root, for level 1).

    Weights add sid_collision_event_share and sid_collision_value_share. Contents add
    content_coded_share.

    Embeddings add distinct_embedding_share = distinct embeddings / ads; twin_ad_share = ads whose
    embedding equals another ad's; max_ads_per_embedding; sid_collision_twin_share = of the ads that
    share their SID, those that share it with such a twin; pas = mean cosine of the pairs inside an
    SID, mean over SIDs with two ads or more; level{l}/pas, the same inside a prefix; pas_chance of
    any pair of ads.

    Reconstructions add reconstruction_relative_error = sum |x - x'|^2 / sum |x - mean|^2;
    reconstruction_cosine = mean cos(x, x'); reconstruction_cosine_of_mean = mean cos(x, mean), what
    one code for all ads would reach.

    Labels add level{l}/label_pair_share = of the pairs of ads with one prefix, those with one
    label; label_pair_chance of any pair; level{l}/label_lift = their ratio. And by
    `retrieval_hits`, for k in 1, 5, 10: retrieval/embedding_r@k, retrieval/reconstruction_r@k,
    retrieval/chance_r@k.

  Raises:
    ValueError: shapes or values out of range.

  Source: GR4AD (arXiv 2602.22732) A.3.1, equations 33 to 35, and Table 2 (recall); PAS and CUR:
    GPR (arXiv 2511.10138), Table 1. Pairs are counted in full, not sampled.
  """
  # So many parameters because each array is optional and adds numbers of its own.
  codes_AL = np.asarray(codes_AL)
  num_quantised = len(codebook_sizes) if num_quantised is None else num_quantised
  _check(codes_AL, codebook_sizes, num_quantised, {
    "embedding_AD": embedding_AD, "reconstruction_AD": reconstruction_AD, "product_A": product_A,
    "events_A": events_A, "value_A": value_A,
  })  # fmt: skip
  prefixes = _prefixes(codes_AL)
  result = _code_metrics(codes_AL, codebook_sizes, num_quantised, prefixes)
  if content_codes_OL is not None and len(content_codes_OL):
    result["content_coded_share"] = (np.asarray(content_codes_OL) >= 0).all(-1).mean()
  collides_A = prefixes[-1].held_A > 1
  for name, weight_A in (("event", events_A), ("value", value_A)):
    if weight_A is not None:
      total = max(float(np.sum(weight_A)), 1e-12)
      result[f"sid_collision_{name}_share"] = np.sum(np.asarray(weight_A)[collides_A]) / total
  if embedding_AD is not None:
    embedding_AD = np.asarray(embedding_AD, np.float32)
    result |= _embedding_metrics(embedding_AD, prefixes)
  if reconstruction_AD is not None:
    reconstruction_AD = np.asarray(reconstruction_AD, np.float32)
    result |= _reconstruction_metrics(embedding_AD, reconstruction_AD)
  if product_A is not None:
    label_A = _label_numbers(product_A)
    result |= _label_metrics(label_A, prefixes)
    for name, x_AD in (("embedding", embedding_AD), ("reconstruction", reconstruction_AD)):
      if x_AD is not None:
        hits = retrieval_hits(x_AD, label_A, max_queries=max_queries)
        result |= {f"retrieval/{name}_r@{k}": value for k, value in hits.items()}
    if embedding_AD is not None:
      chance = chance_hits(label_A)
      result |= {f"retrieval/chance_r@{k}": value for k, value in chance.items()}
  return {name: float(value) for name, value in result.items()}


class _Prefix(NamedTuple):
  """All prefixes of one length."""

  of_A: np.ndarray  # int64, number of each ad's prefix
  count_P: np.ndarray  # ads under each
  parent_P: np.ndarray  # number of each one's prefix one shorter

  @property
  def held_A(self) -> np.ndarray:
    """Ads under each ad's prefix, itself included."""
    return self.count_P[self.of_A]


def _prefixes(codes_AL: np.ndarray) -> list[_Prefix]:
  of_A, result = np.zeros(len(codes_AL), np.int64), []
  for code_A in codes_AL.T.astype(np.int64):
    key_A = of_A * (code_A.max() + 1) + code_A
    _, first_P, new_A, count_P = np.unique(
      key_A, return_index=True, return_inverse=True, return_counts=True
    )
    result.append(_Prefix(new_A.reshape(-1), count_P, of_A[first_P]))
    of_A = result[-1].of_A
  return result


def _check(codes_AL, codebook_sizes, num_quantised, per_ad):
  if codes_AL.ndim != 2 or not codes_AL.size or not np.issubdtype(codes_AL.dtype, np.integer):
    raise ValueError(
      f"codes_AL: {codes_AL.dtype} of shape {codes_AL.shape}, expected integers [A > 0, L > 0]"
    )
  if len(codebook_sizes) != codes_AL.shape[1]:
    raise ValueError(
      f"codebook_sizes: {tuple(codebook_sizes)}, but codes_AL has {codes_AL.shape[1]} levels"
    )
  for level, size in enumerate(codebook_sizes):
    bad_A = np.flatnonzero((codes_AL[:, level] < 0) | (codes_AL[:, level] >= size))
    if bad_A.size:
      raise ValueError(
        f"codes_AL: row {bad_A[0]}, level {level + 1} holds {codes_AL[bad_A[0], level]}, must be in"
        f" [0, {size})"
      )
  if not 0 <= num_quantised <= len(codebook_sizes):
    raise ValueError(f"num_quantised: {num_quantised}, must be 0 to {len(codebook_sizes)}")
  for name, array in per_ad.items():
    if array is None:
      continue
    if len(array) != len(codes_AL):
      raise ValueError(f"{name}: {len(array)} rows for {len(codes_AL)} ads")
    if name.endswith("_AD"):
      try:
        check_embeddings(np.asarray(array))
      except ValueError as error:
        raise ValueError(str(error).replace("embedding_ND", name, 1)) from None
    elif name != "product_A" and not (np.isfinite(array).all() and np.min(array) >= 0):
      raise ValueError(f"{name}: must be finite and >= 0")
  x_AD, y_AD = per_ad["embedding_AD"], per_ad["reconstruction_AD"]
  if y_AD is not None and (x_AD is None or np.shape(x_AD) != np.shape(y_AD)):
    raise ValueError(
      f"reconstruction_AD: shape {np.shape(y_AD)}, must be that of embedding_AD"
      + (f", {np.shape(x_AD)}" if x_AD is not None else ", which is not given")
    )


def _code_metrics(codes_AL, codebook_sizes, num_quantised, prefixes):
  num_ads, num_levels = codes_AL.shape
  count_S = prefixes[-1].count_P
  space = math.prod(codebook_sizes)
  result = {
    "num_ads": num_ads,
    "num_sids": len(count_S),
    "codebook_space": space,
    "num_levels": num_levels,
    "num_quantised": num_quantised,
    "sid_collision_rate": (prefixes[-1].held_A > 1).mean(),
    "cpr": num_ads / len(count_S),
    "col": (count_S > 1).mean(),
    "util": len(count_S) / space,
    "util_as_printed": num_ads / space,
    "max_ads_per_sid": count_S.max(),
  }
  if 0 < num_quantised < num_levels:
    semantic = prefixes[num_quantised - 1]
    result["prefix_collision_rate"] = (semantic.held_A > 1).mean()
    result["max_ads_per_prefix"] = semantic.count_P.max()
  for level, (size, prefix) in enumerate(zip(codebook_sizes, prefixes, strict=True)):
    count_V = np.bincount(codes_AL[:, level], minlength=size)
    p_V = count_V[count_V > 0] / num_ads
    entropy = abs(float(-(p_V * np.log2(p_V)).sum()))  # abs: one used code gives -0
    children_P = np.bincount(prefix.parent_P)
    of_level = {
      "used_share": (count_V > 0).mean(),
      "entropy_bits": entropy,
      "perplexity": 2**entropy,
      "balance": 2**entropy / size,
      "max_share": count_V.max() / num_ads,
      "prefixes": len(prefix.count_P),
      "children_mean": children_P.mean(),
      "children_max": children_P.max(),
    }
    result |= {f"level{level + 1}/{name}": value for name, value in of_level.items()}
  return result


def _embedding_metrics(embedding_AD, prefixes):
  distinct = distinct_rows(embedding_AD)
  num_ads, num_distinct = len(embedding_AD), len(distinct.first_U)
  held_U = np.bincount(distinct.of_N)
  result = {
    "distinct_embedding_share": num_distinct / num_ads,
    "twin_ad_share": (held_U[distinct.of_N] > 1).mean(),
    "max_ads_per_embedding": held_U.max(),
  }
  collides_A = prefixes[-1].held_A > 1
  if collides_A.any():
    key_A = prefixes[-1].of_A * num_distinct + distinct.of_N  # same SID and same embedding
    _, of_A, count = np.unique(key_A, return_inverse=True, return_counts=True)
    with_twin_A = count[of_A.reshape(-1)] > 1
    result["sid_collision_twin_share"] = with_twin_A.sum() / collides_A.sum()
  unit_AD = unit_rows(embedding_AD)
  for level, prefix in enumerate(prefixes, start=1):
    name = "pas" if level == len(prefixes) else f"level{level}/pas"
    similarity = _pair_cosines(unit_AD, prefix.of_A)
    if len(similarity):
      result[name] = similarity.mean()
  if num_ads > 1:
    result["pas_chance"] = _pair_cosines(unit_AD, np.zeros(num_ads, np.int64))[0]
  return result


def _pair_cosines(unit_AD, group_A):
  """Mean cosine of the pairs inside each group of two rows or more: (|sum|^2 - n) / (n (n - 1))."""
  count_G = np.bincount(group_A)
  row_N = np.flatnonzero(count_G[group_A] > 1)
  if not len(row_N):
    return np.empty(0)
  row_N = row_N[np.argsort(group_A[row_N], kind="stable")]
  start_G = np.flatnonzero(np.r_[True, np.diff(group_A[row_N]) > 0])
  count_G = np.diff(np.r_[start_G, len(row_N)])
  squared_G = np.zeros(len(start_G))
  own_N = np.zeros(len(row_N))
  for d in range(unit_AD.shape[1]):  # a column at a time: no sorted copy of the table
    x_N = unit_AD[row_N, d].astype(np.float64)
    squared_G += np.add.reduceat(x_N, start_G) ** 2
    own_N += x_N**2
  pairs_G = count_G * (count_G - 1)
  return (squared_G - np.add.reduceat(own_N, start_G)) / pairs_G


def _reconstruction_metrics(embedding_AD, reconstruction_AD):
  mean_D = embedding_AD.mean(0, dtype=np.float64)
  unit_mean_D = unit_rows(mean_D[None])[0]
  error = spread = total = cosine = cosine_of_mean = 0.0
  for start in range(0, len(embedding_AD), ROWS_PER_CHUNK):
    x_ND = embedding_AD[start : start + ROWS_PER_CHUNK].astype(np.float64)
    y_ND = reconstruction_AD[start : start + ROWS_PER_CHUNK].astype(np.float64)
    error += np.square(x_ND - y_ND).sum()
    spread += np.square(x_ND - mean_D).sum()
    total += np.square(x_ND).sum()
    unit_ND = unit_rows(x_ND)
    cosine += (unit_ND * unit_rows(y_ND)).sum(dtype=np.float64)
    cosine_of_mean += (unit_ND @ unit_mean_D).sum(dtype=np.float64)
  result = {
    "reconstruction_cosine": cosine / len(embedding_AD),
    "reconstruction_cosine_of_mean": cosine_of_mean / len(embedding_AD),
  }
  if spread > 1e-9 * total:  # else all ads have one embedding
    result["reconstruction_relative_error"] = error / spread
  return result


def _label_numbers(product_A):
  """int64 [A]: labels numbered from 0 in their sorted order, -1 = unknown."""
  value_A = np.asarray(product_A)
  if value_A.dtype.kind in "OUS":
    value_A = value_A.astype(str)
    known_A = value_A != ""
  else:
    known_A = value_A >= 0
  label_A = np.full(len(value_A), -1, np.int64)
  label_A[known_A] = np.unique(value_A[known_A], return_inverse=True)[1].reshape(-1)
  return label_A


def _label_metrics(label_A, prefixes):
  known_A = label_A >= 0
  label_K = label_A[known_A]
  if len(label_K) < 2:
    return {}
  pairs = len(label_K) * (len(label_K) - 1)
  chance = _pairs(np.bincount(label_K)) / pairs
  result = {"label_pair_chance": chance}
  for level, prefix in enumerate(prefixes, start=1):
    of_K = prefix.of_A[known_A]
    same_prefix = _pairs(np.bincount(of_K))
    if same_prefix and chance:
      key_K = of_K * (label_K.max() + 1) + label_K
      share = _pairs(np.unique(key_K, return_counts=True)[1]) / same_prefix
      result[f"level{level}/label_pair_share"] = share
      result[f"level{level}/label_lift"] = share / chance
  return result


def _pairs(count_G):
  """Ordered pairs of different members, over all groups."""
  count_G = count_G.astype(np.float64)
  return (count_G * (count_G - 1)).sum()
