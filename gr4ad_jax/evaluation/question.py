"""What every baseline answers, and how scores become lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from gr4ad_jax.data.interactions import Interactions, count_histories
from gr4ad_jax.search.ranking import EvalRequests

_MAX_CELLS = 1 << 23  # scores held at once, requests x ads


@dataclass(frozen=True)
class Question:
  """Which ads each request's user engages with next.

  Attributes:
    interactions: engagements of all users; those of the future may be among them.
    requests: R requests, none before train_end_s.
    num_ads: ads of the catalogue.
    k: length of the lists.
    train_end_s: unix s, events from then on do not enter counts over all users. One for all; or one
      per user, int64 [num_users]; or None, leave-one-out: the first request of each user, and no
      end for users without a request.
    content_AN: unit rows of what the ads say, sparse: `transitions.content_terms`; None = none.
    without_seen: prospecting: lists leave out every ad whose product the user has engaged with
      before the request, promoted or not.
  """

  interactions: Interactions
  requests: EvalRequests
  num_ads: int
  k: int
  train_end_s: float | np.ndarray | None
  content_AN: sp.csr_matrix | None = None
  without_seen: bool = False

  @cached_property
  def end_s_U(self) -> np.ndarray:
    """See `end_s_of_users`."""
    return end_s_of_users(self.interactions, self.requests, self.train_end_s)

  @property
  def times_are_real(self) -> bool:
    """Whether times of different users can be compared: where one time ends training for all."""
    return self.train_end_s is not None and np.ndim(self.train_end_s) == 0


def end_s_of_users(
  interactions: Interactions, requests: EvalRequests, train_end_s: float | np.ndarray | None
) -> np.ndarray:
  """int64 [users]: when each user's events stop to count, from train_end_s as in `Question`.

  Raises:
    ValueError: a user without an end, a request before its user's end.
  """
  num_users = 1 + int(max(interactions.user_E.max(initial=-1), requests.user_R.max()))
  if train_end_s is None:
    log_end_s = 1 + max(interactions.time_s_E.max(initial=0), requests.time_s_R.max())
    end_s_U = np.full(num_users, log_end_s, np.int64)
    np.minimum.at(end_s_U, requests.user_R, requests.time_s_R)
  elif np.ndim(train_end_s) == 0:
    end_s_U = np.full(num_users, np.ceil(train_end_s), np.int64)
  else:
    end_s_U = np.asarray(train_end_s, np.int64)
    if len(end_s_U) < num_users:
      raise ValueError(f"train_end_s has {len(end_s_U)} entries for {num_users} users")
  early_R = requests.time_s_R < end_s_U[requests.user_R]
  if early_R.any():
    raise ValueError(
      f"request {np.argmax(early_R)} is earlier than train_end_s: its future would be counted"
    )
  return end_s_U


def draw_requests(requests: EvalRequests, most: int) -> EvalRequests:
  """Some of the requests, always the same, where there are more than `most`."""
  return requests.rows(np.random.default_rng(0).permutation(len(requests.user_R))[:most])


def blocks(question: Question) -> Iterator[slice]:
  """The requests, so many at once that a score of every ad for each takes little memory."""
  num_requests, step = len(question.requests.user_R), max(1, _MAX_CELLS // question.num_ads)
  for at in range(0, num_requests, step):
    yield slice(at, min(at + step, num_requests))


def rank_by_score(
  question: Question, score: Callable[[slice], np.ndarray], popular_A: np.ndarray
) -> np.ndarray:
  """Ranks ads by score; equal scores, zero included, by popularity.

  Args:
    question: what is asked.
    score: some rows of the requests -> float32 >= 0 [rows, num_ads].
    popular_A: int64, every ad, the most popular first.

  Returns:
    ranked_RK: int32 ad indices, best first; -1 beyond the ads that may stand in the list.
  """
  requests, num_ads = question.requests, question.num_ads
  depth = min(question.k, num_ads)
  # One sortable number per score: the bits of a float32 >= 0 rise with it; below them the place in
  # the order of popularity, so that nothing is equal.
  tie_A = np.empty(num_ads, np.int64)
  tie_A[popular_A] = np.arange(num_ads)[::-1]
  ranked_RK = np.full((len(requests.user_R), question.k), -1, np.int32)
  for rows in blocks(question):
    key_RA = (score(rows).view(np.int32).astype(np.int64) << 32) | tie_A
    if question.without_seen:
      key_RA[seen_ads(question, rows)] = -1
    top_RK = np.argpartition(key_RA, num_ads - depth, axis=1)[:, num_ads - depth :]
    top_key_RK = np.take_along_axis(key_RA, top_RK, axis=1)
    top_RK[top_key_RK < 0] = -1
    ranked_RK[rows, :depth] = np.take_along_axis(top_RK, np.argsort(-top_key_RK, axis=1), axis=1)
  return ranked_RK


def seen_ads(question: Question, rows: slice) -> tuple[np.ndarray, np.ndarray]:
  """Row among `rows` and ad of every product that a request's user has engaged with before it."""
  seen_RA = count_histories(
    question.interactions, user_R=question.requests.user_R[rows],
    time_s_R=question.requests.time_s_R[rows], num_ads=question.num_ads, half_life_s=None,
    organic_weight=1.0,
  )  # fmt: skip
  return seen_RA.nonzero()
