"""GPR's Table 3: what each stage of training does to candidates, in the simulated market.

    python -m experiments.run gpr_table3

The fitted market (market/world.py), one model of GPR. Rows: mtp (stage 1); vaft (stage 2, from it);
dpo, hepo and arr (all stage 3, from vaft), whose candidates the market's truth prices; arr is hepo
with .3 of the requests made up (anticipatory request rehearsal). So a later row has learned for
more steps, as in the paper. Each row's search gives K candidates a request, of
which the truth says the rest: nDCG (gain eCPM, order of log P, against the best order of the same
K), OPR (share of pairs of unequal eCPM that log P orders alike, ties 1/2), and the final value of
stage 3, from 0 to 1 between the least and the largest of all rows of a seed: its mean over
candidates, and the mean over requests of the best one. `revenue@10`: currency a request where the
first ten go to the final ranker, a reward model, as in table1_ablation. Differences to mtp are
paired by seed.

Table 5 in kind: hepo's revenue@10 over that of mtp, by quintile of the users' requests in training
(q1 = the fewest), and what is earned by ads that came after the log had begun (new) against the
others (old): the market launches none in its last weeks. Finished runs and rows are reused.

What was found stands in docs/gpr.md. Run time: an hour of one core that does other work as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments._figures import cell, dot, plain
from experiments._kept import kept_arrays
from experiments._market import (
  HANDED,
  MarketTest,
  open_market_test,
  prepared_market,
  trained_reward,
)
from experiments._runs import of_steps, paired_interval, tokenized
from gr4ad_jax.config import override_all
from gr4ad_jax.data.log_folder import read_logs
from gr4ad_jax.gpr.candidates import Candidates, fit_final_value
from gr4ad_jax.gpr.config import PRESETS, Config
from gr4ad_jax.gpr.run import RunFile, open_run, train_run
from gr4ad_jax.machine.memory import keep_freed_memory
from gr4ad_jax.machine.progress import console
from gr4ad_jax.market.world import MarketConfig, truth
from gr4ad_jax.ranker.reward import RewardScorer, open_reward
from gr4ad_jax.tokenizer.config import TokenizerConfig

REHEARSED = 0.3  # of requests in the row that rehearses
ROWS = {  # name -> the row that it begins with, and the paper's figures
  "mtp": ("", (0.3868, 0.5292, 0.2412, 0.6201)),
  "vaft": ("mtp", (0.3925, 0.5348, None, None)),
  "dpo": ("vaft", (0.4383, 0.5463, 0.2442, 0.6659)),
  "hepo": ("vaft", (0.4413, 0.5509, 0.2630, 0.7619)),
  "arr": ("vaft", (None,) * 4),
}
PAIRS = (
  ("vaft", "mtp"), ("dpo", "mtp"), ("hepo", "mtp"), ("arr", "mtp"), ("hepo", "vaft"),
  ("hepo", "dpo"), ("arr", "hepo"),
)
METRICS = ("ndcg", "opr", "avg_final_value", "max_final_value")
REVENUE = f"revenue@{HANDED}"
QUINTILES = tuple(f"q{i}" for i in range(1, 6))


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change."""

  seeds: int = 3
  """Training runs of every row; the market and its log stay."""
  requests: int = 2_000
  """Test requests that are searched."""
  first_steps: int = 800
  second_steps: int = 200
  third_steps: int = 400
  """Steps of the stages."""
  reward_steps: int = 600
  """Steps of the final ranker."""


@dataclasses.dataclass(frozen=True)
class Options:
  """Everything that --set may change."""

  settings: Settings = Settings()
  market: MarketConfig = MarketConfig()
  config: Config = PRESETS["gpr-demo"]
  tokenizer: TokenizerConfig = TokenizerConfig(last_level="suffix")


class Shared(NamedTuple):
  """What all rows and seeds have in common."""

  options: Options
  data: Path
  sids: Path
  scorer: RewardScorer  # the final ranker
  test: MarketTest
  activity_R: np.ndarray  # 0 to 4, the quintile of each request's user


class Found(NamedTuple):
  """A row's candidates, the most probable first; ad -1 = none."""

  ad_RK: np.ndarray
  logp_RK: np.ndarray


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """ROW/METRIC with /ci_low and /ci_high of its difference to mtp as ROW_over_mtp/METRIC."""
  keep_freed_memory()
  options = Options()
  if size == "full":
    options = override_all(options, {
      "settings.first_steps": 4_000, "settings.second_steps": 1_000, "settings.third_steps": 2_000,
      "settings.seeds": 5,
    })
  options = override_all(options, overrides)
  settings = options.settings
  market, data = prepared_market(workdir, options.market)
  test = open_market_test(
    market, data, "test", num_revenue=settings.requests, num_recall=1
  )
  reward = trained_reward(workdir / "reward", data, steps=settings.reward_steps)
  sids = tokenized(data, workdir / "sids", options.tokenizer)
  users_R = np.array([context.user for context in test.contexts])
  shared = Shared(options, data, sids, open_reward(reward), test, _activity(data, users_R))
  by_seed = []
  for seed in range(settings.seeds):
    found = {name: _found(name, workdir / f"seed{seed}", shared, seed) for name in ROWS}
    by_seed.append(seed_results(found, shared))
  return summary(by_seed)


def _activity(data: Path, users_R: np.ndarray) -> np.ndarray:
  """Quintile of each request's user by the requests of the log up to the last week."""
  events = read_logs(data / "logs").events
  early_E = events.time_s < events.time_s.max() - 7 * 86_400
  pairs = np.unique(np.stack([events.user[early_E], events.request[early_E]]), axis=1)
  count_U = np.bincount(pairs[0], minlength=int(events.user.max()) + 1)
  edges = np.quantile(count_U[users_R], (0.2, 0.4, 0.6, 0.8))
  return np.searchsorted(edges, count_U[users_R], side="left")


def _config(name: str, options: Options, seed: int) -> Config:
  settings, before = options.settings, options.config
  steps = {"mtp": settings.first_steps, "vaft": settings.second_steps}
  train = of_steps(before.train, steps.get(name, settings.third_steps), seed=seed)
  if name == "arr":
    policy = dataclasses.replace(before.policy, rehearsal_share=REHEARSED)
    return dataclasses.replace(before, stage="hepo", train=train, policy=policy)
  return dataclasses.replace(before, stage=name, train=train)


def _trained(name: str, folder: Path, shared: Shared, seed: int) -> Path:
  """The run of a row, after those that it begins with."""
  before = ROWS[name][0]
  start = str(_trained(before, folder, shared, seed).resolve()) if before else ""
  config = _config(name, shared.options, seed)
  market = str(shared.data.resolve()) if config.learns_policy else ""
  console.print(f"seed {seed}: {name}")
  train_run(
    RunFile(
      str(shared.data.resolve()), str(shared.sids.resolve()), config, start=start, market=market
    ), folder / name, resume=True,
  )
  return folder / name


def _found(name: str, folder: Path, shared: Shared, seed: int) -> Found:
  """Trains and searches one row of one seed, or reads what an earlier call has found."""

  def search() -> dict[str, np.ndarray]:
    opened = open_run(_trained(name, folder, shared, seed))
    recommender, size = opened.recommender(), opened.search.batch_size
    most, parts = shared.options.config.policy.candidates, []
    first_ad_S = opened.index.ads_A[opened.index.ads_start[:-1]]
    contexts = shared.test.contexts
    for at in range(0, len(contexts), size):
      beams = recommender.search(opened.contexts.context(contexts[at : at + size]))
      sid_RK = beams.sid_BW[:, :most]
      ad_RK = np.where(sid_RK < 0, -1, first_ad_S[np.maximum(sid_RK, 0)])
      parts.append((ad_RK, beams.logp_BW[:, :most]))
    return Found(*map(np.concatenate, zip(*parts, strict=True)))._asdict()

  return Found(**kept_arrays(folder / f"{name}.npz", search))


def ranking(ecpm_RK: np.ndarray, logp_RK: np.ndarray, there_RK: np.ndarray) -> dict[str, float]:
  """ndcg and opr of candidates that stand in the order of log P, means over requests.

  Requests whose candidates are all worth the same say nothing and do not count.
  """
  discount_K = 1 / np.log2(2 + np.arange(ecpm_RK.shape[1]))
  gain_RK = np.where(there_RK, ecpm_RK, 0).astype(np.float64)
  best_R = (-np.sort(-gain_RK, axis=1) * discount_K).sum(axis=1)
  pairs_RKK = there_RK[:, :, None] & there_RK[:, None] & (gain_RK[:, :, None] > gain_RK[:, None])
  ahead_RKK = np.sign(logp_RK[:, :, None].astype(np.float64) - logp_RK[:, None])
  count_R = pairs_RKK.sum(axis=(1, 2))
  alike_R = (pairs_RKK * (1 + ahead_RKK) / 2).sum(axis=(1, 2))
  says_R = count_R > 0
  return {
    "ndcg": float(((gain_RK * discount_K).sum(axis=1)[says_R] / best_R[says_R]).mean()),
    "opr": float((alike_R[says_R] / count_R[says_R]).mean()),
  }


def final_values(value_by_row: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
  """avg_ and max_final_value of each row, from 0 to 1 over all rows; NaN = no candidate."""
  every = np.concatenate([value_RK.ravel() for value_RK in value_by_row.values()])
  low, high = np.nanmin(every), np.nanmax(every)
  return {
    name: {
      "avg_final_value": float((np.nanmean(value_RK) - low) / (high - low)),
      "max_final_value": float((np.nanmax(value_RK, axis=1).mean() - low) / (high - low)),
    } for name, value_RK in value_by_row.items()
  }


def earnings(test: MarketTest, ranked_RK: np.ndarray) -> np.ndarray:
  """What each ad of ranked lists earns, currency [R, K]: 0 but for the first that may be shown."""
  market, earns_RK = test.market, truth(test.market, test.requests, ranked_RK).ecpm / 1000
  advertiser_RK = market.advertiser_A[np.maximum(ranked_RK, 0)]
  may_RK = (earns_RK > 0) & np.take_along_axis(test.open_RV, advertiser_RK, axis=1)
  return np.where(may_RK & (np.cumsum(may_RK, axis=1) <= market.config.slots), earns_RK, 0)


def seed_results(found: Mapping[str, Found], shared: Shared) -> dict[str, float]:
  """All numbers of one seed's rows."""
  test, results, values = shared.test, {}, {}
  value = None
  for name, (ad_RK, logp_RK) in found.items():
    said = truth(test.market, test.requests, ad_RK)
    there_RK = ad_RK >= 0
    for metric, number in ranking(said.ecpm, logp_RK, there_RK).items():
      results[f"{name}/{metric}"] = number
    none = np.zeros((*ad_RK.shape, 1), np.float32)
    priced = Candidates(
      np.zeros(len(ad_RK)), np.where(there_RK, 0, -1)[..., None], ad_RK, none, none, none, *said
    )
    # By the candidates of the first row, for all rows alike.
    value = value or fit_final_value(priced, shared.options.config.policy.rate_alpha)
    values[name] = np.where(there_RK, value(priced), np.nan)
    ranked_RK = shared.scorer.rank(test.contexts, ad_RK[:, :HANDED])
    earned_RK = earnings(test, ranked_RK)
    results[f"{name}/{REVENUE}"] = float(earned_RK.sum(axis=1).mean())
    for at, quintile in enumerate(QUINTILES):
      mine_R = shared.activity_R == at
      results[f"{name}/{quintile}/{REVENUE}"] = float(earned_RK[mine_R].sum(axis=1).mean())
    new_RK = test.market.launch_A[np.maximum(ranked_RK, 0)] > 0
    for group, mine_RK in (("new", new_RK), ("old", ~new_RK)):
      results[f"{name}/{group}/{REVENUE}"] = float(
        np.where(mine_RK, earned_RK, 0).sum(axis=1).mean()
      )
  for name, numbers in final_values(values).items():
    results |= {f"{name}/{metric}": number for metric, number in numbers.items()}
  return results


def summary(by_seed: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Means over seeds; where there are several, ROW_over_mtp/NAME with 95% t intervals, and so for
  hepo over vaft and over dpo. Revenue is compared as a share, all else as a difference."""
  results = {name: float(np.mean([one[name] for one in by_seed])) for name in by_seed[0]}
  for name in by_seed[0]:
    results |= {f"{name}/seed{i}": one[name] for i, one in enumerate(by_seed)}
  if len(by_seed) < 2:
    return results
  for better, worse in PAIRS:
    for name in by_seed[0]:
      row, _, metric = name.partition("/")
      if row != better:
        continue
      ours, theirs = (
        np.array([one[f"{of}/{metric}"] for one in by_seed]) for of in (better, worse)
      )
      apart = ours / np.maximum(theirs, 1e-12) - 1 if REVENUE in metric else ours - theirs
      interval = paired_interval("apart", apart)
      key = f"{better}_over_{worse}/{metric}"
      results[key] = interval["apart/mean"]
      results |= {f"{key}/{end}": interval[f"apart/{end}"] for end in ("ci_low", "ci_high")}
  return results


def table(results: Mapping[str, float]) -> str:
  """One row a stage, the paper's figures beside ours; then Table 5 in kind."""
  lines = ["| | nDCG | paper | OPR | paper | mean final value | paper | largest | paper | "
           f"{REVENUE} | over mtp |", "|---" + "|---:" * 10 + "|"]
  for name, (_, paper) in ROWS.items():
    cells = []
    for metric, theirs in zip(METRICS, paper, strict=True):
      cells += [f"{results[f'{name}/{metric}']:.4f}", "-" if theirs is None else f"{theirs:.4f}"]
    over = cell(results, f"{name}_over_mtp/{REVENUE}", sign="+", between=" to ")
    cells += [f"{results[f'{name}/{REVENUE}']:.5f}", over]
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  lines += ["", "| over mtp, paired by seed (95% t) | " + " | ".join(METRICS) + " |",
            "|---" + "|---:" * len(METRICS) + "|"]
  for better, worse in PAIRS:
    pair = f"{better}_over_{worse}"
    cells = [
      cell(results, f"{pair}/{metric}", digits=4, sign="+", between=" to ") for metric in METRICS
    ]
    lines.append(f"| {pair.replace('_', ' ')} | " + " | ".join(cells) + " |")
  lines += ["", f"| {REVENUE} of hepo over mtp | share more |", "|---|---:|"]
  for group in (*QUINTILES, "new", "old"):
    key = f"hepo_over_mtp/{group}/{REVENUE}"
    lines.append(f"| {group} | {cell(results, key, sign='+', between=' to ')} |")
  return "\n".join(lines)


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """What each stage adds to the mean final value, with its interval."""
  figure = Figure(figsize=(6.5, 2.6), layout="constrained")
  ax = figure.subplots()
  names = [name for name in ROWS if name != "mtp"][::-1]
  for place, name in enumerate(names):
    dot(ax, results, f"{name}_over_mtp/avg_final_value", place, "#2f5f8f")
  ax.set_yticks(range(len(names)), names)
  ax.axvline(0, color="black", lw=0.8)
  ax.set_title("Mean final value of candidates, more than mtp (95% over seeds)", loc="left")
  plain(ax, grid="x")
  return {"gpr_table3": figure}
