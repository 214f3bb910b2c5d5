"""Serve, log, learn, publish, serve: a live loop against a frozen policy in a drifting market.

    python -m experiments.run closed_loop

Four processes: a market, two servers, a learner. A model is trained on the first days of a market
whose tastes drift, and served twice (`gr4ad serve`). From then on, hour by hour, both servers are
asked for every request of the market; the first four ads of the *online* server are shown, users
click and buy as the market's truth has it, and both servers get all events, so histories and trends
are the same. `gr4ad online` learns from the log segments that the online server writes, and that
server takes over what is published; the frozen one keeps its parameters. At the end of a day the
market waits until the learner has seen it.

What the first four ads earn in expectation is computed from the market's truth, for both, request
by request, budgets left aside: they end only what is shown. Intervals draw users again.

Expected (docs/serving.md): online_over_frozen/all +8.6% (95% +6.5 to +10.6), /first_third +4.5%,
/last_third +9.8%. Run time on two CPU cores: 8 minutes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import aiohttp
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments._figures import change, plain, revenue_by_day
from experiments._market import SmallModel, prepared_first_days
from experiments._runs import of_epochs, run_of
from experiments._serving import Server, running_server
from gr4ad_jax.config import ConfigError, override_all
from gr4ad_jax.data.records import Action
from gr4ad_jax.gr4ad.config import Config
from gr4ad_jax.gr4ad.train_run import train_run
from gr4ad_jax.machine.progress import console
from gr4ad_jax.market.log import simulate_hours
from gr4ad_jax.market.policy import Shown, build_shelves
from gr4ad_jax.market.world import SCENES, Market, MarketConfig, Requests, expected_revenue
from gr4ad_jax.market.worlds import build_market
from gr4ad_jax.training.metric_log import read_log

ARMS = ("online", "frozen")
SHOWN = 4
AT_ONCE = 16  # requests in flight, of each server
EVENTS = 500  # of one call


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change."""

  first_days: int = 14
  """Days that the model is trained on; the last two of them validate and test."""
  epochs: float = 1.6
  """Length of the training."""
  publish_every: int = 5
  """Steps of the learner between publications."""
  learning_rate_share: float = 0.3
  """The learner's rate over the run's peak."""
  segment_s: float = 5.0
  """Seconds between log segments."""


@dataclasses.dataclass(frozen=True)
class Options(SmallModel):
  """Everything that --set may change."""

  settings: Settings = Settings()
  market: MarketConfig = MarketConfig(num_users=3_000, drift=1.2, days=26)


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """ARM/day_N (currency a request), the ratio with its 95% interval, and what the loop did."""
  del size
  options = override_all(Options(), overrides)
  settings, market = options.settings, build_market(options.market)
  if settings.first_days >= options.market.days:
    raise ConfigError(f"settings.first_days={settings.first_days}: leaves no day to serve")
  trained = _trained(market, workdir, options)
  stores = {arm: workdir / f"store-{arm}" for arm in ARMS}
  if any(store.exists() for store in stores.values()):
    raise ConfigError(f"{workdir}: a live loop cannot be resumed; remove store-* and online there")
  learner = workdir / "online"
  common = (
    "--clock", "replay", "--serving.batch-sizes", 1, 16, "--serving.beam-factors", 1.0,
    "--serving.cache-ttl-s", 0, "--serving.max-queue", 1000, "--serving.deadline-ms", 60_000,
  )
  segments = stores["online"] / "segments"
  segments.mkdir(parents=True)
  learning = [
    sys.executable, "-m", "gr4ad_jax", "online", "--workdir", trained, "--segments", segments,
    "--out", learner, "--follow", "0.5", "--publish-every", settings.publish_every,
    "--learning-rate-share", settings.learning_rate_share,
  ]
  with (workdir / "learner.log").open("wb") as log:
    process = subprocess.Popen([str(part) for part in learning], stdout=log, stderr=log)
    try:
      while not (learner / "published" / "latest.json").exists():
        if process.poll() is not None:
          raise RuntimeError(f"the learner ended; see {workdir / 'learner.log'}")
        time.sleep(0.5)
      with running_server(
        trained, stores["online"], *common, "--published", learner / "published",
        "--serving.segment-s", settings.segment_s, log=workdir / "online.log",
      ) as online, running_server(
        trained, stores["frozen"], *common, "--serving.segment-s", 3600,
        log=workdir / "frozen.log",
      ) as frozen:
        loop = _Loop(market, {"online": online, "frozen": frozen}, segments, learner, process)
        return asyncio.run(loop.run(range(settings.first_days, options.market.days)))
    finally:
      process.kill()
      process.wait()


def _trained(market: Market, workdir: Path, options: Options) -> Path:
  """A run on the first days."""
  settings = options.settings
  data = prepared_first_days(market, workdir / "data", settings.first_days)
  config = Config(model=options.model, train=options.train, search=options.search)
  config = dataclasses.replace(config, train=of_epochs(options.train, settings.epochs, data))
  train_run(run_of(data, data / "sids", config), workdir / "run", resume=True)
  return workdir / "run"


class _Loop:
  """The market, hour by hour, against both servers."""

  def __init__(
    self, market: Market, servers: Mapping[str, Server], segments: Path, learner: Path,
    process: subprocess.Popen,
  ):
    self._market, self._servers, self._process = market, servers, process
    self._segments, self._learner = segments, learner
    self._shelves = build_shelves(market)
    self._asked: list[Requests] = []
    self._answers: dict[str, list[np.ndarray]] = {arm: [] for arm in ARMS}

  async def run(self, days: range) -> dict[str, float]:
    """Serves the days; the numbers."""
    revenue: dict[str, list[np.ndarray]] = {arm: [] for arm in ARMS}
    users, results, events = [], {}, 0
    clients = {arm: aiohttp.ClientSession(s.url) for arm, s in self._servers.items()}
    try:
      for day in days:
        self._asked, self._answers = [], {arm: [] for arm in ARMS}
        events += await self._serve(day, clients)
        requests = Requests(*map(np.concatenate, zip(*self._asked, strict=True)))
        for arm in ARMS:
          ranked_RK = np.concatenate(self._answers[arm])
          earned_R = expected_revenue(self._market, requests, ranked_RK).revenue_R
          revenue[arm].append(earned_R)
          results[f"{arm}/day_{day}"] = float(earned_R.mean())
        users.append(requests.user_R)
        steps = await self._caught_up()
        results[f"learner_steps/day_{day}"] = float(steps)
        console.print(
          f"day {day}: {len(requests.user_R):,} requests; "
          + ", ".join(f"{arm} {results[f'{arm}/day_{day}']:.4f}" for arm in ARMS)
          + f"; learner at step {steps}"
        )
    finally:
      for client in clients.values():
        await client.close()
    return results | _ratio(revenue, users) | {
      "requests": float(sum(map(len, users))), "events": float(events),
      "parameters_taken_over": self._servers["online"].metric("gr4ad_reloads_total", 'result="ok"'),
    }

  async def _serve(self, day: int, clients: Mapping[str, aiohttp.ClientSession]) -> int:
    """One day; simulate_hours asks for answers in this thread's place, so it runs in another."""
    loop, events = asyncio.get_running_loop(), 0

    def policy(requests: Requests, open_V: np.ndarray, rng: np.random.Generator) -> Shown:
      del rng
      answers = asyncio.run_coroutine_threadsafe(self._ask(requests, clients), loop).result()
      self._asked.append(requests)
      for arm in ARMS:
        self._answers[arm].append(answers[arm])
      ad_RK = answers["online"]
      open_RK = (ad_RK >= 0) & open_V[self._market.advertiser_A[ad_RK]]
      ad_RK = np.where(open_RK & (np.cumsum(open_RK, axis=1) <= SHOWN), ad_RK, -1)
      return Shown(ad_RK, np.full(ad_RK.shape, np.nan, np.float32))

    hours = simulate_hours(self._market, day, policy, shelves=self._shelves)
    while (frame := await asyncio.to_thread(next, hours, None)) is not None:
      events += len(frame)
      await asyncio.gather(*(self._tell(client, frame) for client in clients.values()))
    return events

  async def _ask(
    self, requests: Requests, clients: Mapping[str, aiohttp.ClientSession]
  ) -> dict[str, np.ndarray]:
    """int32 [R, 10] ads of both servers."""
    rows = list(zip(*requests, strict=True))

    async def of(arm: str) -> np.ndarray:
      ad_RK = np.full((len(rows), 10), -1, np.int32)
      waiting = iter(range(len(rows)))

      async def some() -> None:
        for row in waiting:
          user, time_s, scene = rows[row]
          body = {"user_id": str(user), "time": int(time_s), "k": 10,
                  "features": {"scene": SCENES[scene]}}
          async with clients[arm].post("/v1/recommend", json=body) as reply:
            if reply.status != 200:
              raise RuntimeError(f"{arm}: {reply.status} {await reply.text()}")
            ads = [int(ad["ad_id"]) for ad in (await reply.json())["ads"]]
          ad_RK[row, : len(ads)] = ads

      await asyncio.gather(*(some() for _ in range(AT_ONCE)))
      return ad_RK

    return dict(zip(ARMS, await asyncio.gather(*map(of, ARMS)), strict=True))

  async def _tell(self, client: aiohttp.ClientSession, frame: pd.DataFrame) -> None:
    """Sends events."""
    features = [name for name in frame.columns if name.startswith("feature_")]
    events = []
    for row in frame.to_dict("records"):
      event = {
        "user_id": str(row["user_id"]), "time": int(row["time"]), "value": float(row["value"]),
        "action": Action(row["action"]).name.lower(),
        "features": {name.removeprefix("feature_"): str(row[name]) for name in features},
      }
      for name in ("ad_id", "content_id", "request_id"):
        if not pd.isna(row[name]):
          event[name] = str(row[name])
      events.append(event)
    for at in range(0, len(events), EVENTS):
      async with client.post("/v1/events", json={"events": events[at : at + EVENTS]}) as reply:
        if reply.status != 200:
          raise RuntimeError(f"{reply.status} {await reply.text()}")

  async def _caught_up(self) -> int:
    """Waits until the learner has seen all events and the server what it published; its step."""
    server = self._servers["online"]
    seen = server.metric("gr4ad_events_total")
    while True:
      if self._process.poll() is not None:
        raise RuntimeError(f"the learner ended; see {self._learner.parent / 'learner.log'}")
      files = sorted(self._segments.glob("events-*.parquet"))
      last = int(files[-1].stem.rpartition("-")[2]) if files else 0
      learned = sum(row["kind"] == "segment" for row in read_log(self._learner))
      if last >= seen and learned >= len(files):
        latest = json.loads((self._learner / "published" / "latest.json").read_text())["step"]
        if server.metric("gr4ad_parameters_step") >= latest:
          return int(latest)
      await asyncio.sleep(0.5)


def _ratio(
  revenue: Mapping[str, list[np.ndarray]], users: list[np.ndarray]
) -> dict[str, float]:
  """Online over frozen: all days, first and last third; intervals over users."""
  days = len(users)
  parts = {"all": slice(None), "first_third": slice(0, max(1, days // 3)),
           "last_third": slice(-max(1, days // 3), None)}
  rng, found = np.random.default_rng(0), {}
  for name, part in parts.items():
    user_R = np.concatenate(users[part])
    sums = [
      np.bincount(user_R, weights=np.concatenate(revenue[arm][part])) for arm in ARMS
    ]
    drawn = rng.integers(0, len(sums[0]), (2_000, len(sums[0])))
    ratios = sums[0][drawn].sum(axis=1) / sums[1][drawn].sum(axis=1) - 1
    low, high = np.quantile(ratios, (0.025, 0.975))
    found |= {
      f"online_over_frozen/{name}": float(sums[0].sum() / sums[1].sum() - 1),
      f"online_over_frozen/{name}_low": float(low),
      f"online_over_frozen/{name}_high": float(high),
    }
  return found


def table(results: Mapping[str, float]) -> str:
  """Revenue by day, and the ratio."""
  days = sorted(int(name.split("_")[-1]) for name in results if name.startswith("online/day_"))
  lines = ["| day | online | frozen |", "|---:|---:|---:|"]
  lines += [
    f"| {day} | {results[f'online/day_{day}']:.4f} | {results[f'frozen/day_{day}']:.4f} |"
    for day in days
  ]
  lines += ["", "| online over frozen | difference (95% over users) |", "|---|---:|"]
  for name in ("all", "first_third", "last_third"):
    found = (results[f"online_over_frozen/{name}{part}"] for part in ("", "_low", "_high"))
    lines.append(f"| {name.replace('_', ' ')} | {change(*found)} |")
  return "\n".join(lines)


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """Revenue over the days."""
  figure = Figure(figsize=(7.0, 3.6), layout="constrained")
  ax = figure.subplots()
  plain(ax)
  for arm, colour in (("frozen", "#b0553a"), ("online", "#2f6f9f")):
    revenue_by_day(ax, results, arm, "o-", color=colour, markersize=4)
  return {"closed_loop": figure}
