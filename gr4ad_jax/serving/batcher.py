"""Queries that come one by one -> calls of the engine, with a bounded queue and deadlines."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import functools
import math
import time

from gr4ad_jax.search.beam_schedule import ArrivalRate, TrafficAwareBeams
from gr4ad_jax.serving.compiled import NotCompiled
from gr4ad_jax.serving.config import ServingConfig
from gr4ad_jax.serving.engine import Answer, Engine, Query

ROOM_SHARE = 0.5  # of the deadline that the whole queue may take


class GoingDown(Exception):
  """The server takes no more requests."""


class Overloaded(Exception):
  """More requests wait than can be answered in time."""

  def __init__(self, message: str, *, retry_after_s: int):
    super().__init__(message)
    self.retry_after_s = retry_after_s


class DeadlineExceeded(Exception):
  """The request waited longer than its deadline allows."""


@dataclasses.dataclass(eq=False)
class _Waiting:
  query: Query
  factor: float | None
  since_s: float
  answer: asyncio.Future


class Batcher:
  """At most `calls_at_once` calls of the engine at a time; what waits meanwhile shares the next.

  Where a call can begin, a request is taken after `max_wait_ms`, else as soon as one has ended.
  """

  def __init__(self, engine: Engine):
    """Starts at base widths; the engine must be compiled."""
    config = engine.config
    self._engine = engine
    self._queue: collections.deque[_Waiting] = collections.deque()
    self._arrived, self._stopping = asyncio.Event(), False
    self._threads = concurrent.futures.ThreadPoolExecutor(config.calls_at_once, "engine")
    self._free = asyncio.Semaphore(config.calls_at_once)
    self._calls: set[asyncio.Task] = set()
    self._loop_task: asyncio.Task | None = None
    self.rate = ArrivalRate()
    self.take_timing()

  @property
  def _config(self) -> ServingConfig:
    """It changes where an engine gets its other programs."""
    return self._engine.config

  async def compile_rest(self) -> bool:
    """Compiles the engine's other programs beside requests, and uses them; False once stopped."""
    timing = await asyncio.to_thread(self._engine.compile_rest)
    if timing is None:
      return False
    self._engine.use_all(timing)
    self.take_timing()
    return True

  def take_timing(self) -> None:
    """Chooses beams by the engine's present programs and how long they take."""
    self.beams = TrafficAwareBeams(
      self._engine.call_s, at_once=self._config.calls_at_once, together=self._engine.together,
      target_s=self._config.target_ms / 1000,
    )

  @property
  def waiting(self) -> int:
    """Requests in the queue."""
    return len(self._queue)

  def start(self) -> None:
    """Begins to take requests to the engine; needs a running event loop."""
    self._loop_task = asyncio.get_running_loop().create_task(self._run())

  async def stop(self) -> None:
    """Refuses new requests, answers those that wait, and ends."""
    self._stopping = True
    self._arrived.set()
    if self._loop_task:
      await self._loop_task
    self._threads.shutdown()

  async def submit(self, query: Query, *, factor: float | None = None) -> tuple[Answer, float]:
    """The answer and how long it waited for its call, in seconds.

    Args:
      query: the request.
      factor: beam factor; None = as traffic allows.

    Raises:
      Overloaded: more wait than can be answered in time.
      GoingDown: after `stop`.
      DeadlineExceeded: see there.
      NotCompiled: the factor has no program yet.
      ConfigError: a condition that no ad meets.
    """
    now_s = time.monotonic()
    if self._stopping:
      raise GoingDown("going down")
    if factor is not None and factor not in self._config.beam_factors:
      raise NotCompiled(f"beam_factor={factor:g} is still being compiled")
    if len(self._queue) >= self._room:
      raise Overloaded(
        f"{len(self._queue)} requests are waiting",
        retry_after_s=max(1, math.ceil(len(self._queue) / self.beams.capacity)),
      )
    self.rate.add(now_s)
    waiting = _Waiting(query, factor, now_s, asyncio.get_running_loop().create_future())
    self._queue.append(waiting)
    self._arrived.set()
    try:
      # Calls look at deadlines themselves; this is for a call that never ends.
      async with asyncio.timeout(10 + 2 * self._config.deadline_ms / 1000):
        return await waiting.answer
    except TimeoutError:
      raise DeadlineExceeded("the search did not end") from None

  @property
  def _room(self) -> int:
    """Requests that may wait: as many as base widths answer well before their deadline."""
    in_time = ROOM_SHARE * self._config.deadline_ms / 1000 * self.beams.capacity
    return min(self._config.max_queue, max(self._config.batch_sizes[-1], int(in_time)))

  async def _run(self) -> None:
    while True:
      await self._arrived.wait()
      largest = self._config.batch_sizes[-1]
      if not self._queue:
        if self._stopping:
          await asyncio.gather(*self._calls)
          return
        self._arrived.clear()
        continue
      if len(self._queue) < largest and not self._stopping:
        due_s = self._queue[0].since_s + self._config.max_wait_ms / 1000
        if (left_s := due_s - time.monotonic()) > 0:
          await asyncio.sleep(left_s)
      await self._free.acquire()
      if batch := self._take(largest):
        call = asyncio.create_task(self._answer(batch))
        self._calls.add(call)
        call.add_done_callback(self._ended)
      else:
        self._free.release()

  def _ended(self, call: asyncio.Task) -> None:
    self._calls.remove(call)
    self._free.release()

  def _take(self, most: int) -> list[_Waiting]:
    """The requests that have waited longest and can share one call."""
    now_s, batch, skipped = time.monotonic(), [], []
    while self._queue and len(batch) < most:
      entry = self._queue.popleft()
      if entry.answer.cancelled():  # its client has gone
        continue
      if now_s - entry.since_s > self._config.deadline_ms / 1000:
        entry.answer.set_exception(DeadlineExceeded(
          f"waited {1000 * (now_s - entry.since_s):.0f} ms, the deadline is "
          f"{self._config.deadline_ms:g} ms"
        ))
      elif batch and entry.factor != batch[0].factor:
        skipped.append(entry)
      else:
        batch.append(entry)
    self._queue.extendleft(reversed(skipped))
    return batch

  async def _answer(self, batch: list[_Waiting]) -> None:
    began_s = time.monotonic()
    factor = batch[0].factor
    if factor is None:
      factor = self.beams.choose(
        began_s, rate=self.rate(began_s), queue_share=len(self._queue) / self._room,
        size=self._config.call_size(len(batch)), waited_s=began_s - batch[0].since_s,
        beside=len(self._calls) > 1,
      )
    if not await self._try(batch, factor):  # one request's fault must not be the others'
      for entry in batch:
        await self._try([entry], factor)

  async def _try(self, batch: list[_Waiting], factor: float) -> bool:
    """Answers a batch in one call; a batch of one gets its fault, a larger one False."""
    began_s, queries = time.monotonic(), [entry.query for entry in batch]
    beside = len(self._calls) > 1
    try:
      answers = await asyncio.get_running_loop().run_in_executor(
        self._threads, functools.partial(self._engine, queries, factor=factor)
      )
    except Exception as error:
      if len(batch) > 1:
        return False
      if not batch[0].answer.done():
        batch[0].answer.set_exception(error)
      return True
    self.beams.observe(
      factor, self._config.call_size(len(batch)), time.monotonic() - began_s,
      beside=beside or len(self._calls) > 1,
    )
    for entry, answer in zip(batch, answers, strict=True):
      if not entry.answer.done():
        entry.answer.set_result((answer, began_s - entry.since_s))
    return True
