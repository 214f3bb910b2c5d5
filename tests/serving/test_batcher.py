"""Queries share calls: queue, deadlines, faults; with engines that do what a test needs."""

import asyncio
import dataclasses
import threading

import pytest

from gr4ad_jax.serving.batcher import Batcher
from tests.serving.support import SERVING


class Timed:
  """What an engine has measured before it answers."""

  config = SERVING
  call_s = {(factor, size): 0.01 for factor in SERVING.beam_factors for size in (1, 4)}
  together = 1.0


def test_a_full_queue_refuses_and_a_late_answer_is_given_up():
  """The engine is replaced by one that waits, so that the queue fills for certain."""
  gate, begun = threading.Event(), threading.Event()

  class Slow(Timed):
    config = dataclasses.replace(
      SERVING, max_queue=2, deadline_ms=200, max_wait_ms=0, calls_at_once=1
    )
    # 100 requests a second: 0.5 of the deadline is room for 10, max_queue for 2.

    def __call__(self, queries, *, factor):
      begun.set()
      gate.wait(60)
      return [f"{query} at {factor}" for query in queries]

  async def scenario():
    batcher = Batcher(Slow())
    batcher.start()
    running = asyncio.create_task(batcher.submit("first"))
    assert await asyncio.to_thread(begun.wait, 60)
    waiting = [asyncio.create_task(batcher.submit(f"later {i}")) for i in range(2)]
    await asyncio.sleep(0.01)
    with pytest.raises(Exception, match="2 requests are waiting") as refused:
      await batcher.submit("too many")
    assert refused.value.retry_after_s >= 1
    await asyncio.sleep(0.3)
    gate.set()
    assert (await running)[0] == "first at 1.6"
    for late in waiting:
      with pytest.raises(Exception, match="the deadline is 200 ms"):
        await late
    last = asyncio.create_task(batcher.submit("last"))
    await asyncio.sleep(0)
    await batcher.stop()  # drains: what waits is answered
    assert (await last)[0].startswith("last")
    with pytest.raises(Exception, match="going down"):
      await batcher.submit("after")

  asyncio.run(scenario())


def test_who_comes_during_a_call_need_not_wait_for_its_end():
  gate, begun = threading.Event(), threading.Event()

  class Held(Timed):
    config = dataclasses.replace(SERVING, calls_at_once=2, max_wait_ms=0)

    def __call__(self, queries, *, factor):
      if queries == ["held"]:
        begun.set()
        assert gate.wait(60)
      return list(queries)

  async def scenario():
    batcher = Batcher(Held())
    batcher.start()
    held = asyncio.create_task(batcher.submit("held"))
    assert await asyncio.to_thread(begun.wait, 60)
    for name in ("second", "third"):  # one after the other beside the first
      assert (await batcher.submit(name))[0] == name
    assert not held.done()
    stopping = asyncio.create_task(batcher.stop())
    await asyncio.sleep(0.01)
    assert not stopping.done()  # a call that runs is waited for
    gate.set()
    assert (await held)[0] == "held"
    await stopping

  asyncio.run(scenario())


def test_one_bad_request_does_not_fail_its_neighbours():
  class Picky(Timed):
    def __call__(self, queries, *, factor):
      if "bad" in queries:
        raise ValueError("a bad one")
      return list(queries)

  async def scenario():
    batcher = Batcher(Picky())
    batcher.start()
    replies = await asyncio.gather(
      *(batcher.submit(a) for a in ("good", "bad", "fine")), return_exceptions=True
    )
    assert replies[0][0] == "good" and replies[2][0] == "fine"
    assert isinstance(replies[1], ValueError)
    await batcher.stop()

  asyncio.run(scenario())
