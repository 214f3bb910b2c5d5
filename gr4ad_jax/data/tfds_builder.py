"""Logs -> ArrayRecord examples, as an ordinary TFDS builder (no TensorFlow).

`prepare_examples(DATA/logs, folder, config)` writes

    folder/ad_requests/1.0.0/*.array_record*   one record per Example, splits train/validation/test
    folder/examples.json                       config, feature values, counts
    folder/train_targets.npz                   what every training target was worth
    folder/trending.npz                        current shares of engagement by day

and `open_examples(folder)` gives random access to them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import resource
import shutil
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

from gr4ad_jax import config as config_lib
from gr4ad_jax.data.cutting import (
  ARRAYS,
  SCALARS,
  Cutter,
  PartRecords,
  Survey,
  join_targets,
  map_parts,
  survey,
)
from gr4ad_jax.data.log_folder import LogParts
from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.sequences import Example, FeatureVocabulary
from gr4ad_jax.data.splits import SPLITS, SequenceConfig
from gr4ad_jax.data.trending import Trending, load_trending, save_trending, shares
from gr4ad_jax.data.validation import LogError
from gr4ad_jax.machine import atomic
from gr4ad_jax.machine.progress import track

SHUFFLE_BYTES = 1 << 26  # of a split's examples in memory; more are sorted on disk


def bytes_array(dtype, ndim: int = 1) -> tfds.features.Tensor:
  """A numpy array of any length, stored as raw bytes."""
  # Int lists of a protocol buffer take five times as long to read.
  return tfds.features.Tensor(
    shape=(None,) * ndim, dtype=dtype, encoding=tfds.features.Encoding.BYTES
  )


def example_features() -> dict:
  """What a stored Example consists of."""
  return SCALARS | {name: bytes_array(dtype) for name, dtype in ARRAYS.items()}


class AdRequests(tfds.core.GeneratorBasedBuilder):
  """One record per request with an engaged ad."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(
    self, *, cutters: Sequence[Cutter] = (), workers: int = 1, beam: bool = False, **kwargs
  ):
    """A builder that reads; with `cutters`, one for each split, it can also write.

    Args:
      cutters: make the examples.
      workers: processes that cut.
      beam: cut as a Beam pipeline instead.
      kwargs: of every TFDS builder.
    """
    self._cutters, self._workers, self._beam = cutters, workers, beam
    super().__init__(file_format="array_record", **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Ad requests: user and request features, distinct histories, engaged ads.",
      features=tfds.features.FeaturesDict(example_features()),
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    if self._beam:
      import apache_beam as beam

      def parts(cutter: Cutter):
        return beam.Create(range(len(cutter.parts))) | beam.Reshuffle() | beam.Map(cutter)

      return {
        SPLITS[c.split]: parts(c) | beam.FlatMap(PartRecords.records) for c in self._cutters
      }
    return {SPLITS[c.split]: self._generate_examples(c) for c in self._cutters}

  def _generate_examples(self, cutter: Cutter) -> Iterator[tuple[str, dict]]:
    num_parts = len(cutter.parts)
    made = map_parts(cutter, num_parts, self._workers)
    for part in track(made, f"examples ({SPLITS[cutter.split]}), parts", num_parts):
      yield from part.records()


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
  logs: Path, folder: Path, config: SequenceConfig, *, workers: int = 1,
  beam_options: Sequence[str] | None = None,
) -> Survey:
  """Cuts stored logs; memory grows with users and ads, not with events.

  Args:
    logs: folder that `write_logs` wrote.
    folder: to write; appears, or is replaced, only when all files are complete.
    config: how to cut.
    workers: processes that cut; the files do not depend on it.
    beam_options: cut as a Beam pipeline with these options (`--runner=...`); examples are the same,
      their shards may be cut elsewhere.

  Returns:
    What holds for the whole log.

  Raises:
    LogError: the logs give no example for a split.
    ConfigError: Beam is not installed.
  """
  beam = None if beam_options is None else _beam_config(beam_options)
  parts = LogParts(logs)
  found = survey(parts, config, workers=workers)
  with atomic.new_folder(folder) as fresh:
    targets = fresh / "targets"
    targets.mkdir()
    cutters = [Cutter(parts, config, found.vocabulary, i, targets) for i in range(len(SPLITS))]
    builder = AdRequests(
      cutters=cutters, workers=workers, beam=beam is not None, data_dir=str(fresh)
    )
    with quiet_tfds(), _shuffling_on_disk():
      builder.download_and_prepare(download_config=beam)
    join_targets(targets, fresh / "train_targets.npz")
    shutil.rmtree(targets)
    if config.num_trending:
      save_trending(shares(found.engagements, len(parts.logs.ads.ad_id)), fresh / "trending.npz")
    counts = {
      name: {"requests": int(requests), "examples": builder.info.splits[name].num_examples}
      for name, requests in zip(SPLITS, found.request_counts, strict=True)
    }
    about = {
      "config": dataclasses.asdict(config), "features": dataclasses.asdict(found.vocabulary),
      "counts": counts,
    }
    (fresh / "examples.json").write_text(json.dumps(about, indent=2))
  return found


def _beam_config(options: Sequence[str]) -> tfds.download.DownloadConfig:
  try:
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError:
    raise config_lib.ConfigError(
      "--beam needs Apache Beam: pip install 'gr4ad_jax[beam]'"
    ) from None
  return tfds.download.DownloadConfig(beam_options=PipelineOptions(list(options)))


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
  record = {name: getattr(example, name) for name in (*SCALARS, *ARRAYS)}
  return record | {"new_C": example.new_C.astype(np.uint8)}


def to_example(record: dict, split: int) -> Example:
  """A stored record as an `Example`."""
  scalars = {name: kind(record[name]).item() for name, kind in SCALARS.items()}
  arrays = {name: record[name] for name in ARRAYS} | {"new_C": record["new_C"].astype(bool)}
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


@contextlib.contextmanager
def _shuffling_on_disk():
  """TFDS sorts a split by the hash of its keys: up to 1 GB in memory, else in 1,000 files.

  It opens those through TensorFlow, which is not installed; here they are plain files, and begin at
  SHUFFLE_BYTES.
  """
  files = types.SimpleNamespace(GFile=open, exists=os.path.exists, remove=os.remove)
  errors = types.SimpleNamespace(ResourceExhaustedError=_NeverRaised)
  plain = types.SimpleNamespace(io=types.SimpleNamespace(gfile=files), errors=errors)
  ours = {"tf": plain, "MAX_MEM_BUFFER_SIZE": SHUFFLE_BYTES}
  theirs = {name: vars(shuffle)[name] for name in ours}
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  needed = soft if soft == resource.RLIM_INFINITY else max(soft, 2 * shuffle.BUCKETS_NUMBER)
  vars(shuffle).update(ours)
  try:
    if hard == resource.RLIM_INFINITY or needed <= hard:
      resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    yield
  finally:
    vars(shuffle).update(theirs)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class _NeverRaised(Exception):
  pass
