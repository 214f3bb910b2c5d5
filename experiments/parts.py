"""What each part beyond the paper brings, and what it costs in speed: one change a row.

    python -m experiments.run parts
    python -m experiments.run parts --set settings.data=DATA_FOLDER settings.preset=amazon-beauty

The first row is the preset as it is; every other row is trained with the changes that its name
says, for the same steps, from the same seed, and judged on the same validation requests (test is
not read): all targets with seen ads left in the lists, and as prospecting/, new targets without
seen ads, which is how Amazon is judged. Differences to the first row are paired over users. Speed:
searches of SPEED_BATCH requests that take turns.

Without settings.data Complete Journey is prepared in WORKDIR as in `make demo`, with a semantic ID
of its own for every ad. Such a folder for Amazon is written by `gr4ad prepare amazon` and `gr4ad
tokenize --last-level suffix` (docs/results.md). Finished rows are kept in WORKDIR, so that an
interrupted run goes on.

Expected (docs/results.md, part of the rows, one seed): of Complete Journey after 400 steps
recall@50 .434, without copy path .156 and 1.9 times the requests/s; of Beauty after 300 steps
recall@10 .119, without neighbours .031, without item scorer .123. Run time on half of two busy
cores: 3 to 12 minutes a row.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments._figures import cell, dot, plain
from experiments._runs import (
  Lists,
  by_task,
  found_lists,
  of_steps,
  prepared_journey,
  run_of,
  split_groups,
  tokenized,
  training_minutes,
)
from experiments._settings import own_and_others
from gr4ad_jax.cli.bench_decode import time_in_turns
from gr4ad_jax.config import ConfigError, nearest, override_all
from gr4ad_jax.data.examples import open_examples
from gr4ad_jax.evaluation.evaluate import DEPTH
from gr4ad_jax.gr4ad.config import Config, preset
from gr4ad_jax.gr4ad.run import open_run
from gr4ad_jax.gr4ad.train_run import train_run
from gr4ad_jax.machine.progress import console, track
from gr4ad_jax.search.held_out import eval_requests
from gr4ad_jax.search.ranking import EvalRequests, mean_metrics, paired_difference
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.training.metric_log import read_log

BASE = "as it is"
SPEED_BATCH, SPEED_REPEATS = 8, 15
_PAPER = {"model.copy_path": "false", "loss.request_size_power": "0"}
_SEQUENCES_PAPER = {
  "model.copy_path": "false", "model.item_scorer": "false", "model.neighbours": "0"
}
LEARNING = {  # how it is learned, whatever the model
  "EMA of weights of .999": {"train.ema": "0.999"},
  "label smoothing .1": {"loss.label_smoothing": "0.1"},
}
ROWS: dict[str, dict[str, dict[str, str]]] = {
  "demo": {
    BASE: {},
    "paper: no copy path and targets weigh the same": _PAPER,
    "no copy path": {"model.copy_path": "false"},
    "targets weigh the same instead of requests": {"loss.request_size_power": "0"},
    "and an item scorer": {"model.item_scorer": "true"},
    "dropout .1": {"model.dropout": "0.1"},
    **LEARNING,
    "checkpoint by NDCG of a search": {"train.best_by": "ndcg@50"},
  },
  "amazon-beauty": {
    BASE: {},
    "paper: no copy path": _SEQUENCES_PAPER,
    "neither neighbours nor item scorer": {"model.item_scorer": "false", "model.neighbours": "0"},
    "no neighbours": {"model.neighbours": "0"},
    "no item scorer": {"model.item_scorer": "false"},
    "item scorer's share learned": {"model.item_share": "0"},
    "no low-pass filter": {"model.history_filter": "0"},
    **LEARNING,
    "checkpoint by loss": {"train.best_by": "loss"},
  },
}
ROWS["amazon-sports"] = ROWS["amazon-beauty"]
DEPTHS = {"demo": 50, "amazon-beauty": 10, "amazon-sports": 10}  # ads of a list that count


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change, beside the preset's own settings."""

  data: str = ""
  """A folder that `gr4ad prepare` wrote and `gr4ad tokenize` gave semantic IDs; "" = Complete
  Journey."""
  preset: str = "demo"
  """The first row; one of those that have rows."""
  steps: int = 1_000
  """Training steps of every row."""
  validations: int = 4
  """How often a row is validated; the best checkpoint is kept."""
  requests: int = 1_500
  """Validation requests that judge, evenly spread."""
  bootstrap: int = 1_000
  """Resamples of users for the intervals."""
  rows: tuple[str, ...] = ()
  """Rows beside the first; () = all."""


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """ROW/METRIC, difference/ROW/METRIC (the row minus the first), ROW/speed, ROW/minutes."""
  del size
  settings, config = settings_and_config(overrides)
  data = Path(settings.data) if settings.data else prepared_journey(workdir)
  sids = data / "sids"
  if not settings.data:
    sids = tokenized(data, workdir / "sids", TokenizerConfig(last_level="suffix"))
  rows = {name: override_all(config, ROWS[settings.preset][name]) for name in _names(settings)}
  found, minutes = {}, {}
  for name, of_row in rows.items():
    folder = workdir / _folder_name(name)
    console.print(f"row: {name}")
    train_run(run_of(data, sids, of_row), folder, resume=True)
    found[name] = found_lists(folder, "validation", limit=settings.requests)
    minutes[f"{name}/minutes"] = training_minutes(read_log(folder), of_row.train.batch_size)
  examples = open_examples(data / "examples")
  requests = eval_requests(split_groups(examples, "validation", settings.requests))
  results = compared(found, requests, depth=DEPTHS[settings.preset], bootstrap=settings.bootstrap)
  return results | minutes | _speed(workdir, tuple(rows))


def settings_and_config(overrides: Mapping[str, str]) -> tuple[Settings, Config]:
  """The experiment's own settings, and the first row.

  Raises:
    ConfigError: an unknown setting, a preset without rows, an unknown row.
  """
  settings, others = own_and_others(Settings(), overrides)
  if settings.preset not in ROWS:
    raise ConfigError(f"settings.preset={settings.preset!r}: {nearest(settings.preset, ROWS)}")
  for name in settings.rows:
    if name not in ROWS[settings.preset]:
      raise ConfigError(f"settings.rows: {name!r}: {nearest(name, ROWS[settings.preset])}")
  config = preset(settings.preset)
  every = max(1, settings.steps // settings.validations)
  train = dataclasses.replace(
    of_steps(config.train, settings.steps), eval_every=every, checkpoint_every=every
  )
  return settings, override_all(dataclasses.replace(config, train=train), others)


def compared(
  found: Mapping[str, Lists], requests: EvalRequests, *, depth: int, bootstrap: int
) -> dict[str, float]:
  """ROW/METRIC and ROW/prospecting/METRIC at `depth`, and difference/... of each to the first row.

  Args:
    found: lists of every row, for the same requests; the first row is what others are compared to.
    requests: with their targets.
    depth: ads of a list that count.
    bootstrap: resamples of users.
  """
  results, first = {}, list(by_task(next(iter(found.values())), requests))
  for name, lists in found.items():
    tasks = zip(by_task(lists, requests), first, strict=True)
    for (prefix, ranked_RK, asked), (_, first_RK, _) in tasks:
      metrics = mean_metrics(ranked_RK, asked, k=depth)
      results |= {f"{name}/{prefix}{metric}": value for metric, value in metrics.items()}
      differences = paired_difference(
        ranked_RK, first_RK, requests=asked, k=depth, bootstrap=bootstrap
      )
      results |= {
        f"difference/{name}/{prefix}{metric}": value for metric, value in differences.items()
        if not metric.startswith("new/")
      }
  return {name: value for name, value in results.items() if np.isfinite(value)}


def _speed(workdir: Path, names: tuple[str, ...]) -> dict[str, float]:
  """ROW/speed: requests/s of a row's search over those of the first row."""
  calls = {}
  for name in names:
    opened = open_run(workdir / _folder_name(name))
    context = opened.contexts.context([
      group[0] for group in split_groups(opened.examples, "validation", SPEED_BATCH)
    ])
    recommender = opened.recommender()
    calls[name] = lambda recommender=recommender, context=context: recommender(context, DEPTH).ad_RK
  seconds = time_in_turns(calls, repeats=SPEED_REPEATS, progress=track)
  first = float(np.median(seconds[names[0]]))
  return {f"{name}/speed": first / float(np.median(seconds[name])) for name in names}


def _names(settings: Settings) -> list[str]:
  rows = [name for name in ROWS[settings.preset] if name != BASE]
  return [BASE, *(name for name in rows if not settings.rows or name in settings.rows)]


def _folder_name(row: str) -> str:
  return "-".join(re.findall(r"[a-z0-9.]+", row.lower()))


def _depth(results: Mapping[str, float]) -> int:
  name = next(name for name in results if name.startswith(f"{BASE}/recall@"))
  return int(name.split("@")[1])


def table(results: Mapping[str, float]) -> str:
  """One row a part: what it finds, less what the first row finds, its speed and minutes."""
  k = _depth(results)
  metrics = [f"recall@{k}", f"ndcg@{k}", f"value_recall@{k}", f"prospecting/recall@{k}"]
  # Where each target is worth 1, value is the count.
  shown = [metrics[0]]
  for metric in metrics[1:]:
    key = f"{BASE}/{metric}"
    if key in results and results[key] != results[f"{BASE}/{metrics[0]}"]:
      shown.append(metric)
  lines = ["| | " + " | ".join(shown) + " | requests/s | minutes |",
           "|---" + "|---:" * (len(shown) + 2) + "|"]
  for row in _rows(results):
    cells = [f"{results[f'{row}/{metric}']:.4f}" for metric in shown]
    if row != BASE:
      look = {"digits": 4, "sign": "+", "between": " to "}
      cells = [
        f"{found}: {cell(results, f'difference/{row}/{metric}', **look)}"
        for found, metric in zip(cells, shown, strict=True)
      ]
    speed, minutes = results[f"{row}/speed"], results[f"{row}/minutes"]
    lines.append(f"| {row} | " + " | ".join(cells) + f" | x {speed:.2f} | {minutes:.1f} |")
  return "\n".join(lines) + (
    "\n\nBehind the colon: the row less the first, paired, 95% interval over users; one seed. "
    "requests/s: over the first row's."
  )


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """What each row loses or gains in recall and NDCG."""
  k, rows = _depth(results), [row for row in _rows(results) if row != BASE]
  figure = Figure(figsize=(9, 0.45 * len(rows) + 1.2), layout="constrained")
  axes = figure.subplots(1, 2, sharey=True)
  titles = {f"recall@{k}": f"Recall@{k}", f"ndcg@{k}": f"NDCG@{k}"}
  for ax, (metric, title) in zip(axes, titles.items(), strict=True):
    for place, row in enumerate(rows):
      dot(ax, results, f"difference/{row}/{metric}", place, "tab:blue")
    ax.axvline(0, color="black", lw=0.8)
    ax.set_title(f"{title}, less the preset's", loc="left")
    plain(ax, grid="x")
  axes[0].set_yticks(range(len(rows)), rows)
  axes[0].invert_yaxis()
  return {"parts": figure}


def _rows(results: Mapping[str, float]) -> list[str]:
  return [name.removesuffix("/speed") for name in results if name.endswith("/speed")]
