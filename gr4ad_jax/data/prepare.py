"""From a source of logs to prepared data: validate, store, cut into examples."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gr4ad_jax.config import ConfigError, require
from gr4ad_jax.data import amazon, completejourney, parquet_logs
from gr4ad_jax.data.config import Amazon, CompleteJourney, Parquet, PrepareConfig, Source
from gr4ad_jax.data.cutting import Survey, survey
from gr4ad_jax.data.examples import prepare_examples
from gr4ad_jax.data.log_folder import LogParts, check_replaceable, write_logs
from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.splits import SPLITS, SequenceConfig, split_by_time
from gr4ad_jax.data.validation import LogError
from gr4ad_jax.machine import atomic, storage
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import Place


def prepare_logs(source: Source, config: PrepareConfig) -> dict[str, int]:
  """Reads and checks the logs of `source`, and cuts them into examples.

  Returns:
    Sizes of the tables, requests and examples per split, cleaning counts.

  Raises:
    LogError: missing, invalid or too short logs, or the disk is full.
    ConfigError: settings that cannot work, or `config.out` holds data already.
  """
  require(config.workers >= 1, "--workers", config.workers, "must be at least 1")
  require(config.beam or not config.beam_options, "--beam-options", config.beam_options,
          "needs --beam")
  if config.check:
    return _checked(source, config)
  if config.out is None:
    raise ConfigError("--out: must be given (or --check, which writes nothing)")
  if storage.exists(config.out / "examples" / "examples.json") and not config.overwrite:
    raise ConfigError(
      f"{config.out}: holds prepared data already; pass --overwrite or another --out"
    )
  with _prepared(config.out) as fresh:
    _store(source, fresh / "logs")
    parts = LogParts(fresh / "logs")
    return _cut(
      parts, fresh, _sequences(source, config, parts), workers=config.workers,
      beam_options=[f"--{option}" for option in config.beam_options] if config.beam else None,
    )


def _checked(source: Source, config: PrepareConfig) -> dict[str, int]:
  """Everything but the examples, in a temporary folder."""
  with tempfile.TemporaryDirectory(prefix="gr4ad_check_") as folder:
    _store(source, Path(folder) / "logs")
    parts = LogParts(Path(folder) / "logs")
    found = survey(parts, _sequences(source, config, parts), workers=config.workers)
    of_splits = dict(zip(SPLITS, ({"requests": int(n)} for n in found.request_counts), strict=True))
    return _summary(parts, found, of_splits)


def _sequences(source: Source, config: PrepareConfig, parts: LogParts) -> SequenceConfig:
  limits = (
    "max_ad_history", "max_organic_history", "max_met_ads", "max_targets", "num_trending"
  )
  chosen = {name: getattr(config, name) for name in limits if getattr(config, name) is not None}
  return dataclasses.replace(_split(source, parts), **chosen)


def _store(source: Source, folder: Path) -> None:
  match source:
    case CompleteJourney():
      last = completejourney.VALIDATION_WEEK - 1
      require(1 <= source.train_weeks <= last, "train_weeks", source.train_weeks,
              f"must be 1 to {last}")
      logs = completejourney.read_completejourney(
        min_ad_events=source.min_ad_events, max_households=source.households
      )
      write_logs(logs, folder)
    case Parquet():
      for line in parquet_logs.store_parquet_logs(source, folder):
        console.print(line)
    case Amazon():
      logs = amazon.read_amazon(storage.fetch(source.folder), max_users=source.users)
      write_logs(logs, folder)


def _split(source: Source, parts: LogParts) -> SequenceConfig:
  """Complete Journey: weeks 1-47 train, 48-49 validate, 50-53 test.

  Its catalogue and all histories come from every training week; requests of the last `train_weeks`
  of them are learned from. What is promoted changes, and a year-old request teaches little of it.
  """
  match source:
    case CompleteJourney():
      week_start_s, validation = completejourney.week_start_s, completejourney.VALIDATION_WEEK
      return SequenceConfig(
        train_start_s=week_start_s(validation - source.train_weeks),
        validation_start_s=week_start_s(validation),
        test_start_s=week_start_s(completejourney.TEST_WEEK),
      )
    case Parquet(split="time"):
      return split_by_time(
        parts.first_s, parts.last_s, source=parts.logs.source, train_days=source.train_days,
        validation_days=source.validation_days, test_days=source.test_days,
      )
  return SequenceConfig(split="leave_one_out", num_trending=0)


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


def write_prepared(logs: Logs, out: Place, config: SequenceConfig) -> dict[str, int]:
  """Stores logs that are in memory, and the examples cut from them, below `out`.

  Returns:
    As `prepare_logs`.

  Raises:
    LogError: the logs give no example for a split, or the disk is full.
  """
  with _prepared(out) as fresh:
    write_logs(logs, fresh / "logs")
    return _cut(LogParts(fresh / "logs"), fresh, config)


def _cut(
  parts: LogParts, fresh: Path, config: SequenceConfig, *, workers: int = 1,
  beam_options: Sequence[str] | None = None,
) -> dict[str, int]:
  found, of_splits = prepare_examples(
    parts, fresh / "examples", config, workers=workers, beam_options=beam_options
  )
  return _summary(parts, found, of_splits)


def _summary(
  parts: LogParts, found: Survey, of_splits: dict[str, dict[str, int]]
) -> dict[str, int]:
  logs = parts.logs
  if line := _worthless(logs, found):
    console.print(line)
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


def _worthless(logs: Logs, found: Survey) -> str | None:
  """A line about ads that are worth nothing, or all the same nothing."""
  bid_A = logs.ads.bid
  if (bid_A == 0).any() and not (bid_A > 0).any():
    return (
      f"{logs.source}: no value signal in the bids: every bid is 0, so that all ads have the same "
      "eCPM of 0 and candidate lists teach nothing; without the column, ads take what their "
      "conversions were worth"
    )
  if not found.valued_events and not (bid_A > 0).any():
    return (
      f"{logs.source}: no value signal: no ad event has a value or eCPM above 0, and no ad a bid; "
      "what is learned is what users click, not what it is worth (value buckets, reward and "
      "candidate lists teach nothing)"
    )
  return None
