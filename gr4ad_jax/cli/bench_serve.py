"""A day of traffic on a server, and what came of it: `gr4ad bench serve`.

Requests are sent when they are due, whatever the answers to earlier ones (an open loop), and
latency counts from that moment: a server that falls behind cannot hide it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

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


@dataclasses.dataclass(frozen=True)
class Sample:
  """One request.

  Attributes:
    due_s: since the beginning, when it was to be sent.
    part: of the day.
    latency_ms: from then to the whole answer.
    status: of the answer; 0 = none came.
    factor: of the beams; NaN without an answer.
    value: expected value of the ads returned, in the log's currency, each by its probability.
    cached: the answer had been given before.
    user: who asked, by place in the server's list.
  """

  due_s: float
  part: str
  latency_ms: float
  status: int
  factor: float
  value: float
  cached: bool
  user: int


def part_of(share: float) -> str:
  """Which part of the day a share of it is in."""
  return next(part for end, part in _DAY if share < end or end == 1.0)


def rate(share: float, config: LoadConfig) -> float:
  """Requests a second at a share of the day."""
  low, peak = config.off_peak_share * config.peak_qps, config.peak_qps
  match part_of(share):
    case "off-peak":
      return low
    case "peak":
      return peak
    case "burst":
      return peak * config.burst_share
  up = (share - 0.25) / 0.1 if share < 0.5 else (0.85 - share) / 0.1
  return low + (peak - low) * up


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
    rng = np.random.default_rng(config.seed + 1)
    weight_U = 1 / np.arange(1, len(users) + 1) ** config.skew
    times = arrivals(config)
    chosen = rng.choice(len(users), len(times), p=weight_U / weight_U.sum())
    clicks = rng.random(len(times)) < config.event_share
    samples: list[Sample] = []
    tasks, began = set(), time.perf_counter()
    due = zip(times, chosen, clicks, strict=True)
    for at, user, click in progress(due, "requests", len(times)) if progress else due:
      await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
      body = {"user_id": users[user], "k": config.k}
      task = asyncio.create_task(
        _one(client, body, began + at, at, int(user), bool(click), config, samples)
      )
      tasks.add(task)
      task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
  return sorted(samples, key=lambda sample: sample.due_s)


_FAULTS = (aiohttp.ClientError, TimeoutError)


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


async def _one(client, body, due, at, user, click, config, samples) -> None:
  status, text = 0, b""
  try:
    async with client.post("/v1/recommend", json=body) as reply:
      text = await reply.read()
      status = reply.status
  except _FAULTS:
    pass
  latency_ms = 1000 * (time.perf_counter() - due)
  factor, value, cached, ads = math.nan, math.nan, False, []
  if status == 200:
    answer = json.loads(text)
    ads, cached = answer["ads"], answer["cached"]
    factor = answer["schedule"]["factor"]
    value = sum(ad["probability"] * ad["expected_value"] for ad in ads)
  part = part_of(at / config.day_s)
  samples.append(Sample(at, part, latency_ms, status, factor, value, cached, user))
  if click and ads:
    event = {"user_id": body["user_id"], "ad_id": ads[0]["ad_id"], "action": "click"}
    status = 0
    try:
      async with client.post("/v1/events", json={"events": [event]}) as reply:
        await reply.read()
        status = reply.status
    except _FAULTS:
      pass
    if status != 200:  # an event that was not taken is an error like a request
      samples.append(Sample(at, part, math.nan, status, math.nan, math.nan, False, user))


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
  columns = {
    field.name: [getattr(s, field.name) for s in samples] for field in dataclasses.fields(Sample)
  }
  columns = {
    name: [None if value != value else value for value in values]
    for name, values in columns.items()
  }
  write_json(folder / "load.json", {
    "load": dataclasses.asdict(config), "summary": summary(samples), "requests": columns,
  })
  figure = plot(samples)
  figure.savefig(folder / "load.png", dpi=120)
  plt.close(figure)


def plot(samples: Sequence[Sample]) -> Figure:
  """Requests, latency, beams and cache hits over the day."""
  figure, axes = plt.subplots(4, 1, figsize=(9, 9), sharex=True, layout="constrained")
  step = max(samples[-1].due_s / 60, 1.0)
  edges = np.arange(0, samples[-1].due_s, step)
  bins = np.digitize([s.due_s for s in samples], edges) - 1
  groups = [[s for s, b in zip(samples, bins, strict=True) if b == i] for i in range(len(edges))]
  rows = [(edge + step / 2, _numbers(group)) for edge, group in zip(edges, groups, strict=True)
          if group]

  def line(axis, key: str, style: str = "-", label: str = "", scale: float = 1.0) -> None:
    values = [scale * numbers[key] for _, numbers in rows]
    axis.plot([at for at, _ in rows], values, style, color="C0", label=label)

  line(axes[0], "requests", label="requests", scale=1 / step)
  line(axes[0], "refused", ":", "refused (429)", 1 / step)
  line(axes[1], "p50_ms", label="p50")
  line(axes[1], "p99_ms", "--", "p99")
  line(axes[2], "factor")
  line(axes[3], "cache_hits", scale=100)
  for axis, label in zip(
    axes, ("requests / s", "latency, ms", "beams, multiple of base", "cache hits, %"), strict=True
  ):
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
  axes[1].set_yscale("log")
  for axis in axes[:2]:
    axis.legend(frameon=False, fontsize=8)
  axes[0].set_ylim(bottom=0)
  axes[3].set_ylim(0, 100)
  axes[3].set_xlabel("seconds of the squeezed day")
  return figure
