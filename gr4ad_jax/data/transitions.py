"""Counts what followed what in the sequences of all users, for the neighbours of a history.

No request may see in these counts what its own user did from then on: in training the ad to be
found would stand in the input. So its user's pairs that end there or later are taken out of them.

Letters: E engagements with ads, sorted by user and time, U users, A ads, N terms of ads.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from gr4ad_jax.data import neighbours
from gr4ad_jax.data.engagements import engaged_with_ad
from gr4ad_jax.data.interactions import Interactions, count_pairs
from gr4ad_jax.data.neighbours import NO_PAIRS, NeighbourTable, Pairs, Rows, neighbour_numbers
from gr4ad_jax.data.records import AdTable, Logs
from gr4ad_jax.data.sequences import Example

_OF_AN_ENTRY = 350  # bytes beside its numbers, about


class Transitions:
  """The neighbours of requests, from what may be learned of a log."""

  def __init__(self, logs: Logs, learned_E: np.ndarray, *, most_bytes: int = 1 << 29):
    """Counts.

    Args:
      logs: all events.
      learned_E: bool, the events that count, `examples.training_events`.
      most_bytes: of neighbours kept, about: those of logged requests are asked for again and
        again, and cost more than the rest of the context.
    """
    events, (rows,) = logs.events, np.nonzero(learned_E & engaged_with_ad(logs.events))
    counted = Interactions(
      events.user[rows], events.ad[rows], events.time_s[rows], np.ones(len(rows), bool)
    )
    self.table = neighbour_table(counted, logs.ads)
    self._counted = counted
    self._start_U = np.searchsorted(counted.user_E, np.arange(len(logs.users.user_id) + 1))
    self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by request
    self._room = most_bytes

  def of(self, example: Example, *, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours of a request and numbers, see `neighbours.neighbours`; `most` is always one."""
    if example.request in self._kept:
      return self._kept[example.request]
    own = self.own_pairs(example.user, example.time_s)
    number_KA = neighbour_numbers(self.table, example.ad_T, own)
    found = neighbours.neighbours(number_KA, example.met_P, most)
    size = sum(x.nbytes for x in found) + _OF_AN_ENTRY
    if example.request >= 0 and size <= self._room:
      self._room -= size
      self._kept[example.request] = found
    return found

  def own_pairs(self, user: int, time_s: int) -> Pairs:
    """The counted pairs of a user whose later engagement is of that time or after it."""
    if not 0 <= user < len(self._start_U) - 1:
      return NO_PAIRS
    mine = slice(self._start_U[user], self._start_U[user + 1])
    time_s_E, ad_E = self._counted.time_s_E[mine], self._counted.ad_E[mine]
    if not len(ad_E) or time_s_E[-1] < time_s:
      return NO_PAIRS
    # As `count_pairs` has them: what has one time is a basket, in which an ad stands once.
    _, basket_E = np.unique(time_s_E, return_inverse=True)
    basket_E, ad_E = np.unique(np.stack([basket_E, ad_E]), axis=1)
    first = np.searchsorted(np.unique(time_s_E), time_s)
    near_E = basket_E >= first - neighbours.WINDOW
    basket_E, ad_E = basket_E[near_E], ad_E[near_E].astype(np.int64)
    steps_EE = basket_E[None] - basket_E[:, None]
    counts_EE = np.where(steps_EE == 0, ad_E[None] != ad_E[:, None], steps_EE > 0)
    counts_EE &= (steps_EE <= neighbours.WINDOW) & (basket_E >= first)[None]
    at, then = np.nonzero(counts_EE)
    weight_P = neighbours.STEP_DECAY ** np.maximum(steps_EE[at, then] - 1.0, 0)
    return Pairs(ad_E[at], ad_E[then], weight_P)


def neighbour_table(counted: Interactions, ads: AdTable) -> NeighbourTable:
  """The table of some engagements, without any limit on the entries of an ad."""
  # A limit would keep an ad for what a request's own user did, which is taken out only later.
  pairs_AA = count_pairs(
    counted, num_ads=len(ads.ad_id), end_s_U=np.full(_num_users(counted), np.iinfo(np.int64).max),
    half_life_s=None, organic_weight=1.0, window=neighbours.WINDOW, backward_weight=0.0,
    step_decay=neighbours.STEP_DECAY,
  ).pairs_AA
  content_AN = content_terms(ads)
  source_A, target_A = (
    np.asarray(pairs_AA.sum(axis=axis, dtype=np.float64)).ravel() for axis in (1, 0)
  )
  matrices = (pairs_AA, pairs_AA.T, content_AN, content_AN.T)
  return NeighbourTable(*map(_rows, matrices), source_A, target_A)


def _num_users(counted: Interactions) -> int:
  return int(counted.user_E.max(initial=-1)) + 1


def _rows(matrix: sp.spmatrix) -> Rows:
  by_row = matrix.tocsr()
  by_row.sort_indices()
  start, column, value = by_row.indptr, by_row.indices, by_row.data
  return Rows(start.astype(np.int64), column.astype(np.int32), value.astype(np.float32))


def content_terms(ads: AdTable) -> sp.csr_matrix:
  """Unit rows of terms, advertiser and parts of the category path, rare ones weighing more.

  Args:
    ads: the catalogue of A ads.

  Returns:
    content_AN: float32, tf-idf (log of A / ads with the term) of each ad's N terms.
  """
  num_ads, number, cells = len(ads.ad_id), {}, []
  for ad, (advertiser, category) in enumerate(zip(ads.advertiser_id, ads.category, strict=True)):
    terms = {(part,) for part in category.split(" > ")} | {("advertiser", advertiser)}
    cells += [(ad, number.setdefault(term, len(number))) for term in terms if term[-1]]
  row, column = np.array(cells, np.int64).reshape(-1, 2).T
  weight_N = np.log(num_ads / np.maximum(np.bincount(column, minlength=len(number)), 1))
  weight = weight_N[column]
  norm_A = np.sqrt(np.bincount(row, weight**2, num_ads))
  weight = weight / np.maximum(norm_A[row], 1e-9)
  return sp.csr_matrix((weight.astype(np.float32), (row, column)), (num_ads, len(number)))
