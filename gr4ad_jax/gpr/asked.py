"""The requests that stage 3 makes candidates for: those of the log, and those that are to come.

Anticipatory request rehearsal (ARR): a user who opens the app every few hours will ask again soon.
So the last day of training is walked through for every user, and at each stop a request is made up
from what was known by then. Nobody answered it, but whoever prices candidates can. Source: GPR 3.3.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gr4ad_jax.data.records import DAY_S
from gr4ad_jax.data.sequences import Example, ExampleMaker
from gr4ad_jax.data.splits import SPLITS

HOUR_S = 3_600
PEAK_S, OFF_PEAK_S = 2 * HOUR_S, 4 * HOUR_S
HIGH_ACTIVITY = 0.8  # quantile of requests a day from which a user is asked as often as can be
MOST_FEATURES = 20  # latest requests, of which one lends its features
_STREAM = 0x415252  # of random numbers, apart from those of the pushes


class Logged(NamedTuple):
  """N requests of the training split that showed an ad, engaged with or not, by number."""

  number_N: np.ndarray  # int64, of the logs, ascending
  row_N: np.ndarray  # int64, their first events
  user_N: np.ndarray  # int32
  time_s_N: np.ndarray  # int64, unix seconds


def logged_requests(users: ExampleMaker) -> Logged:
  """Finds them in the logs."""
  events = users.logs.events
  rows = np.flatnonzero(events.ad >= 0)
  number_N, first_N = np.unique(events.request[rows], return_index=True)
  learned_N = users.split_R[number_N] == SPLITS.index("train")
  number_N, row_N = number_N[learned_N], rows[first_N[learned_N]]
  return Logged(number_N, row_N, events.user[row_N], users.first_s_R[number_N])


class Rehearsals(NamedTuple):
  """M requests that are made up: each with the features of a request that its user made before."""

  user_M: np.ndarray  # int32
  time_s_M: np.ndarray  # int64, unix seconds
  row_M: np.ndarray  # int64, the event that lends the request's features


def rehearsals_of(logged: Logged, *, seed: int) -> Rehearsals:
  """Stops of all users in the last day of training.

  A user whose requests a day are among the highest fifth is asked every two hours where the hour of
  the day has more requests than the median hour, every four where it has not; a user with a share
  of their rate that much more rarely, but every day. The first stop lies anywhere in the first
  interval. A stop before the user's first request is none.

  Args:
    logged: of the log.
    seed: of first stops, and of which request lends its features.
  """
  by_user = np.lexsort((logged.time_s_N, logged.user_N))
  asked = Logged(*(x[by_user] for x in logged))
  user_U, start_U, count_U = np.unique(asked.user_N, return_index=True, return_counts=True)
  end_s = int(asked.time_s_N.max(initial=0)) + 1
  rarer_U = np.maximum(np.quantile(count_U, HIGH_ACTIVITY) / count_U, 1.0)
  traffic_H = np.bincount(asked.time_s_N // HOUR_S % 24, minlength=24)
  usual_s_H = np.where(traffic_H > np.median(traffic_H), PEAK_S, OFF_PEAK_S)

  def interval_s(time_s_U: np.ndarray) -> np.ndarray:
    return np.minimum(usual_s_H[time_s_U // HOUR_S % 24] * rarer_U, DAY_S).astype(np.int64)

  rng = np.random.default_rng([seed, _STREAM])
  time_s_U = np.full(len(user_U), end_s - DAY_S)
  time_s_U += (rng.random(len(user_U)) * interval_s(time_s_U)).astype(np.int64)
  stops = []
  while (time_s_U < end_s).any():
    at_U = np.flatnonzero(time_s_U < end_s)
    stops.append((at_U, time_s_U[at_U]))
    time_s_U = time_s_U + interval_s(time_s_U)
  at_M, time_s_M = (np.concatenate(parts) for parts in zip(*stops, strict=True))
  # Requests lie by user, then by time: so one number tells both.
  number_N = np.repeat(np.arange(len(user_U)), count_U) * end_s + asked.time_s_N
  before_M = np.searchsorted(number_N, at_M * end_s + time_s_M) - start_U[at_M]
  ago_M = 1 + rng.integers(0, np.clip(before_M, 1, MOST_FEATURES))
  kept = before_M > 0
  return Rehearsals(
    user_U[at_M][kept], time_s_M[kept],
    asked.row_N[(start_U[at_M] + before_M - ago_M)[kept]],
  )


class TrainingRequests:
  """What candidates are made for. Numbers behind those of the logs are rehearsals."""

  def __init__(self, users: ExampleMaker, *, rehearsal_share: float = 0.0, seed: int = 0):
    """Finds them; makes no context yet.

    Args:
      users: what the users of the logs did, and to which split each request belongs.
      rehearsal_share: of what is drawn, the share of rehearsals; 0 = none.
      seed: of rehearsals.
    """
    self._users, self._share = users, rehearsal_share
    self.logged = logged_requests(users)
    self.rehearsals = rehearsals_of(self.logged, seed=seed) if rehearsal_share else None

  def draw(self, rng: np.random.Generator, wanted: int) -> np.ndarray:
    """Numbers of distinct requests, int64, ascending; fewer where there are fewer."""
    first, made_up = len(self._users.first_s_R), np.zeros(0, np.int64)
    if self.rehearsals is not None:
      most = min(int(wanted * self._share), len(self.rehearsals.user_M))
      made_up = first + rng.permutation(len(self.rehearsals.user_M))[:most]
    logged = rng.permutation(self.logged.number_N)[: wanted - len(made_up)]
    return np.sort(np.concatenate([logged, made_up]))

  def context(self, request: int) -> Example:
    """Of a request by its number; no targets."""
    users, made_up = self._users, request - len(self._users.first_s_R)
    if made_up >= 0:
      user, time_s, row = (int(x[made_up]) for x in self.rehearsals)
      request = -1
    else:
      at = np.searchsorted(self.logged.number_N, request)
      user, time_s, row = (
        int(x[at]) for x in (self.logged.user_N, self.logged.time_s_N, self.logged.row_N)
      )
    return users.past(user).before(
      time_s, config=users.config, feature_F=users.feature(user, row), user=user, request=request,
      split=SPLITS.index("train"),
    )
