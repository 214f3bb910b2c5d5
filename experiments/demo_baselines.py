"""GR4AD against simple rules and boosted trees on real household logs: the table of README.md.

    python -m experiments.run demo_baselines
    python -m experiments.demo_baselines docs/results/demo_baselines.json    # README's lines of it

Complete Journey, weeks 50-53; the preset "demo" for a fixed number of steps, three seeds. What
stands in the results are means over seeds; intervals are a bootstrap over users, who bring what
every seed found for them, and METRIC/seedN is that of one seed. `--set` changes the preset, or
settings.seeds. Finished seeds and the rivals' lists are kept in WORKDIR, so that an interrupted
run goes on.

Expected (docs/results.md): recall@50 .451, value_recall@50 .430, ndcg@50 .276,
prospecting/recall@50 .206; boosted trees .444, .420, .270, .190. Run time on two CPU cores: half an
hour; size full has twice the steps and was not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments._figures import cell, dot, plain
from experiments._runs import (
  by_task,
  found_lists,
  prepared_journey,
  run_of,
  tokenized,
  training_minutes,
)
from experiments._settings import own_and_others
from experiments.rivals import load_lists, save_lists
from gr4ad_jax.catalog.prepared import open_logs
from gr4ad_jax.config import override, override_all
from gr4ad_jax.data.examples import read_split
from gr4ad_jax.evaluation.evaluate import DEPTH, judged
from gr4ad_jax.evaluation.rivals import find_rivals
from gr4ad_jax.gr4ad.config import preset
from gr4ad_jax.gr4ad.train_run import train_run
from gr4ad_jax.report.verdict import SCOPES, compare_with_baselines, methods, verdict
from gr4ad_jax.search.held_out import eval_requests, group_requests
from gr4ad_jax.search.ranking import EvalRequests, mean_metrics
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.training.metric_log import read_log

STEPS = {"cpu": 2_500, "full": 5_000}
COLUMNS = ("recall@10", "ndcg@50", "recall@50", "value_recall@50", "prospecting/recall@50",
           "prospecting/value_recall@50")
FRONT = ("recall@10", "recall@50", "ndcg@50", "value_recall@50", "prospecting/recall@50")
PLOTTED = {"recall@50": "Recall@50", "value_recall@50": "Value recall@50"}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change, beside the preset's own settings."""

  seeds: int = 3
  """Training runs."""
  first_seed: int = 0
  bootstrap: int = 1_000
  """Resamples of users for the intervals."""


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """Names as in metrics.json of a run, METRIC/seedN, and `training_minutes` of a seed."""
  settings, others = own_and_others(Settings(), overrides)
  config = override_all(preset("demo"), {"train.num_steps": STEPS[size]} | others)
  data = prepared_journey(workdir)
  sids = tokenized(data, data / "sids", TokenizerConfig(last_level="suffix"))
  seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
  lists, minutes = [], []
  for seed in seeds:
    folder = workdir / f"seed{seed}"
    of_seed = override(config, "train.seed", seed)
    train_run(run_of(data, sids, of_seed), folder, resume=True)
    lists.append(found_lists(folder, "test"))
    minutes.append(training_minutes(read_log(folder), config.train.batch_size))
  opened = open_logs(data)
  logs, examples = opened.logs, opened.examples
  requests = eval_requests(group_requests(read_split(examples, "test")))
  kept = workdir / "rivals.npz"
  if not kept.exists():
    save_lists(find_rivals(logs, examples, requests, k=DEPTH, with_likeness=True), kept)
  rivals = [
    {name: np.tile(ranked_RK, (len(lists), 1)) for name, ranked_RK in of_task.items()}
    for of_task in load_lists(kept)
  ]
  metrics = judged(
    *map(np.concatenate, zip(*lists, strict=True)), *rivals, repeated(requests, len(lists)),
    advertiser_A=np.unique(logs.ads.advertiser_id, return_inverse=True)[1],
    bootstrap=settings.bootstrap,
  )
  for seed, of_seed in zip(seeds, lists, strict=True):
    metrics |= {
      f"{prefix}{name}/seed{seed}": value
      for prefix, ranked_RK, asked in by_task(of_seed, requests)
      for name, value in mean_metrics(ranked_RK, asked, k=DEPTH).items()
    }
  metrics |= {
    "training_minutes": float(np.mean(minutes)), "num_steps": config.train.num_steps,
    "num_requests": len(requests.user_R), "num_users": len(np.unique(requests.user_R)),
    "num_ads": len(logs.ads.ad_id), "num_seeds": len(lists),
  }
  return {name: float(value) for name, value in metrics.items() if np.isfinite(value)}


def repeated(requests: EvalRequests, times: int) -> EvalRequests:
  """The requests several times over, of the same users, who are drawn with all of theirs."""
  return requests.rows(np.tile(np.arange(len(requests.user_R)), times))


def table(results: Mapping[str, float]) -> str:
  """Metrics with their 95% intervals, differences, and what they say in one sentence."""
  lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * len(COLUMNS) + "|"]
  labels = methods(results, system="GR4AD")
  for label, prefix in labels.items():
    cells = [cell(results, prefix + column) for column in COLUMNS]
    lines.append(f"| {label} | " + " | ".join(cells) + " |")
  paired = COLUMNS[1:]
  lines += ["", "| GR4AD minus | " + " | ".join(paired) + " |",
            "|---" + "|---:" * len(paired) + "|"]
  for label, prefix in labels.items():
    if prefix:
      of_rival = prefix.replace("baseline/", "difference/")
      cells = [cell(results, of_rival + x, sign="+", between=" to ") for x in paired]
      lines.append(f"| {label} | " + " | ".join(cells) + " |")
  sentence, _ = verdict(compare_with_baselines(results), system="GR4AD")
  ours = [
    ", ".join(f"{results[key]:.4f}" for key in results if key.startswith(f"{metric}/seed"))
    for metric in ("recall@50", "prospecting/recall@50")
  ]
  return "\n".join(lines) + (
    f"\n\n{sentence}\n\n{results['num_steps']:,.0f} steps, "
    f"{results['training_minutes']:.1f} minutes of training a seed. recall@50 of each seed: "
    f"{ours[0]}; prospecting: {ours[1]}. "
    f"{results['num_requests']:,.0f} test requests of {results['num_users']:,.0f} users, "
    f"{results['num_ads']:,.0f} ads. Intervals: bootstrap over users, 95%. prospecting: lists and "
    "targets without what the user had before."
  )


def front(results: Mapping[str, float]) -> str:
  """The means alone: the table of README.md."""
  lines = ["| | " + " | ".join(FRONT) + " |", "|---" + "|---:" * len(FRONT) + "|"]
  for label, prefix in methods(results, system="GR4AD").items():
    cells = [f"{results[key]:.3f}" if (key := prefix + name) in results else "-" for name in FRONT]
    lines.append(f"| {label} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """recall@50 and value_recall@50 of every list, over all targets and in prospecting."""
  labels = methods(results, system="GR4AD")
  figure = Figure(figsize=(9, 0.6 * len(labels) + 1.6), layout="constrained")
  axes = figure.subplots(1, len(PLOTTED), sharey=True)
  looks = (("tab:blue", "o", -0.12), ("tab:orange", "D", 0.12))
  for ax, (metric, title) in zip(axes, PLOTTED.items(), strict=True):
    for (scope, words), (colour, marker, shift) in zip(SCOPES.items(), looks, strict=True):
      for row, prefix in enumerate(labels.values()):
        key, label = prefix + scope + metric, words if not row else None
        dot(ax, results, key, row + shift, colour, marker, label)
    ax.set_title(title, loc="left")
    ax.set_xlim(left=0)
    plain(ax, grid="x")
  axes[0].set_yticks(range(len(labels)), labels)
  axes[0].invert_yaxis()
  figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                frameon=False)
  return {"recall": figure}


def main(argv: Sequence[str] | None = None) -> None:
  """Prints README's lines of a results file."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("results", type=Path, help="results.json of demo_baselines")
  print(front(json.loads(parser.parse_args(argv).results.read_text())))


if __name__ == "__main__":
  main()
