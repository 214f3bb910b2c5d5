"""Which ads go together: Swing scores of ad pairs, from the users who engaged with both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from gr4ad_jax.data.engagements import product_engagements
from gr4ad_jax.data.records import Logs

MAX_ITEMS_PER_USER = 1_000
BLOCK_ENTRIES = 2**25
# Two counts in one number, exact in float64: an item of the block counts this and 1, others 1.
_IN_BLOCK = 2.0**20


@dataclass(frozen=True)
class ItemPairs:
  """The best neighbours of each item, sorted by item, then descending score, then neighbour."""

  item_P: np.ndarray  # int32
  neighbour_P: np.ndarray  # int32, never the item itself
  score_P: np.ndarray  # float32, > 0


def training_interactions(
  logs: Logs, train_E: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Positive engagements with ads: clicks, conversions, and organic events of the same product.

  Args:
    logs: one data set; an organic event, whatever its action, counts where its content promotes
      an ad.
    train_E: bool [E], events that may be learned from; None = all.

  Returns:
    user_E and ad_E, int32 [E], sorted by user and time.
  """
  event_N, ad_N = product_engagements(logs)
  if train_E is not None:
    kept_N = train_E[event_N]
    event_N, ad_N = event_N[kept_N], ad_N[kept_N]
  return logs.events.user[event_N], ad_N


def swing_pairs(
  user_E: np.ndarray,
  item_E: np.ndarray,
  *,
  num_items: int,
  alpha: float = 1.0,
  max_items_per_user: int | None = MAX_ITEMS_PER_USER,
  max_neighbours: int | None = 50,
  block_entries: int = BLOCK_ENTRIES,
  progress: Callable | None = None,
) -> ItemPairs:
  """sim(i, j) = sum over ordered pairs of users u != u' who both have i and j, of 1 / (alpha + n).

  n is the number of items that u and u' share. Ordered pairs: each two users count twice, so that
  two users who share i and j alone give 2 / (alpha + 2). Only sim > 0 is kept.

  Time grows with the sum over items of (users of the item)^2 and the sum over two users of n^2.
  Memory: blocks of items and users are gone through one after another; neither a table of users by
  users nor one of items by items is held. The blocks change at most the last bit of a score.

  Args:
    user_E: integers [E] >= 0, users; the events of one user come in the order of time.
    item_E: integers [E] in [0, num_items); repeats of a user and an item count once.
    num_items: A.
    alpha: >= 0, smoothing; the larger, the less it matters how alike two users are.
    max_items_per_user: items of a user that count, those met last; None = all. The default only
      keeps a robot's log from costing more than everyone else's.
    max_neighbours: neighbours kept for each item; None = all.
    block_entries: bounds the memory: entries of a sparse table held at once, some 30 bytes each
      with the work around it (1 GB by default). What one item or one user needs may exceed it.
    progress: called as `progress(blocks, description, total)`; None shows nothing.

  Returns:
    The pairs; both (i, j) and (j, i) are there, unless max_neighbours cuts one of them.

  Raises:
    ValueError: an argument is out of its range.

  Source: Yang et al., "Large Scale Product Graph Construction for Recommendation in E-commerce"
  (arXiv 2010.05525), Swing; GR4AD (arXiv 2602.22732) 3.1 takes its positives from it.
  """
  _check(user_E, item_E, num_items)
  for name, value in (
    ("max_items_per_user", max_items_per_user),
    ("max_neighbours", max_neighbours),
    ("block_entries", block_entries),
  ):
    if value is not None and value < 1:
      raise ValueError(f"{name}: {value}, must be >= 1")
  if not 0 <= alpha < np.inf:
    raise ValueError(f"alpha: {alpha}, must be >= 0 and finite")
  items_UA = _items_of_users(user_E, item_E, num_items, max_items_per_user)
  users_AU = items_UA.T.tocsr()
  blocks = _blocks_of_work(items_UA, users_AU, block_entries)
  if progress is not None:
    blocks = progress(blocks, description="swing pairs", total=len(blocks))
  best, held = [], []
  for block in blocks:
    items = slice(block.first_item, block.end_item)
    if block.first_user == 0:
      scores_BA = sp.csr_matrix((block.end_item - block.first_item, num_items))
    held += _common_items(items_UA, users_AU, block, block_entries)
    is_last = block.end_user == items_UA.shape[0]
    if is_last or sum(common_QA.nnz for common_QA in held) >= block_entries // 2:
      # Rarely, as each sum copies all scores of the block.
      common_QA, held = sp.vstack(held, format="csr"), []
      scores_BA = scores_BA + common_QA[:, items].T @ _weighted(common_QA, alpha)
    if is_last:
      best.append(_best(scores_BA, block.first_item, max_neighbours))
  return ItemPairs(*(np.concatenate(columns) for columns in zip(*best, strict=True)))


def _check(user_E: np.ndarray, item_E: np.ndarray, num_items: int) -> None:
  if user_E.ndim != 1 or user_E.shape != item_E.shape:
    raise ValueError(f"item_E: shape {item_E.shape}, must be [E] like user_E {user_E.shape}")
  if num_items < 1:
    raise ValueError(f"num_items: {num_items}, must be >= 1")
  for name, index_E in (("user_E", user_E), ("item_E", item_E)):
    if not np.issubdtype(index_E.dtype, np.integer):
      raise ValueError(f"{name}: dtype {index_E.dtype}, must be integers")
    if index_E.min(initial=0) < 0:
      raise ValueError(f"{name}: {index_E.min()}, must be >= 0")
  if item_E.max(initial=-1) >= num_items:
    raise ValueError(f"item_E: {item_E.max()}, must be below num_items = {num_items}")


def _items_of_users(
  user_E: np.ndarray, item_E: np.ndarray, num_items: int, max_items: int | None
) -> sp.csr_matrix:
  """1.0 where a user has an item, [U, A]; users with fewer than two items are left out."""
  _, user_E = np.unique(user_E, return_inverse=True)
  cell_E = user_E.astype(np.int64) * num_items + item_E
  cell_N, back_N = np.unique(cell_E[::-1], return_index=True)
  user_N, item_N = np.divmod(cell_N, num_items)
  if max_items is not None:
    order = np.lexsort((back_N, user_N))  # latest first
    start_N = np.searchsorted(user_N, user_N)  # user_N[order] is user_N itself
    order = np.sort(order[np.arange(len(order)) - start_N < max_items])
    user_N, item_N = user_N[order], item_N[order]
  count_U = np.bincount(user_N, minlength=1)
  items_UA = sp.csr_matrix(
    (np.ones(len(item_N)), item_N.astype(np.int32), np.append(0, np.cumsum(count_U))),
    (len(count_U), num_items),
  )
  return items_UA[count_U >= 2]


class _Block(NamedTuple):
  """Pairs of users, one of them in a range, that share an item of a range."""

  first_item: int
  end_item: int
  first_user: int
  end_user: int


def _blocks_of_work(
  items_UA: sp.csr_matrix, users_AU: sp.csr_matrix, block_entries: int
) -> list[_Block]:
  """All blocks; those of the same items follow each other, users in their order."""
  count_U, count_A = np.diff(items_UA.indptr), np.diff(users_AU.indptr)
  # What a row of scores can hold: everything that the users of its item have beside it.
  reach_A = np.minimum(users_AU @ (count_U - 1.0), len(count_A))
  shared_U = items_UA @ count_A.astype(float)  # items that a user shares with others, all told
  return [
    _Block(*items, *users)
    for items in _ranges(reach_A, block_entries)
    for users in _ranges(shared_U, max(1, block_entries // 16))
  ]


def _ranges(size_N: np.ndarray, limit: int) -> list[tuple[int, int]]:
  """Cuts 0..N into ranges whose sizes sum to at most limit + the largest single size."""
  full_N = np.cumsum(size_N) // limit
  cuts = [0, *(np.flatnonzero(np.diff(full_N)) + 1), len(size_N)]
  return [(int(first), int(end)) for first, end in zip(cuts[:-1], cuts[1:], strict=True)]


def _common_items(
  items_UA: sp.csr_matrix, users_AU: sp.csr_matrix, block: _Block, block_entries: int
) -> Iterator[sp.csr_matrix]:
  """A row for each two users of the block who share an item of it and another one: all they share.

  Yields:
    [Q, A], 1.0 where both users have the item, at most about block_entries entries.
  """
  counted_A = np.ones(items_UA.shape[1])
  counted_A[block.first_item : block.end_item] += _IN_BLOCK
  users = slice(block.first_user, block.end_user)
  overlap = (items_UA[users] @ sp.diags_array(counted_A) @ users_AU).tocoo()
  kept = (overlap.data >= _IN_BLOCK + 2) & (overlap.col > overlap.row + block.first_user)
  one_Q, other_Q = overlap.row[kept] + block.first_user, overlap.col[kept]
  del overlap, kept
  count_U = np.diff(items_UA.indptr)
  for first, end in _ranges(count_U[one_Q] + count_U[other_Q], block_entries):
    yield items_UA[one_Q[first:end]].multiply(items_UA[other_Q[first:end]]).tocsr()


def _weighted(common_QA: sp.csr_matrix, alpha: float) -> sp.csr_matrix:
  """The same with what the two users of a row add to each pair of their items, 2 / (alpha + n)."""
  count_Q = np.diff(common_QA.indptr)
  weight_N = np.repeat(2 / (alpha + count_Q), count_Q)
  return sp.csr_matrix((weight_N, common_QA.indices, common_QA.indptr), common_QA.shape)


def _best(
  scores_BA: sp.csr_matrix, low: int, max_neighbours: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """item, neighbour and score of the best pairs of each row, in the order of `ItemPairs`."""
  row_N = np.repeat(np.arange(scores_BA.shape[0]), np.diff(scores_BA.indptr))
  column_N, score_N = scores_BA.indices, scores_BA.data.astype(np.float32)
  kept_N = column_N != row_N + low
  if max_neighbours is not None:
    score_N[~kept_N] = 0  # an item is no neighbour of itself
    for row in np.flatnonzero(np.diff(scores_BA.indptr) > max_neighbours):
      cells = slice(*scores_BA.indptr[row : row + 2])
      kept_N[cells] &= score_N[cells] >= -np.partition(-score_N[cells], max_neighbours - 1)[
        max_neighbours - 1
      ]
  row_N, column_N, score_N = row_N[kept_N], column_N[kept_N], score_N[kept_N]
  order = np.lexsort((column_N, -score_N, row_N))
  if max_neighbours is not None:  # ties with the last one
    rank_N = np.arange(len(order)) - np.searchsorted(row_N, row_N)
    order = order[rank_N < max_neighbours]
  item_N = (row_N[order] + low).astype(np.int32)
  return item_N, column_N[order].astype(np.int32), score_N[order]
