"""A run folder and the prepared data it was trained on, opened for training, search and reports.

    runs/x/run.json        where the data is, and every setting
    runs/x/codes/          the semantic IDs it was trained on, as `gr4ad tokenize` wrote them
    runs/x/checkpoints/    orbax steps
    runs/x/train_log.jsonl, tb/
    runs/x/metrics.json, report.html   after `gr4ad evaluate` and `gr4ad report`
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import grain
import jax

from gr4ad_jax import config as config_lib
from gr4ad_jax.catalog.prepared import Prepared, open_prepared
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.list_records import open_lists, to_list
from gr4ad_jax.data.pipeline import (
  batch_dataset,
  hash_buckets,
  hash_ids,
  read_ahead,
  validation_batches,
)
from gr4ad_jax.gr4ad.batch import Vocabulary
from gr4ad_jax.gr4ad.batch_maker import NUM_ORGANIC_BUCKETS, BatchMaker
from gr4ad_jax.gr4ad.build import Decoder, build_decoder
from gr4ad_jax.gr4ad.config import PRESETS, Config, ModelConfig
from gr4ad_jax.gr4ad.cost import train_flops
from gr4ad_jax.gr4ad.generator import generator_of
from gr4ad_jax.gr4ad.list_batches import ListBatchMaker
from gr4ad_jax.gr4ad.unified_task import UnifiedBatch, unified_task
from gr4ad_jax.gr4ad.value import ValueScale, fit_value_scale, level_weights
from gr4ad_jax.gr4ad.vsl_task import vsl_task
from gr4ad_jax.learning.preference import RewardScale
from gr4ad_jax.machine import digests, distributed, lock, sharding, storage
from gr4ad_jax.machine.peaks import peak_flops
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.search.config import check_widths
from gr4ad_jax.search.opened import Opened
from gr4ad_jax.tokenizer import semantic_id
from gr4ad_jax.tokenizer.semantic_id import SemanticIds
from gr4ad_jax.training.mesh import check_rows, search_mesh, training_mesh
from gr4ad_jax.training.pace import Pace
from gr4ad_jax.training.profiling import Speed
from gr4ad_jax.training.train_loop import read_params, train
from gr4ad_jax.training.train_step import TrainState

_CODES = "codes"  # not "sids": a run may lie in its data folder


@dataclasses.dataclass(frozen=True)
class RunFile:
  """What run.json holds."""

  data: str
  """Folder that `gr4ad prepare` wrote."""
  sids: str
  """Folder that `gr4ad tokenize` wrote."""
  config: Config = Config()
  start: str = ""
  """Folder of a trained run whose parameters this one begins with; "" = random ones."""
  lists: str = ""
  """Folder that `gr4ad candidates` wrote, to learn from beside the logged samples; "" = none."""
  segments: str = ""
  """Folder of log segments that the run goes on learning from (`gr4ad online`); "" = none."""
  system: Literal["gr4ad"] = "gr4ad"
  """What is trained."""
  fingerprint: str = ""
  """Hashes of logs, examples and semantic IDs; a run is only ever opened with those it was trained
  on."""
  lists_fingerprint: str = ""
  """Hash of the lists' files; training is only ever resumed with the same ones."""


@dataclasses.dataclass(frozen=True)
class Inputs(Prepared):
  """Prepared data as GR4AD reads them.

  Attributes:
    make_batch: examples -> padded batches.
    scale: value buckets.
    vocabulary: sizes for the model.
  """

  make_batch: BatchMaker
  scale: ValueScale
  vocabulary: Vocabulary


def open_inputs(run: RunFile, workdir: Place | None = None) -> Inputs:
  """Reads data and semantic IDs; errors as `open_prepared`.

  Args:
    run: data and settings.
    workdir: of a run that is there, whose own codes are taken; None = those that `run` names, as
      also for runs of earlier versions, which keep none.
  """
  sids = run.sids
  if workdir is not None and _keeps_codes(workdir):
    sids = storage.absolute(workdir / _CODES)
  prepared = open_prepared(run.data, sids, fingerprint=run.fingerprint)
  logs, examples, sids = prepared.logs, prepared.examples, prepared.sids
  scale = fit_value_scale(examples, run.config.loss)
  make_batch = BatchMaker(
    examples.config, run.config.loss, scale, sids.codes_AL, sids.content_codes_OL,
    hash_buckets(logs.contents.content_id, NUM_ORGANIC_BUCKETS), logs.contents.ad,
    examples.trending,
  )
  if run.config.model.id_rows:
    make_batch = dataclasses.replace(
      make_batch, user_hash_U=hash_ids(logs.users.user_id), ad_hash_A=hash_ids(logs.ads.ad_id)
    )
  return Inputs(
    **vars(prepared), make_batch=make_batch, scale=scale,
    vocabulary=make_batch.vocabulary(examples.features.sizes, sids.codebook_sizes),
  )


def _keeps_codes(workdir: Place) -> bool:
  return storage.exists(workdir / _CODES / "config.json")  # the last of its files in a bucket


def keep_codes(sids: SemanticIds, workdir: Place) -> None:
  """Stores a run's own copy of its codes, so that tokenizing anew leaves the run as it is."""
  with storage.new_folder(workdir / _CODES) as copy:
    semantic_id.save(sids, copy.path)


def read_run(workdir: Place) -> RunFile:
  """The settings of a run.

  Raises:
    ConfigError: the folder holds no run.
  """
  if not storage.exists(workdir / "run.json"):
    raise ConfigError(f"{workdir}: holds no run; `gr4ad train --workdir {workdir}` makes one")
  return config_lib.read_json(RunFile, storage.fetch(workdir / "run.json"))


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
  taken = storage.exists(workdir / "run.json")
  keeps_codes = taken and _keeps_codes(workdir)
  distributed.wait_for_all("looked for run.json")  # before the first process writes it
  if taken and not resume:
    raise ConfigError(
      f"{workdir}: holds a run already; pass --resume to go on with it, or another --workdir"
    )
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
  logged = batch_dataset(
    inputs.examples.sources["train"], inputs.make_batch, batch_size=config.batch_size,
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
    if not keeps_codes:
      keep_codes(inputs.sids, workdir)
    storage.write_text(workdir / "run.json", config_lib.to_json(run))
    _announce(run, inputs, workdir)
  speed = Speed()
  if not run.lists:
    speed = Speed(
      example_flops=example_flops(run.config.model, inputs),
      peak=peak_flops(list(mesh.devices.flat), run.config.model.compute_dtype),
    )
  return train(
    task, config, batches=read_ahead(batches), folder=workdir,
    validation=level_weights(validation_batches(
      inputs.examples.sources["validation"], inputs.make_batch, batch_size=config.batch_size,
      most=config.eval_batches, host=host, num_hosts=hosts, parts=sharding.row_parts(mesh),
    )),
    start_params=start_params, speed=speed, profile=profile, pace=Pace(_instead(run, inputs)),
  )


def _require_same(there: RunFile, run: RunFile, workdir: Place) -> None:
  """Raises ConfigError where a run that is to go on has other settings."""
  # Data may have moved; the fingerprint says that they are the same.
  there = dataclasses.replace(there, data=run.data, sids=run.sids)
  differing = config_lib.differences(there, run)
  if not differing:
    return
  longer = run.config.train.num_steps > there.config.train.num_steps
  more = (
    f". What it has learned can be trained on in a new folder, with a new course of the learning "
    f"rate: --start {workdir} with another --workdir, without --resume"
  ) if longer else ""
  raise ConfigError(f"{workdir}: the run there has other settings ({', '.join(differing)}){more}")


def _announce(run: RunFile, inputs: Inputs, workdir: Place) -> None:
  """What is about to be trained; `Pace` says how long it takes once that is measured."""
  train, requests = run.config.train, len(inputs.examples.sources["train"])
  passes = train.num_steps * train.batch_size / requests
  console.print(
    f"{workdir}: {train.num_steps:,} steps of {train.batch_size:,} examples, {passes:,.1f} times "
    f"through the {requests:,} of training"
  )


def _instead(run: RunFile, inputs: Inputs) -> dict[str, float]:
  """The preset for a CPU, and its share of this run's time by their FLOPs, where that is small."""
  def flops(config: Config) -> float:
    return example_flops(config.model, inputs) * config.train.batch_size * config.train.num_steps

  share = flops(PRESETS["demo"]) / flops(run.config)
  return {"--preset demo": share} if share < 0.5 else {}


def context_tokens(inputs: Inputs) -> int:
  """S, tokens of a request's context, padded ones included."""
  sequence, vocabulary = inputs.make_batch.sequence, inputs.vocabulary
  fixed = 1 + len(vocabulary.feature_sizes) + vocabulary.num_trending
  return fixed + sequence.max_ad_history + sequence.max_organic_history


def example_flops(config: ModelConfig, inputs: Inputs) -> int:
  """FLOPs of learning from one logged request."""
  return train_flops(
    config, inputs.vocabulary, context_tokens=context_tokens(inputs),
    targets=inputs.make_batch.sequence.max_targets,
  )


def _start_params(run: RunFile, inputs: Inputs) -> Any:
  """Raises ConfigError where the run to begin with has another model or other semantic IDs."""
  folder = storage.place(run.start)
  start = read_run(folder)
  if start.config.model != run.config.model or not inputs.are(start.fingerprint):
    raise ConfigError(f"{run.start}: was trained with another model, other data or other SIDs")
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


def load_params(run: RunFile, workdir: Place, vocabulary: Vocabulary) -> tuple[Decoder, Any, int]:
  """The decoder, the parameters with the best validation loss, and their step.

  A run that learned from candidate lists, or goes on learning, gives its last parameters:
  validation knows only the loss on logged samples, which list learning trades for value.

  Raises:
    ConfigError: no checkpoint.
  """
  decoder = build_decoder(run.config.model, vocabulary)
  task = vsl_task(decoder, run.config.loss)
  newest = bool(run.lists or run.segments)
  params, step = read_params(task, run.config.train, workdir, newest=newest)
  return decoder, params, step


def open_run(workdir: Place, *, data: Place | None = None) -> Opened:
  """A trained run, opened for search.

  Args:
    workdir: folder of the run.
    data: where its data lie now; None = where they lay when it was trained.

  Raises:
    ConfigError: no trained run, or its data are gone or no longer what it was trained on.
  """
  run = with_data(read_run(workdir), workdir, data)
  inputs = open_inputs(run, workdir)
  decoder, params, step = load_params(run, workdir, inputs.vocabulary)
  return Opened(
    system=run.system, model=_in_words(run.config.model), folder=workdir,
    data=storage.place(run.data), config=run.config, search=run.config.search,
    fingerprint=inputs.fingerprint, logs=inputs.logs, examples=inputs.examples, sids=inputs.sids,
    index=inputs.index, contexts=inputs.make_batch, bin_means=inputs.scale.bin_means,
    generator=generator_of(decoder), params=distributed.local(params), step=step,
    read_params=lambda: load_params(run, workdir, inputs.vocabulary)[1:],
    mesh=search_mesh(run.config.train, run.config.search.batch_size),
    value_of="impression" if inputs.scale.uses_ecpm else "engagement",
    unscorable=_unscorable(run),
  )


def _unscorable(run: RunFile) -> str:
  """Why the splits tell nothing of a run that has gone on with later days, or began with one."""
  while not run.segments:
    start = storage.place(run.start) if run.start else None
    if start is None or not storage.exists(start / "run.json"):
      return ""
    run = read_run(start)
  return (
    f"its parameters have learned from the segments in {run.segments}, days that no split of the "
    "data lies behind; `loss_before` of each segment in the learner's train_log.jsonl judges them"
  )


def with_data(run: RunFile, workdir: Place, data: Place | None) -> RunFile:
  """The run with the place of its data, and of semantic IDs in them, as it is now.

  Raises:
    ConfigError: no prepared data are there.
  """
  if data is not None:
    now, before = storage.absolute(data), run.data.rstrip("/")
    sids = now + run.sids[len(before):] if run.sids.startswith(f"{before}/") else run.sids
    run = dataclasses.replace(run, data=now, sids=sids)
  if not storage.exists(storage.place(run.data) / "examples" / "examples.json"):
    where = "are not there" if data is not None else "are gone; if they lie elsewhere, name --data"
    raise ConfigError(f"{run.data}: the prepared data of {workdir} {where}")
  return run


def _in_words(model: ModelConfig) -> str:
  names = {"lazy": "LazyAR", "autoregressive": "Ordinary autoregressive",
           "multi_token": "Multi-token"}
  words = f"{names[model.decoder]} decoder, {model.num_layers} layers"
  if model.decoder == "lazy":
    words += f" ({model.num_lazy_layers} without the previous token)"
  copies = ", with the copy path, which goes beyond the paper" if model.copy_path else ""
  return f"{words}, width {model.width}{copies}."
