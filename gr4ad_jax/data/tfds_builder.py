"""Logs -> ArrayRecord examples, as an ordinary TFDS builder (no TensorFlow).

`prepare_examples(logs, folder, config)` writes

    folder/ad_requests/1.0.0/*.array_record*   one record per Example, splits train/validation/test
    folder/examples.json                       config, feature values, counts
    folder/train_targets.npz                   what every training target was worth
    folder/trending.npz                        current shares of engagement by day

and `open_examples(folder)` gives random access to them.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import logging
import multiprocessing
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from gr4ad_jax import config as config_lib
from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.sequences import (
  SPLITS,
  Example,
  ExampleMaker,
  FeatureVocabulary,
  SequenceConfig,
)
from gr4ad_jax.data.trending import Trending, build_trending, load_trending, save_trending
from gr4ad_jax.data.validation import LogError
from gr4ad_jax.progress import track

_ARRAYS = {
  "feature_F": np.int32, "ad_T": np.int32, "ad_count_T": np.uint8, "ad_age_T": np.uint8,
  "organic_O": np.int32, "organic_count_O": np.uint8, "organic_age_O": np.uint8,
  "target_C": np.int32, "action_C": np.int8, "value_C": np.float32, "ecpm_C": np.float32,
  "new_C": np.uint8,
}
_TARGET_COLUMNS = ("value_N", "ecpm_N", "action_N", "past_value_N")
_USERS_PER_TASK = 100  # of a worker process
_SCALARS = {"request": np.int32, "user": np.int32, "time_s": np.int64, "past_value": np.float32}


def bytes_array(dtype, ndim: int = 1) -> tfds.features.Tensor:
  """A numpy array of any length, stored as raw bytes."""
  # Int lists of a protocol buffer take five times as long to read.
  return tfds.features.Tensor(
    shape=(None,) * ndim, dtype=dtype, encoding=tfds.features.Encoding.BYTES
  )


def example_features() -> dict:
  """What a stored Example consists of."""
  return _SCALARS | {name: bytes_array(dtype) for name, dtype in _ARRAYS.items()}


class AdRequests(tfds.core.GeneratorBasedBuilder):
  """One record per request with an engaged ad."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, *, maker: ExampleMaker | None = None, workers: int = 1, **kwargs):
    """A builder that reads; with `maker` it can also write, cutting in `workers` processes."""
    self._maker, self._workers = maker, workers
    self.train_targets: list[tuple[np.ndarray, ...]] = []  # filled while writing
    super().__init__(file_format="array_record", **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Ad requests: user and request features, distinct histories, engaged ads.",
      features=tfds.features.FeaturesDict(example_features()),
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {name: self._generate_examples(i) for i, name in enumerate(SPLITS)}

  def _generate_examples(self, split: int) -> Iterator[tuple[str, dict]]:
    users = range(len(self._maker.logs.users.user_id))
    tasks = [users[i : i + _USERS_PER_TASK] for i in range(0, len(users), _USERS_PER_TASK)]
    made = _map(functools.partial(_cut, split=split), self._maker, tasks, self._workers)
    of_users = itertools.chain.from_iterable(made)
    for examples in track(of_users, f"examples ({SPLITS[split]}), users", len(users)):
      for part, example in enumerate(examples):
        if SPLITS[split] == "train":
          self.train_targets.append(
            (example.value_C, example.ecpm_C, example.action_C,
             np.full(len(example.target_C), example.past_value, np.float32))
          )
        yield f"{example.request}-{part}", to_record(example)


def _cut(maker: ExampleMaker, users: Sequence[int], *, split: int) -> list[list[Example]]:
  return [list(maker.user_examples(user, split)) for user in users]


def _map(
  function: Callable, maker: ExampleMaker, tasks: Sequence[Sequence[int]], workers: int
) -> Iterator:
  """function(maker, task) of every task, in order; a few tasks ahead in worker processes."""
  if workers == 1:
    yield from (function(maker, task) for task in tasks)
    return
  # A fork shares the log's memory. Workers touch numpy alone, none of what JAX's threads hold.
  waiting = collections.deque()
  with warnings.catch_warnings(), concurrent.futures.ProcessPoolExecutor(
    workers, multiprocessing.get_context("fork"), _keep, (function, maker)
  ) as pool:
    warnings.filterwarnings("ignore", "os.fork|.*multi-threaded", category=Warning)
    for task in tasks:
      waiting.append(pool.submit(_work, task))
      if len(waiting) > 2 * workers:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


_kept: tuple[Callable, ExampleMaker] | None = None  # in a worker process


def _keep(function: Callable, maker: ExampleMaker) -> None:
  global _kept
  _kept = function, maker


def _work(task: Sequence[int]) -> list:
  function, maker = _kept
  return function(maker, task)


@dataclasses.dataclass(frozen=True)
class ExampleSet:
  """Prepared examples.

  Attributes:
    config: how they were made.
    features: feature values.
    counts: split -> (requests, examples).
    sources: split -> random-access data source of dicts of numpy arrays.
    train_value_N, train_ecpm_N, train_past_value_N: float32, of every training target.
    train_action_N: int8.
    trending: current shares by day; None where the config asks for none.
  """

  config: SequenceConfig
  features: FeatureVocabulary
  counts: dict[str, dict[str, int]]
  sources: dict[str, object]
  train_value_N: np.ndarray
  train_ecpm_N: np.ndarray
  train_past_value_N: np.ndarray
  train_action_N: np.ndarray
  trending: Trending | None


def prepare_examples(
  logs: Logs, folder: Path, config: SequenceConfig, *, workers: int = 1
) -> None:
  """Writes all examples below `folder`, replacing what is there.

  Args:
    logs: what to cut.
    folder: to write.
    config: how to cut.
    workers: processes that cut; the files do not depend on it.

  Raises:
    LogError: the logs give no example for a split.
  """
  maker = ExampleMaker(logs, config)
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  builder = AdRequests(maker=maker, workers=workers, data_dir=str(folder))
  with quiet_tfds():
    builder.download_and_prepare()
  sources = {name: builder.as_data_source(split=name) for name in SPLITS}
  counts = {
    name: {"requests": maker.request_counts[name], "examples": len(sources[name])}
    for name in SPLITS
  }
  if config.num_trending:
    save_trending(build_trending(logs), folder / "trending.npz")
  columns = [np.concatenate(column) for column in zip(*builder.train_targets, strict=True)]
  np.savez(folder / "train_targets.npz", **dict(zip(_TARGET_COLUMNS, columns, strict=True)))
  (folder / "examples.json").write_text(
    json.dumps(
      {
        "config": dataclasses.asdict(config),
        "features": dataclasses.asdict(maker.vocabulary),
        "counts": counts,
      },
      indent=2,
    )
  )


def open_examples(folder: Path) -> ExampleSet:
  """Opens what `prepare_examples` wrote.

  Raises:
    LogError: the folder holds no prepared examples.
  """
  if not (folder / "examples.json").exists():
    raise LogError(f"{folder}: no prepared examples here; run `gr4ad prepare` first")
  about = json.loads((folder / "examples.json").read_text())
  with quiet_tfds():
    builder = AdRequests(data_dir=str(folder))
    sources = {name: builder.as_data_source(split=name) for name in SPLITS}
  targets = np.load(folder / "train_targets.npz")
  config = config_lib.from_dict(SequenceConfig, about["config"])
  return ExampleSet(
    config,
    FeatureVocabulary(**about["features"]),
    about["counts"],
    sources,
    targets["value_N"], targets["ecpm_N"], targets["past_value_N"], targets["action_N"],
    load_trending(folder / "trending.npz") if config.num_trending else None,
  )


def read_split(examples: ExampleSet, split: str) -> list[Example]:
  """All examples of a split in memory, ordered by user, time and request."""
  number = SPLITS.index(split)
  records = [to_example(r, number) for r in examples.sources[split]]
  return sorted(records, key=lambda e: (e.user, e.time_s, e.request, e.target_C[0]))


def training_events(logs: Logs, examples: ExampleSet) -> np.ndarray:
  """bool [E], the events that may be learned from: none of a held-out request, or later.

  Args:
    logs: the logs that the examples were cut from.
    examples: tell how they were split.
  """
  events = logs.events
  if examples.config.split == "time":
    return events.time_s < examples.config.validation_start_s
  held_out = np.zeros(int(events.request.max()) + 1, bool)  # each user's two last requests
  for split in ("validation", "test"):
    held_out[[e.request for e in read_split(examples, split)]] = True
  return ~held_out[events.request]


def to_record(example: Example) -> dict:
  """An `Example` as it is stored."""
  record = {name: getattr(example, name) for name in (*_SCALARS, *_ARRAYS)}
  return record | {"new_C": example.new_C.astype(np.uint8)}


def to_example(record: dict, split: int) -> Example:
  """A stored record as an `Example`."""
  scalars = {name: kind(record[name]).item() for name, kind in _SCALARS.items()}
  arrays = {name: record[name] for name in _ARRAYS} | {"new_C": record["new_C"].astype(bool)}
  return Example(split=split, **scalars, **arrays)


@contextlib.contextmanager
def quiet_tfds():
  """TFDS draws its own bars, prints and logs; ours replace them."""
  tfds.disable_progress_bar()
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logger.setLevel(level)
    tfds.enable_progress_bar()
