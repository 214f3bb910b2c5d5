"""The simulated market of experiments: its data, and what a list of ads earns in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments._runs import evenly, tokenized
from gr4ad_jax.catalog.catalog import ContextMaker
from gr4ad_jax.data import prepare
from gr4ad_jax.data.examples import open_examples, read_split
from gr4ad_jax.data.impressions import read_impressions
from gr4ad_jax.data.log_folder import read_logs
from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.sequences import Example, ExampleMaker
from gr4ad_jax.data.splits import time_split
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import write_json
from gr4ad_jax.market.log import market_logs
from gr4ad_jax.market.simulator import requests_of
from gr4ad_jax.market.world import (
  Market,
  MarketConfig,
  Requests,
  best_ads,
  day_of,
  expected_revenue,
  truth,
)
from gr4ad_jax.market.worlds import build_market
from gr4ad_jax.ranker.config import RewardConfig
from gr4ad_jax.ranker.reward import RewardRun, RewardScorer, train_reward
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.held_out import eval_requests, group_requests
from gr4ad_jax.search.ranking import EvalRequests, ranking_metrics
from gr4ad_jax.search.recommender import Recommender
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.training.config import TrainConfig

K = 50  # ads that a system finds
HANDED = 10  # of them that the final ranker sees
LIMITS = {"max_ad_history": 32, "max_organic_history": 32, "num_trending": 32, "max_targets": 1}


@dataclasses.dataclass(frozen=True)
class SmallModel:
  """A model that is trained in minutes, for experiments in a market that drifts."""

  model: ModelConfig = ModelConfig(width=64, num_heads=2, num_layers=3, num_lazy_layers=2)
  train: TrainConfig = TrainConfig(batch_size=64, learning_rate=3e-3, log_every=50)
  search: SearchConfig = SearchConfig(widths=(32, 64, 128), batch_size=64, value_exponent=0.5)


def prepared_market(workdir: Path, config: MarketConfig) -> tuple[Market, Path]:
  """The market and its log, prepared in WORKDIR/data; the last 7 days test, 5 before validate."""
  market, data = build_market(config), workdir / "data"
  if not (data / "market.json").exists():
    logs = market_logs(market)
    cut = time_split(logs, validation_days=5, test_days=7)
    prepare.write_prepared(logs, data, dataclasses.replace(cut, **LIMITS))
    write_json(data / "market.json", dataclasses.asdict(config))
  elif json.loads((data / "market.json").read_text()) != dataclasses.asdict(config):
    raise ValueError(f"{data}: holds the log of another market")
  return market, data


def prepared_first_days(market: Market, data: Path, days: int) -> Path:
  """The market's log of the first days in DATA; all but the last two are learned from."""
  if not (data / "prepared").exists():
    short = dataclasses.replace(market, config=dataclasses.replace(market.config, days=days))
    logs = market_logs(short)
    cut = time_split(logs, validation_days=1, test_days=1)
    prepare.write_prepared(logs, data, dataclasses.replace(cut, **LIMITS))
    tokenized(data, data / "sids", TokenizerConfig())
    (data / "prepared").touch()
  return data


def trained_reward(
  folder: Path, data: Path, *, steps: int, model: RewardConfig | None = None
) -> Path:
  """A reward model in `folder`."""
  if not (folder / "metrics.json").exists():
    console.print("reward model")
    train_reward(reward_run(data, steps=steps, model=model), folder, resume=True)
  return folder


def reward_run(
  data: Path, *, steps: int, model: RewardConfig | None = None, seed: int = 0
) -> RewardRun:
  """Settings of a reward model of so many steps, judged twice."""
  run, half = RewardRun(str(data.resolve()), model or RewardConfig()), max(1, steps // 2)
  return dataclasses.replace(run, train=dataclasses.replace(
    run.train, num_steps=steps, eval_every=half, checkpoint_every=half, seed=seed
  ))


class MarketTest(NamedTuple):
  """Requests of a split, in two roles."""

  market: Market
  contexts: list[Example]  # R requests, engaged or not, whose revenue is computed
  requests: Requests  # the same for the market
  traffic_share: float  # R over all requests of that time
  open_RV: np.ndarray  # bool, advertisers whose budget the logged traffic has not used up by then
  best_RK: np.ndarray  # the K ads of the highest true eCPM
  held_out: list[Example]  # requests with engaged ads, whose recall is computed
  targets: EvalRequests  # of those

  def arm_revenue(self, ranked_RK: np.ndarray) -> float:
    """Currency a request of ads shown to a small share of the traffic."""
    open_RK = np.take_along_axis(
      self.open_RV, self.market.advertiser_A[np.maximum(ranked_RK, 0)], axis=1
    )
    shown_RK = np.where(open_RK, ranked_RK, -1)
    return float(expected_revenue(self.market, self.requests, shown_RK).revenue_R.mean())


def open_market_test(
  market: Market, data: Path, split: str, *, num_revenue: int, num_recall: int
) -> MarketTest:
  """Evenly spread requests of a split."""
  logs, examples = read_logs(data / "logs"), open_examples(data / "examples")
  rows = read_impressions(ExampleMaker(logs, examples.config), split)
  contexts = evenly(sorted(rows.contexts, key=lambda c: c.time_s), num_revenue)
  requests = requests_of(contexts, examples.features)
  groups = evenly(group_requests(read_split(examples, split)), num_recall)
  return MarketTest(
    market, contexts, requests, len(contexts) / len(rows.contexts),
    open_advertisers(market, logs, requests), best_ads(market, requests, K),
    [group[0] for group in groups], eval_requests(groups),
  )


def open_advertisers(market: Market, logs: Logs, requests: Requests) -> np.ndarray:
  """bool [R, V]: what the log has spent that day before the request is below the budget."""
  events = logs.events
  paid = (events.ad >= 0) & (events.value > 0)
  advertiser_E = market.advertiser_A[logs.ads.ad_id.astype(np.int64)[events.ad[paid]]]
  time_s_E, value_E = events.time_s[paid], events.value[paid]
  day_E, day_R = (np.floor(day_of(t)).astype(int) for t in (time_s_E, requests.time_s_R))
  open_RV = np.ones((len(day_R), len(market.budget_V)), bool)
  for row, (day, now_s) in enumerate(zip(day_R, requests.time_s_R, strict=True)):
    before_E = (day_E == day) & (time_s_E < now_s)
    spent_V = np.bincount(
      advertiser_E[before_E], weights=value_E[before_E], minlength=len(market.budget_V)
    )
    open_RV[row] = spent_V < market.budget_V
  return open_RV


class Found(NamedTuple):
  """What a system hands to the final ranker."""

  ad_RK: np.ndarray  # int32, best first; -1 = none
  score_RK: np.ndarray  # float32, the system's own: log p(SID), or the match of two towers


def recommend_all(
  recommender: Recommender, maker: ContextMaker, contexts: list[Example], search: SearchConfig
) -> Found:
  """K ads for every request."""
  size = search.batch_size
  found = [
    recommender(maker.context(contexts[at : at + size]), K)
    for at in range(0, len(contexts), size)
  ]
  return Found(
    np.concatenate([part.ad_RK for part in found]),
    np.concatenate([part.score_RK for part in found]),
  )


def mixed_revenue(
  test: MarketTest, scorer: RewardScorer, found: Found, weights: Mapping[int, Sequence[float]]
) -> dict[int, np.ndarray]:
  """Revenue where the final ranker orders by log eCPM + weight x the system's own score.

  The final ranker errs, and picks what it overrates. A system's score errs in other ways, so that
  both together choose better than either.

  Args:
    test: the requests.
    scorer: the final ranker.
    found: what it is handed.
    weights: ads that it sees, the first ones -> weights to try.

  Returns:
    For each number of ads, currency a request at each weight, as `MarketTest.arm_revenue`.
  """
  ad_RK = found.ad_RK
  log_ecpm_RK = np.log(np.maximum(scorer(test.contexts, ad_RK).ecpm_RC, 1e-30))
  revenue = {}
  for handed, tried in weights.items():
    ranked = []
    for weight in tried:
      mixed_RK = np.where(ad_RK >= 0, log_ecpm_RK + weight * found.score_RK, -np.inf)[:, :handed]
      order_RK = np.argsort(-mixed_RK, axis=1, kind="stable")
      ranked.append(test.arm_revenue(np.take_along_axis(ad_RK[:, :handed], order_RK, axis=1)))
    revenue[handed] = np.array(ranked)
  return revenue


def list_metrics(
  test: MarketTest, scorer: RewardScorer, ad_RK: np.ndarray, held_out_RK: np.ndarray
) -> dict[str, float]:
  """What K ads a request are worth once the final ranker has chosen among them.

  The system answers a small share of the traffic, as in an A/B test: an advertiser is out of the
  race where the logged traffic has used up its budget of the day, and what the system spends
  changes nothing.

  Returns:
    revenue@10 (currency a request; the ranker sees the first 10), revenue@50 (it sees all),
    own_revenue (in the system's own order), whole_revenue (of 50; the system answers all traffic,
    and its own spending ends budgets), ndcg_ecpm@50 (of the system's order, gains = true eCPM,
    against the best 50 of the catalogue) and recall@50.
  """
  market, requests = test.market, test.requests
  ranked_RK = scorer.rank(test.contexts, ad_RK)
  first_RK = scorer.rank(test.contexts, ad_RK[:, :HANDED])
  whole = expected_revenue(market, requests, ranked_RK, traffic_share=test.traffic_share)
  discount_K = 1 / np.log2(2 + np.arange(K))
  gain_RK = truth(market, requests, ad_RK).ecpm
  best_RK = truth(market, requests, test.best_RK).ecpm
  ndcg_R = (gain_RK * discount_K).sum(axis=1) / (best_RK * discount_K).sum(axis=1)
  found = ranking_metrics(
    held_out_RK, test.targets, advertiser_A=market.advertiser_A, ks=(K,), bootstrap=2
  )
  return {
    f"revenue@{HANDED}": test.arm_revenue(first_RK),
    f"revenue@{K}": test.arm_revenue(ranked_RK),
    "own_revenue": test.arm_revenue(ad_RK),
    "whole_revenue": float(whole.revenue_R.mean()),
    f"ndcg_ecpm@{K}": float(ndcg_R.mean()),
    f"recall@{K}": float(found[f"recall@{K}"]),
  }
