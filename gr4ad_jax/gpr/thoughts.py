"""External knowledge: what a language model, for example, has written about users, and when.

A file of thoughts is a parquet table with `user_id`, `timestamp` and either `embedding` or `text`,
which the usual encoder of `gr4ad tokenize` embeds. A run keeps its own copy:

    WORKDIR/thoughts/thoughts.npz, thoughts.json

Letters as in `batch.py`; `N` counts all thoughts. Source: GPR 2.2.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from gr4ad_jax.config import ConfigError
from gr4ad_jax.data import times, validation
from gr4ad_jax.data.validation import LogError, RowChecks
from gr4ad_jax.embedding.rows import first_bad_row, unit_rows
from gr4ad_jax.embedding.text_encoder import encode_texts
from gr4ad_jax.gpr.batch import SeenThoughts
from gr4ad_jax.machine import atomic, storage
from gr4ad_jax.machine.storage import Place

MOST_SEEN = 8  # newest ones before a request, where a run does not say how many
_FOLDER = "thoughts"


class Thoughts(NamedTuple):
  """Thoughts on the users of a log, by user, then by time."""

  user_N: np.ndarray  # int32, numbers in the logs
  time_s_N: np.ndarray  # int64, unix seconds
  embedding_NE: np.ndarray  # float32, rows of norm 1

  @property
  def size(self) -> int:
    """E, numbers that tell one."""
    return self.embedding_NE.shape[1]

  def seen(
    self, asked: Sequence[tuple[int, np.ndarray, np.ndarray]], *, num_groups: int, most: int,
    most_asked: int = 1,
  ) -> SeenThoughts:
    """The newest thoughts that are strictly older than each request.

    Args:
      asked: of each row its user (-1 = none of the log), the groups whose requests are asked, and
        the unix seconds of these, ascending.
      num_groups: G.
      most: thoughts that one request sees.
      most_asked: requests of a row at the most.

    Returns:
      Rows with room for all of these, but not for more than there are on any user.
    """
    room = min(most * most_asked, int(np.bincount(self.user_N).max()))
    embedding_BXE = np.zeros((len(asked), room, self.size), np.float32)
    first_BG = np.zeros((len(asked), num_groups), np.int32)
    end_BG = np.zeros_like(first_BG)
    for row, (user, groups, time_s) in enumerate(asked):
      low, high = np.searchsorted(self.user_N, (user, user + 1))
      end = low + np.searchsorted(self.time_s_N[low:high], time_s, side="left")
      first = np.maximum(end - most, low)
      kept = np.unique(np.concatenate([np.arange(*ends) for ends in zip(first, end, strict=True)]))
      embedding_BXE[row, : len(kept)] = self.embedding_NE[kept]
      first_BG[row, groups], end_BG[row, groups] = np.searchsorted(kept, (first, end))
    return SeenThoughts(embedding_BXE, first_BG, end_BG)


class ReadThoughts(NamedTuple):
  """What a file holds."""

  thoughts: Thoughts
  left_out: int  # rows on users that the logs do not have


def read_thoughts(file: Path, user_id_U: np.ndarray) -> ReadThoughts:
  """Reads a file of thoughts.

  Args:
    file: parquet; thoughts of one time and user stay in its order.
    user_id_U: users of the logs.

  Raises:
    LogError: the file is not readable, a column is missing or unknown, a row breaks a rule, or no
      row is on a user of the logs.
  """
  name, required = str(file), ("user_id", "timestamp")
  frame = validation.read_columns(file, required, optional=("embedding", "text"))
  if ("embedding" in frame) == ("text" in frame):
    there = "both" if "text" in frame else "neither"
    raise LogError(f"{name}: needs one of the columns 'embedding' and 'text', has {there}")
  checks = RowChecks(name, frame)
  given_N, names = validation.factorize_ids(frame["user_id"], name)
  checks.reject(given_N < 0, "user_id", "must not be empty")
  time_s_N, unreadable_N = times.time_column(frame["timestamp"], name)
  wrong_N = unreadable_N | (time_s_N < 0) | (time_s_N >= times.MAX_UNIX_SECONDS)
  checks.reject(wrong_N, "timestamp", "must be a timestamp or unix seconds, years 1970 to 5138")
  embedding_NE = _embeddings(frame, name, checks)
  user_N = pd.Index(user_id_U).get_indexer(pd.Index(names))[given_N].astype(np.int32)
  order = np.lexsort((time_s_N, user_N))
  order = order[user_N[order] >= 0]
  if not len(order):
    raise LogError(f"{name}: no row is on a user of the logs, such as {user_id_U[0]!r}")
  thoughts = Thoughts(user_N[order], time_s_N[order], embedding_NE[order])
  return ReadThoughts(thoughts, len(frame) - len(order))


def _embeddings(frame: pd.DataFrame, name: str, checks: RowChecks) -> np.ndarray:
  """Unit rows of a file's thoughts, given or made of their texts."""
  if "text" in frame:
    text_N = validation.text_column(frame["text"], name)
    checks.reject(np.array([not text.strip() for text in text_N]), "text", "must not be empty")
    return encode_texts(text_N, "wordllama")
  embedding_NE = validation.embedding_column(frame["embedding"], name)
  if (row := first_bad_row(embedding_NE, nonzero=True)) is not None:
    raise LogError(f"{name}: row {row}, column 'embedding', is all zeros and has no direction")
  return unit_rows(embedding_NE)


def keep_thoughts(thoughts: Thoughts, workdir: Place) -> None:
  """Stores a run's own copy."""
  about = {"thoughts": len(thoughts.user_N), "size": thoughts.size}
  with storage.new_folder(workdir / _FOLDER) as copy, atomic.new_folder(copy.path) as fresh:
    np.savez(fresh / "thoughts.npz", **thoughts._asdict())
    storage.write_json(fresh / "thoughts.json", about)


def own_thoughts(workdir: Place) -> Thoughts:
  """A run's own copy; raises ConfigError where it is gone or damaged."""
  file = storage.fetch(workdir / _FOLDER) / "thoughts.npz"
  try:
    with np.load(file, allow_pickle=False) as arrays:
      return Thoughts(**{name: arrays[name] for name in Thoughts._fields})
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    why = type(error).__name__
    raise ConfigError(f"{file}: the run's thoughts cannot be read ({why})") from None
