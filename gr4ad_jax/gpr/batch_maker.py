"""Users' pasts -> padded batches of GPR."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from gr4ad_jax.data.pipeline import look_up, with_rows
from gr4ad_jax.data.records import AdTable
from gr4ad_jax.data.sequences import Example, ExampleMaker
from gr4ad_jax.data.trending import Trending
from gr4ad_jax.gpr.batch import NUM_HOURS, NUM_WEEKDAYS, Batch, Context, Vocabulary
from gr4ad_jax.gpr.config import StreamConfig
from gr4ad_jax.gpr.groups import Groups, Requests, groups_of, requests_of
from gr4ad_jax.gpr.label_rows import LabelRow
from gr4ad_jax.gpr.legal_codes import LegalCodes, legal_codes
from gr4ad_jax.gpr.thoughts import Thoughts


@dataclasses.dataclass(frozen=True)
class BatchMaker:
  """Pads streams to one shape and replaces ads and contents by their codes.

  Attributes:
    stream: limits of a stream.
    users: what the users of the logs did.
    codes_AL: int32 SID codes of every ad.
    content_codes_OL: int32 codes of every organic content, -1 where it has none.
    codebook_sizes: codes of each level.
    value_mean, value_std: of what labels of training are worth, currency.
    thoughts: on the users; None = the run has none.
  """

  stream: StreamConfig
  users: ExampleMaker
  codes_AL: np.ndarray
  content_codes_OL: np.ndarray
  codebook_sizes: tuple[int, ...]
  value_mean: float = 0.0
  value_std: float = 1.0
  thoughts: Thoughts | None = None

  @property
  def vocabulary(self) -> Vocabulary:
    """Sizes that the model needs for these batches."""
    features = self.users.vocabulary
    user_sizes, request_sizes = (
      tuple(len(values) + 1 for values in group.values())
      for group in (features.user, features.request)
    )
    return Vocabulary(
      self.codebook_sizes, user_sizes, (*request_sizes, NUM_HOURS, NUM_WEEKDAYS),
      self.value_mean, self.value_std, 0 if self.thoughts is None else self.thoughts.size,
    )

  def with_ads(self, row_N: np.ndarray, ads: AdTable, code_NL: np.ndarray) -> BatchMaker:
    """The same with the SIDs of some ads; rows past the end follow without a gap."""
    return dataclasses.replace(self, codes_AL=with_rows(self.codes_AL, row_N, code_NL))

  def with_trending(self, trending: Trending) -> BatchMaker:
    """The same: a stream knows of one user alone."""
    return self

  def context(
    self, examples: Sequence[Example], *, user_ids: Sequence[str] | None = None
  ) -> Context:
    """What the model reads of the requests; see `ContextMaker`. Ids of users say nothing here."""
    num_user, last = len(self.users.vocabulary.user), self.stream.groups - 1
    context = self._context(
      np.stack([e.feature_F[:num_user] for e in examples]),
      [self._groups_before(e, e.feature_F[num_user:]) for e in examples],
    )
    if self.thoughts is None:
      return context
    return context._replace(thoughts=self.thoughts.seen(
      [(e.user, np.array([last]), np.array([e.time_s])) for e in examples],
      num_groups=self.stream.groups, most=self.stream.thoughts,
    ))

  def _groups_before(self, example: Example, feature_F: np.ndarray) -> Groups:
    """The stream up to an example's own request, of which nothing is known but its features."""
    past = example.past
    if past is None:
      past = self.users.past(example.user).until(example.time_s)
    before = requests_of(past)
    now = Requests(
      np.append(before.number, -1), np.append(before.time_s, example.time_s),
      np.concatenate([before.feature_RF, feature_F[None]]), [*before.rows, np.zeros(0, np.int64)],
    )
    return groups_of(
      past, now, last=len(before.rows), most=self.stream.groups, bundle=self.stream.bundle
    )

  def _context(self, user_BF: np.ndarray, streams: Sequence[Groups]) -> Context:
    num_groups, bundle, rows = self.stream.groups, self.stream.bundle, len(streams)

    def padded(field: str) -> np.ndarray:
      parts = [getattr(groups, field) for groups in streams]
      padded = np.full((rows, num_groups, *parts[0].shape[1:]), -1, np.int32)
      for row, part in zip(padded, parts, strict=True):
        row[num_groups - len(part) :] = part
      return padded

    def ages(field: str) -> np.ndarray:
      age_BG = np.full((rows, num_groups), -1, np.int32)
      for row, groups in zip(age_BG, streams, strict=True):
        time_s_G = getattr(groups, field)
        # An engagement of the last request itself may be later than it.
        age_s_G = np.clip(groups.time_s_G[-1] - time_s_G, 0, np.iinfo(np.int32).max)
        row[num_groups - len(age_s_G) :] = np.where(time_s_G < 0, -1, age_s_G)
      return age_BG

    flat = (rows, num_groups * bundle)
    return Context(
      user_BF=user_BF.astype(np.int32), request_BGF=padded("request_GF"),
      count_BG=padded("count_G"), gap_BG=padded("gap_G"), age_BG=ages("time_s_G"),
      ad_age_BG=ages("ad_time_s_G"),
      ad_code_BTL=look_up(self.codes_AL, padded("ad_GI").reshape(flat)),
      ad_action_BT=padded("action_GI").reshape(flat),
      organic_code_BOL=look_up(self.content_codes_OL, padded("organic_GJ").reshape(flat)),
    )

  def __call__(self, rows: Sequence[LabelRow]) -> Batch:
    """A training batch of rows of `label_rows.LabelRows`."""
    streams = [Groups(**{name: row[name] for name in Groups._fields}) for row in rows]
    group_BP = np.stack([row["group_P"] for row in rows])
    # Groups are counted from the first one that is there; padding stands before it.
    missing_B1 = self.stream.groups - np.array([[len(groups.time_s_G)] for groups in streams])
    target_BPN = np.stack([row["target_PN"] for row in rows])
    context = self._context(np.stack([row["user_F"] for row in rows]), streams)
    if self.thoughts is not None:
      asked_R = [np.unique(row["group_P"][row["group_P"] >= 0]) for row in rows]
      context = context._replace(thoughts=self.thoughts.seen(
        [
          (int(row["user"]), missing + asked, row["time_s_G"][asked])
          for row, asked, missing in zip(rows, asked_R, missing_B1[:, 0], strict=True)
        ],
        num_groups=self.stream.groups, most=self.stream.thoughts, most_asked=self.stream.labels,
      ))
    return Batch(
      context,
      np.where(group_BP < 0, -1, group_BP + missing_B1).astype(np.int32),
      look_up(self.codes_AL, target_BPN), self.legal.of(target_BPN),
      np.stack([row["worth_P"] for row in rows]),
      np.stack([row["weight_PN"] for row in rows]) if "weight_PN" in rows[0] else None,
    )

  @functools.cached_property
  def legal(self) -> LegalCodes:
    """Which codes lead on to an ad."""
    return legal_codes(self.codes_AL, max(self.codebook_sizes))

