"""What the rivals know of a row and an advertiser: counts, times, company, titles.

Dimension key beyond docs/architecture.md: `R` rows, `A` advertisers, `E` conversions of all
histories, `F` features, `U` users of the training streams.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse as sp

from gr4ad_jax.advertiser.histories import Rows
from gr4ad_jax.advertiser.prepared import Prepared
from gr4ad_jax.embedding.text_encoder import encode_texts

FEATURES = (
  "popularity", "bought", "times", "recency", "last", "cooccurrence", "company", "title", "nearest",
)
NUM_FOLDS = 5
OLDER = 0.8  # what a conversion weighs of the next one


@dataclasses.dataclass(frozen=True)
class Counts:
  """What training streams say of advertisers.

  Attributes:
    count_A: float64, users that converted with each.
    cosine_AA: sparse, c(a, b) / sqrt(c(a) c(b)) over users as baskets, 0 on the diagonal.
  """

  count_A: np.ndarray
  cosine_AA: sp.csr_matrix


def count(data: Prepared, user_in_U: np.ndarray | None = None) -> Counts:
  """Counts users of the training streams, all or some.

  Args:
    data: prepared.
    user_in_U: bool, who counts; None = everyone.
  """
  rows, num = data.streams, len(data.name_A)
  user_E = rows.user_R[rows.row_E()]
  advertiser_E = data.advertiser_N[rows.item_E]
  kept = np.ones(len(user_E), bool) if user_in_U is None else user_in_U[user_E]
  basket_UA = sp.coo_matrix(
    (np.ones(kept.sum()), (user_E[kept], advertiser_E[kept])), (len(data.user_id_U), num)
  ).tocsr()
  basket_UA.data[:] = 1.0
  pair_AA = (basket_UA.T @ basket_UA).tocsr()
  count_A = pair_AA.diagonal()
  pair_AA.setdiag(0)
  pair_AA.eliminate_zeros()
  scale_AA = sp.diags(1 / np.sqrt(np.maximum(count_A, 1)))
  return Counts(count_A, (scale_AA @ pair_AA @ scale_AA).tocsr())


@dataclasses.dataclass(frozen=True)
class Titles:
  """Titles as vectors.

  Attributes:
    item_ND: float32, unit rows; 0 where an item has no title.
    advertiser_AD: float32, the mean over each advertiser's items, unit rows.
  """

  item_ND: np.ndarray
  advertiser_AD: np.ndarray


def embed_titles(data: Prepared) -> Titles:
  """Titles by mean word vectors (wordllama): what every installation has."""
  item_ND = encode_texts(data.title_N.tolist(), "wordllama")
  item_ND[data.title_N == ""] = 0
  known = data.advertiser_N >= 0
  sum_AD = np.zeros((len(data.name_A), item_ND.shape[1]), np.float32)
  np.add.at(sum_AD, data.advertiser_N[known], item_ND[known])
  norm_A1 = np.linalg.norm(sum_AD, axis=1, keepdims=True)
  return Titles(item_ND, sum_AD / np.maximum(norm_A1, 1e-9))


def _ago(rows: Rows) -> np.ndarray:
  """float32, how many conversions ago each one was; 1 = the last one."""
  row_E = rows.row_E()
  return (rows.bound_R[1:][row_E] - np.arange(len(row_E))).astype(np.float32)


def history_titles(rows: Rows, vectors: Titles) -> np.ndarray:
  """[R, D], the mean of each history's titles, each weighing .8 of the next; unit rows, or 0."""
  row_E = rows.row_E()
  weighted_RD = sp.csr_matrix(
    (OLDER ** (_ago(rows) - 1), (row_E, np.arange(len(row_E)))), (len(rows), len(row_E))
  ) @ vectors.item_ND[rows.item_E]
  weighted_RD /= np.maximum(np.linalg.norm(weighted_RD, axis=1, keepdims=True), 1e-9)
  return weighted_RD


def features(
  data: Prepared, rows: Rows, counts: Counts, vectors: Titles
) -> np.ndarray:
  """float32 [R, A, F], one number of each of FEATURES.

  popularity: log (1 + conversions in the days before the cut). bought: 1 where the user did.
  times: log (1 + how often). recency: 1 / how many conversions ago, 0 = never. last: 1 for the last
  one. cooccurrence: sum over own advertisers b of c(a, b) / sqrt(c(a) c(b)); company: its log.
  title: cosine of the advertiser's titles with the mean of the history's, each weighing .8 of the
  next; nearest: with the nearest of them.
  """
  shape = (len(rows), len(data.name_A))
  row_E, advertiser_E = rows.row_E(), data.advertiser_N[rows.item_E]
  ago_E = _ago(rows)
  times_RA = np.zeros(shape, np.float32)
  np.add.at(times_RA, (row_E, advertiser_E), 1)
  recency_RA = np.zeros(shape, np.float32)
  np.maximum.at(recency_RA, (row_E, advertiser_E), 1 / ago_E)
  bought_RA = (times_RA > 0).astype(np.float32)
  popular_RA = np.log1p(np.stack([data.popularity[int(cut)] for cut in rows.cut_s_R]))
  together_RA = (sp.csr_matrix(bought_RA) @ counts.cosine_AA).toarray()
  item_ED = vectors.item_ND[rows.item_E]
  weighted_RD = history_titles(rows, vectors)
  nearest_RA = np.zeros(shape, np.float32)
  for row in range(len(rows)):
    if (at := rows.history(row)).stop > at.start:
      nearest_RA[row] = (item_ED[at] @ vectors.advertiser_AD.T).max(axis=0)
  columns = (
    popular_RA, bought_RA, np.log1p(times_RA), recency_RA, recency_RA == 1, together_RA,
    np.log1p(100 * together_RA), weighted_RD @ vectors.advertiser_AD.T, nearest_RA,
  )
  return np.stack(columns, axis=-1, dtype=np.float32, casting="unsafe")


def cross_fitted(data: Prepared, rows: Rows, vectors: Titles) -> np.ndarray:
  """`features` of training rows, each with the counts of other users.

  Counted with the row's own user, a pair of the label and the history is always there at least
  once, which no row to come will have: what is learned of it would be wrong. So users fall into
  NUM_FOLDS parts, and the rows of one are seen with the counts of the others. Popularity is that
  before the row's cut; where there are no times, the row's own label is taken out of it.
  """
  fold_U = np.arange(len(data.user_id_U)) % NUM_FOLDS
  x_RAF = np.empty((len(rows), len(data.name_A), len(FEATURES)), np.float32)
  for fold in range(NUM_FOLDS):
    if not len(mine := np.flatnonzero(fold_U[rows.user_R] == fold)):
      continue
    x_RAF[mine] = features(data, rows.take(mine), count(data, fold_U != fold), vectors)
  own = np.flatnonzero(rows.cut_s_R == 0)
  counted = data.popularity.get(0)
  if counted is not None and len(own):
    target = rows.target_R[own]
    x_RAF[own, target, 0] = np.log1p(np.maximum(counted[target] - 1, 0))
  return x_RAF
