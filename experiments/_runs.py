"""Trained and scored runs that experiments compare; finished ones are reused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gr4ad_jax import prepare
from gr4ad_jax.config import Config, SearchConfig, override, preset
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.data.tfds_builder import read_split
from gr4ad_jax.evaluation.evaluate import eval_requests, group_requests, search_split
from gr4ad_jax.evaluation.ranking import ranking_metrics
from gr4ad_jax.progress import console
from gr4ad_jax.run import (
  Inputs,
  RunFile,
  open_inputs,
  open_recommender,
  read_run,
  train_run,
  write_json,
)
from gr4ad_jax.tokenizer.semantic_id import TokenizerConfig


def prepared_journey(workdir: Path) -> Path:
  """Complete Journey as in `make demo`, in WORKDIR/data."""
  data = workdir / "data"
  if not (data / "examples" / "examples.json").exists():
    prepare.prepare_completejourney(data)
  return data


def tokenized(data: Path, out: Path, config: TokenizerConfig) -> Path:
  """Semantic IDs in `out`."""
  if not (out / "health.json").exists():
    console.print(f"tokenize: {config.encoder}")
    prepare.tokenize(data, out, config)
  return out


def trained_metrics(folder: Path, data: Path, sids: Path, config: Config) -> dict[str, float]:
  """Trains in `folder`, goes on where an earlier call was interrupted, and scores the test split.

  Returns:
    Ranking metrics at 10 and 50, the same under without_bonus/, and validation_sid_loss (nats).
  """
  file = folder / "metrics.json"
  if file.exists():
    return json.loads(file.read_text())
  console.print(f"train: {folder.name}")
  train_run(RunFile(str(data.resolve()), str(sids.resolve()), config), folder, resume=True)
  run_file = read_run(folder)
  inputs = open_inputs(run_file)
  groups = group_requests(read_split(inputs.examples, "test"))
  metrics = score(run_file, folder, inputs, groups, run_file.config.search)
  metrics |= {"validation_sid_loss": _last_validation(folder)["sid_loss"]}
  write_json(file, metrics)
  return metrics


def score(
  run_file: RunFile,
  folder: Path,
  inputs: Inputs,
  groups: Sequence[Sequence[Example]],
  config: SearchConfig,
) -> dict[str, float]:
  """Ranking metrics at 10 and 50 of a trained run under any search settings."""
  run_file = dataclasses.replace(
    run_file, config=dataclasses.replace(run_file.config, search=config)
  )
  recommender, _, _ = open_recommender(run_file, folder, inputs)
  found = search_split(recommender, inputs, groups, config)
  _, advertiser_A = np.unique(inputs.logs.ads.advertiser_id, return_inverse=True)
  metrics = {}
  for prefix, lists in (("", found.recommendations), ("without_bonus/", found.without_bonus)):
    values = ranking_metrics(
      lists.ad_RK, eval_requests(groups), advertiser_A=advertiser_A, ks=(10, 50), bootstrap=200
    )
    metrics |= {prefix + name: float(value) for name, value in values.items()}
  return metrics


def demo_run(workdir: Path, steps: int = 500) -> Path:
  """A trained run of the preset "demo" on Complete Journey, in WORKDIR/run."""
  data = prepared_journey(workdir)
  sids = tokenized(data, workdir / "sids", TokenizerConfig())
  config = override(preset("demo"), "train.num_steps", steps)
  config = override(config, "train.eval_every", steps)
  trained_metrics(workdir / "run", data, sids, config)
  return workdir / "run"


def _last_validation(folder: Path) -> dict[str, float]:
  lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
  return [line for line in lines if line["kind"] == "validation"][-1]
