"""Online learning in a market whose tastes drift: frozen, online, and retrained from scratch.

    python -m experiments.run online_drift

A model is trained on the first days of a market (VSL, then UVR on candidate lists). From then on
the log arrives day by day: one copy of the model stays as it is, one goes on with `gr4ad online`,
and now and then a new one is trained from scratch on everything so far. All answer the requests of
the *next* day, with the same histories; what their first four ads earn in expectation is computed
from the market's truth, budgets left aside: an advertiser that the log has taken out of the day
still counts. The reward model is that of the first days throughout. An interrupted run goes on.

Expected (docs/value.md): over the model that is retrained, frozen -53.5% (95% -54.8 to -52.1),
online -2.9% (-4.3 to -1.5). Run time on two CPU cores: 15 minutes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments._figures import change, plain, revenue_by_day
from experiments._market import (
  SmallModel,
  prepared_first_days,
  recommend_all,
  requests_of,
  trained_reward,
)
from experiments._runs import evenly, of_epochs, of_steps, run_of
from gr4ad_jax.config import ConfigError, override_all
from gr4ad_jax.data.impressions import read_impressions
from gr4ad_jax.data.records import DAY_S, Logs
from gr4ad_jax.data.segments import append_segment
from gr4ad_jax.data.sequences import Example, ExampleMaker
from gr4ad_jax.data.trending import build_trending
from gr4ad_jax.gr4ad.candidates import write_candidates
from gr4ad_jax.gr4ad.config import (
  CandidateConfig,
  Config,
  OnlineConfig,
  PreferenceConfig,
)
from gr4ad_jax.gr4ad.online import learn_online
from gr4ad_jax.gr4ad.run import open_run
from gr4ad_jax.gr4ad.train_run import train_run
from gr4ad_jax.machine.memory import keep_freed_memory
from gr4ad_jax.machine.progress import console
from gr4ad_jax.market.log import write_market
from gr4ad_jax.market.world import START_S, Market, MarketConfig, expected_revenue
from gr4ad_jax.market.worlds import build_market
from gr4ad_jax.search.opened import Opened
from gr4ad_jax.search.recommender import Recommender

SYSTEMS = ("frozen", "online", "retrained")


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change."""

  first_days: int = 14
  """Days before the stream begins; the last two of them validate and test the first models."""
  judge_every: int = 3
  """Days between judgements of the frozen and the online model."""
  retrain_days: tuple[int, ...] = (25, 34)
  """Days whose requests a model answers that was trained on everything before."""
  requests: int = 2_000
  """Requests of a day that are answered."""
  epochs: float = 1.6
  """Length of every training from scratch."""
  second_steps: int = 200
  """Steps of UVR after it."""


@dataclasses.dataclass(frozen=True)
class Options(SmallModel):
  """Everything that --set may change."""

  settings: Settings = Settings()
  market: MarketConfig = MarketConfig(num_users=3_000, drift=1.2)
  preference: PreferenceConfig = PreferenceConfig(max_rl_weight=2.0)
  candidates: CandidateConfig = CandidateConfig(max_lists=2_000, shown=True)
  online: OnlineConfig = OnlineConfig(publish_every=20, learning_rate_share=0.3)
  reward_steps: int = 500


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """SYSTEM/day_N (currency a request), and ratios to the retrained model with 95% intervals."""
  keep_freed_memory()
  del size
  options = override_all(Options(), overrides)
  settings = options.settings
  if max(settings.retrain_days) >= options.market.days:
    raise ConfigError(f"settings.retrain_days={settings.retrain_days}: beyond the market's days")
  market = build_market(options.market)
  if not (workdir / "market").exists():
    stream_days = options.market.days - settings.first_days
    write_market(market, workdir / "market", stream_days=stream_days)
  segments = workdir / "market" / "segments"
  first = _prepared(market, workdir, settings.first_days)
  reward = trained_reward(workdir / "reward", first, steps=options.reward_steps)
  start = _from_scratch(first, workdir / "first", reward, options)
  judge = _Judge(workdir / "judged", market, start, options)

  def before(name: str, params: Any, logs: Logs) -> None:
    """Nobody has learned from the day `name` yet."""
    day = int(name.removeprefix("day-").removesuffix(".parquet"))
    judge(day, logs, "frozen", None)
    judge(day, logs, "online", params)

  learn_online(
    start, segments, workdir / "online", config=options.online, preference=options.preference,
    candidates=options.candidates, reward=reward, before_segment=before,
  )
  for day in settings.retrain_days:
    data = _prepared(market, workdir, day)
    run_folder = _from_scratch(data, workdir / f"before-{day}", reward, options)
    judge.retrained(day, segments / f"day-{day:04d}.parquet", run_folder)
  return judge.results(settings.retrain_days)


def _prepared(market: Market, workdir: Path, days: int) -> Path:
  return prepared_first_days(market, workdir / f"data-{days}", days)


def _from_scratch(data: Path, folder: Path, reward: Path, options: Options) -> Path:
  """VSL, then UVR on lists of its own."""
  settings = options.settings
  config = Config(
    model=options.model, train=options.train, search=options.search, preference=options.preference
  )
  train = of_epochs(options.train, settings.epochs, data)
  console.print(f"{folder.name}: {train.num_steps:,} + {settings.second_steps} steps")
  first = run_of(data, data / "sids", dataclasses.replace(config, train=train))
  train_run(first, folder / "vsl", resume=True)
  if not (folder / "lists" / "lists.json").exists():
    write_candidates(folder / "vsl", reward, folder / "lists", config=options.candidates)
  train = of_steps(options.train, settings.second_steps, learning_rate=1e-3, seed=100)
  second = dataclasses.replace(
    first, config=dataclasses.replace(config, train=train),
    start=str((folder / "vsl").resolve()), lists=str((folder / "lists").resolve()),
  )
  train_run(second, folder / "uvr", resume=True)
  return folder / "uvr"


class _Judge:
  """Revenue of every system on the requests of a day, kept on disk request by request."""

  def __init__(self, folder: Path, market: Market, start: Path, options: Options):
    folder.mkdir(parents=True, exist_ok=True)
    self._folder, self._market, self._options = folder, market, options
    self._opened: Opened = open_run(start)
    self._recommender = self._opened.recommender()

  def __call__(self, day: int, logs: Logs, system: str, params: Any | None) -> None:
    settings = self._options.settings
    if (day - settings.first_days) % settings.judge_every and day not in settings.retrain_days:
      return
    recommender = self._recommender if params is None else self._recommender.with_params(params)
    self._answer(day, logs, system, recommender)

  def retrained(self, day: int, segment: Path, run_folder: Path) -> None:
    """Answers a day, which is in `segment`, with a run that was trained on all before it."""
    opened = open_run(run_folder)
    logs = append_segment(opened.logs, segment).logs
    self._answer(day, logs, "retrained", opened.recommender())

  def _answer(self, day: int, logs: Logs, system: str, recommender: Recommender) -> None:
    file = self._folder / f"{system}-{day}.npy"
    if file.exists():
      return
    contexts = self._contexts(day, logs)
    maker = self._opened.contexts.with_trending(build_trending(logs))
    ad_RK = recommend_all(recommender, maker, contexts, self._options.search).ad_RK
    requests = requests_of(contexts, self._opened.examples.features)
    np.save(file, expected_revenue(self._market, requests, ad_RK).revenue_R)

  def _contexts(self, day: int, logs: Logs) -> list[Example]:
    """Evenly spread requests of a day, by user and time."""
    begin_s = START_S + day * DAY_S
    examples = self._opened.examples
    maker = ExampleMaker(logs, examples.config, vocabulary=examples.features,
                         split_R=np.full(int(logs.events.request.max()) + 1, -1, np.int8))
    today_R = (maker.first_s_R >= begin_s) & (maker.first_s_R < begin_s + DAY_S)
    maker.split_R[today_R] = 0
    return evenly(read_impressions(maker, "train").contexts, self._options.settings.requests)

  def results(self, retrain_days: tuple[int, ...]) -> dict[str, float]:
    """Means by day, and ratios to the retrained model over all days that it has answered."""
    revenue = {
      system: {
        int(file.stem.split("-")[1]): np.load(file)
        for file in sorted(self._folder.glob(f"{system}-*.npy"))
      }
      for system in SYSTEMS
    }
    found = {
      f"{system}/day_{day}": float(values.mean())
      for system, days in revenue.items() for day, values in days.items()
    }
    whole = {s: np.concatenate([revenue[s][day] for day in retrain_days]) for s in SYSTEMS}
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(whole["online"]), (2_000, len(whole["online"])))
    for a, b in (("online", "retrained"), ("frozen", "retrained"), ("online", "frozen")):
      ratios = whole[a][drawn].mean(axis=1) / whole[b][drawn].mean(axis=1) - 1
      low, high = np.quantile(ratios, (0.025, 0.975))
      found |= {
        f"{a}_over_{b}/mean": float(whole[a].mean() / whole[b].mean() - 1),
        f"{a}_over_{b}/ci_low": float(low), f"{a}_over_{b}/ci_high": float(high),
      }
    return found


def table(results: Mapping[str, float]) -> str:
  """Revenue by day, and the ratios."""
  days = sorted({int(name.split("_")[-1]) for name in results if "/day_" in name})
  lines = ["| day | " + " | ".join(SYSTEMS) + " |", "|---:" * 4 + "|"]
  for day in days:
    cells = [results.get(f"{system}/day_{day}") for system in SYSTEMS]
    lines.append(f"| {day} | " + " | ".join("" if x is None else f"{x:.4f}" for x in cells) + " |")
  lines += ["", "| revenue on the days that all three answered | difference (95%) |", "|---|---:|"]
  for pair in ("online_over_retrained", "frozen_over_retrained", "online_over_frozen"):
    found = (results[f"{pair}/{part}"] for part in ("mean", "ci_low", "ci_high"))
    lines.append(f"| {pair.replace('_', ' ')} | {change(*found)} |")
  return "\n".join(lines)


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """Revenue of the three systems over the days."""
  figure = Figure(figsize=(7.0, 3.6), layout="constrained")
  ax = figure.subplots()
  plain(ax)
  styles = {"frozen": ("#b0553a", "o-"), "online": ("#2f6f9f", "o-"), "retrained": ("#333", "D")}
  for system, (colour, style) in styles.items():
    revenue_by_day(ax, results, system, style, color=colour, markersize=5)
  return {"online_drift": figure}
