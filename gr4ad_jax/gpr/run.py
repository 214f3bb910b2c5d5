"""Runs of GPR: their folders, their training, opened again for search.

    WORKDIR/run.json      the system, where the data are, and every setting
    WORKDIR/codes/        the semantic IDs it was trained on, as `gr4ad tokenize` wrote them
    WORKDIR/checkpoints/, train_log.jsonl, tb/
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from gr4ad_jax import config as config_lib
from gr4ad_jax.catalog.prepared import Prepared, open_prepared
from gr4ad_jax.catalog.run_data import keep_codes, own_codes, with_data
from gr4ad_jax.data.pipeline import train_batches, validation_batches
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.data.splits import SPLITS
from gr4ad_jax.gpr.batch_maker import BatchMaker
from gr4ad_jax.gpr.config import Config, System, check_system
from gr4ad_jax.gpr.generator import generator_of
from gr4ad_jax.gpr.label_rows import LabelRows, as_it_is
from gr4ad_jax.gpr.model import Gpr
from gr4ad_jax.gpr.mtp import mtp_task
from gr4ad_jax.machine import distributed, lock, sharding, storage
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.search.config import check_widths
from gr4ad_jax.search.judge import judge_of
from gr4ad_jax.search.opened import Opened
from gr4ad_jax.training.mesh import search_mesh, training_mesh
from gr4ad_jax.training.metric_log import read_log
from gr4ad_jax.training.pace import Pace
from gr4ad_jax.training.run_folder import going_on, is_taken, require_system
from gr4ad_jax.training.selection import Selection
from gr4ad_jax.training.task import Task
from gr4ad_jax.training.train_loop import read_params, train
from gr4ad_jax.training.train_step import TrainState

BIN_MEANS = (1.0,)  # of the one bucket by which a model tells a value itself


@dataclasses.dataclass(frozen=True)
class RunFile:
  """What run.json holds."""

  data: str
  """Folder that `gr4ad prepare` wrote."""
  sids: str
  """Folder that `gr4ad tokenize` wrote."""
  config: Config = Config()
  system: System = "gpr"
  """What is trained: GPR, or a baseline that is made of its parts."""
  fingerprint: str = ""
  """Hashes of logs, examples and semantic IDs; a run is only ever opened with those it was trained
  on."""

  def __post_init__(self):
    check_system(self.system, self.config.model)


@dataclasses.dataclass(frozen=True)
class Inputs(Prepared):
  """Prepared data as GPR reads them, and the model that they ask for.

  Attributes:
    make_batch: rows -> padded batches, and requests -> contexts.
    model: of the sizes that the data have.
    task: stage 1.
  """

  make_batch: BatchMaker
  model: Gpr
  task: Task

  def rows(self, split: str) -> LabelRows:
    """The rows of a split."""
    return LabelRows(
      self.make_batch.users, SPLITS.index(split), stream=self.make_batch.stream,
      num_heads=self.model.config.predictions,
    )


def open_inputs(run: RunFile, workdir: Place | None = None) -> Inputs:
  """Reads data and semantic IDs; errors as `open_prepared`.

  Args:
    run: data and settings.
    workdir: of a run that is there, whose own codes are taken; None = those that `run` names.
  """
  sids = own_codes(workdir) if workdir is not None else ""
  data = open_prepared(run.data, sids or run.sids, fingerprint=run.fingerprint)
  users = ExampleMaker(data.logs, data.examples.config, vocabulary=data.examples.features)
  worth_N = data.examples.train_value_N.astype(np.float64)
  make_batch = BatchMaker(
    run.config.stream, users, data.sids.codes_AL, data.sids.content_codes_OL,
    tuple(data.sids.codebook_sizes), float(np.mean(worth_N)), float(np.std(worth_N)) or 1.0,
  )
  model = Gpr(run.config.model, make_batch.vocabulary)
  return Inputs(
    **vars(data), make_batch=make_batch, model=model, task=mtp_task(model, run.config.loss)
  )


def read_run(workdir: Place) -> RunFile:
  """The settings of a run in a folder that holds one of this system."""
  return config_lib.read_json(RunFile, storage.fetch(workdir / "run.json"))


def train_run(run: RunFile, workdir: Place, *, resume: bool = False) -> TrainState:
  """Trains in `workdir`.

  Args:
    run: data and settings.
    workdir: a new folder, or with `resume` that of an earlier run with the same settings.
    resume: continue an earlier run, to the same bits (a new run where there is none).

  Raises:
    ConfigError: the folder is taken, its settings or data differ, or another process works in it.
    DivergedError: see `train_loop.train`.
  """
  with lock.held(workdir, "a training"):
    return _train_run(run, workdir, resume)


def _train_run(run: RunFile, workdir: Place, resume: bool) -> TrainState:
  taken = is_taken(workdir, resume=resume)
  if taken:
    require_system(workdir, run.system)
    run = going_on(run, read_run(workdir), workdir)
  inputs = open_inputs(run, workdir if taken else None)
  run = dataclasses.replace(run, fingerprint=inputs.fingerprint)
  check_widths(run.config.search.widths, inputs.model.vocabulary.num_levels)
  config, mesh = run.config.train, training_mesh(run.config.train)
  source = inputs.rows("train")
  hosts = {"host": jax.process_index(), "num_hosts": jax.process_count()}
  if distributed.is_first():
    if not own_codes(workdir):
      keep_codes(inputs.sids, workdir)
    storage.write_text(workdir / "run.json", config_lib.to_json(run))
    console.print(
      f"{workdir}: {config.num_steps:,} steps of {config.batch_size:,} rows at the most, "
      f"{config.num_steps * config.batch_size / max(len(source), 1):,.1f} times through the "
      f"{len(source):,} rows of up to {run.config.stream.labels} labels"
    )
  how = {"batch_size": config.batch_size, "parse": as_it_is, **hosts}
  state = train(
    inputs.task, config, folder=workdir, pace=Pace(),
    batches=train_batches(source, inputs.make_batch, seed=config.seed, **how),
    validation=validation_batches(
      inputs.rows("validation"), inputs.make_batch, most=config.eval_batches,
      parts=sharding.row_parts(mesh), **how,
    ),
    judge=judge_of(
      config, run.config.search, data=inputs, contexts=inputs.make_batch,
      generator=generator_of(inputs.model), bin_means=BIN_MEANS,
    ),
  )
  if distributed.is_first():
    console.print(f"{workdir}: {Selection(config, read_log(workdir))}")
  return state


def open_run(workdir: Place, *, data: Place | None = None) -> Opened:
  """A trained run, opened for search.

  Args:
    workdir: folder of the run.
    data: where its data lie now; None = where they lay when it was trained.

  Raises:
    ConfigError: no trained run, or its data are gone or no longer what it was trained on.
  """
  run = with_data(read_run(workdir), workdir, data)
  inputs, config = open_inputs(run, workdir), run.config

  def read():
    return read_params(inputs.task, config.train, workdir)

  params, step = read()
  return Opened(
    system=run.system, model=_in_words(run), folder=workdir, data=storage.place(run.data),
    config=config, search=config.search, fingerprint=inputs.fingerprint, logs=inputs.logs,
    examples=inputs.examples, sids=inputs.sids, index=inputs.index, contexts=inputs.make_batch,
    bin_means=BIN_MEANS, generator=generator_of(inputs.model),
    params=distributed.local(params), step=step, read_params=read,
    mesh=search_mesh(config.train, config.search.batch_size),
  )


def _in_words(run: RunFile) -> str:
  model, stream = run.config.model, run.config.stream
  tokens = f"a token decoder of {model.num_token_layers} layers"
  reads = f"over the latest {stream.groups} requests"
  match run.system:
    case "hstu":
      return (
        f"HSTU: {model.num_layers} causal layers of SiLU attention {reads}, {tokens}, width "
        f"{model.width}."
      )
    case "onerec":
      return (
        f"An encoder-decoder as OneRec's: {model.num_layers} layers that see both ways {reads}, "
        f"{tokens}, width {model.width}."
      )
  return (
    f"GPR after multi-token prediction (stage 1): a sequence decoder of {model.num_layers} layers, "
    f"up to {model.recursions} times {reads}, {tokens} with {model.thinking} thinking tokens, "
    f"{model.predictions} heads, width {model.width}."
  )
