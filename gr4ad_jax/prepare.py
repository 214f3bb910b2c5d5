"""From a source of logs to prepared data: validate, cut into examples, assign semantic IDs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from gr4ad_jax.config import ConfigError
from gr4ad_jax.data import amazon, completejourney, parquet_logs
from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.schema import read_logs, write_logs
from gr4ad_jax.data.sequences import SequenceConfig, time_split
from gr4ad_jax.data.tfds_builder import open_examples, prepare_examples
from gr4ad_jax.data.validation import InvalidRows
from gr4ad_jax.progress import track
from gr4ad_jax.tokenizer import semantic_id

Limits = Mapping[str, int | None]
"""Overrides of SequenceConfig fields; None keeps the default."""


def prepare_completejourney(
  out: Path,
  *,
  min_ad_events: int = 5,
  train_weeks: int = 20,
  households: int | None = None,
  limits: Limits | None = None,
  overwrite: bool = False,
) -> dict[str, int]:
  """Complete Journey: weeks 1-47 train, 48-49 validate, 50-53 test.

  The catalogue and all histories come from every training week; requests of the last `train_weeks`
  of them are learned from. What is promoted changes, and a year-old request teaches little of it.

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
  return _write(logs, out, config, limits)


def prepare_parquet(
  out: Path,
  *,
  ads: Path,
  events: Path,
  users: Path | None = None,
  contents: Path | None = None,
  currency: str = "currency units",
  split: Literal["time", "leave_one_out"] = "time",
  validation_days: float = 7.0,
  test_days: float = 7.0,
  train_days: float | None = None,
  invalid_rows: InvalidRows = "error",
  limits: Limits | None = None,
  overwrite: bool = False,
) -> dict[str, int]:
  """A user's own logs; arguments as `gr4ad prepare parquet --help` explains them.

  Raises:
    LogError: invalid logs, or too short for the split.
    ConfigError: `out` holds data already.
  """
  _check_free(out, overwrite)
  logs = parquet_logs.read_parquet_logs(
    ads, events, users=users, contents=contents, currency=currency, invalid_rows=invalid_rows
  )
  if split == "time":
    config = time_split(
      logs, validation_days=validation_days, test_days=test_days, train_days=train_days
    )
  else:
    config = SequenceConfig(split="leave_one_out", num_trending=0)
  return _write(logs, out, config, limits)


def prepare_amazon(
  out: Path,
  folder: Path,
  *,
  users: int | None = None,
  limits: Limits | None = None,
  overwrite: bool = False,
) -> dict[str, int]:
  """Public review sequences under the leave-one-out protocol.

  Raises:
    LogError: missing or invalid files.
    ConfigError: `out` holds data already.
  """
  _check_free(out, overwrite)
  logs = amazon.read_amazon(folder, max_users=users)
  return _write(logs, out, SequenceConfig(split="leave_one_out", num_trending=0), limits)


def _check_free(out: Path, overwrite: bool) -> None:
  if (out / "examples" / "examples.json").exists() and not overwrite:
    raise ConfigError(f"{out}: holds prepared data already; pass --overwrite or another --out")


def _write(logs: Logs, out: Path, config: SequenceConfig, limits: Limits | None) -> dict[str, int]:
  chosen = {name: value for name, value in (limits or {}).items() if value is not None}
  config = dataclasses.replace(config, **chosen)
  write_logs(logs, out / "logs")
  prepare_examples(logs, out / "examples", config)
  return summary(logs, out)


def summary(logs: Logs, out: Path) -> dict[str, int]:
  """What was prepared: sizes of the tables, requests and examples per split, cleaning counts."""
  counts = {
    "users": len(logs.users.user_id),
    "ads": len(logs.ads.ad_id),
    "advertisers": len(np.unique(logs.ads.advertiser_id)),
    "organic contents": len(logs.contents.content_id),
    "events": len(logs.events.user),
    "ad events": int((logs.events.ad >= 0).sum()),
  }
  for split, of in open_examples(out / "examples").counts.items():
    counts |= {f"{split} {name}": count for name, count in of.items()}
  return counts | logs.cleaning


def tokenize(
  data: Path, out: Path, config: semantic_id.TokenizerConfig
) -> tuple[tuple[int, ...], dict[str, float]]:
  """Assigns and stores semantic IDs.

  Args:
    data: folder of prepared data.
    out: folder to write.
    config: encoder, codebooks, hash.

  Returns:
    Codebook sizes and the health report.

  Raises:
    LogError, ValueError: no logs there, or settings that do not fit them.
  """
  logs = read_logs(data / "logs")
  sids = semantic_id.assign_semantic_ids(logs, config, progress=track)
  semantic_id.save(sids, out)
  return sids.codebook_sizes, health(logs, sids)


def health(logs: Logs, sids: semantic_id.SemanticIds) -> dict[str, float]:
  """Tokenizer health, weighted by ad events and their value."""
  events, num_ads = logs.events, len(logs.ads.ad_id)
  paid = events.ad >= 0
  return semantic_id.health(
    sids,
    events_A=np.bincount(events.ad[paid], minlength=num_ads).astype(np.float64),
    value_A=np.bincount(events.ad[paid], weights=events.value[paid], minlength=num_ads),
  )
