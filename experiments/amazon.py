"""Amazon Beauty and Sports in the protocol of TIGER: GR4AD beside a tuned counter, several seeds.

    python -m experiments.run amazon --workdir runs/amazon_beauty
    python -m experiments.run amazon --set settings.dataset=sports --workdir runs/amazon_sports
    ... --set settings.folder=FOLDER      # where interactions.parquet and items.parquet lie

The last item of a user tests, the one before validates, the rest is learned from; the whole
catalogue is ranked. Checkpoints are chosen by NDCG on validating items, and the test items are read
once for each recipe. Size cpu is the preset without the item scorer, for STEPS steps; full is the
whole preset. `--set train.num_steps=600` and other settings of the preset may be changed.

Beside the lists without what a user has had: `kept/`, the same runs with seen items left in the
lists; `refit/`, the runs fitted anew with the validating items learned from and counted;
`other_order/`, all of it anew with the reviews of one day in another order, where FOLDER has such a
file (`settings.other_order`). `settings.parts` names those of the last two that are made.

Finished data, runs and rows are reused, so an interrupted experiment goes on.

Expected of size cpu on Beauty, recall@10 and ndcg@10 (docs/results.md): .1072 and .0653, kept/
.1071 and .0653, refit/ (seed 0) .1183 and .0735, other_order/ (seed 0) .1063 and .0628; the
counter .0929 and .0557, kept/ .0893 and .0532, refit/ .1056 and .0644, other_order/ .0892 and
.0506. On Sports (seed 0 alone) .0678 and .0404; the counter .0588 and .0331. Size full was not
measured.
Run time on two CPU cores that others use too: a seed 12 to 20 minutes, its refit and its run in the
other order nearly as long each, so about two hours in all.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from experiments._figures import cell, dot, plain
from experiments._runs import paired_interval, run_of, tokenized, training_minutes
from experiments._settings import SHARED_DATA, own_and_others
from gr4ad_jax.catalog.prepared import open_logs
from gr4ad_jax.config import ConfigError, override, override_all
from gr4ad_jax.data.config import Amazon, PrepareConfig
from gr4ad_jax.data.engagements import SeenAds
from gr4ad_jax.data.examples import read_split
from gr4ad_jax.data.interactions import Interactions
from gr4ad_jax.data.prepare import prepare_logs
from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.transitions import content_terms
from gr4ad_jax.evaluation.counter import counter
from gr4ad_jax.evaluation.evaluate import DEPTH, search_split
from gr4ad_jax.evaluation.question import Question, end_s_of_users
from gr4ad_jax.evaluation.rivals import find_rivals, rank_all
from gr4ad_jax.gr4ad.config import Config, preset
from gr4ad_jax.gr4ad.refit import refit_of
from gr4ad_jax.gr4ad.run import RunFile, open_run
from gr4ad_jax.gr4ad.train_run import train_run
from gr4ad_jax.machine.memory import keep_freed_memory
from gr4ad_jax.machine.storage import write_json
from gr4ad_jax.report.verdict import baseline_label
from gr4ad_jax.search.held_out import eval_requests, group_requests, sample_requests
from gr4ad_jax.search.ranking import EvalRequests, mean_metrics, only_new, ranking_metrics
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.training.metric_log import read_log

STEPS = 400
METRICS = ("recall@10", "ndcg@10", "recall@5", "ndcg@5")
LISTS = {"": "seen removed", "kept/": "seen kept", "refit/": "refit",
         "other_order/": "other order"}
SHOWN = ("counter", "cooccurrence", "popularity")  # on reviews the other rules are popularity
BARS = {  # recall@10, ndcg@10: set before the runs, at or above the published and counted rows
  "beauty": {"": (0.1017, 0.0611), "refit/": (0.1135, 0.0685)}, "sports": {"": (0.0591, 0.0359)},
}
FULL = {"beauty": {"": (0.111, 0.068), "refit/": (0.124, 0.076)}, "sports": {}}  # docs/results.md
PUBLISHED = {  # recall@10, ndcg@10 in the standard order
  "beauty": {
    "TIGER (arXiv 2305.05065)": (0.0648, 0.0384),
    "SASRec, sampled softmax (eSASRec's authors), seen removed": (0.0921, 0.0531),
    "BSARec, its own log, seen removed": (0.1008, 0.0611),
  },
  "sports": {
    "TIGER (arXiv 2305.05065)": (0.0400, 0.0225),
    "SASRec, sampled softmax (eSASRec's authors), seen removed": (0.0569, 0.0314),
    "eSASRec, seen removed": (0.0560, 0.0323),
  },
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change beside the preset's own settings."""

  dataset: Literal["beauty", "sports"] = "beauty"
  """Which preset, and which published figures stand beside it."""
  folder: str = ""
  """Holds interactions.parquet and items.parquet (docs/own_logs.md); default: amazon_DATASET among
  the benchmark files beside the checkout."""
  other_order: str = "order_tigercf.parquet"
  """File of FOLDER with the same columns as interactions.parquet, and another order."""
  seeds: int = 3
  """Training runs of every row."""
  first_seed: int = 0
  parts: tuple[Literal["refit", "other_order"], ...] = ("refit", "other_order")
  """What is made beside the runs in the standard order."""
  bootstrap: int = 1000
  """Resamples of users for intervals of single runs and of rivals."""


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """PART/METRIC, the mean over seeds, its t interval and /seedN; PART/rival/NAME/METRIC."""
  keep_freed_memory()
  settings, others = own_and_others(Settings(), overrides)
  config = override_all(_config(settings.dataset, size), others)
  folder = Path(settings.folder or Path(SHARED_DATA) / f"amazon_{settings.dataset}").resolve()
  if not (folder / "interactions.parquet").exists():
    raise ConfigError(f"settings.folder={folder}: holds no interactions.parquet")
  results = {f"dataset/{settings.dataset}": 1.0}
  results |= _of_order(folder, workdir, settings, config)
  if "other_order" in settings.parts and (folder / settings.other_order).exists():
    home = workdir / "other_order"
    reviews = _reordered(folder, settings.other_order, home / "reviews")
    results |= {
      f"other_order/{name}": value
      for name, value in _of_order(reviews, home, settings, config, standard=False).items()
    }
  return results


def _of_order(
  reviews: Path, home: Path, settings: Settings, config: Config, *, standard: bool = True
) -> dict[str, float]:
  """Rivals and runs on one order of the reviews, below HOME; kept/ and refit/ of the standard one.
  """
  data = _prepared(reviews, home / "data")
  results = _rivals(data, home / "rivals.json", settings.bootstrap, config.train.rank_requests)
  if not standard:
    results = {name: x for name, x in results.items() if not name.startswith(("kept/", "refit/"))}
  seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
  tuned, refits = {}, {}
  for seed in seeds:
    folder, seeded = home / f"run-{seed}", override(config, "train.seed", seed)
    tuned[seed] = _trained(
      folder, lambda seeded=seeded: run_of(data, data / "sids", seeded), settings.bootstrap,
      kept=standard,
    )
    to_counter = _minutes_to(
      results["counter_validation_ndcg@50"], folder, config.train.batch_size
    )
    if to_counter is not None:
      tuned[seed] |= {"minutes_to_counter": to_counter}
  for seed in seeds if standard and "refit" in settings.parts else ():
    refits[seed] = _trained(
      home / f"refit-{seed}", lambda seed=seed: refit_of(home / f"run-{seed}"),
      settings.bootstrap, kept=False,
    )
  results |= _over_seeds(tuned)
  return results | {f"refit/{name}": value for name, value in _over_seeds(refits).items()}


def _config(dataset: str, size: str) -> Config:
  config = preset(f"amazon-{dataset}")
  if size == "full":
    return config
  return override_all(config, {
    "model.item_scorer": False, "train.num_steps": STEPS, "train.eval_every": STEPS // 4,
    "train.checkpoint_every": STEPS // 4, "train.rank_requests": 1024,
  })  # fmt: skip


def _prepared(folder: Path, out: Path) -> Path:
  """Reviews as the presets want them, with semantic IDs in OUT/sids."""
  if not (out / "examples" / "examples.json").exists():
    prepare_logs(Amazon(folder), PrepareConfig(
      out, max_ad_history=24, max_organic_history=1, max_targets=1, max_met_ads=64
    ))  # fmt: skip
  tokenized(out, out / "sids", TokenizerConfig(last_level="suffix"))
  return out


def _reordered(folder: Path, order: str, out: Path) -> Path:
  """A folder like FOLDER, with the reviews in another order."""
  out.mkdir(parents=True, exist_ok=True)
  shutil.copyfile(folder / "items.parquet", out / "items.parquet")
  shutil.copyfile(folder / order, out / "interactions.parquet")
  return out


def _rivals(data: Path, file: Path, bootstrap: int, rank_requests: int) -> dict[str, float]:
  """[kept/ or refit/]rival/NAME/METRIC, and counter_validation_ndcg@50: what a run's are held to.

  In refit/, counts take in the validating items, with settings chosen before that.
  """
  if file.exists():
    return json.loads(file.read_text())
  logs, examples, _ = open_logs(data)
  of_split = {
    split: eval_requests(group_requests(read_split(examples, split)))
    for split in ("validation", "test")
  }
  requests, history = of_split["test"], Interactions.of(logs)
  found = find_rivals(logs, examples, requests, k=DEPTH)
  chosen = found.prospecting_settings
  with_validation = Question(
    history, requests, len(logs.ads.ad_id), DEPTH, train_end_s=None,
    content_AN=content_terms(logs.ads), without_seen=True,
  )  # fmt: skip
  parts = {
    "": found.prospecting, "kept/": found.lists, "refit/": rank_all(with_validation, chosen)
  }
  metrics = {
    f"{part}rival/{name}/{metric}": value
    for part, lists in parts.items() for name, ranked_RK in lists.items()
    for metric, value in _metrics(ranked_RK, requests, logs, bootstrap).items()
  }
  sample = only_new(eval_requests(sample_requests(examples, "validation", most=rank_requests)))
  asked = dataclasses.replace(
    with_validation, requests=sample,
    train_end_s=end_s_of_users(history, of_split["validation"], None),
  )
  ranked_RK = counter(asked, chosen)
  metrics["counter_validation_ndcg@50"] = mean_metrics(ranked_RK, sample, k=DEPTH)["ndcg@50"]
  file.parent.mkdir(parents=True, exist_ok=True)
  write_json(file, metrics)
  return metrics


def _metrics(
  ranked_RK: np.ndarray, requests: EvalRequests, logs: Logs, bootstrap: int
) -> dict[str, float]:
  """METRICS; those at 10 with intervals over users."""
  found = ranking_metrics(
    ranked_RK, requests, advertiser_A=np.unique(logs.ads.advertiser_id, return_inverse=True)[1],
    ks=(5, 10), bootstrap=bootstrap,
  )  # fmt: skip
  return {name: value for name, value in found.items() if name.startswith(METRICS)}


def _trained(
  folder: Path, make: Callable[[], RunFile], bootstrap: int, *, kept: bool
) -> dict[str, float]:
  """Trains in FOLDER and reads the test items: METRICS, kept/METRIC, steps, minutes.

  `minutes` is the wall time of the training, left out where it was interrupted.
  """
  file = folder / "metrics.json"
  if file.exists():
    return json.loads(file.read_text())
  whole, begin = not (folder / "run.json").exists(), time.monotonic()
  train_run(make(), folder, resume=True)
  minutes = (time.monotonic() - begin) / 60
  opened = open_run(folder)
  groups = group_requests(read_split(opened.examples, "test"))
  requests, recommender = eval_requests(groups), opened.recommender()
  metrics = {"steps": float(opened.step)} | ({"minutes": minutes} if whole else {})
  for part, seen in {"": SeenAds(opened.logs), "kept/": None}.items():
    if part and not kept:
      continue
    found = search_split(recommender, opened.contexts, groups, opened.search, seen=seen)
    of_lists = _metrics(found.recommendations.ad_RK, requests, opened.logs, bootstrap)
    metrics |= {part + name: value for name, value in of_lists.items()}
  write_json(file, metrics)
  return metrics


def _minutes_to(score: float, folder: Path, batch_size: int) -> float | None:
  """Minutes of optimizer steps up to the first validation whose NDCG is above a score."""
  rows = read_log(folder)
  for row in rows:
    if row["kind"] == "validation" and row.get("ndcg@50", 0) > score:
      return training_minutes([r for r in rows if r["step"] <= row["step"]], batch_size)
  return None


def _over_seeds(by_seed: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
  """NAME, the mean; NAME/seedN; METRIC/ci_low and /ci_high, a t interval, with two seeds or more.

  The intervals over users of a single run become NAME/seedN/ci_low and /ci_high.
  """
  results: dict[str, float] = {}
  for seed, numbers in by_seed.items():
    for name, value in numbers.items():
      base, end = name.rsplit("/", 1) if "/ci_" in name else (name, "")
      results[f"{base}/seed{seed}" + (end and f"/{end}")] = value
  common = set.intersection(*(set(numbers) for numbers in by_seed.values())) if by_seed else ()
  for name in sorted(name for name in common if "/ci_" not in name):
    values = np.array([numbers[name] for numbers in by_seed.values()])
    results[name] = float(values.mean())
    if len(values) > 1 and name.endswith(METRICS):
      spread = paired_interval(name, values)
      results |= {f"{name}/{end}": spread[f"{name}/{end}"] for end in ("ci_low", "ci_high")}
  return results


def table(results: Mapping[str, float]) -> str:
  """Every list by METRICS, with intervals over seeds for ours and over users for the others."""
  dataset = next(name for name in PUBLISHED if f"dataset/{name}" in results)
  lines = ["| | " + " | ".join(METRICS) + " |", "|---" + "|---:" * len(METRICS) + "|"]
  for label, row in _rows(results):
    cells = [cell(results, f"{row}{metric}", digits=4) for metric in METRICS]
    lines.append(f"| {label} | " + " | ".join(cells) + " |")
  for label, (recall, ndcg) in PUBLISHED[dataset].items():
    lines.append(f"| published: {label} | {recall:.4f} | {ndcg:.4f} | | |")
  seeds = sum(name.startswith("recall@10/seed") and "/ci" not in name for name in results)
  lines += ["", f"GR4AD: {seeds} seed{'s' * (seeds > 1)}, with 95% t intervals over them where "
            "there are more than one; the others: bootstrap over users. refit: validating items "
            "learned from and counted."]
  lines += [_against_bars(results, dataset, part) for part in BARS[dataset] if part + "recall@10"
            in results]
  if "minutes" in results:
    lines.append(f"{results['minutes']:.1f} minutes of training a seed, validations included.")
  if "minutes_to_counter" in results:
    lines.append(f"{results['minutes_to_counter']:.1f} minutes of steps up to the first validation "
                 "above the tuned counter, by NDCG@50 of the same validating requests.")
  absent = [part for part in ("refit", "other_order") if f"{part}/recall@10" not in results]
  if absent:
    lines.append(f"Not there: {', '.join(absent)} (settings.parts; the other order needs a file).")
  return "\n".join(lines)


def _rows(results: Mapping[str, float]) -> list[tuple[str, str]]:
  """Label and prefix of every list, ours before its rivals."""
  rows = []
  for part, words in LISTS.items():
    rows += [(f"**GR4AD**, {words}", part)]
    rows += [(f"{baseline_label(name)}, {words}", f"{part}rival/{name}/") for name in SHOWN]
  return [(label, row) for label, row in rows if f"{row}recall@10" in results]


def _against_bars(results: Mapping[str, float], dataset: str, part: str) -> str:
  bars = BARS[dataset][part]
  missed = [
    f"{metric} by {bar - results[part + metric]:.4f}"
    for metric, bar in zip(METRICS, bars, strict=False) if results[part + metric] < bar
  ]
  said = f"misses {' and '.join(missed)}" if missed else "met"
  line = f"Bar of {LISTS[part]} (recall@10 {bars[0]}, ndcg@10 {bars[1]}): {said}."
  if missed and part in FULL[dataset]:
    line += " The whole preset found {} and {}, one seed.".format(*FULL[dataset][part])
  return line


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """recall@10 and ndcg@10 of every list."""
  rows = _rows(results)
  figure = Figure(figsize=(9, 0.3 * len(rows) + 1.2), layout="constrained")
  axes = figure.subplots(1, 2, sharey=True)
  for ax, metric in zip(axes, ("recall@10", "ndcg@10"), strict=True):
    for place, (_, row) in enumerate(rows):
      dot(ax, results, f"{row}{metric}", place, "tab:blue" if "rival" in row else "tab:orange")
    ax.set_title(metric, loc="left")
    ax.set_xlim(left=0)
    plain(ax, grid="x")
  axes[0].set_yticks(range(len(rows)), [label.replace("**", "") for label, _ in rows])
  axes[0].invert_yaxis()
  return {"lists": figure}
