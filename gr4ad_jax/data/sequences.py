"""One user's events -> one example per request: distinct histories and the ads engaged with.

Histories hold each ad (content) once, most recent first, with how often it was met and how long
ago; only events strictly before the request count. Targets are the ads clicked or converted in a
request; impressions alone are not (VSL logs prefer positive engagements, reference section 3).
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from typing import Literal

import numpy as np

from gr4ad_jax.data.records import Action, Logs
from gr4ad_jax.data.validation import LogError

SPLITS = ("train", "validation", "test")
NUM_COUNT_BUCKETS = 16
NUM_AGE_BUCKETS = 32
NUM_ORGANIC_BUCKETS = 8192


@dataclasses.dataclass(frozen=True)
class SequenceConfig:
  """How logs become examples; stored beside them."""

  split: Literal["time", "leave_one_out"] = "time"
  """Cut by time, or per user: last request = test, the one before = validation."""
  train_start_s: float = 0.0
  """Unix seconds (time split): earlier requests are only history, nothing is learned from them."""
  validation_start_s: float = 0.0
  """Unix seconds (time split): requests from here on validate."""
  test_start_s: float = 0.0
  """Unix seconds (time split): requests from here on test."""
  max_ad_history: int = 96
  """Distinct ads kept, most recent first."""
  max_organic_history: int = 96
  """Distinct organic contents kept, most recent first."""
  num_trending: int = 64
  """Currently most engaged ads shown to every request; 0 = none (needs real times)."""
  max_targets: int = 4
  """Targets per example; a larger request gives several examples."""

  def __post_init__(self):
    for name in ("max_ad_history", "max_organic_history", "max_targets"):
      if getattr(self, name) < 1:
        raise ValueError(f"sequences.{name}={getattr(self, name)}: must be at least 1")
    if self.num_trending < 0:
      raise ValueError(f"sequences.num_trending={self.num_trending}: must not be negative")
    if self.num_trending and self.split == "leave_one_out":
      raise ValueError(
        f"sequences.num_trending={self.num_trending}: must be 0 with leave_one_out, where the "
        "held-out items of other users would count"
      )
    starts = (self.train_start_s, self.validation_start_s, self.test_start_s)
    if self.split == "time" and sorted(starts) != list(starts):
      raise ValueError(
        f"sequences.test_start_s={self.test_start_s}: needs train_start_s <= validation_start_s "
        f"<= test_start_s, has {starts}"
      )


def time_split(
  logs: Logs, *, validation_days: float, test_days: float, train_days: float | None = None
) -> SequenceConfig:
  """A time split that ends with `test_days` of test after `validation_days` of validation.

  With `train_days`, only that many days before them are learned from; earlier ones are history.

  Raises:
    LogError: the log is shorter than that.
  """
  end_s = int(logs.events.time_s.max()) + 1
  begin_s = int(logs.events.time_s.min())
  test_start_s = end_s - test_days * 86400
  validation_start_s = test_start_s - validation_days * 86400
  if validation_start_s <= begin_s:
    span = datetime.timedelta(seconds=end_s - begin_s)
    raise LogError(
      f"{logs.source}: the log spans {span}; {validation_days:g} validation and {test_days:g} test "
      "days leave nothing to train on"
    )
  train_start_s = validation_start_s - train_days * 86400 if train_days else 0.0
  return SequenceConfig(
    train_start_s=max(0.0, train_start_s), validation_start_s=validation_start_s,
    test_start_s=test_start_s,
  )


@dataclasses.dataclass(frozen=True)
class Example:
  """One request (or a part of one with many targets); C <= max_targets, T and O as they come.

  Attributes:
    request, user: int, numbers in the logs.
    split: 0 train, 1 validation, 2 test.
    time_s: unix seconds of the request's first event.
    past_value: currency, the user's ad revenue before the request.
    feature_F: int32, user then request features, 0 = unknown.
    ad_T, organic_O: int32 ad and content numbers, distinct, most recent first.
    ad_count_T, ad_age_T, organic_count_O, organic_age_O: uint8 buckets.
    target_C: int32 ad numbers, distinct.
    action_C: int8, deepest Action of each target in this request.
    value_C: float32 currency, summed over the request.
    ecpm_C: float32 logged eCPM, the largest of the request, NaN = none.
    new_C: bool, the user met this ad's product never before, promoted or not.
  """

  request: int
  user: int
  split: int
  time_s: int
  past_value: float
  feature_F: np.ndarray
  ad_T: np.ndarray
  ad_count_T: np.ndarray
  ad_age_T: np.ndarray
  organic_O: np.ndarray
  organic_count_O: np.ndarray
  organic_age_O: np.ndarray
  target_C: np.ndarray
  action_C: np.ndarray
  value_C: np.ndarray
  ecpm_C: np.ndarray
  new_C: np.ndarray


def count_bucket(count: np.ndarray) -> np.ndarray:
  """Half-octave bucket of a count >= 1: 1, 2, 3, 4, 6, 8, 12, ... -> uint8 in 0..15."""
  bucket = np.floor(2 * np.log2(np.maximum(count, 1)) + 1e-6)
  return np.minimum(bucket, NUM_COUNT_BUCKETS - 1).astype(np.uint8)


def age_bucket(age_s: np.ndarray) -> np.ndarray:
  """Half-octave bucket of 1 + hours: an hour to five years -> uint8 in 0..31."""
  bucket = np.floor(2 * np.log2(1 + np.maximum(age_s, 0) / 3600) + 1e-6)
  return np.minimum(bucket, NUM_AGE_BUCKETS - 1).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class FeatureVocabulary:
  """Values of each categorical feature; number = position + 1, 0 = unknown or not in training."""

  user: dict[str, list[str]]
  request: dict[str, list[str]]

  @property
  def sizes(self) -> tuple[int, ...]:
    """Values of each feature, the unknown included."""
    return tuple(len(v) + 1 for group in (self.user, self.request) for v in group.values())

  @property
  def names(self) -> tuple[str, ...]:
    """Feature names in the order of `feature_F`."""
    return (*self.user, *self.request)


def build_feature_vocabulary(logs: Logs, train_E: np.ndarray) -> FeatureVocabulary:
  """Feature values: of users from their table, of requests from the training events `train_E`."""
  def values(column: np.ndarray) -> list[str]:
    return sorted(set(column.tolist()) - {""})

  return FeatureVocabulary(
    {name: values(column_U) for name, column_U in logs.users.features.items()},
    {name: values(column_E[train_E]) for name, column_E in logs.events.features.items()},
  )


def _encode(column: np.ndarray, values: list[str]) -> np.ndarray:
  number = {value: i + 1 for i, value in enumerate(values)}
  return np.array([number.get(value, 0) for value in column.tolist()], np.int32)


class ExampleMaker:
  """Cuts logs into examples; holds the numbered features and split bounds."""

  def __init__(
    self, logs: Logs, config: SequenceConfig, *, split_R: np.ndarray | None = None,
    vocabulary: FeatureVocabulary | None = None,
  ):
    """Prepares per-request facts.

    Args:
      logs: with every event that may stand in a history.
      config: limits, and how requests are split.
      split_R: int8, the split of every request, -1 = only history; None = by the config. A split
        may then be empty.
      vocabulary: feature values; None = those of these logs.

    Raises:
      LogError: no engaged ad event, or a split without requests.
    """
    self.logs, self.config = logs, config
    events = logs.events
    self.engaged_E = (events.ad >= 0) & (events.action >= Action.CLICK)
    if not self.engaged_E.any():
      raise LogError(f"{logs.source}: no ad was clicked or converted; there is nothing to learn")
    num_requests = int(events.request.max()) + 1
    self.first_s_R = np.full(num_requests, np.iinfo(np.int64).max)
    np.minimum.at(self.first_s_R, events.request, events.time_s)
    self.split_R = self._split_requests() if split_R is None else split_R
    split = self.split_R[np.unique(events.request[self.engaged_E])]
    counts = np.bincount(split[split >= 0], minlength=3)
    for name, count in zip(SPLITS, counts, strict=True):
      if not count and split_R is None:
        raise LogError(f"{logs.source}: the {name} split holds no request with an engaged ad")
    self.vocabulary = vocabulary or build_feature_vocabulary(
      logs, self.split_R[events.request] == 0
    )
    self._user_feature_UF = self._stack(
      [_encode(c, v) for c, v in zip(logs.users.features.values(), self.vocabulary.user.values(),
                                     strict=True)], len(logs.users.user_id))
    self._request_feature_EF = self._stack(
      [_encode(c, v) for c, v in zip(events.features.values(), self.vocabulary.request.values(),
                                     strict=True)], len(events.user))
    self.request_counts = dict(zip(SPLITS, counts.tolist(), strict=True))
    self._user_bounds = np.searchsorted(events.user, np.arange(len(logs.users.user_id) + 1))

  @staticmethod
  def _stack(columns: list[np.ndarray], rows: int) -> np.ndarray:
    return np.stack(columns, axis=1) if columns else np.zeros((rows, 0), np.int32)

  def _split_requests(self) -> np.ndarray:
    """[R] int8 split of every request, -1 = only history.

    Leave-one-out gives users with fewer than 3 requests to training.
    """
    events, config = self.logs.events, self.config
    first_s_R, num_requests = self.first_s_R, len(self.first_s_R)
    if config.split == "time":
      cuts = [config.train_start_s, config.validation_start_s, config.test_start_s]
      return np.searchsorted(cuts, first_s_R, side="right").astype(np.int8) - 1
    user_R = np.zeros(num_requests, np.int32)
    user_R[events.request] = events.user
    request = np.unique(events.request[self.engaged_E])
    request = request[np.lexsort((request, first_s_R[request], user_R[request]))]
    user = user_R[request]
    end = np.append(user[1:] != user[:-1], True)
    split_R = np.zeros(num_requests, np.int8)
    last = np.flatnonzero(end)
    length = np.diff(np.append(-1, last))
    split_R[request[last[length >= 3]]] = 2
    split_R[request[last[length >= 3] - 1]] = 1
    return split_R

  def user_examples(self, user: int, split: int) -> Iterator[Example]:
    """Examples of one user in one split (a number of SPLITS), in time order."""
    events, config = self.logs.events, self.config
    rows = self._rows(user)
    ad_rows = rows.start + np.flatnonzero(self.engaged_E[rows])
    requests = self._in_time(np.unique(events.request[ad_rows]), split)
    if not requests.size:
      return
    past = self.past(user)
    seen, seen_s = _first_met(
      np.append(past.ads, self.logs.contents.ad[past.organics]),
      np.append(past.ad_time_s, past.organic_time_s),
    )
    ad_requests = events.request[ad_rows]
    for request in requests:
      now_s = int(self.first_s_R[request])
      mine = ad_rows[ad_requests == request]
      target, inverse = np.unique(events.ad[mine], return_inverse=True)
      value = np.bincount(inverse, weights=events.value[mine].astype(np.float64))
      action = np.zeros(len(target), np.int8)
      np.maximum.at(action, inverse, events.action[mine])
      ecpm = np.full(len(target), np.nan, np.float32)
      np.fmax.at(ecpm, inverse, events.ecpm[mine])
      new = seen_s[np.searchsorted(seen, target)] >= now_s
      context = past.before(
        now_s, config=config, feature_F=self.feature(user, mine[0]), user=user,
        request=int(request), split=split,
      )
      for i in range(0, len(target), config.max_targets):
        part = slice(i, i + config.max_targets)
        yield dataclasses.replace(
          context, target_C=target[part].astype(np.int32), action_C=action[part],
          value_C=value[part].astype(np.float32), ecpm_C=ecpm[part], new_C=new[part],
        )

  def impressions(self, user: int, split: int) -> Iterator[tuple[Example, np.ndarray]]:
    """Contexts of one user's requests that showed an ad, engaged or not, in time order.

    Yields:
      The context without targets, and the rows of the request's ad events.
    """
    events, rows = self.logs.events, self._rows(user)
    shown_rows = rows.start + np.flatnonzero(events.ad[rows] >= 0)
    shown_requests = events.request[shown_rows]
    requests = self._in_time(np.unique(shown_requests), split)
    if not requests.size:
      return
    past = self.past(user)
    for request in requests:
      mine = shown_rows[shown_requests == request]
      yield past.before(
        int(self.first_s_R[request]), config=self.config, feature_F=self.feature(user, mine[0]),
        user=user, request=int(request), split=split,
      ), mine

  def latest_context(self, user: int) -> Example:
    """The context that a request after the last event of `user` would have; no targets."""
    events, rows = self.logs.events, self._rows(user)
    if rows.start == rows.stop:
      now_s, feature_row = int(events.time_s.max()) + 1, None
    else:
      now_s, feature_row = int(events.time_s[rows.stop - 1]) + 1, rows.stop - 1
    return self.past(user).before(
      now_s, config=self.config, feature_F=self.feature(user, feature_row), user=user
    )

  def past(self, user: int) -> Past:
    """Everything that one user did."""
    events, rows = self.logs.events, self._rows(user)
    time_s_E, content_E = events.time_s[rows], events.content[rows]
    engaged_E, organic_E = self.engaged_E[rows], content_E >= 0
    return Past(
      events.ad[rows][engaged_E], time_s_E[engaged_E],
      events.value[rows][engaged_E].astype(np.float64), content_E[organic_E], time_s_E[organic_E],
    )

  def feature(self, user: int, row: int | None) -> np.ndarray:
    """int32 [F] of a request: the user's features, then those of event `row` (None = unknown)."""
    request_F = np.zeros(self._request_feature_EF.shape[1], np.int32)
    if row is not None:
      request_F = self._request_feature_EF[row]
    return np.append(self._user_feature_UF[user], request_F).astype(np.int32)

  def _rows(self, user: int) -> slice:
    return slice(int(self._user_bounds[user]), int(self._user_bounds[user + 1]))

  def _in_time(self, requests: np.ndarray, split: int) -> np.ndarray:
    requests = requests[self.split_R[requests] == split]
    return requests[np.argsort(self.first_s_R[requests], kind="stable")]


@dataclasses.dataclass(frozen=True)
class Past:
  """What a user did with ads and contents, in time order, ready to be cut at any time.

  Attributes:
    ads, ad_time_s, ad_value: ads engaged with; unix seconds; currency.
    organics, organic_time_s: contents met.
  """

  ads: np.ndarray
  ad_time_s: np.ndarray
  ad_value: np.ndarray
  organics: np.ndarray
  organic_time_s: np.ndarray

  def merged(self, other: Past) -> Past:
    """Both pasts of one user as one; at equal times `other` comes later."""
    ad = np.argsort(np.append(self.ad_time_s, other.ad_time_s), kind="stable")
    organic = np.argsort(np.append(self.organic_time_s, other.organic_time_s), kind="stable")
    return Past(**{
      field.name: np.append(getattr(self, field.name), getattr(other, field.name))[
        organic if field.name.startswith("organic") else ad
      ]
      for field in dataclasses.fields(Past)
    })

  def before(
    self, now_s: int, *, config: SequenceConfig, feature_F: np.ndarray, user: int = -1,
    request: int = -1, split: int = -1,
  ) -> Example:
    """The context of a request at that time, without targets: what came strictly earlier."""
    num_ads = int(np.searchsorted(self.ad_time_s, now_s))
    num_organics = int(np.searchsorted(self.organic_time_s, now_s))
    history = _distinct(
      self.ads[:num_ads], self.ad_time_s[:num_ads], now_s, config.max_ad_history
    )
    organic = _distinct(
      self.organics[:num_organics], self.organic_time_s[:num_organics], now_s,
      config.max_organic_history,
    )
    empty = np.zeros(0)
    return Example(
      request, user, split, now_s, float(self.ad_value[:num_ads].sum()), feature_F,
      *history, *organic, empty.astype(np.int32), empty.astype(np.int8),
      empty.astype(np.float32), empty.astype(np.float32), empty.astype(bool),
    )


def _first_met(item: np.ndarray, time_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Distinct items in ascending order and the time each was met first."""
  order = np.argsort(time_s, kind="stable")
  unique, first = np.unique(item[order], return_index=True)
  return unique, time_s[order[first]]


def _distinct(
  item: np.ndarray, time_s: np.ndarray, now_s: int, limit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Distinct items of a time-sorted history, most recent first, with count and age buckets."""
  unique, last, count = np.unique(item[::-1], return_index=True, return_counts=True)
  order = np.argsort(last, kind="stable")[:limit]
  age_s = now_s - time_s[::-1][last[order]]
  return unique[order].astype(np.int32), count_bucket(count[order]), age_bucket(age_s)
