"""From a source of logs to prepared data: validate, cut into examples, assign semantic IDs."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gr4ad_jax.config import ConfigError
from gr4ad_jax.data import amazon, completejourney, parquet_logs
from gr4ad_jax.data.examples import prepare_examples
from gr4ad_jax.data.log_folder import LogParts, check_replaceable, write_logs
from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.splits import SequenceConfig, split_by_time
from gr4ad_jax.data.validation import InvalidRows, LogError
from gr4ad_jax.machine import atomic, storage
from gr4ad_jax.machine.progress import track
from gr4ad_jax.machine.storage import Place

Limits = Mapping[str, int | None]
"""Overrides of SequenceConfig fields; None keeps the default."""


def prepare_completejourney(
  out: Place,
  *,
  min_ad_events: int = 5,
  train_weeks: int = 20,
  households: int | None = None,
  limits: Limits | None = None,
  overwrite: bool = False,
  **how: Any,
) -> dict[str, int]:
  """Complete Journey: weeks 1-47 train, 48-49 validate, 50-53 test.

  The catalogue and all histories come from every training week; requests of the last `train_weeks`
  of them are learned from. What is promoted changes, and a year-old request teaches little of it.
  `how` as `write_prepared`.

  Returns:
    Counts of everything, cleaning rules included.

  Raises:
    LogError: the package is missing.
    ConfigError: `out` holds data already.
  """
  _check_free(out, overwrite)
  first_week = completejourney.VALIDATION_WEEK - train_weeks
  if not 1 <= first_week < completejourney.VALIDATION_WEEK:
    raise ConfigError(
      f"train_weeks={train_weeks}: must be 1 to {completejourney.VALIDATION_WEEK - 1}"
    )
  logs = completejourney.read_completejourney(
    min_ad_events=min_ad_events, max_households=households, progress=track
  )
  config = SequenceConfig(
    train_start_s=completejourney.week_start_s(first_week),
    validation_start_s=completejourney.week_start_s(completejourney.VALIDATION_WEEK),
    test_start_s=completejourney.week_start_s(completejourney.TEST_WEEK),
  )
  return write_prepared(logs, out, config, limits, **how)


def prepare_parquet(
  out: Place,
  *,
  ads: Place,
  events: Place,
  users: Place | None = None,
  contents: Place | None = None,
  currency: str = "currency units",
  split: Literal["time", "leave_one_out"] = "time",
  validation_days: float = 7.0,
  test_days: float = 7.0,
  train_days: float | None = None,
  invalid_rows: InvalidRows = "error",
  limits: Limits | None = None,
  overwrite: bool = False,
  **how: Any,
) -> dict[str, int]:
  """A user's own logs; arguments as `gr4ad prepare parquet --help` says, `how` as `write_prepared`.

  Raises:
    LogError: invalid logs, or too short for the split.
    ConfigError: `out` holds data already.
  """
  _check_free(out, overwrite)
  with _prepared(out) as fresh:
    parquet_logs.store_parquet_logs(
      storage.fetch(ads), storage.fetch(events), fresh / "logs",
      users=users and storage.fetch(users), contents=contents and storage.fetch(contents),
      currency=currency, invalid_rows=invalid_rows,
    )
    parts = LogParts(fresh / "logs")
    if split == "time":
      config = split_by_time(
        parts.first_s, parts.last_s, source=parts.logs.source, validation_days=validation_days,
        test_days=test_days, train_days=train_days,
      )
    else:
      config = SequenceConfig(split="leave_one_out", num_trending=0)
    return _cut(parts, fresh, config, limits, **how)


def prepare_amazon(
  out: Place,
  folder: Place,
  *,
  users: int | None = None,
  limits: Limits | None = None,
  overwrite: bool = False,
  **how: Any,
) -> dict[str, int]:
  """Public review sequences under the leave-one-out protocol; `how` as `write_prepared`.

  Raises:
    LogError: missing or invalid files.
    ConfigError: `out` holds data already.
  """
  _check_free(out, overwrite)
  logs = amazon.read_amazon(storage.fetch(folder), max_users=users)
  config = SequenceConfig(split="leave_one_out", num_trending=0)
  return write_prepared(logs, out, config, limits, **how)


def _check_free(out: Place, overwrite: bool) -> None:
  if storage.exists(out / "examples" / "examples.json") and not overwrite:
    raise ConfigError(f"{out}: holds prepared data already; pass --overwrite or another --out")


@contextlib.contextmanager
def _prepared(out: Place) -> Iterator[Path]:
  """A folder for logs and examples, which take their places below `out` when both are complete."""
  # In a bucket the examples appear last: examples.json says that all is there.
  with storage.new_folder(out / "examples") as examples, storage.new_folder(out / "logs") as logs:
    check_replaceable(logs.path)
    home = examples.path.parent
    home.mkdir(parents=True, exist_ok=True)
    try:
      with atomic.scratch_folder(home / "prepare") as fresh:
        yield fresh
        for copy in (logs, examples):
          atomic.put_in_place(fresh / copy.path.name, copy.path)
    except (OSError, RuntimeError) as error:  # ArrayRecord's are RuntimeErrors
      if os.strerror(errno.ENOSPC) not in str(error):
        raise
      raise LogError(f"{out}: the disk is full; docs/scaling.md says how much is needed") from None
    finally:
      if not any(home.iterdir()):
        home.rmdir()


def write_prepared(
  logs: Logs, out: Place, config: SequenceConfig, limits: Limits | None = None, **how: Any
) -> dict[str, int]:
  """Stores logs and the examples cut from them below `out`.

  Args:
    logs: in memory.
    out: folder to write.
    config: how to cut.
    limits: change single settings.
    how: `workers` and `beam_options` of `prepare_examples`.

  Returns:
    Sizes of the tables, requests and examples per split, cleaning counts.

  Raises:
    LogError: the logs give no example for a split, or the disk is full.
  """
  with _prepared(out) as fresh:
    write_logs(logs, fresh / "logs")
    return _cut(LogParts(fresh / "logs"), fresh, config, limits, **how)


def _cut(
  parts: LogParts, fresh: Path, config: SequenceConfig, limits: Limits | None, **how: Any
) -> dict[str, int]:
  chosen = {name: value for name, value in (limits or {}).items() if value is not None}
  config = dataclasses.replace(config, **chosen)
  found, of_splits = prepare_examples(parts, fresh / "examples", config, **how)
  logs = parts.logs
  counts = {
    "users": len(logs.users.user_id),
    "ads": len(logs.ads.ad_id),
    "advertisers": len(np.unique(logs.ads.advertiser_id)),
    "organic contents": len(logs.contents.content_id),
    "events": parts.num_events,
    "ad events": found.ad_events,
  }
  for split, of in of_splits.items():
    counts |= {f"{split} {name}": count for name, count in of.items()}
  return counts | logs.cleaning


