"""What stands beside a model on a data set: simple rules, a transition counter, boosted trees.

    python -m experiments.run rivals --set settings.run=RUN_FOLDER
    python -m experiments.run rivals --set settings.data=DATA_FOLDER

Beside them trained runs on the same data, where they are named, or trained here:

    ... --set settings.sasrec=RUN_FOLDER settings.two_tower=RUN_FOLDER
    ... --set settings.train_rivals=true

With a run, its own lists are searched and set beside every row; with data alone, that `gr4ad
prepare` wrote, there are the rows. All settings of the rows are chosen on the validation split.
Both tasks: all targets, and prospecting, where lists leave out what a user has had and only new
targets count. Rows: rule (own history + what trends), counter (transitions and content), trees
(LightGBM, where it is installed), trees_likeness (with one more feature, of which docs/results.md
tells), sasrec, two_tower, popularity, cooccurrence, own_history, trending.

Lists are kept in WORKDIR/lists.npz, so an interrupted run goes on.

Expected on Complete Journey, recall@50 and prospecting/recall@50: trees .437, .178; rule .408,
.174; own_history .371, .119; counter .296, .133; cooccurrence .294, .124; two_tower .273, .099;
trending .235, .174; sasrec .211, .093; popularity .189, .119. Run time on two CPU cores: about
fifteen minutes, most of it for the trees, and ten more where the trained rivals are trained here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from experiments._figures import cell, dot, plain
from experiments._settings import with_overrides
from gr4ad_jax.api import open_baseline, open_run
from gr4ad_jax.catalog.prepared import open_logs
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.examples import read_split
from gr4ad_jax.evaluation.evaluate import (
  DEPTH,
  judged,
  prospecting_lists,
  require_held_out,
  search_split,
)
from gr4ad_jax.evaluation.rivals import Rivals, find_rivals, rank_trained
from gr4ad_jax.machine import atomic, storage
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.report.verdict import baseline_label
from gr4ad_jax.search.held_out import eval_requests, group_requests
from gr4ad_jax.sequential.run import SasrecRun, TwoTowerRun, train_baseline

ROWS = ("ours", "rule", "counter", "trees", "trees_likeness", "sasrec", "two_tower", "popularity",
        "cooccurrence", "own_history", "trending")
COLUMNS = ("recall@50", "value_recall@50", "ndcg@50", "prospecting/recall@50",
           "prospecting/value_recall@50")


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change."""

  run: str = ""
  """A trained run; its own data are taken."""
  data: str = ""
  """A folder that `gr4ad prepare` wrote, where there is no run."""
  sasrec: str = ""
  two_tower: str = ""
  """Runs of these systems (`gr4ad train --system NAME`) on the same data."""
  train_rivals: bool = False
  """Train those of the two that are not named, with their default settings, in WORKDIR."""
  with_likeness: bool = True
  """Train trees also with the likeness of an ad to what the user took, which a copy path reads."""
  split: Literal["validation", "test"] = "test"
  bootstrap: int = 1000


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """ROW/METRIC of every row, difference/ROW/METRIC of ours minus it, with intervals."""
  del size
  settings = with_overrides(Settings(), overrides)
  if bool(settings.run) == bool(settings.data):
    raise ConfigError(
      "--set settings.run=RUN_FOLDER or --set settings.data=DATA_FOLDER: give one of them"
    )
  opened, with_validation = open_run(settings.run) if settings.run else None, False
  if opened is not None:
    require_held_out(opened, settings.split)
    data, place = opened.without_sids, opened.data
    with_validation = "validation" not in opened.held_out
  else:
    place = Path(settings.data)
    data = open_logs(place)
  logs, examples = data.logs, data.examples
  groups = group_requests(read_split(examples, settings.split))
  requests = eval_requests(groups)
  kept = workdir / "lists.npz"
  if not kept.exists():
    folders = trained_rivals(settings, storage.absolute(place), workdir)
    trained = [open_baseline(folder, data, place=place) for folder in folders]
    lists = rank_trained(trained, groups, logs, k=DEPTH, split=settings.split)
    found = find_rivals(
      logs, examples, requests, k=DEPTH, with_validation=with_validation,
      with_likeness=settings.with_likeness,
    )
    save_lists(found.beside(lists), kept)
  ranked_RK = prospecting_RK = None
  if opened is not None:
    recommender = opened.recommender()
    result = search_split(recommender, opened.contexts, groups, opened.search)
    ranked_RK = result.recommendations.ad_RK
    prospecting_RK = prospecting_lists(recommender, opened, groups)
  metrics = judged(
    ranked_RK, prospecting_RK, *load_lists(kept), requests,
    advertiser_A=np.unique(logs.ads.advertiser_id, return_inverse=True)[1],
    bootstrap=settings.bootstrap,
  )
  return {_row_of(name): value for name, value in metrics.items() if np.isfinite(value)}


def trained_rivals(settings: Settings, data: str, workdir: Path) -> list[Place]:
  """Folders of the trained runs; those to be trained here are, or go on where they were."""
  folders = []
  for run in (SasrecRun(data), TwoTowerRun(data)):
    if named := getattr(settings, run.system):
      folders.append(storage.place(named))
    elif settings.train_rivals:
      train_baseline(run, workdir / run.system, resume=True)
      folders.append(workdir / run.system)
  return folders


def save_lists(rivals: Rivals, path: Path) -> None:
  """Writes the lists of both tasks to one .npz file."""
  with atomic.new_file(path) as file:
    np.savez_compressed(file, **{
      f"{task}/{name}": ranked_RK
      for task, lists in (("all", rivals.lists), ("prospecting", rivals.prospecting))
      for name, ranked_RK in lists.items()
    })  # fmt: skip


def load_lists(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """What `save_lists` wrote: name -> lists, for all targets and for prospecting."""
  lists: dict[str, dict[str, np.ndarray]] = {"all": {}, "prospecting": {}}
  with np.load(path) as arrays:
    for key in arrays.files:
      task, name = key.split("/")
      lists[task][name] = arrays[key]
  return lists["all"], lists["prospecting"]


def _row_of(name: str) -> str:
  """The name of a result: that of evaluate's, with the row first."""
  if name.startswith("difference/"):
    return name
  return name.removeprefix("baseline/") if name.startswith("baseline/") else f"ours/{name}"


def table(results: Mapping[str, float]) -> str:
  """Every row by every metric with its 95% interval, and ours minus each row."""
  lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * len(COLUMNS) + "|"]
  for row in _rows(results):
    cells = [cell(results, f"{row}/{column}", between=" to ") for column in COLUMNS]
    lines.append(f"| {_label(row)} | " + " | ".join(cells) + " |")
  if any(name.startswith("difference/") for name in results):
    columns = [column for column in COLUMNS if "ndcg" not in column]
    lines += ["", "Ours minus each, the same resampled users for both:", "",
              "| | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for row in _rows(results)[1:]:
      cells = [
        cell(results, f"difference/{row}/{column}", sign="+", between=" to ") for column in columns
      ]
      lines.append(f"| {_label(row)} | " + " | ".join(cells) + " |")
  absent = [_label(row) for row in ROWS[1:] if f"{row}/recall@50" not in results]
  if absent:
    lines += ["", f"Not there: {', '.join(absent)} (trees need LightGBM, they and trending ads "
                  "real times; SASRec and two towers settings.train_rivals=true)."]
  return "\n".join(lines)


def _rows(results: Mapping[str, float]) -> list[str]:
  return [row for row in ROWS if f"{row}/recall@50" in results]


def _label(row: str) -> str:
  return row if row == "ours" else baseline_label(row)


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """recall@50 of every row, for all targets and for prospecting."""
  rows = _rows(results)
  figure = Figure(figsize=(9, 0.4 * len(rows) + 1.2), layout="constrained")
  axes = figure.subplots(1, 2, sharey=True)
  tasks = {"recall@50": "Recall@50", "prospecting/recall@50": "Prospecting: recall@50"}
  for ax, (metric, title) in zip(axes, tasks.items(), strict=True):
    for place, row in enumerate(rows):
      dot(ax, results, f"{row}/{metric}", place, "tab:orange" if row == "ours" else "tab:blue")
    ax.set_title(title, loc="left")
    ax.set_xlim(left=0)
    plain(ax, grid="x")
  axes[0].set_yticks(range(len(rows)), [_label(row) for row in rows])
  axes[0].invert_yaxis()
  return {"recall": figure}
