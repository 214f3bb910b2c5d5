"""Logs -> examples on disk, and back.

`prepare_examples(LogParts(DATA/logs), folder, config)` writes

    folder/ad_requests/1.0.0/*.array_record*   one record per Example, splits train/validation/test
    folder/examples.json                       config, feature values, counts, digests
    folder/train_targets.npz                   what every training target was worth
    folder/trending.npz                        current shares of engagement, hour by hour
    folder/tastes.npz                          vectors of ads (splits by time alone)

and `open_examples(folder)` gives random access to them.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from gr4ad_jax import config as config_lib
from gr4ad_jax.data.array_records import Every, one_by_one, open_dataset, write_dataset
from gr4ad_jax.data.cutting import Cutter, Survey, join_targets, map_parts, survey
from gr4ad_jax.data.example_records import example_features, to_example
from gr4ad_jax.data.log_folder import LogParts
from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.sequences import Example, FeatureVocabulary
from gr4ad_jax.data.splits import SPLITS, SequenceConfig, split_requests
from gr4ad_jax.data.taste_tables import load_tastes, make_tastes, save_tastes, table_times
from gr4ad_jax.data.tastes import Tastes
from gr4ad_jax.data.trending import Trending, load_trending, save_trending, shares
from gr4ad_jax.data.validation import LogError
from gr4ad_jax.machine import atomic, digests, extras
from gr4ad_jax.machine.progress import track

DATASET = "ad_requests"
_REMEDY = "run `gr4ad prepare --overwrite` again"


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
    train_of_request_N: int32, how many targets the request of each has.
    trending: current shares by period; None where the config asks for none.
    tastes: vectors of ads; None where splits are not by time.
  """

  config: SequenceConfig
  features: FeatureVocabulary
  counts: dict[str, dict[str, int]]
  sources: dict[str, object]
  train_value_N: np.ndarray
  train_ecpm_N: np.ndarray
  train_past_value_N: np.ndarray
  train_action_N: np.ndarray
  train_of_request_N: np.ndarray
  trending: Trending | None
  tastes: Tastes | None


def prepare_examples(
  parts: LogParts, folder: Path, config: SequenceConfig, *, workers: int = 1,
  beam_options: Sequence[str] | None = None,
) -> tuple[Survey, dict[str, dict[str, int]]]:
  """Cuts stored logs; memory grows with users and ads, not with events.

  Args:
    parts: the logs.
    folder: to write; appears, or is replaced, only when all files are complete.
    config: how to cut.
    workers: processes that cut; the files do not depend on it.
    beam_options: cut as a Beam pipeline with these options (`--runner=...`); workers must see
      `folder` under the same path. The files do not depend on it.

  Returns:
    What holds for the whole log, and the requests and examples of each split.

  Raises:
    LogError: the logs give no example for a split.
    ConfigError: Beam is not installed.
  """
  in_beam = None if beam_options is None else _in_beam(beam_options)
  found = survey(parts, config, workers=workers)
  with atomic.new_folder(folder) as fresh:
    scratch = fresh / "scratch"
    cutter = Cutter(parts, config, found.vocabulary, scratch)
    if in_beam:
      in_beam(cutter, len(parts), "examples")
    else:
      for _ in track(map_parts(cutter, len(parts), workers), "examples, parts", len(parts)):
        pass
    examples = write_dataset(
      fresh / DATASET, {name: scratch / name for name in SPLITS}, example_features(),
      every=in_beam or one_by_one,
      description="Ad requests: user and request features, distinct histories, engaged ads.",
    )
    join_targets(scratch / "targets", fresh / "train_targets.npz")
    shutil.rmtree(scratch)
    if config.num_trending:
      save_trending(shares(found.engagements, len(parts.logs.ads.ad_id)), fresh / "trending.npz")
    if found.users:
      made_s_D = table_times(parts.first_s, parts.last_s)
      tastes = make_tastes(found.users, made_s_D, len(parts.logs.ads.ad_id))
      save_tastes(tastes, fresh / "tastes.npz")
    counts = {
      name: {"requests": int(requests), "examples": examples[name]}
      for name, requests in zip(SPLITS, found.request_counts, strict=True)
    }
    files = [*fresh.glob("*.npz"), *fresh.glob(f"{DATASET}/*/*.array_record*")]
    about = {
      "config": dataclasses.asdict(config), "features": dataclasses.asdict(found.vocabulary),
      "counts": counts, "digests": digests.of_files(fresh, files),
    }
    (fresh / "examples.json").write_text(json.dumps(about, indent=2))
  return found, counts


def _in_beam(options: Sequence[str]) -> Every:
  """Runs every number through a pipeline of its own."""
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError:
    raise config_lib.ConfigError(
      f"--beam needs Apache Beam; {extras.install('beam')}"
    ) from None

  def every(function: Callable[[int], object], count: int, what: str) -> None:
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
      _ = pipeline | beam.Create(range(count)) | beam.Reshuffle() | what >> beam.Map(function)

  return every


def open_examples(folder: Path) -> ExampleSet:
  """Opens what `prepare_examples` wrote.

  Raises:
    LogError: the folder holds no prepared examples, or a damaged file.
  """
  file = folder / "examples.json"
  if not file.exists():
    raise LogError(f"{folder}: no prepared examples here; run `gr4ad prepare` first")
  try:
    about = json.loads(file.read_text(encoding="utf-8"))
    if "max_met_ads" not in about["config"]:
      raise LogError(f"{folder}: an earlier version prepared it, which counted less: {_REMEDY}")
    config = config_lib.from_dict(SequenceConfig, about["config"])
    features, counts = FeatureVocabulary(**about["features"]), about["counts"]
    file, targets, trending, tastes = folder / "train_targets.npz", {}, None, None
    with file.open("rb") as opened, np.load(opened) as arrays:  # numpy leaves a damaged one open
      targets = {f"train_{name}": arrays[name] for name in arrays.files}
    if config.num_trending:
      file = folder / "trending.npz"
      trending = load_trending(file)
    if config.split == "time":
      file = folder / "tastes.npz"
      tastes = load_tastes(file)
    records = open_dataset(folder / DATASET, remedy=_REMEDY)
    return ExampleSet(
      config, features, counts, records, trending=trending, tastes=tastes, **targets
    )
  except LogError:
    raise
  except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
    raise LogError(f"{file}: missing or damaged ({type(error).__name__}): {_REMEDY}") from None


def read_split(examples: ExampleSet, split: str) -> list[Example]:
  """All examples of a split in memory, ordered by user, time and request."""
  number = SPLITS.index(split)
  records = [to_example(r, number) for r in examples.sources[split]]
  return sorted(records, key=lambda e: (e.user, e.time_s, e.request, e.target_C[0]))


def training_events(
  logs: Logs, examples: ExampleSet, *, through: Literal["train", "validation"] = "train"
) -> np.ndarray:
  """bool [E], the events that may be learned from: none of a held-out request, or later.

  Args:
    logs: the logs that the examples were cut from.
    examples: tell how they were split.
    through: the last split that is learned from; the later ones are held out.
  """
  events, config = logs.events, examples.config
  if config.split == "time":
    end_s = config.validation_start_s if through == "train" else config.test_start_s
    return events.time_s < end_s
  splits = split_requests(events, config)
  # What a user did after that, promoted or not, tells of the targets as the requests would.
  held_out_R = splits.split_R > SPLITS.index(through)
  held_s_U = np.full(len(logs.users.user_id), np.iinfo(np.int64).max)
  held_out_E, split_E = held_out_R[events.request], splits.split_R[events.request]
  np.minimum.at(held_s_U, events.user[held_out_E], events.time_s[held_out_E])
  learned_E = (split_E >= 0) & ~held_out_E
  return learned_E & (events.time_s <= held_s_U[events.user])
