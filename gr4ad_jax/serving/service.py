"""What a server does, without HTTP: recommend, take events and ads, follow published parameters."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import fcntl
import gc
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.records import Action
from gr4ad_jax.data.trending import LiveTrending
from gr4ad_jax.data.validation import LogError
from gr4ad_jax.embedding.embeddings import open_encoder
from gr4ad_jax.gr4ad.run import Inputs, check_widths, load_params, open_inputs, read_run
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.serving.batcher import Batcher
from gr4ad_jax.serving.catalog import Catalog, LiveCatalog, NoRoom
from gr4ad_jax.serving.config import ServingConfig
from gr4ad_jax.serving.engine import Answer, Engine, Query
from gr4ad_jax.serving.histories import JournalHistories, Latest, RedisHistories, RedisLink
from gr4ad_jax.serving.journal import Event, Journal, export_segment, prune
from gr4ad_jax.serving.keys import cache_key
from gr4ad_jax.serving.messages import (
  AdFields,
  HistoryItem,
  Level,
  RecommendedAd,
  RecommendRequest,
  Schedule,
  UserEvent,
)
from gr4ad_jax.serving.metrics import Metrics
from gr4ad_jax.serving.result_cache import LocalStore, RedisStore, ResultCache
from gr4ad_jax.serving.users import Users
from gr4ad_jax.training.published import latest, read_published

Clock = Literal["real", "log", "replay"]
MOST_AHEAD_S = 86_400  # an event's time beyond the server's clock
MOST_REPLAYED_S = 40 * 86_400  # the same where events move the clock
LOOK_S = 0.5  # between looks for published parameters
SHOWN_COLUMNS = ("advertiser_id", "category", "text")
BEST_PREFIXES = 24  # of a level, in an explanation


class UnknownAd(ConfigError):
  """An ad that is not, or no longer, in the index."""


class Service:
  """All of a server's state; made once, before the first request."""

  def __init__(
    self,
    workdir: Place,
    *,
    config: ServingConfig,
    store: Path,
    segments: Path,
    published: Path | None = None,
    redis: str | None = None,
    clock: Clock = "real",
    progress: Callable | None = None,
  ):
    """Opens a trained run and warms its searches.

    Args:
      workdir: the run.
      config: batches, beams, limits.
      store: folder for accepted events and ads.
      segments: folder for log segments.
      published: folder where `gr4ad online` publishes parameters; None = none are followed.
      redis: URL of a Redis for histories and answers; None = this server's own.
      clock: "log" begins right after the log's last event, for logs of the past; "replay" stands
        there and moves with the times of accepted events.
      progress: like gr4ad_jax.machine.progress.track.

    Raises:
      ConfigError, ValueError: no trained run, or another part that cannot be used.
    """
    run = read_run(workdir)
    self.inputs: Inputs = open_inputs(run)
    logs = self.inputs.logs
    self.config, self.run, self._workdir = config, run, workdir
    self._published, self._segments = published, segments
    last_s = int(logs.events.time_s.max())
    self.log_age_days = (time.time() - last_s) / 86400 if clock == "real" else 0.0
    self._lock = _locked(store)
    self.journal = Journal(store / "journal.sqlite")
    # An earlier life may have gone further than the log.
    begin_s = max(last_s, self.journal.last_time_s) + 1
    self._late_s = time.time() - begin_s if clock == "log" else 0.0
    self._replayed_s = begin_s if clock == "replay" else None
    decoder, params, step = load_params(run, workdir, self.inputs.vocabulary)
    self._template = params
    embeddings = storage.fetch(storage.place(run.data) / "embeddings")
    encoder = open_encoder(self.inputs.sids.config.encoder, folder=embeddings)
    self.catalog = LiveCatalog(self.inputs, encoder, spare=config.spare)
    self.users = Users(self.inputs)
    self._restore_ads()
    search = run.config.search
    if config.widths:
      search = dataclasses.replace(search, widths=config.widths)
      check_widths(dataclasses.replace(run.config, search=search), self.inputs.vocabulary)
    self.engine = Engine(
      decoder, params, step=step, catalog=self.catalog, search=search,
      bin_means=self.inputs.scale.bin_means, config=config,
    )
    self._trending = None
    if self.inputs.make_batch.trending is not None:
      self._trending = LiveTrending(logs)
      self._restore_trending()
    self._parameters = f"run {step}"  # what is served, for the cache and for `reload`
    if published is not None and not self._read_published():
      console.print(f"{published}: nothing is published there yet; serving the run's parameters")
    someone = self.users.profile(
      str(self.users.ids[0]), None, self.catalog.now, now_s=self.now_s, features={}, history=None
    )
    self.engine.warm(someone.example, progress=progress)
    self.parts_ms = {
      name: 1000 * value for name, value in self.engine.parts_s(someone.example).items()
    }
    self.metrics = Metrics(self)
    self._link = RedisLink(redis) if redis else None
    if self._link:
      self.histories = RedisHistories(self.journal, self._link, config.max_history)
      cache = RedisStore(self._link, ttl_s=config.cache_ttl_s)
    else:
      self.histories = JournalHistories(self.journal, config.max_history)
      cache = LocalStore(size=config.cache_size, ttl_s=config.cache_ttl_s)
    self._cache = ResultCache(cache) if config.cache_ttl_s else None
    self.ready = False
    self.batcher: Batcher | None = None
    self._tasks: list[asyncio.Task] = []
    self._ads_lock, self._reload_lock = asyncio.Lock(), asyncio.Lock()
    self._export_lock = threading.Lock()
    self._searcher = concurrent.futures.ThreadPoolExecutor(1, "find")

  @property
  def now_s(self) -> float:
    """Unix seconds by the server's clock."""
    return time.time() - self._late_s if self._replayed_s is None else self._replayed_s

  # ---- life

  async def start(self) -> None:
    """Begins to answer; in a running event loop."""
    self.batcher = Batcher(self.engine)
    self.batcher.start()
    jobs = {"export": self._export_later}
    if self._published is not None:
      jobs["follow"] = self._follow
    if isinstance(self.histories, RedisHistories):
      jobs["redis"] = self.histories.carry
    self._tasks = [asyncio.create_task(self._for_ever(*job)) for job in jobs.items()]
    # What is there now stays: the collector must not walk through a whole log again and again.
    gc.collect()
    gc.freeze()
    self.ready = True

  async def stop(self) -> None:
    """Answers what waits, writes the last segment, closes."""
    self.ready = False
    await self.batcher.stop()
    for task in self._tasks:
      task.cancel()
    await asyncio.gather(*self._tasks, return_exceptions=True)
    try:
      await asyncio.to_thread(self._export)
    finally:
      if self._link:
        await self._link.close()
      self._searcher.shutdown()
      self.journal.close()
      self._lock.close()

  async def _for_ever(self, name: str, job: Callable[[], Awaitable[None]]) -> None:
    """Does a job again and again; a fault, such as a full disk, must not be the last time."""
    said = ""
    while True:
      try:
        await job()
      except Exception as error:
        self.metrics.faults.labels(name).inc()
        if said != (said := f"{name}: {error!r}"):
          console.print(f"{said}; trying again")
        await asyncio.sleep(1.0)

  # ---- recommend

  async def recommend(
    self, request: RecommendRequest, *, use_cache: bool = True
  ) -> dict[str, Any]:
    """The reply to a request, as JSON values; `use_cache` allows an earlier one.

    Raises:
      ConfigError: k or the history is too long, an unknown feature, factor or condition.
      Overloaded, DeadlineExceeded: see `Batcher.submit`.
    """
    began = time.perf_counter()
    self._check(request)
    known = Latest([], "", False)
    if request.user_id is not None and request.history is None:
      known = await self.histories.latest(request.user_id)
    histories_ms = 1000 * (time.perf_counter() - began)

    async def compute() -> dict[str, Any]:
      return await self._searched(request, known)

    cached = False
    if self._cache and use_cache and request.user_id is not None and not request.explain:
      key = cache_key(
        request.model_dump(), known.version, self.run.fingerprint, self._parameters
      )
      where = tuple(request.where)
      reply, how = await self._cache.get(
        key, compute, usable=lambda reply: self._still_there(reply, where)
      )
      self.metrics.cache(how)
      cached = how != "miss"
    else:
      reply = await compute()
    total_ms = 1000 * (time.perf_counter() - began)
    latency_ms = {} if cached else reply["latency_ms"]
    return reply | {
      "request_id": uuid.uuid4().hex, "cached": cached,
      "degraded": ["user_events"] if known.degraded else [],
      "latency_ms": latency_ms | {"histories": histories_ms, "total": total_ms},
    }

  def _check(self, request: RecommendRequest) -> None:
    config = self.config
    if request.k > config.max_k:
      raise ConfigError(f"k={request.k}: must be at most {config.max_k}")
    if request.history is not None and len(request.history) > config.max_history:
      raise ConfigError(
        f"history: {len(request.history)} events, must be at most {config.max_history}"
      )
    if request.beam_factor is not None and request.beam_factor not in config.beam_factors:
      known = ", ".join(f"{factor:g}" for factor in config.beam_factors)
      raise ConfigError(f"beam_factor={request.beam_factor:g}: must be one of {known}")
    if request.where:  # a condition that no ad meets must not reach the others' call
      self.catalog.now.allowed(tuple(request.where))

  def _still_there(self, reply: dict[str, Any], where: tuple[str, ...]) -> bool:
    """Every ad is live and as it was; checked by content, as servers may share a cache."""
    now = self.catalog.now
    keep_A = now.allowed(where).keep_A if where else None
    for ad in reply["ads"]:
      row = now.snapshot.find(ad["ad_id"])
      if row < 0 or now.snapshot.index.sid_of_ad_A[row] < 0 or not (
        keep_A is None or keep_A[row]
      ):
        return False
      if now.snapshot.codes_of(ad["ad_id"]).tolist() != ad["sid"] or any(
        getattr(now.ads, name)[row] != ad[name] for name in SHOWN_COLUMNS
      ):
        return False
    return True

  async def _searched(self, request: RecommendRequest, known: Latest) -> dict[str, Any]:
    now_s = int(self.now_s if request.time is None else request.time)
    self._see_trending()
    history = request.history
    if history is not None:
      history = [_event(item, "", now_s - 1) for item in history]
    profile = self.users.profile(
      request.user_id, known, self.catalog.now, now_s=now_s + 1, features=request.features,
      history=history,
    )
    query = Query(profile.example, request.user_id or "", request.k, tuple(request.where))
    answer, waited_s = await self.batcher.submit(query, factor=request.beam_factor)
    self.metrics.answered(answer)
    seconds = {"queue": waited_s} | answer.seconds
    return {
      "ads": _ads(answer),
      "schedule": Schedule(factor=answer.factor, widths=list(answer.widths)).model_dump(),
      "step": answer.step,
      "index_version": answer.catalog.snapshot.version,
      "known_user": profile.known,
      "unknown_items": profile.unknown_items,
      "currency": self.inputs.logs.currency,
      "latency_ms": {name: 1000 * value for name, value in seconds.items()},
      "levels": levels(answer) if request.explain else None,
    }

  # ---- events

  async def add_events(self, items: Sequence[UserEvent]) -> int:
    """Keeps events; returns the number of the last one, which is on disk then.

    Raises:
      ConfigError: an ad that the index has never had, or a time in the future.
    """
    catalog, now_s = self.catalog.now, int(self.now_s)
    ahead_s = MOST_AHEAD_S if self._replayed_s is None else MOST_REPLAYED_S
    for at, item in enumerate(items):
      if (item.time or 0) > now_s + ahead_s:
        raise ConfigError(
          f"events[{at}].time={item.time:.0f}: more than {ahead_s // 86_400} days in the future"
        )
      if item.ad_id is not None and catalog.snapshot.find(item.ad_id) < 0:
        raise ConfigError(f"events[{at}].ad_id={item.ad_id!r}: not in the index")
    events = [
      _event(item, item.user_id, now_s)._replace(
        request_id=item.request_id, ecpm=item.ecpm, features=dict(item.features)
      )
      for item in items
    ]
    last = await asyncio.to_thread(self.journal.add_events, events)
    if self._replayed_s is not None:
      self._replayed_s = max(self._replayed_s, *(event.time_s for event in events))
    self._count_trending(events, catalog)
    if isinstance(self.histories, RedisHistories):
      self.histories.added()
    self.metrics.events.inc(len(events))
    return last

  def _export(self) -> None:
    with self._export_lock:  # at the end, an earlier call may still be at it
      while export_segment(
        self.journal, self._segments, feature_names=self.users.request_features
      ):
        pass
      prune(self.journal, self._segments, now_s=self.now_s, keep_days=self.config.keep_days)

  async def _export_later(self) -> None:
    await asyncio.sleep(self.config.segment_s)
    await asyncio.to_thread(self._export)

  def _count_trending(self, events: Sequence[Event], catalog: Catalog) -> None:
    if self._trending is not None:
      self._see_trending()
      self._trending.add(np.array([
        catalog.snapshot.find(event.ad_id) for event in events
        if event.ad_id is not None and event.action >= Action.CLICK
      ], np.int64))

  def _see_trending(self) -> None:
    """Every day has its own shares."""
    if self._trending is not None:
      self.engine.trending = self._trending.at(self.now_s)

  def _restore_trending(self) -> None:
    """Counts the events of an earlier life, day by day."""
    at, catalog = 0, self.catalog.now
    while rows := self.journal.after(at, 10_000):
      for _, event in rows:
        if event.ad_id is not None and event.action >= Action.CLICK:
          self._trending.at(min(event.time_s, self.now_s))
          self._trending.add(np.array([catalog.snapshot.find(event.ad_id)]))
      at = rows[-1][0]
    self._see_trending()

  # ---- ads

  async def put_ads(self, ads: Sequence[AdFields]) -> dict[str, list[int]]:
    """Adds or changes ads; returns their SIDs. They are on disk and in the index then.

    Raises:
      ConfigError: a rule is broken; see `LiveCatalog.change`.
      NoRoom: see there.
    """
    encoder = self.inputs.sids.config.encoder
    for at, ad in enumerate(ads):
      if ad.embedding is not None and encoder != "given":
        raise ConfigError(f"ads[{at}].embedding: these semantic IDs are made by {encoder!r}")
    rows = [_columns(ad) for ad in ads]
    fields = {row["ad_id"]: row for row in rows}
    async with self._ads_lock:
      try:
        codes = await asyncio.to_thread(
          self.catalog.change, rows, keep=lambda: self.journal.put_ads(fields)
        )
      except (ConfigError, LogError):
        raise
      except ValueError as error:
        raise ConfigError(str(error)) from None
    self.metrics.index_changed()
    return {row["ad_id"]: code_L.tolist() for row, code_L in zip(rows, codes, strict=True)}

  async def remove_ad(self, ad_id: str) -> None:
    """Takes an ad out of the index.

    Raises:
      UnknownAd: it is not there.
      ConfigError: it is the last one.
    """
    async with self._ads_lock:
      if not self.catalog.now.is_live(ad_id):
        raise UnknownAd(f"ad_id {ad_id!r} is not in the index")
      await asyncio.to_thread(
        self.catalog.change, gone=[ad_id], keep=lambda: self.journal.remove_ad(ad_id)
      )
    self.metrics.index_changed()

  async def find_ads(self, query: str, limit: int) -> list[dict[str, str]]:
    """Live ads whose id, advertiser, category or text holds all words of `query`."""
    return await asyncio.get_running_loop().run_in_executor(
      self._searcher, _find_ads, self.catalog.now, query, limit
    )

  def _restore_ads(self) -> None:
    """Ads that came and went in an earlier life; what no longer fits is left out and named."""
    ads, now = self.journal.ads(), self.catalog.now
    come = [fields for _, fields, live in ads if live]
    gone = [ad for ad, _, live in ads if not live and now.is_live(ad)]
    if not come and not gone:
      return
    try:
      self.catalog.change(come, gone=gone)
    except ValueError:
      for fields in come:
        self._tried(fields["ad_id"], [fields])
      for ad in gone:
        self._tried(ad, gone=[ad])
    for ad, fields, live in ads:  # late events may name them
      if not live and fields is not None and self._tried(ad, [fields]):
        self._tried(ad, gone=[ad])

  def _tried(self, ad_id: str, ads: Sequence[dict] = (), *, gone: Sequence[str] = ()) -> bool:
    try:
      self.catalog.change(ads, gone=gone)
    except ValueError as error:
      console.print(f"ad {ad_id!r} of the store is left out: {error}")
      return False
    return True

  # ---- parameters

  async def reload(self) -> bool:
    """Takes the newest published parameters, or the run's; returns whether they are others.

    Raises:
      NoRoom: they cannot be read, or are of another model.
    """
    async with self._reload_lock:
      try:
        changed = await asyncio.to_thread(self._read_published)
      except (ValueError, OSError, KeyError, TypeError) as error:
        self.metrics.reloads.labels("failed").inc()
        raise NoRoom(f"parameters: {error}") from None
      if changed:
        self.metrics.reloads.labels("ok").inc()
      return changed

  def _read_published(self) -> bool:
    if self._published is None:
      _, params, step = load_params(self.run, self._workdir, self.inputs.vocabulary)
      name = f"run {step}"
    elif not (self._published / "latest.json").exists():  # the learner may start later
      return False
    else:
      step = latest(self._published)["step"]
      name = f"published {step}"
      if name != self._parameters:
        params = read_published(self._published, self._template, step=step)
    if name == self._parameters:
      return False
    self.engine.replace_params(params, step)
    self._parameters = name
    return True

  async def _follow(self) -> None:
    await asyncio.sleep(LOOK_S)
    await self.reload()


def _locked(store: Path):
  """An open file that keeps other servers out of a store."""
  store.mkdir(parents=True, exist_ok=True)
  file = (store / "lock").open("w")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    raise ConfigError(f"{store}: another server uses it; pass another --store") from None
  return file


def _find_ads(now: Catalog, query: str, limit: int) -> list[dict[str, str]]:
  words, found = query.lower().split(), []
  for row in np.flatnonzero(now.snapshot.index.sid_of_ad_A >= 0).tolist():
    columns = {name: str(getattr(now.ads, name)[row]) for name in ("ad_id", *SHOWN_COLUMNS)}
    text = " ".join(columns.values()).lower()
    if all(word in text for word in words):
      found.append(columns)
      if len(found) == limit:
        break
  return found


def _event(item: HistoryItem, user_id: str, now_s: int) -> Event:
  """What was done; nothing of the request that it belongs to."""
  return Event(
    user_id=user_id, time_s=now_s if item.time is None else int(item.time), ad_id=item.ad_id,
    content_id=item.content_id, action=item.number, request_id=None, value=item.value, ecpm=None,
    features={},
  )


def _columns(ad: AdFields) -> dict[str, Any]:
  """Columns of the ads table."""
  row = ad.model_dump()
  embedding = row.pop("embedding")
  return row if embedding is None else row | {"embedding": embedding}


def _ads(answer: Answer) -> list[dict[str, Any]]:
  found, columns = answer.found, answer.catalog.ads
  return [
    RecommendedAd(
      ad_id=str(columns.ad_id[ad]), advertiser_id=columns.advertiser_id[ad],
      category=columns.category[ad], text=columns.text[ad],
      sid=found.code_RKL[0, rank].tolist(),
      probability=float(np.exp(found.logp_RK[0, rank])),
      level_probability=np.exp(found.level_logp_RKL[0, rank]).tolist(),
      expected_value=float(found.expected_value_RK[0, rank]),
    ).model_dump()
    for rank, ad in enumerate(found.ad_RK[0].tolist()) if ad >= 0
  ]


def levels(answer: Answer) -> list[dict[str, Any]]:
  """How the beams were narrowed: of each level those prefixes that lead to a found SID."""
  code_WL, level_WL = answer.beams.code_BWL[0], answer.beams.level_logp_BWL[0]
  filled = answer.beams.sid_BW[0] >= 0
  code_WL, logp_WL = code_WL[filled], np.cumsum(level_WL[filled], axis=1)
  result, place_of = [], {(): 0}
  for level, kept in enumerate(answer.widths):
    prefixes: dict[tuple[int, ...], float] = {}
    for codes, logp in zip(code_WL[:, : level + 1].tolist(), logp_WL[:, level], strict=True):
      prefixes.setdefault(tuple(codes), float(logp))
    # Children of prefixes that are shown themselves.
    shown = [p for p in sorted(prefixes, key=prefixes.get, reverse=True) if p[:-1] in place_of]
    shown = shown[:BEST_PREFIXES]
    result.append(Level(
      kept=kept, surviving=len(prefixes),
      best=[[p[-1], place_of[p[:-1]], prefixes[p]] for p in shown],
    ).model_dump())
    place_of = {p: place for place, p in enumerate(shown)}
  return result
