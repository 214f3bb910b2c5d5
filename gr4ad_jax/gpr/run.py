"""Runs of GPR: their folders, their training, opened again for search.

    WORKDIR/run.json      the system, where the data are, and every setting
    WORKDIR/codes/        the semantic IDs it was trained on, as `gr4ad tokenize` wrote them
    WORKDIR/thoughts/     where it was given some, see `thoughts.py`
    WORKDIR/checkpoints/, train_log.jsonl, tb/
    WORKDIR/candidates/   of stage 3, see `candidates.py`
"""

from __future__ import annotations

import dataclasses
from typing import Any

import grain
import jax
import numpy as np

from gr4ad_jax import config as config_lib
from gr4ad_jax.catalog.prepared import Prepared, open_prepared
from gr4ad_jax.catalog.run_data import keep_codes, own_codes, with_data
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.pipeline import batch_dataset, read_ahead, validation_batches
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.data.splits import SPLITS
from gr4ad_jax.gpr.asked import TrainingRequests
from gr4ad_jax.gpr.batch_maker import BatchMaker
from gr4ad_jax.gpr.candidates import FinalValue
from gr4ad_jax.gpr.config import Config, System, check_system
from gr4ad_jax.gpr.generator import generator_of
from gr4ad_jax.gpr.label_rows import LabelRows, as_it_is
from gr4ad_jax.gpr.model import Gpr
from gr4ad_jax.gpr.mtp import mtp_task
from gr4ad_jax.gpr.policy import policy_task
from gr4ad_jax.gpr.pushes import Pushes, read_final_value
from gr4ad_jax.gpr.thoughts import MOST_SEEN, keep_thoughts, own_thoughts, read_thoughts
from gr4ad_jax.gpr.vaft import LabelWeights, label_weights
from gr4ad_jax.machine import distributed, lock, sharding, storage
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.market.simulator import open_simulator
from gr4ad_jax.ranker.reward import open_reward
from gr4ad_jax.search.config import check_widths
from gr4ad_jax.search.judge import judge_of
from gr4ad_jax.search.opened import Opened
from gr4ad_jax.search.recommender import Recommender
from gr4ad_jax.training.mesh import check_rows, search_mesh, training_mesh
from gr4ad_jax.training.metric_log import read_log
from gr4ad_jax.training.pace import Pace
from gr4ad_jax.training.run_folder import going_on, is_taken, require_system
from gr4ad_jax.training.selection import Selection
from gr4ad_jax.training.task import Task
from gr4ad_jax.training.train_loop import read_params, train
from gr4ad_jax.training.train_step import TrainState

_STAGES = {
  "mtp": "multi-token prediction (stage 1)", "vaft": "value-aware fine-tuning (stage 2)",
  "hepo": "HEPO (stage 3)", "dpo": "DPO in the place of HEPO (stage 3)",
}
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
  start: str = ""
  """Folder of a trained run whose parameters this one begins with; "" = random ones."""
  reward: str = ""
  """Folder of the reward model that prices candidates (`gr4ad reward`); "" = none."""
  market: str = ""
  """Folder with the market.json of the market that the data are a log of, whose truth prices
  candidates instead; "" = none."""
  thoughts: str = ""
  """File of thoughts on users, or that of the run to begin with; "" = none. The run's folder has a
  copy of its own."""
  fingerprint: str = ""
  """Hashes of logs, examples and semantic IDs; a run is only ever opened with those it was trained
  on."""

  def __post_init__(self):
    check_system(self.system, self.config.model)
    config_lib.require(not self.thoughts or self.system == "gpr", "thoughts", self.thoughts,
                       f"are none of what {self.system} reads; --system gpr takes them")


@dataclasses.dataclass(frozen=True)
class Inputs(Prepared):
  """Prepared data as GPR reads them, and the model that they ask for.

  Attributes:
    make_batch: rows -> padded batches, and requests -> contexts.
    model: of the sizes that the data have.
    task: of the run's stage.
    weights: of labels, where the stage weighs them.
    left_out: rows of a file of thoughts on users that the logs do not have.
  """

  make_batch: BatchMaker
  model: Gpr
  task: Task
  weights: LabelWeights | None
  left_out: int = 0

  def rows(self, split: str) -> LabelRows:
    """The rows of a split."""
    return LabelRows(
      self.make_batch.users, SPLITS.index(split), stream=self.make_batch.stream,
      num_heads=self.model.config.predictions, weights=self.weights,
    )


def open_inputs(run: RunFile, workdir: Place | None = None) -> Inputs:
  """Reads data and semantic IDs; errors as `open_prepared`.

  Args:
    run: data and settings.
    workdir: of a run that is there, whose own codes and thoughts are taken; None = those that `run`
      names, or the thoughts of the run that it begins with.
  """
  sids = own_codes(workdir) if workdir is not None else ""
  data = open_prepared(run.data, sids or run.sids, fingerprint=run.fingerprint)
  users = ExampleMaker(data.logs, data.examples.config, vocabulary=data.examples.features)
  worth_N = data.examples.train_value_N.astype(np.float64)
  thoughts, left_out = None, 0
  if run.thoughts:
    if (owner := workdir or (storage.place(run.start) if run.start else None)) is not None:
      thoughts = own_thoughts(owner)
    else:
      file = storage.fetch(storage.place(run.thoughts))
      thoughts, left_out = read_thoughts(file, data.logs.users.user_id)
  make_batch = BatchMaker(
    run.config.stream, users, data.sids.codes_AL, data.sids.content_codes_OL,
    tuple(data.sids.codebook_sizes), float(np.mean(worth_N)), float(np.std(worth_N)) or 1.0,
    thoughts,
  )
  model = Gpr(run.config.model, make_batch.vocabulary)
  inputs = Inputs(
    **vars(data), make_batch=make_batch, model=model, task=mtp_task(model, run.config.loss),
    weights=None if run.config.stage == "mtp" else label_weights(users), left_out=left_out,
  )
  value = read_final_value(workdir) if workdir is not None else None
  return inputs if value is None else _with_final_value(inputs, run.config, value)


def _with_final_value(inputs: Inputs, config: Config, value: FinalValue) -> Inputs:
  """As stage 3 reads them: values are of candidates from here on."""
  make_batch = dataclasses.replace(
    inputs.make_batch, value_mean=value.mean, value_std=value.std
  )
  model = Gpr(config.model, make_batch.vocabulary)
  return dataclasses.replace(
    inputs, make_batch=make_batch, model=model,
    task=policy_task(model, config.loss, config.policy, config.stage),
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
  run = _with_thoughts(run)
  if taken:
    require_system(workdir, run.system)
    run = going_on(run, read_run(workdir), workdir)
  inputs = open_inputs(run, workdir if taken else None)
  run = dataclasses.replace(run, fingerprint=inputs.fingerprint)
  check_widths(run.config.search.widths, inputs.model.vocabulary.num_levels)
  start_params, pushes = _start_params(run, inputs), None
  if run.config.learns_policy:
    pushes = _pushes(run, inputs, workdir, start_params)
  config, mesh = run.config.training, training_mesh(run.config.train)
  source = inputs.rows("train")
  hosts = {"host": jax.process_index(), "num_hosts": jax.process_count()}
  if distributed.is_first():
    if not own_codes(workdir):
      keep_codes(inputs.sids, workdir)
    if (thoughts := inputs.make_batch.thoughts) is not None and not taken:
      keep_thoughts(thoughts, workdir)
      console.print(
        f"{run.thoughts}: {len(thoughts.user_N):,} thoughts on "
        f"{len(np.unique(thoughts.user_N)):,} users; {inputs.left_out:,} rows are on users that "
        "the logs do not have, and are left out"
      )
    storage.write_text(workdir / "run.json", config_lib.to_json(run))
    console.print(
      f"{workdir}: {config.num_steps:,} steps of {config.batch_size:,} rows at the most, "
      f"{config.num_steps * config.batch_size / max(len(source), 1):,.1f} times through the "
      f"{len(source):,} rows of up to {run.config.stream.labels} labels"
    )
  how = {"batch_size": config.batch_size, "parse": as_it_is, **hosts}
  validation = validation_batches(
    inputs.rows("validation"), inputs.make_batch, most=config.eval_batches,
    parts=sharding.row_parts(mesh), **how,
  )
  logged = batch_dataset(source, inputs.make_batch, seed=config.seed, **how)
  if pushes is not None:
    value = pushes.final_value(start_params)
    inputs = _with_final_value(inputs, run.config, value)
  judge = judge_of(
    config, run.config.search, data=inputs, contexts=inputs.make_batch,
    generator=generator_of(inputs.model, run.config.search), bin_means=BIN_MEANS,
  )

  def train_until(batches: grain.DatasetIterator, until: int | None) -> TrainState:
    return train(
      inputs.task, config, folder=workdir, pace=Pace(), start_params=start_params, batches=batches,
      validation=validation, judge=judge, until=until,
    )

  if pushes is not None:
    return pushes.train(
      inputs.task, value, start_params=start_params, logged=logged, train_until=train_until
    )
  state = train_until(read_ahead(logged), None)
  if distributed.is_first():
    console.print(f"{workdir}: {Selection(config, read_log(workdir))}")
  return state


def _with_thoughts(run: RunFile) -> RunFile:
  """The run with the thoughts of the run to begin with, and with how many of them a request sees.

  Raises:
    ConfigError: thoughts beside those of that run, or a number of thoughts without any.
  """
  stream, usual = run.config.stream, MOST_SEEN
  if run.start:
    folder = storage.place(run.start)
    require_system(folder, run.system)
    start = read_run(folder)
    config_lib.require(not run.thoughts, "thoughts", run.thoughts,
                       f"goes without --start: a run has the thoughts of {run.start}, or none")
    run, usual = dataclasses.replace(run, thoughts=start.thoughts), start.config.stream.thoughts
  if not run.thoughts:
    config_lib.require(not stream.thoughts, "stream.thoughts", stream.thoughts,
                       "needs --thoughts, a file of them")
    return run
  stream = dataclasses.replace(stream, thoughts=stream.thoughts or usual)
  return dataclasses.replace(run, config=dataclasses.replace(run.config, stream=stream))


def _start_params(run: RunFile, inputs: Inputs) -> Any:
  """The parameters of the run to begin with, None = random ones.

  Raises:
    ConfigError: a later stage without such a run, or one of another model, other data or SIDs.
  """
  stage = run.config.stage
  if (run.reward or run.market) and not run.config.learns_policy:
    raise ConfigError(f"stage={stage!r}: prices no candidates; leave out --reward and --market")
  if not run.start:
    config_lib.require(stage == "mtp", "stage", stage, "needs --start, the run of an earlier stage")
    return None
  folder = storage.place(run.start)
  require_system(folder, run.system)
  start = read_run(folder)
  if start.config.model != run.config.model or not inputs.are(start.fingerprint):
    raise ConfigError(f"{run.start}: was trained with another model, other data or other SIDs")
  if start.config.learns_policy:
    raise ConfigError(f"{run.start}: is of stage {start.config.stage}, after which none begins")
  task = mtp_task(inputs.model, start.config.loss)
  return read_params(task, start.config.train, folder)[0]


def _pushes(run: RunFile, inputs: Inputs, workdir: Place, start_params: Any) -> Pushes:
  """What makes a run's candidates; raises ConfigError where nothing, or two things, price them."""
  config = run.config
  if bool(run.reward) == bool(run.market):
    raise ConfigError(
      f"stage={config.stage!r}: needs --reward, a reward model, or --market, the folder with the "
      "market.json of a simulated log, to price candidates"
    )
  if jax.process_count() > 1:
    raise ConfigError(f"stage={config.stage!r}: candidates are made on one host; start one alone")
  rows = config.policy.lists_per_step
  check_rows(training_mesh(config.train), config.train, "policy.lists_per_step", rows)
  if run.market:
    pricer = open_simulator(
      storage.place(run.market), inputs.logs, inputs.make_batch.users.vocabulary
    )
  else:
    pricer = open_reward(storage.place(run.reward), data=storage.place(run.data))
    if not inputs.fingerprint.startswith(f"{pricer.fingerprint}-"):
      raise ConfigError(f"{run.reward}: was trained on other logs or examples than the run")
  search = dataclasses.replace(config.search, value_exponent=0.0)
  searcher = Recommender(
    generator_of(inputs.model, search), start_params, index=inputs.index, config=search,
    bin_means=BIN_MEANS, mesh=search_mesh(config.train, search.batch_size),
  )
  requests = TrainingRequests(
    inputs.make_batch.users, rehearsal_share=config.policy.rehearsal_share, seed=config.train.seed
  )
  return Pushes(
    workdir, config, inputs.make_batch, inputs.index, pricer, requests, searcher
  )


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
    return read_params(inputs.task, config.train, workdir, newest=config.learns_policy)

  params, step = read()
  return Opened(
    system=run.system, model=_in_words(run), folder=workdir, data=storage.place(run.data),
    config=config, search=config.search, fingerprint=inputs.fingerprint, logs=inputs.logs,
    examples=inputs.examples, sids=inputs.sids, index=inputs.index, contexts=inputs.make_batch,
    bin_means=BIN_MEANS, generator=generator_of(inputs.model, config.search),
    params=distributed.local(params), step=step, read_params=read,
    value_of="impression" if config.learns_policy else "engagement",
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
    f"GPR after {_STAGES[run.config.stage]}: a sequence decoder of {model.num_layers} layers, "
    f"up to {model.recursions} times {reads}, {tokens} with {model.thinking} thinking tokens, "
    f"{model.predictions} heads, width {model.width}"
    + (f", told up to {stream.thoughts} thoughts on the user." if run.thoughts else ".")
  )
