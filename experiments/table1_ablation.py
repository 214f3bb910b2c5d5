"""Table 1: from a DLRM cascade to GR4AD, row by row, as expected revenue in the simulated market.

    python -m experiments.run table1_ablation
    python -m experiments.table1_ablation --check runs/table1_ablation/results.json

The fitted market (market/world.py). Every generative row trains for the same number of steps in two
stages, the second from the first's parameters: logged samples alone, or with candidate lists of the
first stage's model priced by the reward model. All have the copy path, which the paper does not
have, but for the row that says so; `--set model.copy_path=false` makes the paper's table. One row
learns from as many requests as the cascade's towers see. Each hands its first 10 ads a request, or
all 50, to the same final ranker, the reward model; what the four shown ads earn is computed from
the market's truth. `mixed`: the ranker also counts the score of the system that found the ads, of
the cascade's towers likewise. Finished runs and rows are reused. `--check` exits 1 where a
list-trained row loses more than 1% of the supervised row's recall@50: the known failure of
reinforcement learning.

Expected over three seeds with the copy path (docs/value.md): revenue_lift over the cascade +12.2%
to +14.1% for every row that was run (dlrm, ua_sid, vsl, dpo, rspo, uvr, uvr_dbs, gr4ad), intervals
of five to ten points; with fifty ads +1.3% (+0.5 to +2.1) for VSL, level for the others, DPO -2.9%;
mixed +5.5% to +6.8%, DPO +2.2%. Without any copy path, beside the paper's: -7.9% for VSL, +4.9% for
DPO, +1.8% for RSPO, -0.6% for GR4AD, intervals of three to five points; RSPO over VSL +10.6% (+1.5
to +19.7). Size full was not measured. Run time: without copy path under an hour on two CPU cores;
with it the eight rows above took some two and a half hours on one, beside other work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments._figures import change, plain
from experiments._market import (
  HANDED,
  Found,
  K,
  MarketTest,
  list_metrics,
  mixed_revenue,
  open_market_test,
  prepared_market,
  recommend_all,
  reward_run,
  trained_reward,
)
from experiments._runs import of_steps, paired_interval, run_of, tokenized
from gr4ad_jax.catalog.legal_prefixes import build_prefix_tree
from gr4ad_jax.cli.bench_decode import time_in_turns
from gr4ad_jax.config import override_all
from gr4ad_jax.data.example_records import to_example
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.gr4ad.build import start_fn, step_fn
from gr4ad_jax.gr4ad.candidates import write_candidates
from gr4ad_jax.gr4ad.config import (
  CandidateConfig,
  Config,
  LossConfig,
  ModelConfig,
  PreferenceConfig,
)
from gr4ad_jax.gr4ad.run import RunFile, load_params, open_inputs, open_run
from gr4ad_jax.gr4ad.train_run import train_run
from gr4ad_jax.machine.memory import keep_freed_memory
from gr4ad_jax.machine.progress import console, track
from gr4ad_jax.machine.storage import write_json
from gr4ad_jax.market.world import MarketConfig
from gr4ad_jax.ranker.cascade import train_retrieval
from gr4ad_jax.ranker.config import REWARD_TRAINING, RewardConfig
from gr4ad_jax.ranker.reward import RewardScorer, open_reward
from gr4ad_jax.search.beam_search import compile_search
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.training.config import TrainConfig

PLAIN_LOSS = LossConfig(
  ecpm_weight=0.0, mtp_weight=0.0, conversion_weight=1.0, user_weight_range=(1.0, 1.0)
)
# On validation: at this size the defaults' weights cost more samples than they are worth, and the
# value head, learned from the logging policy's noisy estimates, does not help to rank.
VALUE_LOSS = LossConfig(ecpm_weight=0.2, conversion_weight=2.0, user_weight_range=(0.8, 1.25))
WIDE, PROGRESSIVE = (64, 64, 64), (16, 32, 64)


class Row(NamedTuple):
  """One system of the table."""

  label: str
  paper: tuple[str, str]  # revenue against DLRM, QPS against AR
  decoder: str = "autoregressive"
  sids: str = "ua_sid"
  values: bool = True  # VSL instead of the plain loss
  method: str = "none"  # of PreferenceConfig
  weight: float = 0.0  # of the list loss; Z_max where the method is uvr
  widths: tuple[int, ...] = WIDE
  copied: bool = True  # with the copy path, which the paper does not have
  long: bool = False  # learns from as many requests as the cascade's towers


ROWS = {
  "dlrm": Row("DLRM cascade", ("-", "")),
  "ar": Row("AR decoder, RQ-Kmeans", ("+1.68%", "-"), sids="rq_kmeans", values=False),
  "ua_sid": Row("+ UA-SID", ("+1.92%", "0%"), values=False),
  "vsl": Row("+ VSL", ("+2.80%", "-25%")),
  "dpo": Row("+ VSL + DPO", ("+3.16%", "-25%"), method="dpo", weight=3.0),
  "grpo": Row("+ VSL + GRPO", ("+3.21%", "-25%"), method="grpo", weight=8.0),
  "rspo": Row("+ VSL + RSPO", ("+3.86%", "-25%"), method="rspo", weight=10.0),
  "uvr": Row("+ UVR", ("+4.01%", "-25%"), method="uvr", weight=14.0),
  "uvr_dbs": Row(
    "+ UVR + DBS", ("+4.32%", "+20%"), method="uvr", weight=14.0, widths=PROGRESSIVE
  ),
  "uvr_dbs_mtp": Row(
    "+ UVR + DBS + MTP", ("+3.98%", "+117%"), decoder="multi_token", method="uvr",
    weight=14.0, widths=PROGRESSIVE,
  ),
  "gr4ad": Row(
    "GR4AD (UVR + DBS + LazyAR)", ("+4.28%", "+117%"), decoder="lazy", method="uvr",
    weight=14.0, widths=PROGRESSIVE,
  ),
  "gr4ad_paper": Row(
    "GR4AD without the copy path", ("+4.28%", "+117%"), decoder="lazy", method="uvr",
    weight=14.0, widths=PROGRESSIVE, copied=False,
  ),
  "gr4ad_long": Row(
    "GR4AD, as many samples as the cascade", ("", ""), decoder="lazy", method="uvr",
    weight=14.0, widths=PROGRESSIVE, long=True,
  ),
}
REVENUES = {  # the first one is the table's -> the name of its lift over the cascade
  f"revenue@{HANDED}": "revenue_lift", f"revenue@{K}": f"revenue_lift@{K}",
  f"mixed_revenue@{HANDED}": "mixed_revenue_lift",
  f"mixed_revenue@{K}": f"mixed_revenue_lift@{K}",
}
WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0)
METRICS = (*REVENUES, f"mixed_weight@{HANDED}", f"mixed_weight@{K}", "own_revenue",
           "whole_revenue", f"ndcg_ecpm@{K}", f"recall@{K}")
ORDERINGS = (("vsl", "ua_sid"), ("rspo", "vsl"), ("rspo", "dpo"), ("rspo", "grpo"), ("uvr", "rspo"),
             ("gr4ad", "gr4ad_paper"), ("gr4ad_long", "gr4ad"))


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change."""

  seeds: int = 3
  """Training runs of every row; the market and its log stay."""
  first_seed: int = 0
  split: str = "test"
  """Requests that are judged: test, or validation for choosing settings."""
  revenue_requests: int = 4_000
  """Requests behind the revenue."""
  recall_requests: int = 4_000
  """Requests behind recall."""
  first_steps: int = 1_000
  """Steps on logged samples."""
  second_steps: int = 250
  """Steps of the second stage."""
  second_learning_rate: float = 1e-3
  """Peak of the second stage."""
  value_exponent: float = 0.0
  """gamma of the rows with a value head."""
  rows: tuple[str, ...] = tuple(ROWS)
  """Rows to make; the results need all of them."""


@dataclasses.dataclass(frozen=True)
class Options:
  """Everything that --set may change."""

  settings: Settings = Settings()
  market: MarketConfig = MarketConfig()
  model: ModelConfig = ModelConfig(
    width=64, num_heads=2, num_layers=3, num_lazy_layers=2, copy_path=True
  )  # the decoder: the row's; without a copy path here, no row has one
  train: TrainConfig = TrainConfig(
    batch_size=64, learning_rate=3e-3, log_every=50, eval_batches=8
  )
  preference: PreferenceConfig = PreferenceConfig(reward_range="list")  # method, weight: the row's
  candidates: CandidateConfig = CandidateConfig(max_lists=3_000)
  reward: RewardConfig = RewardConfig()
  reward_steps: int = 600


class Shared(NamedTuple):
  """What all rows and seeds have in common."""

  options: Options
  data: Path
  sids: Mapping[str, Path]
  reward: Path  # folder of the final ranker
  scorer: RewardScorer  # the same, opened
  test: MarketTest
  chooser: MarketTest  # validation requests, which choose what a system's own score weighs

  def first_run(self, row: Row, seed: int) -> tuple[str, RunFile]:
    """The first stage of a row: its folder's name, and the run."""
    config = _config(row, self.options, seed, stage=1)
    name = f"{row.decoder}-{row.sids}-{'vsl' if row.values else 'plain'}"
    name += "-long" * row.long + "-paper" * (not row.copied)
    return name, run_of(self.data, self.sids[row.sids], config)


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """ROW/revenue_lift, its interval, ROW/recall@50, ROW/ndcg_ecpm@50, ROW/qps_ratio, and more."""
  keep_freed_memory()
  options = override_all(Options(), overrides)
  if size == "full":
    options = override_all(options, {"settings.first_steps": 4_000, "settings.second_steps": 1_000,
                                     "candidates.max_lists": 20_000, "settings.seeds": 5})
  settings = options.settings
  market, data = prepared_market(workdir, options.market)
  by_split = {
    split: open_market_test(
      market, data, split, num_revenue=settings.revenue_requests,
      num_recall=settings.recall_requests,
    )
    for split in {settings.split, "validation"}
  }
  test, chooser = by_split[settings.split], by_split["validation"]
  reward = trained_reward(
    workdir / "reward", data, steps=options.reward_steps, model=options.reward
  )
  sids = {
    "ua_sid": tokenized(
      data, workdir / "sids" / "ua_sid", TokenizerConfig(last_level="suffix")
    ),
    "rq_kmeans": tokenized(
      data, workdir / "sids" / "rq_kmeans",
      TokenizerConfig(quantizer="kmeans", codebook_sizes=(40, 40, 40), last_level="quantised"),
    ),
  }
  shared = Shared(options, data, sids, reward, open_reward(reward), test, chooser)
  found: dict[str, dict[str, list[float]]] = {
    name: {metric: [] for metric in METRICS} for name in settings.rows
  }
  for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
    for name in settings.rows:
      metrics = _row_metrics(name, workdir / f"seed{seed}", shared, seed)
      for metric in METRICS:
        found[name][metric].append(metrics[metric])
  results = summary(found) | _bounds(workdir / f"bounds-{settings.split}.json", shared)
  return results | _speed(workdir / f"seed{settings.first_seed}", shared)


def summary(found: Mapping[str, Mapping[str, list[float]]]) -> dict[str, float]:
  """Means over seeds, lifts over the cascade, and paired differences of the orderings."""
  results: dict[str, float] = {}
  for name, metrics in found.items():
    for metric, values in metrics.items():
      results[f"{name}/{metric}"] = float(np.mean(values))
      results |= {f"{name}/{metric}/seed{i}": v for i, v in enumerate(values)}

  def compare(better: str, worse: str, name: str, revenue: str) -> None:
    if {better, worse} <= set(found) and len(found[better][revenue]) > 1:
      change = np.array(found[better][revenue]) / np.array(found[worse][revenue]) - 1
      interval = paired_interval("change", change)
      results[name] = interval["change/mean"]
      results.update({f"{name}_{end}": interval[f"change/{end}"] for end in ("ci_low", "ci_high")})

  for revenue, lift in REVENUES.items():
    for name in found:
      compare(name, "dlrm", f"{name}/{lift}", revenue)
    for better, worse in ORDERINGS:
      compare(better, worse, f"{better}_over_{worse}/{lift}", revenue)
  return results


def _row_metrics(name: str, folder: Path, shared: Shared, seed: int) -> dict[str, float]:
  """Trains and judges one row of one seed, or reads what an earlier call has found."""
  options, test = shared.options, shared.test
  file = folder / f"{name}-{options.settings.split}.json"
  if file.exists() and set(METRICS) <= set(metrics := json.loads(file.read_text())):
    return metrics
  console.print(f"seed {seed}: {ROWS[name].label}")
  if name == "dlrm":
    of_seed = reward_run(shared.data, steps=options.reward_steps, model=options.reward, seed=seed)
    retrieval = train_retrieval(of_seed, folder / "two_tower")

    def find(contexts: list[Example]) -> Found:
      return Found(*retrieval(contexts, K))
  else:
    opened = open_run(_trained(ROWS[name], folder, shared, seed))
    search = _search(ROWS[name], options)
    recommender = opened.recommender(search)

    def find(contexts: list[Example]) -> Found:
      return recommend_all(recommender, opened.contexts, contexts, search)

  handed = find(test.contexts)
  metrics = list_metrics(test, shared.scorer, handed.ad_RK, find(test.held_out).ad_RK)
  chosen_on = handed if shared.chooser is test else find(shared.chooser.contexts)
  metrics |= _mixed(handed, chosen_on, shared)
  folder.mkdir(parents=True, exist_ok=True)
  write_json(file, metrics)
  return metrics


def _mixed(handed: Found, chosen_on: Found, shared: Shared) -> dict[str, float]:
  """Revenue where the final ranker also counts the system's own score, as validation chose."""
  tried = mixed_revenue(
    shared.chooser, shared.scorer, chosen_on, dict.fromkeys((HANDED, K), WEIGHTS)
  )
  weights = {ads: WEIGHTS[int(np.argmax(revenue))] for ads, revenue in tried.items()}
  earned = mixed_revenue(
    shared.test, shared.scorer, handed, {ads: (weight,) for ads, weight in weights.items()}
  )
  return {f"mixed_revenue@{ads}": float(revenue[0]) for ads, revenue in earned.items()} | {
    f"mixed_weight@{ads}": weight for ads, weight in weights.items()
  }


def _bounds(file: Path, shared: Shared) -> dict[str, float]:
  """What retrieval could bring: revenue of the truth's best ads, and of all ads, handed over."""
  if not file.exists():
    test, scorer = shared.test, shared.scorer
    first_RK = scorer.rank(test.contexts, test.best_RK[:, :HANDED])
    best_RK = scorer.rank(test.contexts, test.best_RK)
    num_ads = len(test.market.advertiser_A)
    every_RA = np.tile(np.arange(num_ads, dtype=np.int32), (len(test.contexts), 1))
    write_json(file, {
      f"bound/best/revenue@{HANDED}": test.arm_revenue(first_RK),
      f"bound/best/revenue@{K}": test.arm_revenue(best_RK),
      "bound/all_ads/revenue": test.arm_revenue(scorer.rank(test.contexts, every_RA)),
    })
  return json.loads(file.read_text())


def _trained(row: Row, folder: Path, shared: Shared, seed: int) -> Path:
  """The second stage of a row; rows that differ in beams alone share it."""
  options = shared.options
  first, first_run = shared.first_run(row, seed)
  train_run(first_run, folder / first, resume=True)
  lists = ""
  if row.method != "none":
    lists = folder / f"{first}-lists"
    if not (lists / "lists.json").exists():
      config = dataclasses.replace(options.candidates, seed=seed)
      write_candidates(folder / first, shared.reward, lists, config=config)
  second = dataclasses.replace(
    first_run, config=_config(row, options, seed, stage=2), start=str((folder / first).resolve()),
    lists=str(lists and lists.resolve()),
  )
  place = folder / f"{first}-{row.method}"
  train_run(second, place, resume=True)
  return place


def _config(row: Row, options: Options, seed: int, *, stage: int) -> Config:
  settings = options.settings
  steps = settings.first_steps if stage == 1 else settings.second_steps
  if row.long and stage == 1:
    seen = options.reward_steps * REWARD_TRAINING.batch_size
    steps = seen // options.train.batch_size - settings.second_steps
  rate = options.train.learning_rate if stage == 1 else settings.second_learning_rate
  train = of_steps(options.train, steps, learning_rate=rate, seed=seed + 100 * (stage - 1))
  return Config(
    model=dataclasses.replace(
      options.model, decoder=row.decoder, copy_path=row.copied and options.model.copy_path
    ),
    loss=VALUE_LOSS if row.values else PLAIN_LOSS,
    train=train, search=_search(row._replace(widths=WIDE), options),  # lists come from wide beams
    preference=PreferenceConfig(method="none") if stage == 1 else dataclasses.replace(
      options.preference, method=row.method, weight=row.weight, max_rl_weight=row.weight
    ),
  )


def _search(row: Row, options: Options) -> SearchConfig:
  gamma = options.settings.value_exponent if row.values else 0.0
  return SearchConfig(widths=row.widths, batch_size=64, value_exponent=gamma)


def _speed(folder: Path, shared: Shared) -> dict[str, float]:
  """ROW/qps_ratio: searches of 8 requests taking turns, against the AR row."""
  names = [name for name in shared.options.settings.rows if name != "dlrm"]
  if not names:
    return {}
  calls = {}
  for name in names:
    row = ROWS[name]
    first, run_file = shared.first_run(row, seed=0)
    inputs = open_inputs(run_file)
    decoder, params, _ = load_params(run_file, folder / first, inputs.vocabulary)
    tree = build_prefix_tree(inputs.index.sids_SL)
    examples = [inputs.examples.sources["test"][i] for i in range(8)]
    context = inputs.make_batch.context([to_example(record, 2) for record in examples])
    bins = np.asarray(inputs.scale.bin_means, np.float32) if row.values else None
    fixed = jax.device_put((params, context, tree.arrays, bins))
    search = compile_search(start_fn(decoder), step_fn(decoder), tree, row.widths)
    calls[name] = lambda search=search, fixed=fixed: search(*fixed)
  seconds = time_in_turns(calls, repeats=15, progress=track)
  base = float(np.median(seconds.get("ar", seconds[names[0]])))
  return {f"{name}/qps_ratio": base / float(np.median(seconds[name])) for name in names}


def check(results: Mapping[str, float]) -> list[str]:
  """Rows whose list-wise learning has lowered recall@50 by more than 1% of the VSL row's."""
  least = 0.99 * results[f"vsl/recall@{K}"]
  return [
    f"{name}: recall@{K} {results[f'{name}/recall@{K}']:.4f} is below {least:.4f}, 99% of vsl's"
    for name in ("rspo", "uvr") if results[f"{name}/recall@{K}"] < least
  ]


def table(results: Mapping[str, float]) -> str:
  """One row a system, the paper's figures beside ours; the orderings below."""
  lines = [
    f"| | revenue, {HANDED} to the ranker | paper | revenue, {K} | {HANDED}, mixed | {K}, mixed | "
    f"recall@{K} | NDCG by eCPM | QPS | paper |",
    "|---" + "|---:" * 9 + "|",
  ]

  def lift(name: str, digits: int = 1) -> str:
    if name not in results:
      return "-"
    return change(*(results[name + end] for end in ("", "_ci_low", "_ci_high")), digits)

  for name, row in ROWS.items():
    if f"{name}/recall@{K}" not in results:
      continue
    lifts = [
      "-" if name == "dlrm" else lift(f"{name}/{revenue_lift}")
      for revenue_lift in REVENUES.values()
    ]
    speed = results.get(f"{name}/qps_ratio")
    lines.append(
      f"| {row.label} | {lifts[0]} | {row.paper[0]} | {' | '.join(lifts[1:])} | "
      f"{results[f'{name}/recall@{K}']:.4f} | {results[f'{name}/ndcg_ecpm@{K}']:.4f} | "
      f"{f'{speed - 1:+.0%}' if speed else ''} | {row.paper[1]} |"
    )
  if f"dlrm/mixed_revenue@{K}" in results:
    of_itself = [
      f"{results[f'dlrm/mixed_{name}'] / results[f'dlrm/{name}'] - 1:+.1%} with {ads}"
      for ads, name in ((HANDED, f"revenue@{HANDED}"), (K, f"revenue@{K}"))
    ]
    lines += ["", "Mixed: the ranker orders by log eCPM + a weight x the system's own score, the "
              "weight chosen on validation for each system, the cascade too: it then earns "
              f"{', '.join(of_itself)}, and is what the others are compared with."]
  if "bound/all_ads/revenue" in results and f"dlrm/revenue@{K}" in results:
    def gain(bound: str, revenue: str) -> float:
      return results[f"bound/{bound}"] / results[f"dlrm/{revenue}"] - 1

    ten, all_of_them = f"revenue@{HANDED}", f"revenue@{K}"
    first, fifty = (gain(f"best/{revenue}", revenue) for revenue in (ten, all_of_them))
    every = gain("all_ads/revenue", all_of_them)
    lines += ["", f"Handed the truth's best {HANDED} ads the ranker would earn {first:+.1%} over "
              f"the cascade, the best {K} {fifty:+.1%}; handed the whole catalogue {every:+.1%}."]
  lines += [
    "", f"| revenue, paired by seed (95% t interval) | {HANDED} to the ranker | {K} |",
    "|---|---:|---:|",
  ]
  for better, worse in ORDERINGS:
    key = f"{better}_over_{worse}/revenue_lift"
    if key in results:
      lines.append(
        f"| {better} over {worse} | {lift(key, 2)} | {lift(f'{key}@{K}', 2)} |"
      )
  if {f"{name}/recall@{K}" for name in ("vsl", "rspo", "uvr")} <= set(results):
    lines += ["", *(check(results) or [f"RSPO and UVR keep 99% of vsl's recall@{K}."])]
  return "\n".join(lines)


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """Revenue lift of each row, beside the paper's."""
  names = [name for name in ROWS if f"{name}/revenue_lift" in results and name != "dlrm"]
  figure = Figure(figsize=(7.5, 5.2), layout="constrained")
  ax = figure.subplots()
  places = np.arange(len(names))[::-1]

  def bars(offset: float, lifts: list[float], ends: list[list[float]] | None, **style) -> None:
    error = None if ends is None else np.abs(np.array(ends).T - lifts) * 100
    ax.barh(places + offset, np.array(lifts) * 100, 0.26, xerr=error, error_kw={"lw": 1}, **style)

  for offset, lift, handed, color in (
    (0.27, "revenue_lift", HANDED, "#2f5f8f"), (0, f"revenue_lift@{K}", K, "#8db4d9")
  ):
    bars(
      offset, [results[f"{name}/{lift}"] for name in names],
      [[results[f"{name}/{lift}_ci_{end}"] for end in ("low", "high")] for name in names],
      color=color, label=f"here, {handed} ads to the ranker",
    )
  paper = [float(ROWS[name].paper[0].rstrip("%") or "nan") / 100 for name in names]
  bars(-0.27, paper, None, color="#b8b8b8", label="paper, online")
  ax.set_yticks(places, [ROWS[name].label for name in names])
  ax.set_title("Revenue over the DLRM cascade, % (bars: 95% interval over seeds)", loc="left")
  ax.axvline(0, color="black", lw=0.8)
  plain(ax, grid="x")
  ax.legend(frameon=False)
  return {"table1": figure}


def main() -> None:
  """`--check FILE`: exits 1 where list-wise learning has lowered recall."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--check", type=Path, required=True, metavar="RESULTS_JSON")
  failures = check(json.loads(parser.parse_args().check.read_text()))
  print("\n".join(failures) or "recall is kept")
  sys.exit(bool(failures))


if __name__ == "__main__":
  main()
