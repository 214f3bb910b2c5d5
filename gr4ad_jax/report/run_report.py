"""One self-contained HTML page about a run, for the people who run the ads."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gr4ad_jax.config import ConfigError, read_values
from gr4ad_jax.machine import atomic
from gr4ad_jax.report import health_lines, sections
from gr4ad_jax.report.page import compact, duration, integer, number, percent, render
from gr4ad_jax.report.verdict import compare_with_baselines, methods, verdict
from gr4ad_jax.tokenizer.health_line import HealthLine
from gr4ad_jax.training.metric_log import read_log

_SECTIONS = {
  "metrics": "Metrics",
  "training": "Training",
  "tokenizer": "Semantic IDs",
  "data": "Data",
  "samples": "Samples",
  "settings": "Settings",
}


@dataclasses.dataclass(frozen=True)
class _RunFiles:
  """What a run folder holds; None (an empty log) = the file is not there."""

  workdir: Path
  metrics: dict[str, float]
  run: dict[str, Any] | None
  log: list[dict[str, Any]]
  health: dict[str, Any] | None
  about: dict[str, Any] | None
  samples: list[dict[str, Any]] | None


def write_report(workdir: Path) -> Path:
  """Writes `report.html` from the files that training and evaluation left in a run folder.

  Args:
    workdir: holds metrics.json, and where they were made run.json, train_log.jsonl,
      sid_health.json, about.json and samples.json. A part whose file is absent says which command
      makes it.

  Returns:
    The page: one file that refers to no other; all text from the logs is escaped.

  Raises:
    ConfigError: no such folder, no metrics.json, or a file that does not hold JSON.
  """
  files = _read(workdir)
  about, metrics, step = files.about or {}, files.metrics, files.metrics.get("checkpoint_step")
  system = (files.run or {}).get("system", "gr4ad").upper()  # older folders do not name it
  comparisons, prefixes = compare_with_baselines(metrics), methods(metrics, system=system)
  lines = [HealthLine(**line) for line in (files.health or {"lines": []})["lines"]]
  text = render(
    "run.html", kind="run", sections=_SECTIONS, **vars(files), system=system,
    title=f"{system} on {about.get('source', workdir.name)}", tiles=_tiles(metrics, about),
    verdict=verdict(comparisons, system=system), split=about.get("evaluated_split"),
    splits=[(name, n["requests"], n["examples"]) for name, n in about.get("counts", {}).items()],
    currency=about.get("currency", ""), value_of=about.get("value_of", "engagement"),
    comparisons=comparisons,
    metric_tables=sections.metric_tables(metrics, prefixes),
    comparison_table=sections.comparison_table(comparisons),
    interval_figures=sections.interval_figures(metrics, prefixes),
    meanings=[words for name, words in sections.MEANINGS.items() if name in metrics],
    step=step, losses=sections.loss_curves(files.log, step),
    optimisation=sections.curves(files.log, sections.OPTIMISATION, step),
    training_verdict=sections.training_verdict(files.log, step) if files.log else "",
    health_headline=health_lines.with_options(health_lines.headline(lines)[0]) if lines else "",
    health_groups=health_lines.groups(lines), settings=_settings(files),
  )  # fmt: skip
  path = workdir / "report.html"
  atomic.write_text(path, text)
  return path


def _read(workdir: Path) -> _RunFiles:
  if not workdir.is_dir():
    raise ConfigError(f"{workdir}: no such folder; `gr4ad train --workdir {workdir}` makes a run")
  metrics = _read_json(workdir / "metrics.json", dict)
  if metrics is None:
    raise ConfigError(
      f"{workdir}: no metrics.json to report; run `gr4ad evaluate --workdir {workdir}` first"
    )
  for name, value in metrics.items():
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise ConfigError(f"{workdir / 'metrics.json'}: {name} is {value!r}, must be a number")
  health = _read_json(workdir / "sid_health.json", dict)
  if health is not None and not {"lines", "metrics"} <= health.keys():
    path = workdir / "sid_health.json"
    raise ConfigError(f"{path}: has no lines and metrics; run `gr4ad evaluate` again")
  return _RunFiles(
    workdir=workdir,
    metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
    run=_read_json(workdir / "run.json", dict),
    log=read_log(workdir),
    health=health,
    about=_read_json(workdir / "about.json", dict),
    samples=_read_json(workdir / "samples.json", list),
  )


def _read_json(path: Path, kind: type) -> Any:
  """The file's content, which must be of this kind; None where there is no such file."""
  return read_values(path, kind) if path.exists() else None


def _tiles(metrics: Mapping[str, float], about: Mapping[str, Any]) -> list[tuple[str, str]]:
  """(number, words) of what a reader looks for first."""
  requests = f"{about.get('evaluated_split', 'held-out')} requests evaluated"
  return [
    (percent(metrics.get("recall@50")), "recall@50: held-out ads found in a list of 50"),
    (percent(metrics.get("value_recall@50")), "value recall@50: their money found"),
    (integer(metrics.get("num_requests")), requests),
    (integer(metrics.get("num_users")), "users behind them"),
    (integer(metrics.get("num_ads", about.get("num_ads"))), "ads in the catalogue"),
    (integer(about.get("num_advertisers")), "advertisers"),
    (compact(metrics.get("num_params")), "parameters"),
    (number(metrics.get("decode_requests_per_second")), "requests per second, search"),
    (number(metrics.get("train_examples_per_second")), "examples per second, training"),
    (percent(metrics.get("invalid_sid_rate")), "generated IDs that belong to no ad"),
  ]


def _settings(files: _RunFiles) -> dict[str, list[tuple[str, str]]]:
  """Title -> (name, value) of everything that was set and measured."""
  tables = {
    "All settings of the run": files.run,
    "Settings of the baselines, chosen on the validation split":
      (files.about or {}).get("baseline_settings"),
    "Settings of the baselines that leave out what a user has seen":
      (files.about or {}).get("prospecting_settings"),
    "All numbers of metrics.json": files.metrics,
    "All numbers of sid_health.json": files.health and files.health["metrics"],
  }  # fmt: skip
  return {title: list(_leaves(values)) for title, values in tables.items() if values}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
  for name, value in values.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, f"{prefix}{name}.")
    else:
      yield prefix + name, _plain(name, value)


def _plain(name: str, value: Any) -> str:
  """A setting as it is written in JSON; spans in seconds also in words."""
  if name.endswith("_s") and isinstance(value, int | float):
    return f"{value:,} ({duration(value)})"
  if isinstance(value, float):
    return f"{value:,.6g}"
  if value is None:
    return "none"
  if type(value) is int:
    return f"{value:,}"
  return value if isinstance(value, str) else json.dumps(value)
