"""Runs of the advertiser model: their folders, their training, opened again to tell names.

    WORKDIR/run.json      where the data are, which weights, and every setting
    WORKDIR/checkpoints/, train_log.jsonl, tb/
    WORKDIR/read/         head: what the frozen layers say of each training history
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from gr4ad_jax import config as config_lib
from gr4ad_jax.advertiser import head_run
from gr4ad_jax.advertiser.config import Config, GrpoConfig
from gr4ad_jax.advertiser.name_search import Told, tell
from gr4ad_jax.advertiser.name_tree import build_tree
from gr4ad_jax.advertiser.prepared import Prepared, open_advertisers
from gr4ad_jax.advertiser.texts import Speller, batch_maker, pack
from gr4ad_jax.advertiser.tuning import llama_of, name_task, variables_of
from gr4ad_jax.advertiser.weights import LanguageModel, load_model
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.pipeline import train_batches, validation_batches
from gr4ad_jax.machine import digests, distributed, lock, sharding, storage
from gr4ad_jax.machine.progress import console, track
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.training.mesh import training_mesh
from gr4ad_jax.training.metric_log import read_log
from gr4ad_jax.training.pace import Pace
from gr4ad_jax.training.run_folder import going_on, is_taken, require_system
from gr4ad_jax.training.selection import Selection
from gr4ad_jax.training.train_loop import read_params, train
from gr4ad_jax.training.train_step import TrainState


@dataclasses.dataclass(frozen=True)
class RunFile:
  """What run.json holds."""

  data: str
  """Folder that `gr4ad advertiser prepare` wrote."""
  weights: str
  """What `weights.load_model` takes."""
  config: Config = Config()
  system: Literal["advertiser"] = "advertiser"
  """What is trained."""
  fingerprint: str = ""
  """Hash of the data; a run only ever tells names of those it was trained on."""


@dataclasses.dataclass(frozen=True)
class GrpoRunFile(RunFile):
  """What run.json holds of a run that GRPO has made of a supervised one."""

  start: str = ""
  """Folder of the supervised run."""
  start_version: str = ""
  """`version_of` it: the parameters that it gave."""
  grpo: GrpoConfig = GrpoConfig()


def name_of(run: RunFile) -> str:
  """What a run's row is called among rivals: head, lora, full, or grpo."""
  return "grpo" if isinstance(run, GrpoRunFile) else run.config.tuning


@dataclasses.dataclass(frozen=True)
class AdvertiserRun:
  """A trained run, or published weights as they are, opened to tell names.

  Attributes:
    data: its histories and names.
    version: a hash of weights, settings and step.
    tell: (split, row numbers, K) -> the K most probable advertisers of these rows.
    key: (split, row) -> a hash of all that the answer for a row depends on.
  """

  data: Prepared
  version: str
  tell: Callable[[str, Sequence[int], int], Told]
  key: Callable[[str, int], str]


def read_run(workdir: Place) -> RunFile:
  """The settings of a run in a folder that holds one of this system.

  Raises:
    ConfigError: it holds none.
  """
  require_system(workdir, "advertiser")
  values = config_lib.read_values(storage.fetch(workdir / "run.json"))
  return config_lib.from_dict(GrpoRunFile if values.get("start") else RunFile, values)


def train_run(run: RunFile, workdir: Place, *, resume: bool = False) -> TrainState:
  """Trains in `workdir`.

  Args:
    run: data, weights and settings.
    workdir: a new folder, or with `resume` that of an earlier run with the same settings.
    resume: continue an earlier run, to the same bits (a new run where there is none).

  Raises:
    ConfigError: the folder is taken, its settings or data differ, or another process works in it.
    DivergedError: see `train_loop.train`.
  """
  with lock.held(workdir, "a training"):
    if is_taken(workdir, resume=resume):
      if isinstance(there := read_run(workdir), GrpoRunFile):
        raise ConfigError(f"{workdir}: `gr4ad advertiser grpo` goes on with the run there")
      run = going_on(run, there, workdir)
    data = open_advertisers(storage.place(run.data), fingerprint=run.fingerprint)
    run = dataclasses.replace(run, fingerprint=data.fingerprint)
    model = load_model(run.weights)
    if distributed.is_first():
      storage.write_text(workdir / "run.json", config_lib.to_json(run))
    if run.config.tuning == "head":
      state = head_run.train_head(run.config, workdir, data, model)
    else:
      state = _train_names(run, workdir, data, model)
  if distributed.is_first():
    console.print(f"{workdir}: {Selection(run.config.train, read_log(workdir))}")
  return state


def _train_names(
  run: RunFile, workdir: Place, data: Prepared, model: LanguageModel
) -> TrainState:
  """Adapters or all weights, on packed texts."""
  config, width = run.config.train, run.config.model.max_tokens
  speller = Speller(data, model, max_tokens=width)
  packed = pack(speller.training(), width)
  held_out = pack(speller.validation(), width)
  if distributed.is_first():
    labels = sum(len(text.label_P) for row in packed for text in row)
    console.print(
      f"{workdir}: {config.num_steps:,} steps of {config.batch_size:,} rows of {width:,} tokens, "
      f"{config.num_steps * config.batch_size / len(packed):,.1f} times through {len(packed):,} "
      f"rows with {labels:,} tokens of names"
    )
  hosts = {"host": jax.process_index(), "num_hosts": jax.process_count()}
  how = {"batch_size": config.batch_size, **hosts}
  maker = batch_maker([*packed, *held_out], width)
  # Packed rows lie sorted by length; a part of them is to be like all.
  order = np.random.default_rng(0).permutation(len(held_out))
  return train(
    name_task(model, run.config), config, folder=workdir, pace=Pace(),
    batches=train_batches(
      range(len(packed)), maker, seed=config.seed, parse=packed.__getitem__, **how
    ),
    validation=validation_batches(
      order.tolist(), maker, most=config.eval_batches, parse=held_out.__getitem__,
      parts=sharding.row_parts(training_mesh(config)), **how,
    ),
    start_params=model.params if run.config.tuning == "full" else None,
  )


def open_run(workdir: Place, *, data: Place | None = None) -> AdvertiserRun:
  """A trained run, with the parameters of its best validation.

  Args:
    workdir: folder of the run.
    data: where its data lie now; None = where they lay when it was trained.

  Raises:
    ConfigError: no trained run, or its data are gone or no longer what it was trained on.
  """
  run = read_run(workdir)
  place = storage.place(run.data) if data is None else data
  prepared = open_advertisers(place, fingerprint=run.fingerprint)
  model = load_model(run.weights)
  if run.config.tuning == "head":
    head = head_run.open_head(run.config, workdir, prepared, model)
    version = version_of(run, head.step)
    return AdvertiserRun(prepared, version, head.tell, _keys(prepared, head.speller, version))
  params, step = read_params(name_task(model, run.config), run.config.train, workdir)
  return _opened(prepared, model, run.config, distributed.local(params), version_of(run, step))


def version_of(run: RunFile, step: int) -> str:
  """A hash of all that the parameters of a run's step were made from."""
  made_from = [config_lib.to_json(run.config), run.weights, run.fingerprint, step]
  if isinstance(run, GrpoRunFile):
    made_from += [run.start_version, config_lib.to_json(run.grpo)]
  return digests.of_value(made_from)


def open_weights(data: Place, weights: str, config: Config) -> AdvertiserRun:
  """Published weights as they are: zero-shot.

  Raises:
    ConfigError: no data, or no weights of that name.
  """
  prepared, model = open_advertisers(data), load_model(weights)
  if config.tuning != "full":
    raise ConfigError(f"tuning={config.tuning!r}: must be 'full' where nothing is tuned")
  version = digests.of_value([weights, prepared.config.form, config.model.max_tokens])
  return _opened(prepared, model, config, model.params, version)


def _opened(
  data: Prepared, model: LanguageModel, config: Config, params: Any, version: str
) -> AdvertiserRun:
  speller = Speller(data, model, max_tokens=config.model.max_tokens)
  tree = build_tree(speller.name_A, speller.end)
  llama = llama_of(model, config)
  variables = jax.device_put(variables_of(model, config, params))

  def known(split: str, row: int) -> list[int]:
    return speller.known(split, data.splits[split], row)

  def tell_rows(split: str, rows: Sequence[int], most: int) -> Told:
    texts = [known(split, row) for row in rows]
    # Rows of like length share a batch; the last one is filled up.
    order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    size = config.model.batch_rows
    starts = range(0, len(order), size)
    advertiser_RK = np.full((len(texts), most), -1, np.int32)
    logp_RK = np.full((len(texts), most), -np.inf, np.float32)
    for start in track(starts, "tell names, batches", len(starts)):
      mine = order[start : start + size]
      filled = mine + [mine[0]] * (size - len(mine))
      told = tell(llama, variables, [texts[n] for n in filled], tree, most=most)
      advertiser_RK[mine] = told.advertiser_RK[: len(mine)]
      logp_RK[mine] = told.logp_RK[: len(mine)]
    return Told(advertiser_RK, logp_RK)

  return AdvertiserRun(data, version, tell_rows, _keys(data, speller, version))


def _keys(data: Prepared, speller: Speller, version: str) -> Callable[[str, int], str]:
  names = digests.of_value(data.name_A.tolist())

  def key(split: str, row: int) -> str:
    rows = data.splits[split]
    items = rows.item_E[rows.history(row)].tolist()
    return digests.of_value([version, names, items, speller.known(split, rows, row)])

  return key
