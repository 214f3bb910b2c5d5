"""Rows to learn from: a part of one user's stream, with every engaged ad of a split as one label.

A row holds up to P consecutive labels of a user, so that the stream is read once for all of them;
each label stands in one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gr4ad_jax.data.sequences import ExampleMaker, Past
from gr4ad_jax.gpr.config import StreamConfig
from gr4ad_jax.gpr.groups import Requests, groups_of, requests_of
from gr4ad_jax.gpr.vaft import LabelWeights

LabelRow = dict[str, np.ndarray]
"""The fields of `groups.Groups`; `user` int64 number of the user; `user_F` int32 user features;
`group_P` int32, the group of each label counted from the row's first one, -1 = no label;
`target_PN` int32 ads, -1 = none; `worth_P` float32, what the label's engagement was worth,
currency; in stages that weigh labels `weight_PN` float32, w^V of each target, 0 = none."""


class LabelRows(Sequence[LabelRow]):
  """The rows of a split, in an order that says nothing: the same at every opening."""

  def __init__(
    self, users: ExampleMaker, split: int, *, stream: StreamConfig, num_heads: int,
    weights: LabelWeights | None = None,
  ):
    """Counts labels; makes no row yet.

    Args:
      users: what the users of the logs did, and to which split each request belongs.
      split: a number of `splits.SPLITS`.
      stream: limits of a row.
      num_heads: N; head j is told an ad of the j-th request from the label's on.
      weights: of labels; None = rows have none.
    """
    self._users, self._split = users, split
    self._stream, self._num_heads, self._weights = stream, num_heads, weights
    rows = []
    for user in range(len(users.logs.users.user_id)):
      past = users.past(user)
      of_split = users.split_R[past.ad_request] == split
      pairs = np.stack([past.ad_request[of_split], past.ads[of_split]])
      ends = np.arange(np.unique(pairs, axis=1).shape[1], 0, -stream.labels)
      rows += [(user, max(0, end - stream.labels), end) for end in ends.tolist()]
    self._row_N3 = np.random.default_rng(0).permutation(np.array(rows, np.int64).reshape(-1, 3))

  def __len__(self) -> int:
    return len(self._row_N3)

  def _labels(self, past: Past, requests: Requests) -> list[tuple[int, int]]:
    """Row of the request, and place among its ads, of every label of a user, in time order."""
    return [
      (at, place) for at, number in enumerate(requests.number)
      if self._users.split_R[number] == self._split
      for place in range(len(np.unique(past.ads[requests.rows[at]])))
    ]

  def __getitem__(self, row: int) -> LabelRow:
    user, first, end = self._row_N3[row].tolist()
    past = self._users.past(user)
    requests = requests_of(past)
    labels = self._labels(past, requests)[first:end]
    last = labels[-1][0]
    groups = groups_of(
      past, requests, last=last, most=self._stream.groups, bundle=self._stream.bundle
    )
    oldest = last + 1 - len(groups.time_s_G)
    group_P = np.full(self._stream.labels, -1, np.int32)
    target_PN = np.full((self._stream.labels, self._num_heads), -1, np.int32)
    worth_P = np.zeros(self._stream.labels, np.float32)
    weight_PN = np.zeros(target_PN.shape, np.float32)
    ads_of = {
      at: self._ads(past, requests, at)
      for at in range(labels[0][0], last + self._num_heads)
    }
    for label, (at, place) in enumerate(labels):
      group_P[label] = at - oldest
      for head in range(self._num_heads):
        ads = ads_of[at + head]
        if len(ads):
          target_PN[label, head] = ads[place % len(ads)]
          if self._weights is not None:
            weight_PN[label, head] = self._weights.of(
              int(requests.number[at + head]), target_PN[label, head]
            )
      mine = past.ads[requests.rows[at]] == target_PN[label, 0]
      worth_P[label] = past.ad_value[requests.rows[at]][mine].sum()
    num_user = len(self._users.vocabulary.user)
    user_F = self._users.feature(user, None)[:num_user]
    weights = {} if self._weights is None else {"weight_PN": weight_PN}
    return groups._asdict() | weights | {
      "user": np.array(user), "user_F": user_F, "group_P": group_P, "target_PN": target_PN,
      "worth_P": worth_P,
    }

  def _ads(self, past: Past, requests: Requests, at: int) -> np.ndarray:
    """Distinct ads of a request of this split, in an order that says nothing; none past the end."""
    if at >= len(requests.number) or self._users.split_R[requests.number[at]] != self._split:
      return np.zeros(0, np.int32)
    ads = np.unique(past.ads[requests.rows[at]])
    return np.random.default_rng(int(requests.number[at])).permutation(ads)


def as_it_is(row: LabelRow) -> LabelRow:
  """A row of `LabelRows` as the pipeline's rows: made, not read, it needs no parsing."""
  return row
