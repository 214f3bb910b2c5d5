"""Runs of the head: what is read once and kept, the training, names told.

    WORKDIR/read/train.npz         whitened components of each training history, and the whitening
    WORKDIR/read/validation.npz    those of rows with a label, once all of them were asked for; test
    WORKDIR/read/train-00000.npy   before that: what is read so far; validation, test
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gr4ad_jax.advertiser.config import Config
from gr4ad_jax.advertiser.head import HeadRow, head_task, log_probs, stacked
from gr4ad_jax.advertiser.histories import Rows, drawn
from gr4ad_jax.advertiser.llama import Llama, lower_layers
from gr4ad_jax.advertiser.name_search import Told
from gr4ad_jax.advertiser.prepared import Prepared, own_advertisers, training_rows
from gr4ad_jax.advertiser.reading import Whitening, read_texts, whiten
from gr4ad_jax.advertiser.rivals import ranked
from gr4ad_jax.advertiser.texts import Speller
from gr4ad_jax.advertiser.weights import LanguageModel
from gr4ad_jax.data.pipeline import train_batches, validation_batches
from gr4ad_jax.data.splits import SPLITS
from gr4ad_jax.machine import atomic, distributed, sharding, storage
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.training.mesh import training_mesh
from gr4ad_jax.training.pace import Pace
from gr4ad_jax.training.task import Task
from gr4ad_jax.training.train_loop import read_params, train
from gr4ad_jax.training.train_step import TrainState

_ROWS = 512  # told at once


class Reader(NamedTuple):
  """The lower layers of a model, and the tokens of histories."""

  llama: Llama
  params: Any
  speller: Speller

  def __call__(self, split: str, asked: Sequence[int] | np.ndarray, rows: Rows) -> np.ndarray:
    """float32 [N, F], what they say of the histories of some rows of a split."""
    known = [self.speller.known(split, rows, int(row)) for row in asked]
    # A row without a history is one token.
    return read_texts(self.llama, self.params, [k if len(k) > 1 else k * 2 for k in known])


def reader(data: Prepared, model: LanguageModel, config: Config) -> Reader:
  """Of a model's first `config.model.layer` layers."""
  sizes, params = lower_layers(model.config, model.params, config.model.layer)
  speller = Speller(data, model, max_tokens=config.model.max_tokens)
  return Reader(Llama(sizes), jax.device_put(params), speller)


class Kept(NamedTuple):
  """What was read of the training rows."""

  x_RC: np.ndarray
  whitening: Whitening


def read_training(
  read: Reader, rows: Rows, config: Config, workdir: Place, *, part_rows: int = 2048
) -> Kept:
  """Reads the training rows once, in parts: a run that goes on finds those that are there.

  Args:
    read: the lower layers.
    rows: of training.
    config: settings.
    workdir: of the run.
    part_rows: rows of a part.
  """
  place = workdir / "read" / "train.npz"
  if not storage.exists(place):
    with storage.working_copy(workdir / "read") as copy:
      x_RF = _read_parts(read, "train", np.arange(len(rows)), rows, copy, part_rows)
      whitening = whiten(x_RF, config.model.components)
      _keep(copy, "train", {"x_RC": whitening(x_RF), **whitening._asdict()})
  with np.load(storage.fetch(place)) as kept:
    return Kept(kept["x_RC"], Whitening(kept["mean_F"], kept["turn_FC"]))


def _read_parts(
  read: Reader, split: str, asked: np.ndarray, rows: Rows, copy: storage.Copy, part_rows: int
) -> np.ndarray:
  """float32 [R, F]; each part is a file of its own until `_keep` takes them away."""
  parts = []
  for at in range(0, len(asked), part_rows):
    file = copy.path / f"{split}-{at // part_rows:05d}.npy"
    if not file.exists():
      part_RF = read(split, asked[at : at + part_rows], rows)
      with atomic.new_file(file) as opened:
        np.save(opened, part_RF)
      copy.push()
    parts.append(np.load(file))
  return np.concatenate(parts)


def _keep(copy: storage.Copy, split: str, arrays: Mapping[str, np.ndarray]) -> None:
  with atomic.new_file(copy.path / f"{split}.npz") as opened:
    np.savez(opened, **arrays)
  for file in copy.path.glob(f"{split}-*.npy"):
    file.unlink()


def read_rows(
  data: Prepared, read: Reader, whitening: Whitening, workdir: Place, split: str,
  asked: Sequence[int] | np.ndarray, *, part_rows: int = 1024,
) -> np.ndarray:
  """float32 [R, C], components of some rows of a split.

  Where these are all rows that have a label they are kept, for a reading takes minutes and is the
  same for whatever is trained on it.

  Args:
    data: prepared.
    read: the lower layers.
    whitening: of the training rows.
    workdir: of the run.
    split: theirs.
    asked: numbers of rows.
    part_rows: rows of a part.
  """
  rows, asked = data.splits[split], np.asarray(asked)
  place, labelled = workdir / "read" / f"{split}.npz", np.flatnonzero(rows.target_R >= 0)
  if not storage.exists(place):
    if not np.array_equal(asked, labelled):
      return whitening(read(split, asked, rows))
    with storage.working_copy(workdir / "read") as copy:
      x_RF = _read_parts(read, split, asked, rows, copy, part_rows)
      _keep(copy, split, {"x_RC": whitening(x_RF)})
  if not np.isin(asked, labelled).all():
    return whitening(read(split, asked, rows))
  with np.load(storage.fetch(place)) as kept:
    return kept["x_RC"][np.searchsorted(labelled, asked)]


def copy_readings(start: Place, workdir: Place) -> None:
  """Gives a run what another one of the same data and layers has read."""
  with storage.working_copy(workdir / "read") as copy:
    for split in SPLITS:
      file = f"{split}.npz"
      if storage.exists(start / "read" / file) and not (copy.path / file).exists():
        with atomic.new_file(copy.path / file) as opened:
          opened.write(storage.fetch(start / "read" / file).read_bytes())


def head_rows(data: Prepared, rows: Rows, x_RC: np.ndarray) -> list[HeadRow]:
  """Rows as the head takes them."""
  return list(map(HeadRow, x_RC, own_advertisers(data, rows), rows.target_R))


def label_counts(data: Prepared, rows: Rows) -> np.ndarray:
  """int64 [A], how often each advertiser is a label: where the head's bias begins."""
  return np.bincount(rows.target_R, minlength=len(data.name_A))


# Six parameters: what learns from what and where, and two that GRPO has of its own.
def train_head(
  config: Config, workdir: Place, data: Prepared, model: LanguageModel, *,
  make_task: Callable[[np.ndarray, int], Task] = head_task, start_params: Any = None,
) -> TrainState:
  """Trains a softmax over advertisers on what the lower layers say.

  Args:
    config: settings.
    workdir: of the run.
    data: prepared.
    model: whose layers read.
    make_task: (labels of training, components) -> what is trained.
    start_params: parameters of step 0; None = the task's own.
  """
  train_config, read = config.train, reader(data, model, config)
  rows = training_rows(data)
  kept = read_training(read, rows, config, workdir)
  known, components = head_rows(data, rows, kept.x_RC), kept.x_RC.shape[1]
  split = data.splits["validation"]
  asked = drawn(
    np.flatnonzero(split.target_R >= 0), train_config.batch_size * train_config.eval_batches
  )
  read_RC = read_rows(data, read, kept.whitening, workdir, "validation", asked)
  validated = head_rows(data, split.take(asked), read_RC)
  hosts = {"host": jax.process_index(), "num_hosts": jax.process_count()}
  how = {"batch_size": min(train_config.batch_size, len(known)), **hosts}
  return train(
    make_task(label_counts(data, rows), components), train_config, folder=workdir, pace=Pace(),
    batches=train_batches(
      range(len(known)), stacked, seed=train_config.seed, parse=known.__getitem__, **how
    ),
    validation=validation_batches(
      range(len(validated)), stacked, most=train_config.eval_batches,
      parse=validated.__getitem__, parts=sharding.row_parts(training_mesh(train_config)), **how,
    ),
    start_params=start_params,
  )


class OpenedHead(NamedTuple):
  """A trained head.

  Attributes:
    params: of its best validation.
    step: theirs.
    speller: of its histories.
    tell: (split, row numbers, K) -> names, as `AdvertiserRun.tell`.
  """

  params: Any
  step: int
  speller: Speller
  tell: Callable[[str, Sequence[int], int], Told]


def open_head(config: Config, workdir: Place, data: Prepared, model: LanguageModel) -> OpenedHead:
  """The head of a run, with the parameters of its best validation.

  Raises:
    ConfigError: none is there.
  """
  read, rows = reader(data, model, config), training_rows(data)
  kept = read_training(read, rows, config, workdir)
  task = head_task(label_counts(data, rows), kept.x_RC.shape[1])
  params, step = read_params(task, config.train, workdir)
  params = distributed.local(params)
  of_rows = functools.partial(read_rows, data, read, kept.whitening, workdir)
  return OpenedHead(
    params, step, read.speller, functools.partial(tell_rows, data, of_rows, params)
  )


@functools.cache
def _log_probs():
  return jax.jit(log_probs)


def tell_rows(
  data: Prepared, read: Callable[[str, Sequence[int]], np.ndarray], params: Any, split: str,
  asked: Sequence[int], most: int,
) -> Told:
  """The K most probable advertisers of some rows of a split, as `name_search.tell`.

  Args:
    data: prepared.
    read: `read_rows` of a run.
    params: of its head.
    split, asked: the rows.
    most: K.
  """
  x_RC = read(split, asked)
  batches, found = head_rows(data, data.splits[split].take(np.asarray(asked)), x_RC), []
  for at in range(0, len(batches), _ROWS):
    batch = batches[at : at + _ROWS]
    filled = batch + [batch[-1]] * (_ROWS - len(batch))
    logp_BA = np.asarray(_log_probs()(params, stacked(filled)))[: len(batch)]
    best_BK = ranked(logp_BA, most)
    logp_BK = np.take_along_axis(logp_BA, np.maximum(best_BK, 0), axis=1)
    found.append(Told(best_BK, np.where(best_BK < 0, -np.inf, logp_BK)))
  return Told(*(np.concatenate(column) for column in zip(*found, strict=True)))
