"""A run folder and the prepared data it was trained on, opened for search and reports.

    runs/x/run.json        where the data is, and every setting
    runs/x/codes/          the semantic IDs it was trained on, as `gr4ad tokenize` wrote them
    runs/x/checkpoints/    orbax steps
    runs/x/train_log.jsonl, tb/
    runs/x/metrics.json, report.html   after `gr4ad evaluate` and `gr4ad report`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from gr4ad_jax import config as config_lib
from gr4ad_jax.catalog.prepared import Prepared, open_prepared
from gr4ad_jax.catalog.run_data import own_codes, with_data
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.examples import training_events
from gr4ad_jax.data.pipeline import ad_facts, hash_buckets, hash_ids
from gr4ad_jax.data.transitions import Transitions
from gr4ad_jax.gr4ad.batch import KnownAds, Vocabulary
from gr4ad_jax.gr4ad.batch_maker import NUM_ORGANIC_BUCKETS, BatchMaker
from gr4ad_jax.gr4ad.build import Decoder, build_decoder
from gr4ad_jax.gr4ad.config import Config, ModelConfig
from gr4ad_jax.gr4ad.cost import train_flops
from gr4ad_jax.gr4ad.generator import generator_of
from gr4ad_jax.gr4ad.value import ValueScale, fit_value_scale
from gr4ad_jax.gr4ad.vsl_task import vsl_task
from gr4ad_jax.machine import distributed, storage
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.search.opened import Opened
from gr4ad_jax.training.mesh import search_mesh
from gr4ad_jax.training.train_loop import read_params

# Settings of earlier versions, which their runs may name.
REMOVED = ("config.search.new_ad_bonus",)


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
  refit: str = ""
  """Folder of the tuned run that this one fits anew, with the validation requests (`refit.py`)."""
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
  sids = own_codes(workdir) if workdir is not None else ""
  prepared = open_prepared(run.data, sids or run.sids, fingerprint=run.fingerprint)
  logs, examples, sids = prepared.logs, prepared.examples, prepared.sids
  scale = fit_value_scale(examples, run.config.loss)
  make_batch = BatchMaker(
    examples.config, run.config.loss, scale, sids.codes_AL, sids.content_codes_OL,
    hash_buckets(logs.contents.content_id, NUM_ORGANIC_BUCKETS), logs.contents.ad,
    examples.trending,
  )
  model, ads = run.config.model, None
  if model.id_rows:
    make_batch = dataclasses.replace(make_batch, user_hash_U=hash_ids(logs.users.user_id))
  if model.id_rows or model.item_scorer:
    make_batch = dataclasses.replace(make_batch, ad_hash_A=hash_ids(logs.ads.ad_id))
  if model.item_scorer:
    ads = KnownAds.of(make_batch.ad_hash_A, sids.codes_AL)
  if model.copy_path:
    make_batch = dataclasses.replace(
      make_batch, facts=ad_facts(logs.ads), shortlist=model.shortlist, tastes=examples.tastes
    )
  if model.neighbours:
    make_batch = dataclasses.replace(
      make_batch, transitions=_transitions(prepared, run), neighbours=model.neighbours
    )
  return Inputs(
    **vars(prepared), make_batch=make_batch, scale=scale,
    vocabulary=make_batch.vocabulary(examples.features.sizes, sids.codebook_sizes, ads),
  )


def _transitions(prepared: Prepared, run: RunFile) -> Transitions:
  """Counted where the run learns; raises ConfigError where a request would see later ones."""
  if prepared.examples.config.split != "leave_one_out":
    raise ConfigError(
      f"model.neighbours={run.config.model.neighbours}: {run.data} is split by time, and counts of "
      "transitions would tell earlier requests of later ones; needs leave-one-out, or 0"
    )
  through = "validation" if run.refit else "train"
  learned_E = training_events(prepared.logs, prepared.examples, through=through)
  return Transitions(prepared.logs, learned_E)


def read_run(workdir: Place) -> RunFile:
  """The settings of a run.

  Raises:
    ConfigError: the folder holds no run.
  """
  if not storage.exists(workdir / "run.json"):
    raise ConfigError(f"{workdir}: holds no run; `gr4ad train --workdir {workdir}` makes one")
  values = config_lib.read_values(storage.fetch(workdir / "run.json"))
  for path, value in config_lib.take_out(values, REMOVED):
    console.print(f"{workdir}/run.json: {path}={value} is no setting any more and is left out")
  return config_lib.from_dict(RunFile, values)


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


def load_params(run: RunFile, workdir: Place, vocabulary: Vocabulary) -> tuple[Decoder, Any, int]:
  """The decoder, the parameters with the best validation, and their step.

  A run that goes on learning gives its last parameters, and so does one that learned from candidate
  lists and was validated by the loss alone: that is of logged samples, which list learning trades
  for value.

  Raises:
    ConfigError: no checkpoint.
  """
  decoder = build_decoder(run.config.model, vocabulary)
  task = vsl_task(decoder, run.config.loss)
  params, step = read_params(task, run.config.train, workdir, newest=gives_newest(run))
  return decoder, params, step


def gives_newest(run: RunFile) -> bool:
  """Whether a run gives its last parameters, whatever its validations say."""
  return bool(run.refit or run.segments or (run.lists and run.config.train.best_by == "loss"))


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
    history_tables=inputs.make_batch.tables,
    value_of="impression" if inputs.scale.uses_ecpm else "engagement",
    unscorable=_unscorable(run), held_out=held_out(run),
  )


def _unscorable(run: RunFile) -> str:
  """Why the splits tell nothing of a run that has gone on with later days, or began with one."""
  for learned in _with_origins(run):
    if learned.segments:
      return (
        f"its parameters have learned from the segments in {learned.segments}, days that no split "
        "of the data lies behind; `loss_before` of each segment in the learner's train_log.jsonl "
        "judges them"
      )
  return ""


def held_out(run: RunFile) -> tuple[str, ...]:
  """The splits that neither a run nor those it began with have learned from."""
  refitted = any(learned.refit for learned in _with_origins(run))
  return ("test",) if refitted else ("validation", "test")


def _with_origins(run: RunFile) -> Iterator[RunFile]:
  """A run, the one whose parameters it began with, and so on, as far as they are still there."""
  yield run
  while run.start and storage.exists(storage.place(run.start) / "run.json"):
    run = read_run(storage.place(run.start))
    yield run


def _in_words(model: ModelConfig) -> str:
  names = {"lazy": "LazyAR", "autoregressive": "Ordinary autoregressive",
           "multi_token": "Multi-token"}
  words = f"{names[model.decoder]} decoder, {model.num_layers} layers"
  if model.decoder == "lazy":
    words += f" ({model.num_lazy_layers} without the previous token)"
  if model.copy_path:
    scorer = " and the item scorer, which go" if model.item_scorer else ", which goes"
    words += f", with the copy path{scorer} beyond the paper"
  return f"{words}, width {model.width}."
