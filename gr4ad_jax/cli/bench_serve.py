"""A day of traffic on a server, and what came of it: `gr4ad bench serve`.

Requests are sent when they are due, whatever the answers to earlier ones (an open loop), and
latency counts from that moment: a server that falls behind cannot hide it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import aiohttp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from gr4ad_jax.cli.bench_config import LoadConfig
from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine.storage import write_json

PARTS = ("off-peak", "ramp", "peak", "burst")
# (share of the day, part); the rate runs linearly over ramps.
_DAY = ((0.25, "off-peak"), (0.35, "ramp"), (0.62, "peak"), (0.67, "burst"), (0.75, "peak"),
        (0.85, "ramp"), (1.0, "off-peak"))  # fmt: skip
_FAULTS = (aiohttp.ClientError, TimeoutError)


@dataclasses.dataclass(frozen=True)
class Sample:
  """One request, or an event that was not taken: an error like a request without an answer.

  Attributes:
    due_s: since the beginning, when it was to be sent.
    part: of the day.
    latency_ms: from then to the whole answer; NaN for an event.
    status: of the answer; 0 = none came.
    user: who asked, by place in the server's list.
    factor: of the beams; NaN without an answer.
    value: expected value of the ads returned, in the log's currency, each by its probability.
    cached: the answer had been given before.
  """

  due_s: float
  part: str
  latency_ms: float
  status: int
  user: int
  factor: float = math.nan
  value: float = math.nan
  cached: bool = False


class Visit(NamedTuple):
  """A request to come; `clicks` = on an ad of the answer."""

  due_s: float
  user: int
  clicks: bool


def part_of(share: float) -> str:
  """Which part of the day a share of it is in."""
  return next(part for end, part in _DAY if share < end or end == 1.0)


def rate(share: float, config: LoadConfig) -> float:
  """Requests a second at a share of the day."""
  low, peak = config.off_peak_share * config.peak_qps, config.peak_qps
  if part_of(share) == "burst":
    return peak * config.burst_share
  return float(np.interp(share, (0.25, 0.35, 0.75, 0.85), (low, peak, peak, low)))


def arrivals(config: LoadConfig) -> list[float]:
  """Seconds of all requests: a Poisson process at that rate."""
  rng = np.random.default_rng(config.seed)
  most = config.peak_qps * max(1.0, config.burst_share, config.off_peak_share)
  at, times = 0.0, []
  while (at := at + rng.exponential(1 / most)) < config.day_s:
    if rng.random() < rate(at / config.day_s, config) / most:
      times.append(at)
  return times


def run_load(
  url: str,
  config: LoadConfig,
  *,
  api_key: str | None = None,
  use_cache: bool = True,
  progress: Callable[[Iterable, str, int], Iterable] | None = None,
) -> list[Sample]:
  """Sends a day of traffic.

  Args:
    url: of the server.
    config: rates, users.
    api_key: of the server.
    use_cache: take answers that were given before.
    progress: like gr4ad_jax.machine.progress.track.

  Raises:
    ConfigError: no server answers there, or it knows no users.
  """
  headers = {"x-api-key": api_key} if api_key else {}
  if not use_cache:
    headers["cache-control"] = "no-cache"
  return asyncio.run(_run(url, config, headers, progress))


async def _run(url, config, headers, progress) -> list[Sample]:
  async with aiohttp.ClientSession(
    url, headers=headers, connector=aiohttp.TCPConnector(limit=0),
    timeout=aiohttp.ClientTimeout(total=config.timeout_s),
  ) as client:
    users = await _users(client, url, config)
    visits = _visits(config, len(users))
    tasks, began_s = [], time.perf_counter()
    for visit in progress(visits, "requests", len(visits)) if progress else visits:
      due_s = began_s + visit.due_s
      await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
      tasks.append(asyncio.create_task(_ask(client, visit, due_s, users[visit.user], config)))
    samples = [sample for found in await asyncio.gather(*tasks) for sample in found]
  return sorted(samples, key=lambda sample: sample.due_s)


def _visits(config: LoadConfig, num_users: int) -> list[Visit]:
  rng = np.random.default_rng(config.seed + 1)
  weight_U = 1 / np.arange(1, num_users + 1) ** config.skew
  times = arrivals(config)
  user = rng.choice(num_users, len(times), p=weight_U / weight_U.sum())
  clicks = rng.random(len(times)) < config.event_share
  return list(map(Visit, times, user.tolist(), clicks.tolist()))


async def _users(client: aiohttp.ClientSession, url: str, config: LoadConfig) -> list[str]:
  try:
    async with client.get("/v1/users", params={"limit": config.users}) as reply:
      reply.raise_for_status()
      users = await reply.json()
  except _FAULTS as error:
    raise ConfigError(f"{url}: no server that knows users ({error!r})") from None
  if not users:
    raise ConfigError(f"{url}: the server knows no users")
  return users


async def _ask(
  client: aiohttp.ClientSession, visit: Visit, due_s: float, user_id: str, config: LoadConfig
) -> list[Sample]:
  """Asks for ads and may click on the first; `due_s` is on the clock of `perf_counter`."""
  status, text = await _post(client, "/v1/recommend", {"user_id": user_id, "k": config.k})
  part, latency_ms = part_of(visit.due_s / config.day_s), 1000 * (time.perf_counter() - due_s)
  if status != 200:
    return [Sample(visit.due_s, part, latency_ms, status, visit.user)]
  answer = json.loads(text)
  ads = answer["ads"]
  samples = [Sample(
    visit.due_s, part, latency_ms, status, visit.user, factor=answer["schedule"]["factor"],
    value=sum(ad["probability"] * ad["expected_value"] for ad in ads), cached=answer["cached"],
  )]
  if visit.clicks and ads:
    event = {"user_id": user_id, "ad_id": ads[0]["ad_id"], "action": "click"}
    status, _ = await _post(client, "/v1/events", {"events": [event]})
    if status != 200:
      samples.append(Sample(visit.due_s, part, math.nan, status, visit.user))
  return samples


async def _post(client: aiohttp.ClientSession, path: str, body: dict) -> tuple[int, bytes]:
  """Status and text of the answer; 0 where none came whole."""
  try:
    async with client.post(path, json=body) as reply:
      return reply.status, await reply.read()
  except _FAULTS:
    return 0, b""


def summary(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
  """Part of the day -> requests, qps, p50_ms, p95_ms, p99_ms, errors, refused, cache_hits, factor
  (mean over searched requests), value (mean over all answers); "day" holds all of them."""
  parts = {part: [s for s in samples if s.part == part] for part in PARTS}
  parts = {part: rows for part, rows in parts.items() if rows} | {"day": list(samples)}
  return {part: _numbers(rows) for part, rows in parts.items()}


def _numbers(rows: list[Sample]) -> dict[str, float]:
  good = [s for s in rows if s.status == 200]
  latency = [s.latency_ms for s in good] or [math.nan]
  seconds = len({int(s.due_s) for s in rows})  # a part may be in pieces
  p50, p95, p99 = np.percentile(latency, (50, 95, 99))
  searched = [s.factor for s in good if not s.cached]
  return {
    "requests": len(rows), "qps": len(rows) / max(seconds, 1), "p50_ms": float(p50),
    "p95_ms": float(p95), "p99_ms": float(p99),
    "errors": sum(s.status not in (200, 429) for s in rows),
    "refused": sum(s.status == 429 for s in rows),
    "cache_hits": sum(s.cached for s in good) / max(len(good), 1),
    "factor": float(np.mean(searched)) if searched else math.nan,
    "value": float(np.mean([s.value for s in good])) if good else math.nan,
  }


def write(samples: Sequence[Sample], config: LoadConfig, folder: Path) -> None:
  """Writes load.json (settings, summary, every request) and load.png."""
  folder.mkdir(parents=True, exist_ok=True)
  columns = {}
  for field in dataclasses.fields(Sample):
    values = (getattr(sample, field.name) for sample in samples)
    columns[field.name] = [None if value != value else value for value in values]  # NaN
  write_json(folder / "load.json", {
    "load": dataclasses.asdict(config), "summary": summary(samples), "requests": columns,
  })
  figure = plot(samples)
  figure.savefig(folder / "load.png", dpi=120)
  plt.close(figure)


def plot(samples: Sequence[Sample]) -> Figure:
  """Requests, latency, beams and cache hits over the day."""
  figure, axes = plt.subplots(4, 1, figsize=(9, 9), sharex=True, layout="constrained")
  last = 59  # a day is drawn as 60 points, a short one second by second
  step_s = max(samples[-1].due_s / (last + 1), 1.0)
  groups = itertools.groupby(samples, lambda sample: min(int(sample.due_s / step_s), last))
  rows = [((slot + 0.5) * step_s, _numbers(list(group))) for slot, group in groups]
  for axis, key, style, label, scale in (
    (axes[0], "requests", "-", "requests", 1 / step_s),
    (axes[0], "refused", ":", "refused (429)", 1 / step_s),
    (axes[1], "p50_ms", "-", "p50", 1),
    (axes[1], "p99_ms", "--", "p99", 1),
    (axes[2], "factor", "-", "", 1),
    (axes[3], "cache_hits", "-", "", 100),
  ):
    values = [scale * numbers[key] for _, numbers in rows]
    axis.plot([at for at, _ in rows], values, style, color="C0", label=label)
  names = ("requests / s", "latency, ms", "beams, multiple of base", "cache hits, %")
  for axis, name in zip(axes, names, strict=True):
    axis.set_ylabel(name)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
  axes[1].set_yscale("log")
  for axis in axes[:2]:
    axis.legend(frameon=False, fontsize=8)
  axes[0].set_ylim(bottom=0)
  axes[3].set_ylim(0, 100)
  axes[3].set_xlabel("seconds of the squeezed day")
  return figure
