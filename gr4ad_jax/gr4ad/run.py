"""A run folder and the prepared data it was trained on, opened for training, search and reports.

    runs/x/run.json        where the data is, and every setting
    runs/x/checkpoints/    orbax steps
    runs/x/train_log.jsonl, tb/
    runs/x/metrics.json, report.html   after `gr4ad evaluate` and `gr4ad report`
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import numpy as np

from gr4ad_jax import config as config_lib
from gr4ad_jax.catalog.ad_index import AdIndex, build_ad_index
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.engagements import engaged_with_ad
from gr4ad_jax.data.list_records import open_lists, to_list
from gr4ad_jax.data.log_folder import read_logs
from gr4ad_jax.data.pipeline import batch_dataset, hash_buckets, hash_ids, read_ahead
from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.tfds_builder import ExampleSet, open_examples, to_example, training_events
from gr4ad_jax.gr4ad.batch import Vocabulary
from gr4ad_jax.gr4ad.batch_maker import NUM_ORGANIC_BUCKETS, BatchMaker
from gr4ad_jax.gr4ad.build import Decoder, build_decoder
from gr4ad_jax.gr4ad.config import Config, ModelConfig
from gr4ad_jax.gr4ad.cost import train_flops
from gr4ad_jax.gr4ad.generator import generator_of
from gr4ad_jax.gr4ad.list_batches import list_batch_maker
from gr4ad_jax.gr4ad.unified_task import UnifiedBatch, unified_task
from gr4ad_jax.gr4ad.value import ValueScale, fit_value_scale
from gr4ad_jax.gr4ad.vsl_task import vsl_task
from gr4ad_jax.learning.preference import RewardScale
from gr4ad_jax.machine import distributed, sharding, storage
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.search.config import check_widths
from gr4ad_jax.search.opened import Opened
from gr4ad_jax.tokenizer import semantic_id
from gr4ad_jax.training.config import TrainConfig
from gr4ad_jax.training.mesh import check_rows, search_mesh, training_mesh
from gr4ad_jax.training.train_loop import read_params, train
from gr4ad_jax.training.train_step import TrainState


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
  """Of examples and semantic IDs; a run is only ever opened with those it was trained on."""


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Everything that model, search and evaluation read.

  Attributes:
    logs: the cleaned logs.
    examples: prepared requests.
    sids: codes of ads and contents.
    index: SID <-> ads; ads of one SID ordered by engagements in training.
    make_batch: examples -> padded batches.
    scale: value buckets.
    vocabulary: sizes for the model.
    fingerprint: of examples and semantic IDs.
  """

  logs: Logs
  examples: ExampleSet
  sids: semantic_id.SemanticIds
  index: AdIndex
  make_batch: BatchMaker
  scale: ValueScale
  vocabulary: Vocabulary
  fingerprint: str


def open_inputs(run: RunFile) -> Inputs:
  """Reads data and semantic IDs.

  Raises:
    LogError: a folder is missing, or the semantic IDs are not of these logs.
  """
  data = storage.place(run.data)
  examples_folder = storage.fetch(data / "examples")
  examples = open_examples(examples_folder)
  logs = read_logs(storage.fetch(data / "logs"))
  sids = semantic_id.load(storage.fetch(storage.place(run.sids)))
  if len(sids.codes_AL) != len(logs.ads.ad_id):
    raise ConfigError(
      f"{run.sids}: holds {len(sids.codes_AL)} ads, {data / 'logs'} has {len(logs.ads.ad_id)}; "
      "run `gr4ad tokenize` on these logs"
    )
  if not 2 <= len(sids.codebook_sizes):
    raise ConfigError(f"{run.sids}: {len(sids.codebook_sizes)} SID level; needs at least 2")
  fingerprint = _fingerprint(examples_folder / "examples.json", sids)
  if run.fingerprint and run.fingerprint != fingerprint:
    raise ConfigError(
      f"{run.data}, {run.sids}: changed since the run was trained on them; train again"
    )
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
  index = build_ad_index(sids.codes_AL, training_engagements(logs, examples).astype(np.float64))
  vocabulary = make_batch.vocabulary(examples.features.sizes, sids.codebook_sizes)
  return Inputs(logs, examples, sids, index, make_batch, scale, vocabulary, fingerprint)


def _fingerprint(examples: Path, sids: semantic_id.SemanticIds) -> str:
  digest = hashlib.blake2b(examples.read_bytes(), digest_size=8)
  for codes in (sids.codes_AL, sids.content_codes_OL):
    digest.update(np.ascontiguousarray(codes).tobytes())
  return digest.hexdigest()


def training_engagements(logs: Logs, examples: ExampleSet) -> np.ndarray:
  """int64 [A] clicks and conversions of every ad in the training requests."""
  events = logs.events
  rows = engaged_with_ad(events) & training_events(logs, examples)
  return np.bincount(events.ad[rows], minlength=len(logs.ads.ad_id))


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
    ConfigError: the folder is taken, or its settings differ.
    DivergedError: see `train_loop.train`.
  """
  taken = storage.exists(workdir / "run.json")
  distributed.wait_for_all("looked for run.json")  # before the first process writes it
  if taken and not resume:
    raise ConfigError(f"{workdir}: holds a run already; pass --resume or another --workdir")
  inputs = open_inputs(run)
  run = dataclasses.replace(run, fingerprint=inputs.fingerprint)
  if taken and (differing := differences(read_run(workdir), run)):
    raise ConfigError(f"{workdir}: the run there has other settings ({', '.join(differing)})")
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
    lists = _list_dataset(run, inputs, host, hosts)
    batches = grain.MapDataset.range(config.num_steps).map(
      lambda step: UnifiedBatch(logged[step], lists[step])
    )
    task = unified_task(decoder, run.config.loss, run.config.preference)
  else:
    batches, task = logged, vsl_task(decoder, run.config.loss)
  if distributed.is_first():
    storage.write_text(workdir / "run.json", config_lib.to_json(run))
  return train(
    task, config, batches=read_ahead(batches), folder=workdir, mesh=mesh,
    validation=validation_batches(
      inputs, config, host, hosts, parts=sharding.row_parts(mesh)
    ),
    start_params=start_params, profile=profile, dtype=run.config.model.compute_dtype,
    example_flops=0.0 if run.lists else example_flops(run.config.model, inputs),
  )


def example_flops(config: ModelConfig, inputs: Inputs) -> int:
  """FLOPs of learning from one logged request."""
  sequence, vocabulary = inputs.make_batch.sequence, inputs.vocabulary
  tokens = 1 + len(vocabulary.feature_sizes) + vocabulary.num_trending
  tokens += sequence.max_ad_history + sequence.max_organic_history
  return train_flops(config, vocabulary, context_tokens=tokens, targets=sequence.max_targets)


def _start_params(run: RunFile, inputs: Inputs) -> Any:
  """Raises ConfigError where the run to begin with has another model or other semantic IDs."""
  folder = storage.place(run.start)
  start = read_run(folder)
  if start.config.model != run.config.model or start.fingerprint != inputs.fingerprint:
    raise ConfigError(f"{run.start}: was trained with another model, other data or other SIDs")
  return load_params(start, folder, inputs.vocabulary)[1]


def _list_dataset(run: RunFile, inputs: Inputs, host: int, hosts: int) -> grain.MapDataset:
  """Batches of candidate lists; rewards are scaled by quantiles over all of them."""
  folder = storage.fetch(storage.place(run.lists))
  records = open_lists(folder)
  about = json.loads((folder / "lists.json").read_text())
  if about["fingerprint"] != inputs.fingerprint:
    raise ConfigError(f"{run.lists}: was made of other data or other SIDs")
  make_batch = list_batch_maker(
    inputs.make_batch, run.config.preference, RewardScale(*about["reward_scale"]), about["size"]
  )
  return batch_dataset(
    records, make_batch, batch_size=run.config.preference.lists_per_step,
    seed=run.config.train.seed + 1, host=host, num_hosts=hosts, parse=to_list,
  )


def validation_batches(
  inputs: Inputs, config: TrainConfig, host: int, hosts: int, *, parts: int = 1
) -> list[Any]:
  """The first batches of the validation split in its stored (shuffled) order.

  Args:
    inputs: with the split.
    config: batch size and number of batches.
    host, hosts: which rows of each batch this process reads.
    parts: rows of a batch are a multiple of this.

  Raises:
    ConfigError: the split is smaller than that.
  """
  source = inputs.examples.sources["validation"]
  rows = min(config.batch_size, len(source) // parts * parts) // hosts
  if not rows:
    raise ConfigError(
      f"the validation split has {len(source)} examples, the batch is split over {parts} devices; "
      "take fewer with train.data_parallel"
    )
  count = max(1, min(config.eval_batches, len(source) // (rows * hosts)))
  batches = []
  for i in range(count):
    first = (i * hosts + host) * rows
    records = [source[j] for j in range(first, first + rows)]
    batches.append(inputs.make_batch([to_example(r, 1) for r in records]))
  return batches


def differences(old: RunFile, new: RunFile) -> list[str]:
  """Settings in which two runs differ, as "path: old -> new"."""
  def flat(values: dict, prefix: str = "") -> dict[str, Any]:
    out = {}
    for name, value in values.items():
      if isinstance(value, dict):
        out |= flat(value, f"{prefix}{name}.")
      else:
        out[prefix + name] = value
    return out

  a, b = flat(dataclasses.asdict(old)), flat(dataclasses.asdict(new))
  return [f"{name}: {a.get(name)} -> {b[name]}" for name in b if a.get(name) != b[name]]


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


def open_run(workdir: Place) -> Opened:
  """A trained run, opened for search.

  Raises:
    ConfigError: no trained run, or its data are no longer what it was trained on.
  """
  run = read_run(workdir)
  inputs = open_inputs(run)
  decoder, params, step = load_params(run, workdir, inputs.vocabulary)
  return Opened(
    folder=workdir, data=storage.place(run.data), config=run.config, search=run.config.search,
    fingerprint=inputs.fingerprint, logs=inputs.logs, examples=inputs.examples, sids=inputs.sids,
    index=inputs.index, contexts=inputs.make_batch, bin_means=inputs.scale.bin_means,
    generator=generator_of(decoder), params=distributed.local(params), step=step,
    read_params=lambda: load_params(run, workdir, inputs.vocabulary)[1:],
    mesh=search_mesh(run.config.train, run.config.search.batch_size),
  )
