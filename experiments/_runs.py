"""Trained and scored runs that experiments compare; finished ones are reused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.stats

from experiments._kept import kept_arrays
from gr4ad_jax.api import open_run as open_any
from gr4ad_jax.catalog.legal_prefixes import PrefixTree, build_prefix_tree
from gr4ad_jax.config import override_all
from gr4ad_jax.data import prepare
from gr4ad_jax.data.config import CompleteJourney, PrepareConfig
from gr4ad_jax.data.examples import ExampleSet, open_examples, read_split
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.evaluation.evaluate import prospecting_lists, search_split
from gr4ad_jax.gr4ad.build import Decoder, build_decoder
from gr4ad_jax.gr4ad.config import Config, preset
from gr4ad_jax.gr4ad.run import (
  RunFile,
  open_inputs,
  open_run,
  read_run,
)
from gr4ad_jax.gr4ad.train_run import train_run
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import write_json
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.held_out import eval_requests, group_requests
from gr4ad_jax.search.opened import Opened
from gr4ad_jax.search.ranking import EvalRequests, only_new, ranking_metrics
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.tokenizer.stage import tokenize
from gr4ad_jax.training.config import TrainConfig
from gr4ad_jax.training.metric_log import read_log

STEPS = {"cpu": 500, "full": 1_500}


def prepared_journey(workdir: Path) -> Path:
  """Complete Journey as in `make demo`, in WORKDIR/data."""
  data = workdir / "data"
  if not (data / "examples" / "examples.json").exists():
    prepare.prepare_logs(CompleteJourney(), PrepareConfig(data))
  return data


def tokenized(data: Path, out: Path, config: TokenizerConfig) -> Path:
  """Semantic IDs in `out`."""
  if not (out / "health.json").exists():
    console.print(f"tokenize: {config.encoder}")
    tokenize(data, out, config)
  return out


def trained_metrics(folder: Path, data: Path, sids: Path, config: Config) -> dict[str, float]:
  """Trains in `folder`, goes on where an earlier call was interrupted, and scores the test split.

  Returns:
    Ranking metrics at 10 and 50, and validation_sid_loss (nats).
  """
  file = folder / "metrics.json"
  if file.exists():
    return json.loads(file.read_text())
  console.print(f"train: {folder.name}")
  train_run(run_of(data, sids, config), folder, resume=True)
  opened = open_run(folder)
  metrics = score(opened, group_requests(read_split(opened.examples, "test")), opened.search)
  metrics |= {"validation_sid_loss": _last_validation(folder)["sid_loss"]}
  write_json(file, metrics)
  return metrics


def score(
  opened: Opened, groups: Sequence[Sequence[Example]], config: SearchConfig
) -> dict[str, float]:
  """Ranking metrics at 10 and 50 of a run with these search settings."""
  found = search_split(opened.recommender(config), opened.contexts, groups, config)
  _, advertiser_A = np.unique(opened.logs.ads.advertiser_id, return_inverse=True)
  return ranking_metrics(
    found.recommendations.ad_RK, eval_requests(groups), advertiser_A=advertiser_A, ks=(10, 50),
    bootstrap=200,
  )


class Lists(NamedTuple):
  """What a run's searches have found, int32 [R, DEPTH]; -1 = nothing."""

  all_RK: np.ndarray
  prospecting_RK: np.ndarray  # without what users had seen; nothing where no target is new


def found_lists(folder: Path, split: str, *, limit: int | None = None) -> Lists:
  """Searches for a split's requests with the run in `folder`, or reads what an earlier call found.

  Args:
    folder: of a trained run; lists-SPLIT.npz is kept in it.
    split: "validation" or "test".
    limit: at most so many requests, evenly spread; None = all.
  """
  file = folder / f"lists-{split}.npz"

  def search() -> dict[str, np.ndarray]:
    opened = open_run(folder)
    recommender, groups = opened.recommender(), split_groups(opened.examples, split, limit)
    found = search_split(recommender, opened.contexts, groups, opened.search).recommendations
    return Lists(found.ad_RK, prospecting_lists(recommender, opened, groups))._asdict()

  return Lists(**kept_arrays(file, search))


def found_ads(folder: Path, split: str, *, k: int, limit: int | None = None) -> np.ndarray:
  """The k best ads of a run of any system for a split's requests, int32 [R, k]; -1 = nothing.

  Args:
    folder: of a trained run; ads-SPLIT.npz is kept in it, and read by later calls.
    split: "validation" or "test".
    k: ads of a list.
    limit: at most so many requests, evenly spread; None = all.
  """
  file = folder / f"ads-{split}.npz"

  def search() -> dict[str, np.ndarray]:
    opened = open_any(folder)
    groups = split_groups(opened.examples, split, limit)
    found = search_split(opened.recommender(), opened.contexts, groups, opened.search, k=k)
    return {"ad_RK": found.recommendations.ad_RK}

  return kept_arrays(file, search)["ad_RK"]


def by_task(
  lists: Lists, requests: EvalRequests
) -> Iterator[tuple[str, np.ndarray, EvalRequests]]:
  """Prefix of the metrics, lists and requests of each task; no prospecting without new targets."""
  yield "", lists.all_RK, requests
  if requests.has_new_R.any():
    yield "prospecting/", lists.prospecting_RK[requests.has_new_R], only_new(requests)


def split_groups(examples: ExampleSet, split: str, limit: int | None) -> list[list[Example]]:
  """The requests of a split, or `limit` of them, evenly spread."""
  groups = group_requests(read_split(examples, split))
  return groups if limit is None else evenly(groups, limit)


def evenly(rows: list, count: int) -> list:
  """`count` of the rows, or all, evenly spread."""
  return [rows[i] for i in np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def training_minutes(rows: Sequence[Mapping], batch_size: int) -> float:
  """Minutes spent in optimizer steps, without compilation, validation and checkpoints.

  Args:
    rows: of the training log.
    batch_size: examples per step.
  """
  seconds, last_step = 0.0, 0
  for row in rows:
    if "examples_per_second" in row:
      seconds += (row["step"] - last_step) * batch_size / row["examples_per_second"]
      last_step = row["step"]
  return seconds / 60


def run_of(data: Path, sids: Path, config: Config) -> RunFile:
  """What run.json will say, wherever the experiment is run from."""
  return RunFile(str(data.resolve()), str(sids.resolve()), config)


def of_steps(train: TrainConfig, steps: int, **changes: Any) -> TrainConfig:
  """A training of so many steps, validated at the end and kept twice."""
  return dataclasses.replace(
    train, num_steps=steps, eval_every=steps, checkpoint_every=max(1, steps // 2), **changes
  )


def of_epochs(train: TrainConfig, epochs: float, data: Path) -> TrainConfig:
  """A training that sees each example of `data` so many times."""
  examples = open_examples(data / "examples").counts["train"]["examples"]
  return of_steps(train, max(1, math.ceil(epochs * examples / train.batch_size)))


def demo_config(size: str, overrides: Mapping[str, str]) -> Config:
  """The preset "demo", trained for STEPS and validated at the end, with `overrides`."""
  steps = {"train.num_steps": STEPS[size], "train.eval_every": STEPS[size]}
  return override_all(preset("demo"), steps | dict(overrides))


@dataclasses.dataclass(frozen=True)
class TrainedRun:
  """A trained run that answers requests of its test split.

  Attributes:
    opened: the run.
    decoder: of its best checkpoint.
    groups: test requests, as `evaluate.group_requests` gives them.
    tree: of its SIDs.
    fixed: arrays of the tree and values of the buckets, on the device.
  """

  opened: Opened
  decoder: Decoder
  groups: list[list[Example]]
  tree: PrefixTree
  fixed: tuple[Any, jax.Array]

  def context(self, requests: int) -> Any:
    """The first test requests, on the device."""
    examples = [group[0] for group in self.groups[:requests]]
    return jax.device_put(self.opened.contexts.context(examples))

  def score(self, search: SearchConfig, requests: int) -> dict[str, float]:
    """Ranking metrics of the first test requests under any search settings."""
    return score(self.opened, self.groups[:requests], search)


@dataclasses.dataclass(frozen=True)
class OfTrainedRun:
  """Settings of an experiment that measures a `TrainedRun`."""

  run: str = ""
  """Folder of a trained run; default: one is trained in WORKDIR."""
  batch: int = 8
  """Requests of a timed call."""
  repeats: int = 10
  """Timed calls of each program."""
  requests: int = 1_000
  """Test requests behind the quality."""


def open_trained(workdir: Path, folder: str) -> TrainedRun:
  """The run in `folder`, or where that is "" one of the preset "demo", trained in WORKDIR/run."""
  path = Path(folder) if folder else workdir / "run"
  if not folder:
    data = prepared_journey(workdir)
    sids = tokenized(data, workdir / "sids", TokenizerConfig())
    trained_metrics(path, data, sids, demo_config("cpu", {}))
  run_file = read_run(path)
  opened, inputs = open_run(path), open_inputs(run_file)
  tree = build_prefix_tree(opened.index.sids_SL)
  return TrainedRun(
    opened, build_decoder(run_file.config.model, inputs.vocabulary),
    group_requests(read_split(opened.examples, "test")), tree,
    jax.device_put((tree.arrays, np.asarray(opened.bin_means, np.float32))),
  )


def paired_interval(name: str, difference: np.ndarray) -> dict[str, float]:
  """NAME/mean, /ci_low, /ci_high: differences of seeds with their 95% t interval."""
  half = scipy.stats.t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1)
  half /= math.sqrt(len(difference))
  mean = float(difference.mean())
  return {f"{name}/mean": mean, f"{name}/ci_low": mean - half, f"{name}/ci_high": mean + half}


def _last_validation(folder: Path) -> dict[str, float]:
  return [row for row in read_log(folder) if row["kind"] == "validation"][-1]
