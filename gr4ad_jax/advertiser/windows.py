"""Folders of windows: histories with their targets that somebody else has cut.

    FOLDER/items.parquet     item_id, title, brand
    FOLDER/train*.parquet    user_id, history (item ids, oldest first), target; one file or several
    FOLDER/valid*.parquet, test*.parquet    the same

The preparation of Amazon reviews 2018 by MiniOneRec, for one, is of this kind.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gr4ad_jax.advertiser.config import PrepareConfig
from gr4ad_jax.advertiser.histories import NOW, Source, make_rows, titles
from gr4ad_jax.advertiser.names import merge_names
from gr4ad_jax.data.validation import LogError, read_columns

_FILES = {"train": "train*.parquet", "validation": "valid*.parquet", "test": "test*.parquet"}


def are_windows(folder: Path) -> bool:
  """Whether a folder holds windows and no prepared log."""
  return (folder / "items.parquet").is_file() and any(folder.glob(_FILES["train"]))


def from_windows(folder: Path, config: PrepareConfig) -> Source:
  """Reads a folder of windows; items without a brand are left out, and rows that ask for one.

  Raises:
    LogError: a file is missing or broken, or names an item that is not there.
  """
  items = read_columns(folder / "items.parquet", ("item_id", "title", "brand"))
  if items["item_id"].duplicated().any():
    raise LogError(f"{folder / 'items.parquet'}: column 'item_id' holds a number twice")
  brand = items["brand"].astype(object).where(items["brand"].notna(), "").tolist()
  names = merge_names(brand)
  title = items["title"].astype(object).where(items["title"].notna(), "").tolist()
  number = {item: n for n, item in enumerate(items["item_id"])}
  users: dict[str, int] = {}
  windows = {name: _windows(folder, pattern, number, users) for name, pattern in _FILES.items()}
  advertiser_N, splits = names.advertiser_N, {}
  for name, rows in windows.items():
    known = ((u, _with_name(h, advertiser_N), t) for u, h, t in rows if advertiser_N[t] >= 0)
    splits[name] = make_rows(
      _row(u, h[-config.max_history:], advertiser_N[t]) for u, h, t in known
    )
    if not len(splits[name]):
      raise LogError(f"{folder}: no row of {_FILES[name]} asks for an item with a brand")
  whole = {
    name: [(u, _with_name((*h, t), advertiser_N)) for u, h, t in rows]
    for name, rows in windows.items()
  }
  # Test comes last, and the later windows of a user stand behind the earlier ones.
  latest = {u: h for name in _FILES for u, h in whole[name] if h}
  splits[NOW] = make_rows(
    _row(u, h[-config.max_history:], -1) for u, h in sorted(latest.items())
  )
  streams = make_rows(
    _row(u, h, -1) for u, h in longest(whole["train"]) if len(h) > 1
  )
  counted = advertiser_N[streams.item_E]
  return Source(
    names, titles(names, title, most_chars=config.title_chars),
    items["item_id"].astype(str).to_numpy(object), np.array(list(users), object),
    np.full(len(users), "", object), streams, splits,
    {0: np.bincount(counted, minlength=len(names.name_A))}, f"windows in {folder.name}",
  )


def longest(windows: list[tuple[int, tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
  """The windows of each user that are no beginning of another one of theirs, each once.

  Args:
    windows: (user, items).
  """
  kept = []
  ordered = sorted(set(windows))
  # Of one user, a window stands right before those that it is the beginning of.
  for (user, items), (next_user, longer) in zip(ordered, [*ordered[1:], (-1, ())], strict=True):
    if user != next_user or longer[: len(items)] != items:
      kept.append((user, items))
  return kept


def _row(user: int, items, target: int):
  return user, 0, np.array(items, np.int32), np.full(len(items), -1), target


def _with_name(items, advertiser_N: np.ndarray) -> tuple[int, ...]:
  return tuple(item for item in items if advertiser_N[item] >= 0)


def _windows(folder: Path, pattern: str, number: dict, users: dict[str, int]):
  """(user, history, target) of all files of a split, in items' numbers."""
  files = sorted(folder.glob(pattern))
  if not files:
    raise LogError(f"{folder}: has no {pattern}")
  rows = []
  for file in files:
    frame = read_columns(file, ("user_id", "history", "target"))
    for user, history, target in zip(
      frame["user_id"].astype(str), frame["history"], frame["target"], strict=True
    ):
      try:
        items = tuple(number[item] for item in history)
        rows.append((users.setdefault(user, len(users)), items, number[target]))
      except KeyError as error:
        raise LogError(f"{file}: item {error.args[0]} is not in items.parquet") from None
      except TypeError:
        raise LogError(f"{file}: column 'history' must hold lists of item ids") from None
  return rows
