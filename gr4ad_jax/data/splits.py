"""Which requests train, validate and test, and the settings by which logs become examples."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Literal, NamedTuple

import numpy as np

from gr4ad_jax.config import Bounded, Count, CountOrZero, require
from gr4ad_jax.data.engagements import engaged_with_ad
from gr4ad_jax.data.records import DAY_S, EventTable, Logs
from gr4ad_jax.data.validation import LogError

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class SequenceConfig(Bounded, section="sequences"):
  """How logs become examples; stored beside them."""

  split: Literal["time", "leave_one_out"] = "time"
  """Cut by time, or per user: last request = test, the one before = validation."""
  train_start_s: float = 0.0
  """Unix seconds (time split): earlier requests are only history, nothing is learned from them."""
  validation_start_s: float = 0.0
  """Unix seconds (time split): requests from here on validate."""
  test_start_s: float = 0.0
  """Unix seconds (time split): requests from here on test."""
  max_ad_history: Count = 96
  """Distinct ads kept, most recent first."""
  max_organic_history: Count = 96
  """Distinct organic contents kept, most recent first."""
  max_met_ads: Count = 512
  """Ads kept whose products the user engaged with, each with its decayed counts."""
  num_trending: CountOrZero = 64
  """Currently most engaged ads shown to every request; 0 = none (needs real times)."""
  max_targets: Count = 4
  """Targets per example; a larger request gives several examples."""

  def _check(self):
    require(not self.num_trending or self.split == "time", "sequences.num_trending",
            self.num_trending,
            "must be 0 with leave_one_out, where the held-out items of other users would count")
    starts = (self.train_start_s, self.validation_start_s, self.test_start_s)
    require(self.split != "time" or sorted(starts) == list(starts), "sequences.test_start_s",
            self.test_start_s,
            f"needs train_start_s <= validation_start_s <= test_start_s, has {starts}")


def time_split(logs: Logs, **days: float | None) -> SequenceConfig:
  """`split_by_time` of logs in memory."""
  time_s = logs.events.time_s
  return split_by_time(int(time_s.min()), int(time_s.max()), source=logs.source, **days)


def split_by_time(
  begin_s: int, last_s: int, *, source: str, validation_days: float, test_days: float,
  train_days: float | None = None,
) -> SequenceConfig:
  """A time split that ends with `test_days` of test after `validation_days` of validation.

  With `train_days`, only that many days before them are learned from; earlier ones are history.

  Args:
    begin_s, last_s: unix seconds of the log's first and last event.
    source: of the log, for messages.
    validation_days, test_days, train_days: lengths.

  Raises:
    LogError: the log is shorter than that.
  """
  end_s = last_s + 1
  test_start_s = end_s - test_days * DAY_S
  validation_start_s = test_start_s - validation_days * DAY_S
  if validation_start_s <= begin_s:
    span = datetime.timedelta(seconds=end_s - begin_s)
    raise LogError(
      f"{source}: the log spans {span}; {validation_days:g} validation and {test_days:g} test "
      "days leave nothing to train on"
    )
  train_start_s = validation_start_s - train_days * DAY_S if train_days else 0.0
  return SequenceConfig(
    train_start_s=max(0.0, train_start_s), validation_start_s=validation_start_s,
    test_start_s=test_start_s,
  )


class RequestSplits(NamedTuple):
  """Facts of requests, which are numbered 0 to R-1.

  Attributes:
    engaged_E: bool, ad events clicked or converted.
    first_s_R: int64, unix seconds of the first event.
    split_R: int8, a number of SPLITS, -1 = only history.
    counts: [3] requests with an engaged ad in each split.
  """

  engaged_E: np.ndarray
  first_s_R: np.ndarray
  split_R: np.ndarray
  counts: np.ndarray


def split_requests(
  events: EventTable, config: SequenceConfig, split_R: np.ndarray | None = None
) -> RequestSplits:
  """Splits the requests of all events of some users; `split_R` if given is taken as it is.

  Leave-one-out gives users with fewer than 3 requests to training. Of the others, requests without
  an engaged ad that begin with the validating one, or later, are only history.
  """
  engaged_E = engaged_with_ad(events)
  first_s_R = np.full(int(events.request.max()) + 1, np.iinfo(np.int64).max)
  np.minimum.at(first_s_R, events.request, events.time_s)
  request = np.unique(events.request[engaged_E])
  if split_R is None and config.split == "time":
    cuts = [config.train_start_s, config.validation_start_s, config.test_start_s]
    split_R = np.searchsorted(cuts, first_s_R, side="right").astype(np.int8) - 1
  elif split_R is None:
    user_R = np.zeros(len(first_s_R), np.int32)
    user_R[events.request] = events.user
    # Requests user by user in time; `last` is where each user's end.
    ordered = request[np.lexsort((request, first_s_R[request], user_R[request]))]
    user = user_R[ordered]
    last = np.flatnonzero(np.append(user[1:] != user[:-1], True)[: len(user)])
    length = np.diff(np.append(-1, last))
    split_R = np.zeros(len(first_s_R), np.int8)
    last = last[length >= 3]
    held_s_U = np.full(int(events.user.max()) + 1, np.iinfo(np.int64).max)
    held_s_U[user[last]] = first_s_R[ordered[last - 1]]
    split_R[first_s_R >= held_s_U[user_R]] = -1
    split_R[ordered] = 0  # of equal times the one that comes first in the order trains
    split_R[ordered[last]], split_R[ordered[last - 1]] = 2, 1
  split = split_R[request]
  return RequestSplits(
    engaged_E, first_s_R, split_R, np.bincount(split[split >= 0], minlength=len(SPLITS))
  )


def require_requests(counts: np.ndarray, *, engaged: bool, source: str) -> None:
  """Raises LogError unless ads were engaged with, in some request of each split (counts [3])."""
  if not engaged:
    raise LogError(f"{source}: no ad was clicked or converted; there is nothing to learn")
  for name, count in zip(SPLITS, counts, strict=True):
    if not count:
      raise LogError(f"{source}: the {name} split holds no request with an engaged ad")
