"""GR4AD, GPR, SASRec and HSTU on one data set, of one size, with one budget of decoding.

    python -m experiments.run gr4ad_vs_gpr

All learn from the same labels of the fitted market (market/world.py), for as many passes through
them, each with the settings of its own system but for its size: .8 million parameters, tables of
codes or ads among them. Those that write codes search with the same beams. recall@50 is of held-out
test requests; revenue is what the first four ads of a list earn, computed from the market's truth,
each system in its own order: GR4AD and GPR by probability and value, the other two, which know no
values, by probability. requests_per_second is of lists of 50 in batches of `search.batch_size`,
look-up included; train_examples_per_second counts labels. The best checkpoint of a run is that with
the best NDCG on validation requests. Intervals are a bootstrap over users, who bring what every
seed found for them. Finished runs and what they found are kept in WORKDIR, so that an interrupted
experiment goes on.

What two passes found stands in docs/gpr.md: about an hour and a half of two cores that did other
work as well. GR4AD is without its copy path here.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments._figures import cell, dot, plain
from experiments._kept import kept_arrays
from experiments._market import MarketTest, SmallModel, open_market_test, prepared_market
from experiments._runs import of_steps, tokenized
from experiments.demo_baselines import repeated
from gr4ad_jax.api import open_baseline
from gr4ad_jax.catalog.prepared import open_logs
from gr4ad_jax.config import Count, Positive, override_all
from gr4ad_jax.data.examples import open_examples
from gr4ad_jax.gpr.config import BASES, System
from gr4ad_jax.gpr.config import PRESETS as GPR_PRESETS
from gr4ad_jax.gpr.config import Config as GprConfig
from gr4ad_jax.gpr.run import RunFile as GprRun
from gr4ad_jax.gpr.run import open_inputs as open_gpr_inputs
from gr4ad_jax.gpr.run import train_run as train_gpr
from gr4ad_jax.gr4ad.config import Config as Gr4adConfig
from gr4ad_jax.gr4ad.config import preset
from gr4ad_jax.gr4ad.run import RunFile as Gr4adRun
from gr4ad_jax.gr4ad.train_run import train_run as train_gr4ad
from gr4ad_jax.machine.progress import console
from gr4ad_jax.market.world import MarketConfig
from gr4ad_jax.report.verdict import baseline_label
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.ranking import ranking_metrics
from gr4ad_jax.sequential.config import SasrecConfig, SasrecModel
from gr4ad_jax.sequential.run import SasrecRun, train_baseline
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.training.metric_log import read_log

K = 50
SYSTEMS = ("gr4ad", "gpr", "sasrec", "hstu")


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change."""

  seeds: Count = 3
  passes: Positive = 3.0
  """Times that every label is learned from."""
  revenue_requests: Count = 2_000
  recall_requests: Count = 2_000
  bootstrap: Count = 1_000
  """Resamples of users for the intervals."""
  value_exponent: float = 0.5
  """Of GR4AD's and GPR's order: log p + this x log V."""


@dataclasses.dataclass(frozen=True)
class Options:
  """Everything that --set may change; sizes by which all have about as many parameters."""

  settings: Settings = Settings()
  market: MarketConfig = MarketConfig(num_users=3_000, days=42)
  search: SearchConfig = SearchConfig(widths=(32, 64, 128), batch_size=64)
  gr4ad: Gr4adConfig = dataclasses.replace(
    preset("tiny"), model=SmallModel().model, train=SmallModel().train
  )
  gpr: GprConfig = override_all(GPR_PRESETS["gpr-small"], {
    "stream.groups": 16, "model.width": 80, "model.num_heads": 2, "model.num_layers": 2,
    "model.num_token_layers": 1,
  })
  hstu: GprConfig = override_all(GPR_PRESETS["hstu-small"], {
    "stream.groups": 16, "model.num_layers": 2, "model.num_token_layers": 1,
  })
  sasrec: SasrecConfig = dataclasses.replace(
    SasrecConfig(), model=SasrecModel(width=168, dropout=0.2)
  )


class Trained(NamedTuple):
  """A run in its folder, and how it was trained."""

  folder: Path
  num_params: int
  labels_per_second: float


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """SYSTEM/recall@50 and /revenue (with intervals or of each seed), /requests_per_second, ..."""
  options = override_all(Options(), overrides)
  if size == "full":
    options = override_all(options, {"settings.passes": 10.0, "market.num_users": 6_000})
  settings = options.settings
  market, data = prepared_market(workdir, options.market)
  sids = tokenized(data, workdir / "sids", TokenizerConfig(last_level="suffix"))
  trained = {
    system: [_trained(system, options, workdir, data, sids, seed) for seed in range(settings.seeds)]
    for system in SYSTEMS
  }
  test = open_market_test(
    market, data, "test", num_revenue=settings.revenue_requests,
    num_recall=settings.recall_requests,
  )
  asked = repeated(test.targets, settings.seeds)
  results: dict[str, float] = {}
  for system, runs in trained.items():
    judged = [_judged(run, data, test, options.search.batch_size) for run in runs]
    found = ranking_metrics(
      np.concatenate([one.held_out_RK for one in judged]), asked, ks=(K,),
      advertiser_A=market.advertiser_A, bootstrap=settings.bootstrap,
    )
    results |= {
      f"{system}/recall@{K}{end}": float(found[f"recall@{K}{end}"])
      for end in ("", "/ci_low", "/ci_high")
    }
    results |= {
      f"{system}/revenue": float(np.mean([one.revenue for one in judged])),
      f"{system}/requests_per_second": float(np.median([one.rate for one in judged])),
      f"{system}/train_examples_per_second":
        float(np.median([run.labels_per_second for run in runs])),
      f"{system}/num_params": float(runs[0].num_params),
    }
    results |= {f"{system}/revenue/seed{seed}": one.revenue for seed, one in enumerate(judged)}
  return results


def _trained(
  system: str, options: Options, workdir: Path, data: Path, sids: Path, seed: int
) -> Trained:
  """Trains a system, or goes on where an earlier call was interrupted."""
  folder, places = workdir / system / f"seed{seed}", (str(data.resolve()), str(sids.resolve()))
  config = config_of(system, options)
  num_labels = open_examples(data / "examples").counts["train"]["examples"]  # of one target each
  num_rows = num_labels
  if isinstance(config, GprConfig):
    num_rows = len(open_gpr_inputs(GprRun(*places, config, _gpr_system(system))).rows("train"))
  steps = max(2, math.ceil(options.settings.passes * num_rows / config.train.batch_size))
  train = of_steps(config.train, steps, seed=seed, best_by="ndcg@50", patience=0)
  config = dataclasses.replace(config, train=dataclasses.replace(train, eval_every=steps // 2))
  console.print(f"train: {system}, seed {seed}")
  match config:
    case Gr4adConfig():
      state = train_gr4ad(Gr4adRun(*places, config), folder, resume=True)
    case GprConfig():
      state = train_gpr(GprRun(*places, config, _gpr_system(system)), folder, resume=True)
    case SasrecConfig():
      state = train_baseline(SasrecRun(places[0], config), folder, resume=True)
  rates = [row["examples_per_second"] for row in read_log(folder) if "examples_per_second" in row]
  num_params = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
  return Trained(folder, num_params, num_labels / num_rows * float(np.median(rates)))


def config_of(system: str, options: Options) -> Gr4adConfig | GprConfig | SasrecConfig:
  """The settings of a system, with the budget of decoding that all have."""
  config = getattr(options, system)
  if system == "sasrec":  # scores all ads
    return config
  exponent = 0.0 if system in BASES else options.settings.value_exponent
  ours = dataclasses.asdict(options.search) | {"value_exponent": exponent}
  return dataclasses.replace(config, search=dataclasses.replace(config.search, **ours))


def _gpr_system(system: str) -> System:
  return "hstu" if system == "hstu" else "gpr"


class Judged(NamedTuple):
  """What a run has found, and how fast."""

  held_out_RK: np.ndarray
  revenue: float
  rate: float  # requests/s


def _judged(trained: Trained, data: Path, test: MarketTest, batch_size: int) -> Judged:
  """Lists for both roles of the test requests; kept in the run's folder."""

  def judge() -> dict[str, np.ndarray | float]:
    console.print(f"judge: {trained.folder}")
    rank = open_baseline(trained.folder, open_logs(data), place=data).rank
    rank(test.contexts[:batch_size], K, None)  # compiles
    start = time.perf_counter()
    ranked_RK = rank(test.contexts, K, None)
    rate = len(test.contexts) / (time.perf_counter() - start)
    return Judged(
      rank(test.held_out, K, None), test.arm_revenue(ranked_RK), rate
    )._asdict()

  arrays = kept_arrays(trained.folder / "judged.npz", judge)
  return Judged(arrays["held_out_RK"], float(arrays["revenue"]), float(arrays["rate"]))


def table(results: Mapping[str, float]) -> str:
  """A row a system."""
  lines = ["| | recall@50 | revenue a request | requests/s | training labels/s | parameters |",
           "|---|---:|---:|---:|---:|---:|"]
  for system in SYSTEMS:
    revenue = results[f"{system}/revenue"]
    seeds = [value for name, value in results.items() if name.startswith(f"{system}/revenue/seed")]
    lines.append(
      f"| {baseline_label(system)} | {cell(results, f'{system}/recall@{K}', between=' to ')} | "
      f"{revenue:.4f} ({min(seeds):.4f} to {max(seeds):.4f}) | "
      f"{results[f'{system}/requests_per_second']:,.0f} | "
      f"{results[f'{system}/train_examples_per_second']:,.0f} | "
      f"{results[f'{system}/num_params'] / 1e6:.2f} M |"
    )
  return "\n".join(lines) + (
    "\n\nrecall@50: mean of seeds, 95% interval over users. revenue: mean, least and most of the "
    "seeds, in each system's own order."
  )


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """Quality and speed, side by side."""
  figure = Figure(figsize=(10, 2.6), layout="constrained")
  axes = figure.subplots(1, 3, sharey=True)
  titles = {f"recall@{K}": "Recall@50", "revenue": "Revenue a request",
            "requests_per_second": "Requests a second"}
  for ax, (metric, title) in zip(axes, titles.items(), strict=True):
    for place, system in enumerate(SYSTEMS):
      dot(ax, results, f"{system}/{metric}", place, "tab:blue")
    ax.set_title(title, loc="left")
    ax.set_xlim(left=0)
    plain(ax, grid="x")
  axes[0].set_yticks(range(len(SYSTEMS)), [baseline_label(system) for system in SYSTEMS])
  axes[0].invert_yaxis()
  return {"systems": figure}
