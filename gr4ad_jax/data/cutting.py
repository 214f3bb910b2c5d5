"""Stored logs -> runs of example records, part by part, in this process or in several.

Two passes: `survey` learns what holds for the whole log, a `Cutter` makes the examples of a part.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import signal
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import tensorflow_datasets as tfds

from gr4ad_jax.data.array_records import write_run
from gr4ad_jax.data.engagements import PeriodEngagements, add_counts, count_engagements
from gr4ad_jax.data.example_records import example_features, to_record
from gr4ad_jax.data.log_folder import LogParts
from gr4ad_jax.data.sequences import (
  Example,
  ExampleMaker,
  FeatureVocabulary,
  feature_values,
  feature_vocabulary,
  training_feature_values,
)
from gr4ad_jax.data.splits import SPLITS, SequenceConfig, require_requests, split_requests
from gr4ad_jax.data.taste_tables import MOST_USERS, UserCounts, count_users, table_times
from gr4ad_jax.machine import atomic
from gr4ad_jax.machine.progress import track

ResultT = TypeVar("ResultT")

_TARGETS = {
  "value_N": np.float32, "ecpm_N": np.float32, "action_N": np.int8, "past_value_N": np.float32,
  "of_request_N": np.int32,
}
_MERGE_AT = 1 << 22  # rows of engagement counts


class Survey(NamedTuple):
  """What holds for the whole log.

  Attributes:
    vocabulary: feature values of users and of training requests.
    request_counts: [3] requests with an engaged ad in each split.
    ad_events: events with an ad.
    valued_events: those with a value or eCPM above 0.
    engagements: clicks and conversions by hour and ad.
    users: who engaged with which ad, part by part; none where splits are not by time.
  """

  vocabulary: FeatureVocabulary
  request_counts: np.ndarray
  ad_events: int
  valued_events: int
  engagements: PeriodEngagements
  users: list[UserCounts]


def survey(parts: LogParts, config: SequenceConfig, *, workers: int = 1) -> Survey:
  """Goes through the log once.

  Raises:
    LogError: no engaged ad event, or a split without requests.
  """
  counts, ad_events, valued_events = np.zeros(len(SPLITS), np.int64), 0, 0
  request: dict[str, set[str]] = collections.defaultdict(set)
  counted: list[PeriodEngagements] = []
  users: list[UserCounts] = []
  surveyed = map_parts(functools.partial(_survey_part, parts, config), len(parts), workers)
  for part in track(surveyed, "requests and features, parts", len(parts)):
    counts += part.request_counts
    ad_events += part.ad_events
    valued_events += part.valued_events
    for name, values in part.features.items():
      request[name] |= values
    counted.append(part.engagements)
    users += part.users
    # Merged when the new ones outgrow the sum, so that every count is added up a few times only.
    if sum(len(part.ad) for part in counted[1:]) > max(_MERGE_AT, len(counted[0].ad)):
      counted = [add_counts(counted)]
  engagements = add_counts(counted)
  require_requests(counts, engaged=len(engagements.ad) > 0, source=parts.logs.source)
  vocabulary = feature_vocabulary(feature_values(parts.logs.users.features), request)
  return Survey(vocabulary, counts, ad_events, valued_events, engagements, users)


class _PartSurvey(NamedTuple):
  features: dict[str, set[str]]
  request_counts: np.ndarray
  ad_events: int
  valued_events: int
  engagements: PeriodEngagements
  users: list[UserCounts]


def _survey_part(parts: LogParts, config: SequenceConfig, number: int) -> _PartSurvey:
  part, users = parts.read(number), []
  events = part.logs.events
  if config.split == "time":
    made_s_D = table_times(parts.first_s, parts.last_s)
    every = -(-len(parts.logs.users.user_id) // MOST_USERS)
    users.append(count_users(part.logs, made_s_D, first_user=part.first_user, every=every))
  splits = split_requests(events, config)
  is_ad_E = events.ad >= 0
  valued_E = is_ad_E & ((events.value > 0) | (events.ecpm > 0))
  return _PartSurvey(
    training_feature_values(events, splits.split_R), splits.counts, int(is_ad_E.sum()),
    int(valued_E.sum()), count_engagements(events), users,
  )


class Cutter(NamedTuple):
  """Makes the examples of a part; goes to other processes as it is.

  Attributes:
    parts: the log.
    config: how to cut.
    vocabulary: feature values of the whole log.
    folder: takes a run of records in the folder of each split, and in "targets" what training
      targets were worth.
  """

  parts: LogParts
  config: SequenceConfig
  vocabulary: FeatureVocabulary
  folder: Path

  def __call__(self, number: int) -> None:
    """Stores the examples of a part, targets in the order of users and time."""
    part = self.parts.read(number)
    maker = ExampleMaker(part.logs, self.config, vocabulary=self.vocabulary)
    serialize = tfds.features.FeaturesDict(example_features()).serialize_example
    learned = []
    for split, name in enumerate(SPLITS):
      records = []
      for user in range(len(part.logs.users.user_id)):
        for place, example in enumerate(maker.user_examples(user, split)):
          example = dataclasses.replace(
            example, user=user + part.first_user, request=example.request + part.first_request
          )
          records.append((f"{example.request}-{place}", serialize(to_record(example))))
          if name == "train":
            learned.append(example)
      write_run(self.folder / name / f"{number:06d}", name, records)
    _write_targets(learned, self.folder / "targets" / f"{number:06d}.npz")


def map_parts(
  function: Callable[[int], ResultT], num_parts: int, workers: int
) -> Iterator[ResultT]:
  """function(part) of every part, in order; one part more than there are processes at a time."""
  if workers == 1:
    yield from map(function, range(num_parts))
    return
  # A fork shares the tables. Workers touch numpy and Arrow alone, none of what JAX's threads hold.
  waiting = collections.deque()
  with warnings.catch_warnings(), concurrent.futures.ProcessPoolExecutor(
    workers, multiprocessing.get_context("fork"), _keep, (function,)
  ) as pool:
    warnings.filterwarnings("ignore", "os.fork|.*multi-threaded", category=Warning)
    try:
      for part in range(num_parts):
        waiting.append(pool.submit(_work, part))
        if len(waiting) > workers:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


_kept: Callable | None = None  # in a worker process


def _keep(function: Callable) -> None:
  global _kept
  _kept = function
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one


def _work(part: int) -> object:
  return _kept(part)


def _write_targets(examples: list[Example], file: Path) -> None:
  columns = {
    "value_N": [e.value_C for e in examples], "ecpm_N": [e.ecpm_C for e in examples],
    "action_N": [e.action_C for e in examples],
    "past_value_N": [np.full(len(e.target_C), e.past_value) for e in examples],
    "of_request_N": [np.full(len(e.target_C), e.num_targets) for e in examples],
  }
  with atomic.new_file(file) as out:  # a Beam runner may do a part twice
    np.savez(out, **{
      name: np.concatenate([np.zeros(0), *column]).astype(_TARGETS[name])
      for name, column in columns.items()
    })


def join_targets(folder: Path, file: Path) -> None:
  """Joins what training targets of all parts were worth into one .npz file, part by part."""
  parts = sorted(folder.glob("*.npz"))
  total = sum(len(np.load(part)["action_N"]) for part in parts)
  with zipfile.ZipFile(file, "w") as archive:
    for name, kind in _TARGETS.items():
      with archive.open(f"{name}.npy", "w", force_zip64=True) as out:
        header = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": (total,)}
        np.lib.format.write_array_header_1_0(out, header)
        for part in parts:
          out.write(np.load(part)[name].tobytes())
