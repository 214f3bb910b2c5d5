"""What is asked of a user and what is known before: histories, cuts and labels.

Two sources: prepared logs, cut by time or by the users' last requests, and folders of windows
(histories that somebody else has cut). Both give the same records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from gr4ad_jax.advertiser.config import PrepareConfig
from gr4ad_jax.advertiser.names import Names, merge_names, title_without
from gr4ad_jax.data.records import DAY_S, Action, Logs
from gr4ad_jax.data.splits import SPLITS, SequenceConfig
from gr4ad_jax.data.validation import LogError

NOW = "now"  # the split of a daily batch: everything in the log is known, nothing is asked
ALL_SPLITS = (*SPLITS, NOW)


@dataclasses.dataclass(frozen=True)
class Rows:
  """R questions: a user's latest conversions before a cut, oldest first, and who comes next.

  Attributes:
    user_R: int32, users.
    cut_s_R: int64, unix seconds; all that is known lies strictly before. 0 = there are no times.
    bound_R: int64 [R + 1], where each history begins in the columns below, and the end.
    item_E: int32, items.
    age_E: int32, whole days from the conversion to the cut; -1 = there are no times.
    target_R: int32, advertisers; -1 = no label.
  """

  user_R: np.ndarray
  cut_s_R: np.ndarray
  bound_R: np.ndarray
  item_E: np.ndarray
  age_E: np.ndarray
  target_R: np.ndarray

  def __len__(self) -> int:
    return len(self.user_R)

  def history(self, row: int) -> slice:
    """Where a row's history lies."""
    return slice(int(self.bound_R[row]), int(self.bound_R[row + 1]))

  def row_E(self) -> np.ndarray:
    """int64, the row of each conversion."""
    return np.repeat(np.arange(len(self)), np.diff(self.bound_R))

  def take(self, kept: np.ndarray) -> Rows:
    """Some rows, by mask or number."""
    kept = np.arange(len(self))[kept]
    return make_rows(
      (self.user_R[r], self.cut_s_R[r], self.item_E[self.history(r)], self.age_E[self.history(r)],
       self.target_R[r]) for r in kept
    )  # fmt: skip


def drawn(number_R: np.ndarray, most: int) -> np.ndarray:
  """So many of these row numbers, or all, the same at every call; in ascending order."""
  return np.sort(np.random.default_rng(0).permutation(number_R)[:most])


def make_rows(
  rows: Iterable[tuple[int, int, np.ndarray, np.ndarray, int]]
) -> Rows:
  """Rows from (user, cut, items, ages, target)."""
  columns = list(zip(*rows, strict=True)) or [()] * 5
  users, cuts, items, ages, targets = columns

  def joined(parts) -> np.ndarray:
    return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)

  bounds = np.cumsum([0, *map(len, items)])
  return Rows(
    np.array(users, np.int32), np.array(cuts, np.int64), bounds.astype(np.int64), joined(items),
    joined(ages), np.array(targets, np.int32),
  )


@dataclasses.dataclass(frozen=True)
class Source:
  """Everything that texts, labels and rivals are made of.

  Attributes:
    names: advertisers; `names.advertiser_N` are those of the items.
    title_N: str objects, what each item's line says behind the name.
    item_id_N, user_id_U: str objects.
    profile_U: str objects, what the log knows of each user in words; "" = nothing.
    streams: what training reads: conversions before validation, each once; no labels of their own.
    splits: train, validation, test, now.
    popularity: cut_s -> int64 [A], conversions in the days before.
    about: source in words.
  """

  names: Names
  title_N: np.ndarray
  item_id_N: np.ndarray
  user_id_U: np.ndarray
  profile_U: np.ndarray
  streams: Rows
  splits: dict[str, Rows]
  popularity: dict[int, np.ndarray]
  about: str


def titles(names: Names, text_N: Sequence[str], *, most_chars: int) -> np.ndarray:
  """The title of each item without its advertiser's name."""
  name_N = [names.name_A[a] if a >= 0 else "" for a in names.advertiser_N]
  pairs = zip(name_N, text_N, strict=True)
  return np.array([title_without(n, t, most_chars=most_chars) for n, t in pairs], object)


def from_logs(logs: Logs, split: SequenceConfig, config: PrepareConfig) -> Source:
  """Histories of a prepared log: conversions with ads, and organic ones of an ad's product.

  Cut by time: training asks at `config.cuts` moments, validation and test where they begin; the
  label is the first advertiser within `label_days`. Leave one out: the last conversion is the test
  label, the one before it that of validation, the one before that one training's; times hold only
  an order there, so that the cut of a row is no moment (0).

  Raises:
    LogError: nobody converts with an advertiser that has a name, or a split is empty.
  """
  names = merge_names(logs.ads.advertiser_id.tolist())
  moves = _conversions(logs, names)
  if not len(moves.item_E):
    raise LogError(f"{logs.source}: no conversion with an advertiser that has a name")
  by_time = split.split == "time"
  if by_time:
    streams, splits, popularity = _cut_by_time(moves, split, config, len(names.name_A))
  else:
    streams, splits, popularity = _cut_last(moves, config, len(names.name_A))
  for name in SPLITS:
    if not (splits[name].target_R >= 0).any():
      raise LogError(f"{logs.source}: the {name} split asks nobody for an advertiser")
  return Source(
    names, titles(names, logs.ads.text.tolist(), most_chars=config.title_chars), logs.ads.ad_id,
    logs.users.user_id, _profiles(logs), streams, splits, popularity, logs.source,
  )


class _Moves(NamedTuple):
  """Conversions by user and time; `begin_U` says where each user's begin, and the end."""

  begin_U: np.ndarray
  time_s_E: np.ndarray
  item_E: np.ndarray
  advertiser_E: np.ndarray


def _conversions(logs: Logs, names: Names) -> _Moves:
  events = logs.events
  ad_E = np.where(events.ad >= 0, events.ad, np.append(logs.contents.ad, -1)[events.content])
  advertiser_E = np.append(names.advertiser_N, -1)[ad_E]
  kept = np.flatnonzero((events.action == Action.CONVERSION) & (advertiser_E >= 0))
  users = np.arange(len(logs.users.user_id) + 1)
  return _Moves(
    np.searchsorted(events.user[kept], users), events.time_s[kept], ad_E[kept].astype(np.int32),
    advertiser_E[kept].astype(np.int32),
  )


def _profiles(logs: Logs) -> np.ndarray:
  features = sorted(logs.users.features.items())
  return np.array([
    "; ".join(f"{name} {values[u]}" for name, values in features if values[u])
    for u in range(len(logs.users.user_id))
  ], object)


def _cut_by_time(moves: _Moves, split: SequenceConfig, config: PrepareConfig, num_names: int):
  """Streams, splits and popularity around moments that are the same for all users."""
  window_s = round(config.label_days * DAY_S)
  ends_s = {
    "validation": int(split.validation_start_s), "test": int(split.test_start_s),
    NOW: int(moves.time_s_E.max()) + 1,
  }
  first_s = max(int(split.train_start_s), int(moves.time_s_E.min()) + 1)
  train = (ends_s["validation"] - window_s * k for k in range(1, config.cuts + 1))
  cuts = {"train": [cut for cut in train if cut >= first_s]}
  cuts |= {name: [cut] for name, cut in ends_s.items()}
  splits = {}
  for name, moments in cuts.items():
    asked = make_rows(
      row for cut in moments for row in _ask_all(moves, cut, window_s, config.max_history)
    )
    splits[name] = asked.take(asked.target_R >= 0) if name == "train" else asked
  popularity = {}
  for cut in sorted({cut for moments in cuts.values() for cut in moments}):
    recent = (moves.time_s_E < cut) & (moves.time_s_E >= cut - config.popular_days * DAY_S)
    popularity[cut] = np.bincount(moves.advertiser_E[recent], minlength=num_names)
  known_U = [
    begin + np.searchsorted(moves.time_s_E[begin:end], ends_s["validation"])
    for begin, end in zip(moves.begin_U, moves.begin_U[1:], strict=False)
  ]
  return _streams(moves, known_U, config.max_history), splits, popularity


def _ask_all(moves: _Moves, cut: int, window_s: int, most: int):
  """Rows of all users who converted before a cut; the label is of the window behind it."""
  for user, (begin, end) in enumerate(zip(moves.begin_U, moves.begin_U[1:], strict=False)):
    at = begin + np.searchsorted(moves.time_s_E[begin:end], cut)
    if at == begin:
      continue
    known = slice(max(begin, at - most), at)
    asked = at < end and moves.time_s_E[at] < cut + window_s
    yield (user, cut, moves.item_E[known], (cut - moves.time_s_E[known]) // DAY_S,
           moves.advertiser_E[at] if asked else -1)  # fmt: skip


def _streams(moves: _Moves, known_U: Sequence[int], most: int) -> Rows:
  """All conversions up to each user's end, in pieces; each piece says what came after its first."""
  pieces = []
  for user, (begin, end) in enumerate(zip(moves.begin_U, known_U, strict=False)):
    for at in range(begin, end - 1, most):
      item = moves.item_E[at : min(at + most + 1, end)]
      pieces.append((user, 0, item, np.full(len(item), -1), -1))
  return make_rows(pieces)


def _cut_last(moves: _Moves, config: PrepareConfig, num_names: int):
  """Streams, splits and popularity around each user's last conversions."""
  def ask(back: int):
    """Rows that know all but the last `back` conversions of a user."""
    for user, (begin, end) in enumerate(zip(moves.begin_U, moves.begin_U[1:], strict=False)):
      at = end - back
      if at > begin and (back in (0, 3) or end - begin >= 3):
        known = slice(max(begin, at - config.max_history), at)
        item = moves.item_E[known]
        yield user, 0, item, np.full(len(item), -1), moves.advertiser_E[at] if back else -1

  splits = {name: make_rows(ask(3 - n)) for n, name in enumerate(ALL_SPLITS)}
  size_U = np.diff(moves.begin_U)
  known_U = moves.begin_U[1:] - np.where(size_U >= 3, 2, 0)
  streams = _streams(moves, known_U.tolist(), config.max_history)
  train = np.concatenate([
    np.arange(begin, end) for begin, end in zip(moves.begin_U, known_U, strict=False)
  ])
  return streams, splits, {0: np.bincount(moves.advertiser_E[train], minlength=num_names)}
