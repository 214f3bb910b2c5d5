"""One user's events -> one example per request: distinct histories and the ads engaged with.

Histories hold each ad (content) once, most recent first, with how often it was met and how long
ago; only events strictly before the request count. Targets are the ads clicked or converted in a
request; impressions alone are not.

Source: GR4AD, arXiv 2602.22732, 3.3: logs for VSL prefer positive engagements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from gr4ad_jax.data.records import EventTable, Logs
from gr4ad_jax.data.shortlist import met_ads
from gr4ad_jax.data.splits import SequenceConfig, require_requests, split_requests

NUM_COUNT_BUCKETS = 16
NUM_AGE_BUCKETS = 32


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
    met_P: int32, ads whose product the user engaged with, promoted or organic, most counted first.
    met_count_PH: float16 [P, H], their decayed counts, see `shortlist.met_ads`.
    target_C: int32 ad numbers, distinct.
    action_C: int8, deepest Action of each target in this request.
    value_C: float32 currency, summed over the request.
    ecpm_C: float32 logged eCPM, the largest of the request, NaN = none.
    new_C: bool, the user met this ad's product never before, promoted or not.
    num_targets: int, of the whole request, whose targets may be split over several examples.
    past: what the user did before the request, event by event, where the logs alone do not tell:
      of a request that is made now. None = the user's events of the logs before `time_s`.
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
  met_P: np.ndarray
  met_count_PH: np.ndarray
  target_C: np.ndarray
  action_C: np.ndarray
  value_C: np.ndarray
  ecpm_C: np.ndarray
  new_C: np.ndarray
  num_targets: int = 0
  past: Past | None = None


def count_bucket(count: np.ndarray) -> np.ndarray:
  """Half-octave bucket of a count >= 1: 1, 2, 3, 4, 6, 8, 12, ... -> uint8 in 0..15."""
  # The logarithm of a power of two may come out a hair too small, on some machines.
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


def feature_values(columns: dict[str, np.ndarray]) -> dict[str, set[str]]:
  """Known values of categorical columns."""
  return {name: set(column.tolist()) - {""} for name, column in columns.items()}


def training_feature_values(events: EventTable, split_R: np.ndarray) -> dict[str, set[str]]:
  """Known values of request features in training requests; `split_R` numbers SPLITS."""
  learned_E = split_R[events.request] == 0
  return feature_values({name: column_E[learned_E] for name, column_E in events.features.items()})


def feature_vocabulary(
  user: dict[str, set[str]], request: dict[str, set[str]]
) -> FeatureVocabulary:
  """Numbers values: those of the user table and of training events."""
  return FeatureVocabulary(*(
    {name: sorted(values) for name, values in group.items()} for group in (user, request)
  ))


def _encode(
  columns: dict[str, np.ndarray], vocabulary: dict[str, list[str]], num_rows: int
) -> np.ndarray:
  """int32 [rows, F], the number of every value."""
  encoded = np.zeros((num_rows, len(columns)), np.int32)
  for place, (column, values) in enumerate(zip(columns.values(), vocabulary.values(), strict=True)):
    number = {value: i for i, value in enumerate(values, 1)}
    encoded[:, place] = [number.get(value, 0) for value in column.tolist()]
  return encoded


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
      split_R: int8, the split of every request, -1 = only history; None = by the config.
      vocabulary: feature values; None = those of these logs. Where either is given, the logs may be
        a part, and a split may be empty.

    Raises:
      LogError: no engaged ad event, or a split without requests.
    """
    self.logs, self.config = logs, config
    events = logs.events
    splits = split_requests(events, config, split_R)
    self.engaged_E, self.first_s_R = splits.engaged_E, splits.first_s_R
    self.split_R = splits.split_R
    if split_R is None and vocabulary is None:
      require_requests(splits.counts, engaged=self.engaged_E.any(), source=logs.source)
    self.vocabulary = vocabulary or feature_vocabulary(
      feature_values(logs.users.features), training_feature_values(events, self.split_R)
    )
    self._user_feature_UF = _encode(
      logs.users.features, self.vocabulary.user, len(logs.users.user_id)
    )
    self._request_feature_EF = _encode(
      events.features, self.vocabulary.request, len(events.user)
    )
    self._user_bounds = np.searchsorted(events.user, np.arange(len(logs.users.user_id) + 1))

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
      np.append(past.ads, past.organic_ads), np.append(past.ad_time_s, past.organic_time_s)
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
      new = seen_s[np.searchsorted(seen, target)] >= now_s  # met first in this request
      context = past.before(
        now_s, config=config, feature_F=self.feature(user, mine[0]), user=user,
        request=int(request), split=split,
      )
      for i in range(0, len(target), config.max_targets):
        part = slice(i, i + config.max_targets)
        yield dataclasses.replace(
          context, target_C=target[part].astype(np.int32), action_C=action[part],
          value_C=value[part].astype(np.float32), ecpm_C=ecpm[part], new_C=new[part],
          num_targets=len(target),
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
    last = rows.stop - 1 if rows.start < rows.stop else None
    now_s = int(events.time_s.max() if last is None else events.time_s[last]) + 1
    return self.past(user).request(
      now_s, config=self.config, feature_F=self.feature(user, last), user=user
    )

  def past(self, user: int) -> Past:
    """Everything that one user did."""
    events, rows = self.logs.events, self._rows(user)
    time_s_E, content_E = events.time_s[rows], events.content[rows]
    engaged_E, organic_E = self.engaged_E[rows], content_E >= 0
    request_N = events.request[rows][engaged_E]
    return Past(
      events.ad[rows][engaged_E], time_s_E[engaged_E],
      events.value[rows][engaged_E].astype(np.float64), events.action[rows][engaged_E], request_N,
      self.first_s_R[request_N], self._request_feature_EF[rows][engaged_E],
      content_E[organic_E], time_s_E[organic_E], self.logs.contents.ad[content_E[organic_E]],
    )

  def feature(self, user: int, row: int | None) -> np.ndarray:
    """int32 [F] of a request: the user's features, then those of event `row` (None = unknown)."""
    feature_EF = self._request_feature_EF
    request_F = np.zeros(feature_EF.shape[1]) if row is None else feature_EF[row]
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
    ad_action: int8, an Action.
    ad_request: which of them belong to one request: numbers of no meaning beyond one user's past.
    ad_request_s: unix seconds of that request's first event.
    ad_feature: int32 [N, F], its request features, 0 = unknown.
    organics, organic_time_s: contents met.
    organic_ads: ads of the same products, -1 = none.
  """

  ads: np.ndarray
  ad_time_s: np.ndarray
  ad_value: np.ndarray
  ad_action: np.ndarray
  ad_request: np.ndarray
  ad_request_s: np.ndarray
  ad_feature: np.ndarray
  organics: np.ndarray
  organic_time_s: np.ndarray
  organic_ads: np.ndarray

  def merged(self, other: Past) -> Past:
    """Both pasts of one user as one; at equal times `other` comes later."""
    ad = np.argsort(np.append(self.ad_time_s, other.ad_time_s), kind="stable")
    organic = np.argsort(np.append(self.organic_time_s, other.organic_time_s), kind="stable")
    return Past(**{
      field.name: np.concatenate([getattr(self, field.name), getattr(other, field.name)])[
        organic if field.name.startswith("organic") else ad
      ]
      for field in dataclasses.fields(Past)
    })

  def until(self, now_s: int) -> Past:
    """What came strictly earlier; views, no copies."""
    num_ads = int(np.searchsorted(self.ad_time_s, now_s))
    num_organics = int(np.searchsorted(self.organic_time_s, now_s))
    return Past(**{
      field.name: getattr(self, field.name)[
        : num_organics if field.name.startswith("organic") else num_ads
      ]
      for field in dataclasses.fields(Past)
    })

  def request(self, now_s: int, **about: Any) -> Example:
    """As `before`, with this past itself: of a request that is made now."""
    return dataclasses.replace(self.before(now_s, **about), past=self.until(now_s))

  def before(
    self, now_s: int, *, config: SequenceConfig, feature_F: np.ndarray, user: int = -1,
    request: int = -1, split: int = -1,
  ) -> Example:
    """The context of a request at that time, without targets: what came strictly earlier."""
    past = self.until(now_s)
    history = _distinct(past.ads, past.ad_time_s, now_s, config.max_ad_history)
    organic = _distinct(past.organics, past.organic_time_s, now_s, config.max_organic_history)
    met = met_ads(
      past.ads, past.ad_time_s, past.organic_ads, past.organic_time_s, now_s=now_s,
      limit=config.max_met_ads,
    )
    empty = np.zeros(0)
    return Example(
      request, user, split, now_s, float(past.ad_value.sum()), feature_F,
      *history, *organic, *met, empty.astype(np.int32), empty.astype(np.int8),
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
  # Seen from the end, the first place of an item is where it was met last.
  unique, last, count = np.unique(item[::-1], return_index=True, return_counts=True)
  order = np.argsort(last, kind="stable")[:limit]
  age_s = now_s - time_s[::-1][last[order]]
  return unique[order].astype(np.int32), count_bucket(count[order]), age_bucket(age_s)
