"""The library in a few calls, from logs to ranked ads; `gr4ad_jax` hands these names on.

Folders are paths, or places such as "gs://bucket/folder". Settings that are not named here are
those of the commands of the same names: `gr4ad COMMAND --help`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from gr4ad_jax.catalog.prepared import PreparedLogs, open_logs
from gr4ad_jax.config import ConfigError, override_all, read_values
from gr4ad_jax.data.config import Amazon, CompleteJourney, Parquet, PrepareConfig, Source
from gr4ad_jax.data.prepare import prepare_logs
from gr4ad_jax.evaluation import evaluate as evaluation
from gr4ad_jax.evaluation.trained import as_baseline, evaluate_baseline
from gr4ad_jax.gpr import config as gpr
from gr4ad_jax.gpr.run import RunFile as GprRun
from gr4ad_jax.gpr.run import open_run as open_gpr
from gr4ad_jax.gpr.run import train_run as train_gpr
from gr4ad_jax.gr4ad.config import PRESETS
from gr4ad_jax.gr4ad.config import preset as named_preset
from gr4ad_jax.gr4ad.run import RunFile
from gr4ad_jax.gr4ad.run import open_run as open_gr4ad
from gr4ad_jax.gr4ad.train_run import train_run
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.search.baseline import Baseline
from gr4ad_jax.search.export import export_run
from gr4ad_jax.search.opened import Opened
from gr4ad_jax.search.recommend import RankedAd, UserSearch, recommend_for_user
from gr4ad_jax.sequential.run import WITHOUT_SIDS
from gr4ad_jax.sequential.run import open_baseline as open_without_sids
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.tokenizer.stage import tokenize as tokenize_stage

__all__ = [
  "PRESETS", "Amazon", "CompleteJourney", "Opened", "Parquet", "evaluate", "export", "open_run",
  "prepare", "recommend", "recommend_many", "tokenize", "train",
]


def prepare(source: Source, out: str | Path, **settings: Any) -> dict[str, int]:
  """Checks logs and cuts them into training examples.

  Args:
    source: `Parquet(ads=..., events=...)` of your own, `CompleteJourney()`, `Amazon(folder=...)`.
    out: new folder to write.
    settings: of `PrepareConfig`, such as `overwrite=True`.

  Returns:
    Sizes of the tables, requests and examples of each split, cleaning counts.

  Raises:
    LogError: a row or column breaks a rule; the message names it.
    ConfigError: settings that cannot work, or `out` holds data already.
  """
  return prepare_logs(source, PrepareConfig(out=storage.place(str(out)), **settings))


def tokenize(
  data: str | Path, *, overwrite: bool = False, **settings: Any
) -> dict[str, float]:
  """Gives every ad a semantic ID, in DATA/sids.

  Args:
    data: folder that `prepare` wrote.
    overwrite: replace semantic IDs that are there; trained runs keep their own copy.
    settings: of `TokenizerConfig`, such as `encoder="uae"`.

  Returns:
    Numbers that tell how healthy the semantic IDs are.

  Raises:
    LogError, ValueError: no data there, settings that do not fit them, or semantic IDs are there.
  """
  place, config = storage.place(str(data)), TokenizerConfig(**settings)
  return tokenize_stage(place, place / "sids", config, overwrite=overwrite).health


def train(
  data: str | Path,
  workdir: str | Path,
  *,
  preset: str = "demo",
  settings: Mapping[str, Any] | None = None,
  resume: bool = False,
) -> Opened:
  """Trains GR4AD, or by one of its presets GPR, HSTU or OneRec, and opens the run.

  Args:
    data: folder with semantic IDs.
    workdir: folder of the run, a new one unless `resume`.
    preset: one of `PRESETS`, or "gpr-small", "hstu-small", "onerec-small" (or "-tiny").
    settings: single ones by path, such as {"train.num_steps": 500, "model.width": 128}.
    resume: go on with the run in WORKDIR, exactly where it was.

  Raises:
    ConfigError: an unknown setting, or the folder is taken.
    DivergedError: the loss is no longer finite, or twice its first value.
  """
  data, workdir = storage.place(str(data)), storage.place(str(workdir))
  places = storage.absolute(data), storage.absolute(data / "sids")
  if preset in gpr.PRESETS:
    config = override_all(gpr.PRESETS[preset], settings or {})
    train_gpr(GprRun(*places, config, gpr.system_of(preset)), workdir, resume=resume)
  else:
    config = override_all(named_preset(preset), settings or {})
    train_run(RunFile(*places, config), workdir, resume=resume)
  return open_run(workdir)


def open_run(workdir: str | Place, *, data: str | Place | None = None) -> Opened:
  """Opens a trained run of any system, with its data and parameters.

  Args:
    workdir: folder of the run.
    data: where its data lie now, if they have moved.

  Raises:
    ConfigError: no trained run, one of an unknown system, or its data have changed.
  """
  workdir = storage.place(str(workdir))
  settings = run_settings(workdir)
  match system := settings.get("system", "gr4ad"):
    case "gr4ad" | "gpr" | "hstu" | "onerec":
      opens = open_gr4ad if system == "gr4ad" else open_gpr
      return opens(workdir, data=None if data is None else storage.place(str(data)))
    case _ if system in WITHOUT_SIDS:
      raise ConfigError(
        f"{workdir}: is a run of {system}, which has no semantic IDs to search; `gr4ad evaluate` "
        "judges it, alone or with --baseline-run beside another run"
      )
    case "advertiser":
      raise ConfigError(
        f"{workdir}: is a run that names advertisers, not ads; `gr4ad advertiser evaluate` and "
        "`gr4ad advertiser predict` take it"
      )
  raise ConfigError(f"{workdir}: a run of the system {system!r}, which this version does not know")


def run_settings(workdir: Place) -> dict[str, Any]:
  """What run.json of a folder holds, of whatever system; ConfigError where there is none."""
  if not storage.exists(workdir / "run.json"):
    raise ConfigError(f"{workdir}: holds no run; `gr4ad train --workdir {workdir}` makes one")
  return read_values(storage.fetch(workdir / "run.json"))


def open_baseline(workdir: str | Place, data: PreparedLogs, *, place: Place) -> Baseline:
  """Opens a trained run of any system as a row beside others.

  Args:
    workdir: folder of the run.
    data: that it has to be trained on.
    place: where they lie.

  Raises:
    ConfigError: no trained run, or one of other data.
  """
  workdir = storage.place(str(workdir))
  settings = run_settings(workdir)
  if not settings.get("fingerprint", "").startswith(data.fingerprint):
    raise ConfigError(f"{workdir}: was trained on other logs or examples than those in {place}")
  if settings.get("system") in WITHOUT_SIDS:
    return open_without_sids(workdir, data)
  return as_baseline(open_run(workdir, data=place))


def evaluate_run(
  workdir: Place,
  *,
  data: Place | None = None,
  split: str = "test",
  baseline_runs: Sequence[str | Place] = (),
) -> tuple[str, dict[str, float]]:
  """Opens a run of any system and evaluates it, as `evaluate`; gives its system and the metrics."""
  settings = run_settings(workdir)
  if (system := settings.get("system")) not in WITHOUT_SIDS:
    run = open_run(workdir, data=data)
    return run.system, evaluate(run, split=split, baseline_runs=baseline_runs)
  place = data or storage.place(settings["data"])
  prepared = open_logs(place)
  ours, *others = (open_baseline(w, prepared, place=place) for w in (workdir, *baseline_runs))
  return system, evaluate_baseline(ours, prepared, workdir, split=split, baselines=others)


def evaluate(
  run: Opened, *, split: str = "test", baseline_runs: Sequence[str | Place] = ()
) -> dict[str, float]:
  """Ranks ads for every request of a split, beside simple baselines.

  Args:
    run: from `open_run` or `train`.
    split: "validation" or "test".
    baseline_runs: folders of trained runs, on the same data, that stand beside it.

  Returns:
    Metrics by name, such as "recall@50"; the run's folder keeps them in metrics.json.
  """
  baselines = [open_baseline(w, run.without_sids, place=run.data) for w in baseline_runs]
  return evaluation.evaluate(run, split=split, baselines=baselines)


def recommend(
  run: Opened, user_id: str, *, k: int = 10, where: Sequence[str] = (),
  exclude_seen: bool | None = None,
) -> pd.DataFrame:
  """The best ads for a request right after the user's last event.

  Args:
    run: from `open_run` or `train`.
    user_id: of the logs.
    k: ads wanted.
    where: conditions that every ad meets, as "COLUMN=VALUE" of the ads table.
    exclude_seen: prospecting: leave out every ad whose product the user has ever engaged with,
      promoted or not; None = as the run's search.exclude_seen says.

  Returns:
    A row an ad, best first: ad_id, advertiser_id, text, sid, logp, expected_value (currency, of one
    `run.value_of`), score (what ads are ranked by), new (not in the user's history).

  Raises:
    ConfigError: an unknown user, or a condition that no ad meets.
  """
  found = recommend_for_user(run, user_id, k, where=where, exclude_seen=exclude_seen)
  return pd.DataFrame(found.ads, columns=RankedAd._fields)


def recommend_many(
  run: Opened, user_ids: Sequence[str] | None = None, *, k: int = 10, where: Sequence[str] = (),
  exclude_seen: bool | None = None,
) -> pd.DataFrame:
  """As `recommend`, for many users in batches; None = all of the logs.

  Returns:
    As `recommend`, with the columns user_id and rank (1 = best) before; a user for whom fewer than
    k are found has fewer rows.
  """
  search = UserSearch(run, k, where=where, exclude_seen=exclude_seen)
  users = search.users(user_ids)
  return pd.DataFrame(
    (row for batch in search.batches(users) for found in batch for row in found.rows()),
    columns=("user_id", "rank", *RankedAd._fields),
  )


def export(run: Opened, out: str | Path) -> int:
  """Writes the run's search as a folder that answers with jax and numpy alone.

  Args:
    run: from `open_run` or `train`.
    out: new folder.

  Returns:
    Bytes of its files.

  Raises:
    ValueError: `out` exists already.
  """
  return export_run(run, storage.place(str(out)))
