"""Runs of the head: what is read once and kept, the training, names told.

    WORKDIR/read/train.npz       whitened components of each training history, and the whitening
    WORKDIR/read/part-00000.npy  before that: what is read so far
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gr4ad_jax.advertiser.config import Config
from gr4ad_jax.advertiser.head import HeadRow, head_task, log_probs, stacked
from gr4ad_jax.advertiser.histories import Rows, make_rows
from gr4ad_jax.advertiser.llama import Llama, lower_layers
from gr4ad_jax.advertiser.name_search import Told
from gr4ad_jax.advertiser.prepared import Prepared
from gr4ad_jax.advertiser.reading import Whitening, read_texts, whiten
from gr4ad_jax.advertiser.rivals import ranked
from gr4ad_jax.advertiser.texts import Speller
from gr4ad_jax.advertiser.weights import LanguageModel
from gr4ad_jax.machine import atomic, storage
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.training.task import Task

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


def training_rows(data: Prepared) -> Rows:
  """Questions of training: every later name of each stream, or each prompt with a label."""
  if data.config.form == "prompt":
    return data.splits["train"]
  streams = data.streams

  def ask():
    for row in range(len(streams)):
      item = streams.item_E[streams.history(row)]
      for at in range(1, len(item)):
        yield (streams.user_R[row], 0, item[:at], np.full(at, -1), data.advertiser_N[item[at]])

  return make_rows(ask())


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
      parts = []
      for at in range(0, len(rows), part_rows):
        file = copy.path / f"part-{at // part_rows:05d}.npy"
        if not file.exists():
          part_RF = read("train", np.arange(at, min(at + part_rows, len(rows))), rows)
          with atomic.new_file(file) as opened:
            np.save(opened, part_RF)
          copy.push()
        parts.append(np.load(file))
      x_RF = np.concatenate(parts)
      whitening = whiten(x_RF, config.model.components)
      with atomic.new_file(copy.path / "train.npz") as opened:
        np.savez(opened, x_RC=whitening(x_RF), **whitening._asdict())
      for file in copy.path.glob("part-*.npy"):
        file.unlink()
  with np.load(storage.fetch(place)) as kept:
    return Kept(kept["x_RC"], Whitening(kept["mean_F"], kept["turn_FC"]))


def head_rows(data: Prepared, rows: Rows, x_RC: np.ndarray) -> list[HeadRow]:
  """Rows as the head takes them."""
  most, found = data.config.max_history, []
  for row in range(len(rows)):
    own = data.advertiser_N[rows.item_E[rows.history(row)]][-most:]
    own_H = np.full(most, -1, np.int32)
    own_H[most - len(own) :] = own
    found.append(HeadRow(x_RC[row], own_H, rows.target_R[row]))
  return found


def task_of(data: Prepared, rows: Rows, components: int) -> Task:
  """The head's task; its bias begins at how often each advertiser is a label."""
  return head_task(np.bincount(rows.target_R, minlength=len(data.name_A)), components)


@functools.cache
def _log_probs():
  return jax.jit(log_probs)


def tell_rows(
  data: Prepared, read: Reader, whitening: Whitening, params: Any, split: str,
  asked: Sequence[int], most: int,
) -> Told:
  """The K most probable advertisers of some rows of a split, as `name_search.tell`."""
  x_RC = whitening(read(split, asked, data.splits[split]))
  batches, found = head_rows(data, data.splits[split].take(np.asarray(asked)), x_RC), []
  for at in range(0, len(batches), _ROWS):
    batch = batches[at : at + _ROWS]
    filled = batch + [batch[-1]] * (_ROWS - len(batch))
    logp_BA = np.asarray(_log_probs()(params, stacked(filled)))[: len(batch)]
    best_BK = ranked(logp_BA, most)
    logp_BK = np.take_along_axis(logp_BA, np.maximum(best_BK, 0), axis=1)
    found.append(Told(best_BK, np.where(best_BK < 0, -np.inf, logp_BK)))
  return Told(*(np.concatenate(column) for column in zip(*found, strict=True)))
