"""From a source of logs to prepared data: validate, cut into examples, assign semantic IDs."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from gr4ad_jax.config import ConfigError
from gr4ad_jax.data import amazon, completejourney, parquet_logs
from gr4ad_jax.data.log_folder import (
  LogParts,
  check_replaceable,
  put_in_place,
  read_logs,
  write_logs,
)
from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.splits import SequenceConfig, split_by_time
from gr4ad_jax.data.tfds_builder import open_examples, prepare_examples, training_events
from gr4ad_jax.data.validation import InvalidRows, LogError
from gr4ad_jax.embedding.embeddings import LogEmbeddings, embed
from gr4ad_jax.machine import sharding, storage
from gr4ad_jax.machine.progress import track
from gr4ad_jax.machine.storage import Place, write_json
from gr4ad_jax.report.tokenizer_report import write_tokenizer_report
from gr4ad_jax.tokenizer import semantic_id
from gr4ad_jax.tokenizer.groups import NUM_GROUPS
from gr4ad_jax.tokenizer.health import measure
from gr4ad_jax.tokenizer.health_line import HealthLine, Made
from gr4ad_jax.tokenizer.health_verdicts import as_record, verdicts

PRODUCT = "advertiser and category"  # what stands for "the same product" in a log

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
    if split == "time":
      parts = LogParts(fresh / "logs")
      config = split_by_time(
        parts.first_s, parts.last_s, source=parts.logs.source, validation_days=validation_days,
        test_days=test_days, train_days=train_days,
      )
    else:
      config = SequenceConfig(split="leave_one_out", num_trending=0)
    return _cut(fresh, config, limits, **how)


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
    fresh = Path(tempfile.mkdtemp(prefix=".prepare-", dir=home))
    try:
      yield fresh
      for copy in (logs, examples):
        put_in_place(fresh / copy.path.name, copy.path)
    except (OSError, RuntimeError) as error:  # ArrayRecord's are RuntimeErrors
      if os.strerror(errno.ENOSPC) not in str(error):
        raise
      raise LogError(f"{out}: the disk is full; docs/scaling.md says how much is needed") from None
    finally:
      shutil.rmtree(fresh, ignore_errors=True)
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
    return _cut(fresh, config, limits, **how)


def _cut(
  fresh: Path, config: SequenceConfig, limits: Limits | None, **how: Any
) -> dict[str, int]:
  chosen = {name: value for name, value in (limits or {}).items() if value is not None}
  config = dataclasses.replace(config, **chosen)
  found = prepare_examples(fresh / "logs", fresh / "examples", config, **how)
  parts = LogParts(fresh / "logs")
  logs = parts.logs
  counts = {
    "users": len(logs.users.user_id),
    "ads": len(logs.ads.ad_id),
    "advertisers": len(np.unique(logs.ads.advertiser_id)),
    "organic contents": len(logs.contents.content_id),
    "events": parts.num_events,
    "ad events": found.ad_events,
  }
  for split, of in open_examples(fresh / "examples").counts.items():
    counts |= {f"{split} {name}": count for name, count in of.items()}
  return counts | logs.cleaning


class Tokenized(NamedTuple):
  """What `tokenize` has made and found."""

  codebook_sizes: tuple[int, ...]
  health: dict[str, float]
  lines: list[HealthLine]


def tokenize(
  data: Place,
  out: Place,
  config: semantic_id.TokenizerConfig,
  *,
  embeddings: Place | None = None,
  with_report: bool = False,
) -> Tokenized:
  """Assigns and stores semantic IDs with their health (health.json beside them).

  Embeddings are kept in DATA/embeddings, and a fit that was interrupted goes on.

  Args:
    data: folder of prepared data.
    out: folder to write.
    config: encoder, quantizer, codebooks, last level.
    embeddings: .npy file [num_ads, D] for encoder "given"; None = the ads' column.
    with_report: also write report.html.

  Raises:
    LogError, ValueError: no logs there, or settings that do not fit them.
  """
  logs = read_logs(storage.fetch(data / "logs"))
  train_E = None
  if config.encoder == "uae":  # the others learn from no event
    train_E = training_events(logs, open_examples(storage.fetch(data / "examples")))
  with storage.new_folder(out) as copy:
    folder = copy.path
    with storage.working_copy(data / "embeddings") as cache:
      embedded = embed(
        logs, config.encoder, file=embeddings and storage.fetch(embeddings), folder=cache.path,
        train_E=train_E, seed=config.seed, progress=track,
      )
    sids = semantic_id.assign_semantic_ids(
      logs, embedded, config, mesh=sharding.data_mesh(NUM_GROUPS),
      resume_path=folder.with_name(f".{folder.name}.resume.npz"), progress=track,
    )
    metrics = health(logs, sids, embedded)
    lines = judge(sids, metrics)
    semantic_id.save(sids, folder)
    write_json(folder / "health.json", as_record(metrics, lines))
    if with_report:
      write_tokenizer_report(
        folder, title=logs.source, metrics=metrics, lines=lines, codes_AL=sids.codes_AL,
        codebook_sizes=sids.codebook_sizes, embedding_AD=embedded.ad_AD,
        group_A=np.array([path.split(" > ")[0] for path in logs.ads.category], object),
      )
  return Tokenized(sids.codebook_sizes, metrics, lines)


def judge(sids: semantic_id.SemanticIds, metrics: Mapping[str, float]) -> list[HealthLine]:
  """The verdicts on what `health` has measured."""
  config = sids.config
  made = Made(config.last_level, config.hash_columns, config.quantizer, config.encoder)
  return verdicts(metrics, made=made, label_name=PRODUCT)


def health(
  logs: Logs, sids: semantic_id.SemanticIds, embedded: LogEmbeddings | None = None
) -> dict[str, float]:
  """Tokenizer health, weighted by ad events and their value.

  Args:
    logs: of the semantic IDs.
    sids: codes of the ads.
    embedded: what was quantised; adds reconstruction and retrieval of ads with the same advertiser
      and category, which stand for the same product.
  """
  events, num_ads = logs.events, len(logs.ads.ad_id)
  paid = events.ad >= 0
  of_embedding = {}
  if embedded is not None:
    pairs = zip(logs.ads.advertiser_id, logs.ads.category, strict=True)
    of_embedding = {
      "embedding_AD": embedded.ad_AD, "reconstruction_AD": sids.reconstruct(),
      "product_A": np.array(["\0".join(pair) for pair in pairs], object),
    }
  return measure(
    sids.codes_AL, sids.codebook_sizes, num_quantised=sids.num_quantised,
    content_codes_OL=sids.content_codes_OL,
    events_A=np.bincount(events.ad[paid], minlength=num_ads).astype(np.float64),
    value_A=np.bincount(events.ad[paid], weights=events.value[paid], minlength=num_ads),
    **of_embedding,
  )
