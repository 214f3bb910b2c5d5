"""A server without HTTP: its parts, made and connected, and their common life."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from gr4ad_jax.catalog.catalog import LiveCatalog
from gr4ad_jax.catalog.targeting import COLUMNS
from gr4ad_jax.data.records import DAY_S
from gr4ad_jax.data.trending import LiveTrending
from gr4ad_jax.embedding.embeddings import open_encoder
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.lock import Lock
from gr4ad_jax.machine.progress import console
from gr4ad_jax.search.config import check_widths
from gr4ad_jax.search.opened import Opened
from gr4ad_jax.serving.ads import Ads
from gr4ad_jax.serving.batcher import Batcher
from gr4ad_jax.serving.clock import Clock, ClockKind
from gr4ad_jax.serving.config import ServingConfig
from gr4ad_jax.serving.engine import Engine
from gr4ad_jax.serving.events import Events, Trends
from gr4ad_jax.serving.histories import Histories, RedisLink
from gr4ad_jax.serving.journal import Journal
from gr4ad_jax.serving.metrics import Metrics
from gr4ad_jax.serving.parameters import Parameters
from gr4ad_jax.serving.recommend import Replies, Searches
from gr4ad_jax.serving.result_cache import LocalStore, RedisStore, ResultCache
from gr4ad_jax.serving.segments import Segments
from gr4ad_jax.serving.users import Users
from gr4ad_jax.version import __version__

THREADS = 8  # for what a request may wait for: the store, the index, a file


class Service:
  """A server's parts; made once, before the first request.

  What it does is done by them: `recommend`, `events`, `ads`, `parameters`.
  """

  def __init__(
    self,
    opened: Opened,
    *,
    config: ServingConfig,
    store: Path,
    segments: Path,
    published: Path | None = None,
    redis: str | None = None,
    clock: ClockKind = "real",
    quick: bool = False,
  ):
    """Opens a trained run and warms its searches.

    Args:
      opened: the run.
      config: batches, beams, limits.
      store: folder for accepted events and ads.
      segments: folder for log segments.
      published: folder where `gr4ad online` publishes parameters; None = none are followed.
      redis: URL of a Redis for histories and answers; None = this server's own.
      clock: "log" begins right after the log's last event, for logs of the past; "replay" stands
        there and moves with the times of accepted events.
      quick: compiles one program now, and the others while it serves.

    Raises:
      ConfigError, ValueError: a part that cannot be used.
    """
    self.config, self.metrics = config, Metrics()
    self.opened, logs = opened, opened.logs
    last_s = int(logs.events.time_s.max())
    self.log_age_days = (time.time() - last_s) / DAY_S if clock == "real" else 0.0
    self._lock = Lock(store, "a server")
    weakref.finalize(self, self._lock.close)  # where a part cannot be used, and it never runs
    self._link = RedisLink(redis) if redis else None
    self.journal = Journal(store / "journal.sqlite")
    # An earlier life may have gone further than the log.
    self.clock = Clock(clock, begin_s=max(last_s, self.journal.last_time_s) + 1)

    encoder_name = opened.sids.config.encoder
    embeddings = storage.fetch(opened.data / "embeddings")
    self.catalog = LiveCatalog(
      logs.ads, opened.sids, opened.index, opened.contexts,
      encode=open_encoder(encoder_name, folder=embeddings, file=opened.sids.encoder_file),
      spare=config.spare,
    )
    self.ads = Ads(self.catalog, self.journal, encoder=encoder_name, metrics=self.metrics)
    self.ads.restore()
    search = opened.search
    if config.widths:
      search = dataclasses.replace(search, widths=config.widths)
      check_widths(search.widths, len(opened.sids.codebook_sizes))
    self.engine = Engine(
      opened.generator, opened.params, step=opened.step, catalog=self.catalog, search=search,
      bin_means=opened.bin_means, config=config,
    )
    self.users = Users(logs, opened.examples)
    someone = self.users.profile(
      str(self.users.ids[0]), None, self.catalog.now, now_s=self.clock.now_s, features={},
      history=None,
    ).example
    self.parameters = Parameters(
      self.engine, template=opened.params, read_run=opened.read_params, published=published,
      canary=someone, metrics=self.metrics,
    )
    reads_trending = opened.examples.trending is not None
    trends = Trends(LiveTrending(logs) if reads_trending else None, self.engine, self.clock)
    trends.restore(self.journal, self.catalog.now)
    self.engine.example = someone
    self.parts_ms: dict[str, float] = {}  # of a search, measured once
    if quick:
      self.engine.compile_one()
    else:
      self.engine.compile_all()
      self._time_parts()
    self.parameters.begin()  # whose first search is a compiled one, too

    self.batcher = Batcher(self.engine)
    self.metrics.watch(
      engine=self.engine, batcher=self.batcher, catalog=self.catalog, journal=self.journal
    )
    self.histories = Histories(self.journal, config.max_history, self._link)
    self.events = Events(
      self.journal, self.catalog, self.clock, trends, self.histories,
      self.users.request_features, self.metrics,
    )
    self.segments = Segments(
      self.journal, segments, self.users.request_features, self.clock, config
    )
    self.segments.sweep()
    self.recommend = Replies(
      Searches(self.users, self.catalog, trends, self.clock, self.batcher, self.metrics,
               logs.currency, search.exclude_seen),
      self.histories, _result_cache(config, self._link), self.parameters, opened.fingerprint,
      config,
    )

  def _time_parts(self) -> None:
    self.parts_ms = {name: 1000 * seconds for name, seconds in self.engine.parts_s().items()}

  @contextlib.asynccontextmanager
  async def running(self) -> AsyncIterator[None]:
    """Answers from begin to end; then answers what still waits, writes the last segment, closes."""
    await self._open_store()
    self.batcher.start()
    jobs = {"export": self.segments.write_later}
    if self.parameters.published is not None:
      jobs["follow"] = self.parameters.follow
    if self._link:
      jobs["redis"] = self.histories.carry
    tasks = [asyncio.create_task(self._for_ever(*job)) for job in jobs.items()]
    if not self.engine.is_whole:
      tasks.append(asyncio.create_task(self._compile_rest()))
    # What is there now stays: the collector must not walk through a whole log again and again.
    gc.collect()
    gc.freeze()
    yield
    self.engine.stop()
    await self.batcher.stop()
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    try:
      await asyncio.to_thread(self.segments.write)
    finally:
      if self._link:
        await self._link.close()
      self.journal.close()
      self._lock.close()

  async def _open_store(self) -> None:
    """Every thread that works for requests opens the store now, not when files may be short."""
    opened = threading.Barrier(THREADS)
    threads = concurrent.futures.ThreadPoolExecutor(THREADS, "requests")
    asyncio.get_running_loop().set_default_executor(threads)

    def open_here() -> None:
      self.journal.last_seq  # noqa: B018
      opened.wait()

    await asyncio.gather(*(asyncio.to_thread(open_here) for _ in range(THREADS)))

  async def _compile_rest(self) -> None:
    try:
      done = await self.batcher.compile_rest()
    except Exception as error:  # what is there goes on answering
      self.metrics.faults.labels("compile").inc()
      console.print(f"compile: {error!r}; serving goes on with one program")
      return
    if done:
      await asyncio.to_thread(self._time_parts)

  async def _for_ever(self, name: str, job: Callable[[], Awaitable[None]]) -> None:
    """Does a job again and again; a fault, such as a full disk, must not be the last time."""
    said = ""
    while True:
      try:
        await job()
      except Exception as error:
        self.metrics.faults.labels(name).inc()
        if said != (said := f"{name}: {error!r}"):  # once, not every second
          console.print(f"{said}; trying again")
        await asyncio.sleep(1.0)

  def about(self) -> dict[str, Any]:
    """What this server serves, as JSON values."""
    engine, now, logs = self.engine, self.catalog.now, self.opened.logs
    return {
      "version": __version__, "source": logs.source, "step": engine.step,
      "index_version": now.snapshot.version, "live_ads": len(now.snapshot.index.ads_A),
      "currency": logs.currency,
      "schedules": [
        {"factor": factor, "widths": list(widths), "call_ms": 1000 * engine.call_s[factor, 1]}
        for factor, widths in engine.widths.items() if (factor, 1) in engine.call_s
      ],
      "parts_ms": self.parts_ms,
      "exclude_seen": self.opened.search.exclude_seen,
      "max_k": self.config.max_k, "targeting": list(COLUMNS),
      "features": {name: values[:200] for name, values in self.users.features.items()},
    }


def _result_cache(config: ServingConfig, link: RedisLink | None) -> ResultCache | None:
  """Earlier replies, in Redis where servers share one; None where none are given again."""
  if not config.cache_ttl_s:
    return None
  if link:
    return ResultCache(RedisStore(link, ttl_s=config.cache_ttl_s))
  return ResultCache(LocalStore(size=config.cache_size, ttl_s=config.cache_ttl_s))
