"""GPR's whole path on a simulated market, stage by stage: `gr4ad demo --system gpr`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from gr4ad_jax.cli import tables
from gr4ad_jax.config import to_json
from gr4ad_jax.gpr.config import PRESETS, Config
from gr4ad_jax.machine.progress import console
from gr4ad_jax.market.world import MarketConfig
from gr4ad_jax.tokenizer.config import TokenizerConfig

if TYPE_CHECKING:  # they import JAX
  from gr4ad_jax.search.opened import Opened

STAGES = {"mtp": "multi-token prediction", "vaft": "value-aware fine-tuning", "hepo": "HEPO"}
SHOWN, K, JUDGED = 4, 50, 1_000  # ads that are shown, and listed; test requests that judge a stage
SPLIT = {"validation_days": 5.0, "test_days": 7.0}
# Of the market's own config: enough users for a model to learn from in minutes.
MARKETS = {
  "cpu": MarketConfig(),
  "tiny": MarketConfig(num_users=150, num_ads=120, num_contents=60, num_advertisers=15,
                       num_categories=8, days=16),
}


def run_demo_gpr(workdir: Path, size: str) -> dict[str, float]:
  """Simulates, prepares, tokenizes, trains three stages, evaluates the last and reports.

  Finished stages in WORKDIR are reused; one that was interrupted goes on.

  Args:
    workdir: data/, a folder for each stage.
    size: "cpu" or "tiny".

  Returns:
    The metrics of the last stage, and those of each that `judge` gives, as STAGE/revenue.

  Raises:
    LogError, ConfigError: see the stages.
    DivergedError: training became useless.
  """
  from gr4ad_jax.api import evaluate, open_run
  from gr4ad_jax.gpr.run import RunFile, train_run
  from gr4ad_jax.report.run_report import write_report

  data = workdir / "data"
  _prepare(data, MARKETS[size])
  if not (data / "sids" / "config.json").exists():
    from gr4ad_jax.tokenizer.stage import tokenize

    tables.say("2/6 tokenize: ads -> semantic IDs")
    config = TokenizerConfig(quantizer="rq_kmeans_plus", last_level="suffix")
    made = tokenize(data, data / "sids", config)
    tables.print_health(made.lines, title="semantic IDs", reasons=False)
  start = ""
  for number, (stage, words) in enumerate(STAGES.items(), start=3):
    config = stage_config(stage, size)
    tables.say(f"{number}/6 stage {number - 2}, {words}: {config.train.num_steps:,} steps")
    run = RunFile(
      str(data.resolve()), str((data / "sids").resolve()), config, start=start,
      market=str(data.resolve()) if config.learns_policy else "",
    )
    train_run(run, workdir / stage, resume=True)
    start = str((workdir / stage).resolve())
  tables.say("6/6 evaluate: beam search for every test request, and the baselines")
  last = workdir / "hepo"
  opened = {stage: open_run(workdir / stage) for stage in STAGES}
  metrics = evaluate(opened["hepo"])
  judged = {stage: judge(run, data) for stage, run in opened.items()}
  report = write_report(last)
  tables.print_metrics(
    metrics, system="GPR, stage 3", title="test split, recall over the full catalogue"
  )
  _print_stages(judged)
  console.print(f"metrics: {last / 'metrics.json'}")
  console.print(f"report:  {report.resolve().as_uri()}")
  return metrics | {
    f"{stage}/{name}": value for stage, numbers in judged.items() for name, value in numbers.items()
  }


def stage_config(stage: str, size: str) -> Config:
  """Settings of a stage: the preset's, with a share of its steps after the first."""
  config = PRESETS["gpr-demo" if size == "cpu" else "gpr-tiny"]
  share = {"mtp": 1.0, "vaft": 0.25, "hepo": 0.5}[stage]
  steps = max(1, int(share * config.train.num_steps))
  train = dataclasses.replace(
    config.train, num_steps=steps, eval_every=max(1, steps // 2),
    checkpoint_every=max(1, steps // 2),
  )
  return dataclasses.replace(config, stage=stage, train=train)


def _prepare(data: Path, config: MarketConfig) -> None:
  """A market's log, prepared, with the market.json by which its truth is known again."""
  if (data / "market.json").exists():
    return
  from gr4ad_jax.data import prepare
  from gr4ad_jax.data.splits import time_split
  from gr4ad_jax.market.log import market_logs
  from gr4ad_jax.market.worlds import build_market

  tables.say("1/6 simulate an ad market, prepare its log")
  logs = market_logs(build_market(config))
  days = {"validation_days": 2, "test_days": 3} if config.days < 30 else SPLIT
  counts = prepare.write_prepared(logs, data, time_split(logs, **days))
  (data / "market.json").write_text(to_json(config))
  tables.print_summary(counts, title="prepared")


def judge(opened: Opened, data: Path) -> dict[str, float]:
  """A run's lists for JUDGED test requests.

  Returns:
    revenue: what the first SHOWN ads earn by the market's truth, currency per 1,000 requests,
    budgets left aside; recall@50; ndcg@50.
  """
  from gr4ad_jax.data.examples import read_split
  from gr4ad_jax.evaluation.evaluate import search_split
  from gr4ad_jax.market.simulator import open_simulator
  from gr4ad_jax.search.held_out import eval_requests, group_requests
  from gr4ad_jax.search.ranking import mean_metrics

  groups = group_requests(read_split(opened.examples, "test"))
  chosen = np.unique(np.linspace(0, len(groups) - 1, min(JUDGED, len(groups))).astype(int))
  groups = [groups[at] for at in chosen]
  simulator = open_simulator(data, opened.logs, opened.examples.features)
  found = search_split(opened.recommender(), opened.contexts, groups, opened.search, k=K)
  ad_RK = found.recommendations.ad_RK
  earns_RK = simulator([group[0] for group in groups], ad_RK[:, :SHOWN]).ecpm
  metrics = mean_metrics(ad_RK, eval_requests(groups), k=K)
  return {
    "revenue": float(earns_RK.sum(axis=1).mean()),
    **{name: metrics[name] for name in (f"recall@{K}", f"ndcg@{K}")},
  }


def _print_stages(judged: dict[str, dict[str, float]]) -> None:
  table = Table("after", f"recall@{K}", f"ndcg@{K}", "revenue", "over stage 1")
  first = judged["mtp"]["revenue"]
  for stage, numbers in judged.items():
    table.add_row(
      STAGES[stage], f"{numbers[f'recall@{K}']:.3f}", f"{numbers[f'ndcg@{K}']:.3f}",
      f"{numbers['revenue']:.2f}", f"{numbers['revenue'] / first - 1:+.1%}" if first else "-",
    )
  tables.show(
    table, title="what the first four ads earn by the market's truth, per 1,000 test requests"
  )
