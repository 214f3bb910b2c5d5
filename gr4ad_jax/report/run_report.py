"""One self-contained HTML page about a run, for the people who run the ads."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gr4ad_jax.config import ConfigError
from gr4ad_jax.report.page import (
  Html,
  compact,
  details,
  duration,
  integer,
  number,
  numeric,
  page,
  percent,
  section,
  table,
  tag,
  write_page,
)
from gr4ad_jax.report.samples import samples_section
from gr4ad_jax.report.sections import health_section, metrics_section, training_section
from gr4ad_jax.report.verdict import CLEARLY, Comparison, compare_with_baselines, verdict
from gr4ad_jax.training.metric_log import read_log

_TITLES = {
  "metrics": "Metrics",
  "training": "Training",
  "tokenizer": "Semantic IDs",
  "data": "Data",
  "samples": "Samples",
  "settings": "Settings",
}
_SPLITS = {
  "time": "Split by time: training ends before validation begins, validation before test.",
  "leave_one_out": "Leave-one-out: each user's last request tests, the one before it validates, "
  "the rest trains.",
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
  workdir = Path(workdir)
  files = _read(workdir)
  comparisons = compare_with_baselines(files.metrics)
  currency = (files.about or {}).get("currency", "")
  step = files.metrics.get("checkpoint_step")

  def absent(name: str, file: str, command: str) -> Html:
    return section(name, _TITLES[name], _absent(workdir, file, command))

  sections = [
    _headline(files, comparisons),
    metrics_section(files.metrics, comparisons),
    training_section(files.log, step) if files.log
    else absent("training", "train_log.jsonl", "train"),
    health_section(files.health) if files.health is not None
    else absent("tokenizer", "sid_health.json", "evaluate"),
    _data_section(files.about) if files.about is not None
    else absent("data", "about.json", "evaluate"),
    samples_section(files.samples, currency) if files.samples is not None
    else absent("samples", "samples.json", "evaluate"),
    _settings_section(files),
  ]  # fmt: skip
  source = (files.about or {}).get("source", workdir.name)
  text = page(f"GR4AD on {source}", sections, navigation=_TITLES)
  return write_page(workdir / "report.html", text)


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
  return _RunFiles(
    workdir=workdir,
    metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
    run=_read_json(workdir / "run.json", dict),
    log=read_log(workdir),
    health=_read_health(workdir / "sid_health.json"),
    about=_read_json(workdir / "about.json", dict),
    samples=_read_json(workdir / "samples.json", list),
  )


def _read_json(path: Path, kind: type) -> Any:
  """The file's content, which must be of this kind; None where there is no such file."""
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise ConfigError(f"{path}: not JSON ({error})") from None
  if not isinstance(content, kind):
    raise ConfigError(f"{path}: holds a {type(content).__name__}, must be a {kind.__name__}")
  return content


def _read_health(path: Path) -> dict[str, Any] | None:
  health = _read_json(path, dict)
  if health is not None and not {"lines", "metrics"} <= health.keys():
    raise ConfigError(f"{path}: has no lines and metrics; run `gr4ad evaluate` again")
  return health


def _absent(workdir: Path, file: str, command: str) -> Html:
  """The sentence that stands where a part cannot."""
  made = tag("code", f"gr4ad {command} --workdir {workdir}")
  return tag("p", f"This run has no {file}; ", made, " writes it.", class_="soft")


def _headline(files: _RunFiles, comparisons: list[Comparison]) -> Html:
  metrics, about = files.metrics, files.about or {}
  source = about.get("source", files.workdir.name)
  sentence, style = verdict(comparisons)
  split = about.get("evaluated_split")
  tiles = [
    (percent(metrics.get("recall@50")), "recall@50: held-out ads found in a list of 50"),
    (percent(metrics.get("value_recall@50")), "value recall@50: their money found"),
    (integer(metrics.get("num_requests")), f"{split or 'held-out'} requests evaluated"),
    (integer(metrics.get("num_users")), "users behind them"),
    (integer(metrics.get("num_ads", about.get("num_ads"))), "ads in the catalogue"),
    (integer(about.get("num_advertisers")), "advertisers"),
    (compact(metrics.get("num_params")), "parameters"),
    (number(metrics.get("decode_requests_per_second")), "requests per second, search"),
    (number(metrics.get("train_examples_per_second")), "examples per second, training"),
    (percent(metrics.get("invalid_sid_rate")), "generated IDs that belong to no ad"),
  ]
  warning = None
  if split == "validation":
    warning = tag(
      "p", "These are validation requests: the checkpoint and the baselines' settings were chosen "
      "on them, so the numbers flatter both. Use --split test for a result.", class_="poor")
  return tag(
    "header",
    tag("h1", f"GR4AD on {source}"),
    tag("p", *_description(files), class_="soft"),
    tag("p", tag("span", sentence), tag("small", CLEARLY) if comparisons else None,
        class_=f"verdict {style}"),
    warning,
    tag("div", *(tag("div", tag("b", value), tag("span", label)) for value, label in tiles),
        class_="tiles"),
  )  # fmt: skip


def _description(files: _RunFiles) -> Iterator[str]:
  """What was trained on what, in a line or two."""
  about = files.about
  if about is not None:
    yield (
      f"{integer(about['num_events'])} events of {integer(about['num_users'])} users with "
      f"{integer(about['num_ads'])} ads. "
    )
  if files.run is not None:
    model = files.run["config"]["model"]
    lazy = model["decoder"] == "lazy"
    yield "LazyAR decoder, " if lazy else "Ordinary autoregressive decoder, "
    yield f"{model['num_layers']} layers"
    yield f" ({model['num_lazy_layers']} without the previous token)" if lazy else ""
    yield f", width {model['width']}"
    yield ", with the copy path, which goes beyond the paper. " if model["copy_path"] else ". "


def _data_section(about: Mapping[str, Any]) -> Html:
  counts = [
    [split, numeric(integer(c["requests"])), numeric(integer(c["examples"]))]
    for split, c in about["counts"].items()
  ]
  touched = {rule: rows for rule, rows in about["cleaning"].items() if rows}
  untouched = [rule for rule, rows in about["cleaning"].items() if not rows]
  facts = [
    ["Source", about["source"]],
    ["Currency of values", about["currency"] or "not named"],
    ["Users", integer(about["num_users"])],
    ["Ads", integer(about["num_ads"])],
    ["Advertisers", integer(about["num_advertisers"])],
    ["Events", integer(about["num_events"])],
  ]
  rules = details(
    f"Rules that touched no row: {len(untouched)}",
    tag("ul", *(tag("li", rule) for rule in untouched)),
  )
  return section(
    "data", "Data",
    table((), facts),
    tag("h3", "What to keep in mind"),
    tag("ul", *(tag("li", text) for text in about["caveats"])) if about["caveats"]
    else tag("p", "No caveats were stated for this source.", class_="soft"),
    tag("h3", "Splits"),
    tag("p", _SPLITS.get(about["split"], about["split"]), " An example holds a few targets of one "
        "request; a large request gives several examples."),
    table(["", "Requests", "Examples"], counts),
    tag("h3", "Cleaning"),
    tag("p", "Rows that each rule touched; nothing is dropped without being counted here."),
    table(["Rule", "Rows"], [[rule, numeric(integer(rows))] for rule, rows in touched.items()])
    if touched else None,
    rules if untouched else None,
  )  # fmt: skip


def _settings_section(files: _RunFiles) -> Html:
  if files.run is None:
    settings = _absent(files.workdir, "run.json", "train")
  else:
    settings = _flat_table("All settings of the run", files.run)
  tuned = (files.about or {}).get("baseline_settings")
  return section(
    "settings", _TITLES["settings"], settings,
    _flat_table("Settings of the baselines, chosen on the validation split", tuned)
    if tuned else None,
    _flat_table("All numbers of metrics.json", files.metrics),
    _flat_table("All numbers of sid_health.json", files.health["metrics"])
    if files.health else None,
  )  # fmt: skip


def _flat_table(title: str, values: Mapping[str, Any]) -> Html:
  rows = [[name, _plain(name, value)] for name, value in _leaves(values)]
  return details(title, table((), rows))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in values.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


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
