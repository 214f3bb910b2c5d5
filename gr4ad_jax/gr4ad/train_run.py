"""Training of a run: the data, the task and the loop, in a folder of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import jax

from gr4ad_jax import config as config_lib
from gr4ad_jax.catalog.run_data import keep_codes, own_codes
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.list_records import open_lists, to_list
from gr4ad_jax.data.pipeline import batch_dataset, read_ahead, validation_batches
from gr4ad_jax.gr4ad.build import build_decoder
from gr4ad_jax.gr4ad.config import PRESETS, Config
from gr4ad_jax.gr4ad.generator import generator_of
from gr4ad_jax.gr4ad.list_batches import ListBatchMaker
from gr4ad_jax.gr4ad.run import (
  Inputs,
  RunFile,
  example_flops,
  gives_newest,
  held_out,
  load_params,
  open_inputs,
  read_run,
)
from gr4ad_jax.gr4ad.unified_task import UnifiedBatch, unified_task
from gr4ad_jax.gr4ad.value import level_weights
from gr4ad_jax.gr4ad.vsl_task import vsl_task
from gr4ad_jax.learning.preference import RewardScale
from gr4ad_jax.machine import digests, distributed, lock, sharding, storage
from gr4ad_jax.machine.peaks import peak_flops
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.search.config import check_widths
from gr4ad_jax.search.judge import judge_of
from gr4ad_jax.training.mesh import check_rows, training_mesh
from gr4ad_jax.training.metric_log import read_log
from gr4ad_jax.training.pace import Pace
from gr4ad_jax.training.profiling import Speed
from gr4ad_jax.training.run_folder import changed_settings, is_taken
from gr4ad_jax.training.selection import Selection
from gr4ad_jax.training.train_loop import train
from gr4ad_jax.training.train_step import TrainState


def train_run(
  run: RunFile, workdir: Place, *, resume: bool = False, profile: range | None = None
) -> TrainState:
  """Trains in `workdir`.

  Args:
    run: data and settings.
    workdir: a new folder, or with `resume` that of an earlier run with the same settings.
    resume: continue an earlier run (a new run where there is none).
    profile: steps to trace into workdir/profile.

  Raises:
    ConfigError: the folder is taken, its settings differ, or another process works in it.
    DivergedError: see `train_loop.train`.
  """
  with lock.held(workdir, "a training"):
    return _train_run(run, workdir, resume, profile)


def _train_run(run: RunFile, workdir: Place, resume: bool, profile: range | None) -> TrainState:
  taken = is_taken(workdir, resume=resume)
  has_codes = taken and own_codes(workdir) != ""
  if taken:
    there = read_run(workdir)
    run = dataclasses.replace(
      run, fingerprint=there.fingerprint, lists_fingerprint=there.lists_fingerprint
    )
    _require_same(there, run, workdir)
  inputs = open_inputs(run, workdir if taken else None)
  run = dataclasses.replace(run, fingerprint=run.fingerprint or inputs.fingerprint)
  check_widths(run.config.search.widths, inputs.vocabulary.num_levels)
  config = run.config.train
  hosts, host = jax.process_count(), jax.process_index()
  mesh = training_mesh(config)
  start_params = _start_params(run, inputs) if run.start else None
  decoder = build_decoder(run.config.model, inputs.vocabulary)
  source = _requests(run, inputs)
  logged = batch_dataset(
    source, inputs.make_batch, batch_size=config.batch_size,
    seed=config.seed, host=host, num_hosts=hosts,
  )
  if run.lists:
    rows = run.config.preference.lists_per_step
    check_rows(mesh, config, "preference.lists_per_step", rows)
    lists, found = _list_dataset(run, inputs, host, hosts)
    run = dataclasses.replace(run, lists_fingerprint=found)
    batches = grain.MapDataset.range(config.num_steps).map(
      lambda step: UnifiedBatch(logged[step], lists[step])
    )
    task = unified_task(decoder, run.config.loss, run.config.preference)
  else:
    batches, task = logged, vsl_task(decoder, run.config.loss)
  if distributed.is_first():
    if not has_codes:
      keep_codes(inputs.sids, workdir)
    storage.write_text(workdir / "run.json", config_lib.to_json(run))
    _announce(run, len(source), workdir)
  speed = Speed()
  if not run.lists:
    speed = Speed(
      example_flops=example_flops(run.config.model, inputs),
      peak=peak_flops(list(mesh.devices.flat), run.config.model.compute_dtype),
    )
  validation = [] if run.refit else level_weights(validation_batches(
    inputs.examples.sources["validation"], inputs.make_batch, batch_size=config.batch_size,
    most=config.eval_batches, host=host, num_hosts=hosts, parts=sharding.row_parts(mesh),
  ))
  state = train(
    task, config, batches=read_ahead(batches), folder=workdir, validation=validation,
    judge=judge_of(
      config, run.config.search, data=inputs, contexts=inputs.make_batch,
      generator=generator_of(decoder), bin_means=inputs.scale.bin_means,
    ),
    start_params=start_params, speed=speed, profile=profile, pace=Pace(_instead(run, inputs)),
  )
  if distributed.is_first() and not gives_newest(run):
    console.print(f"{workdir}: {Selection(config, read_log(workdir))}")
  return state


def _requests(run: RunFile, inputs: Inputs) -> Sequence[dict]:
  """Records of the requests that are learned from."""
  sources = inputs.examples.sources
  if not run.refit:
    return sources["train"]
  return grain.MapDataset.concatenate(
    [grain.MapDataset.source(sources[split]) for split in ("train", "validation")]
  )


def _require_same(there: RunFile, run: RunFile, workdir: Place) -> None:
  """Raises ConfigError where a run that is to go on has other settings."""
  differing = changed_settings(there, run)
  if not differing:
    return
  longer = run.config.train.num_steps > there.config.train.num_steps
  more = (
    f". What it has learned can be trained on in a new folder, with a new course of the learning "
    f"rate: --start {workdir} with another --workdir, without --resume"
  ) if longer else ""
  raise ConfigError(f"{workdir}: the run there has other settings ({', '.join(differing)}){more}")


def _announce(run: RunFile, requests: int, workdir: Place) -> None:
  """What is about to be trained; `Pace` says how long it takes once that is measured."""
  train = run.config.train
  passes = train.num_steps * train.batch_size / requests
  console.print(
    f"{workdir}: {train.num_steps:,} steps of {train.batch_size:,} examples, {passes:,.1f} times "
    f"through the {requests:,} of training" + (" and validation" if run.refit else "")
  )


def _instead(run: RunFile, inputs: Inputs) -> dict[str, float]:
  """The preset for a CPU, and its share of this run's time by their FLOPs, where that is small."""
  def flops(config: Config) -> float:
    return example_flops(config.model, inputs) * config.train.batch_size * config.train.num_steps

  share = flops(PRESETS["demo"]) / flops(run.config)
  return {"--preset demo": share} if share < 0.5 else {}


def _start_params(run: RunFile, inputs: Inputs) -> Any:
  """Raises ConfigError where the run to begin with has another model or other semantic IDs."""
  folder = storage.place(run.start)
  start = read_run(folder)
  if start.config.model != run.config.model or not inputs.are(start.fingerprint):
    raise ConfigError(f"{run.start}: was trained with another model, other data or other SIDs")
  if "validation" not in held_out(start):
    raise ConfigError(f"{run.start}: has learned from the requests that would validate this run")
  return load_params(start, folder, inputs.vocabulary)[1]


def _list_dataset(
  run: RunFile, inputs: Inputs, host: int, hosts: int
) -> tuple[grain.MapDataset, str]:
  """Batches of candidate lists, and a hash of the lists; rewards are scaled over all of them."""
  folder = storage.fetch(storage.place(run.lists))
  known = digests.check(folder / "lists.json", remedy="run `gr4ad candidates` again")
  found = digests.of_value(known) if known else ""
  if run.lists_fingerprint not in ("", found):
    raise ConfigError(f"{run.lists}: the lists have changed since the run began; train a new one")
  records = open_lists(folder)
  about = config_lib.read_values(folder / "lists.json")
  if not inputs.are(about["fingerprint"]):
    raise ConfigError(f"{run.lists}: was made of other data or other SIDs")
  per_list = run.config.preference.reward_range == "list"
  scale = None if per_list else RewardScale(*about["reward_scale"])
  make_batch = ListBatchMaker(inputs.make_batch, scale, about["size"])
  return batch_dataset(
    records, make_batch, batch_size=run.config.preference.lists_per_step,
    seed=run.config.train.seed + 1, host=host, num_hosts=hosts, parse=to_list,
  ), found
