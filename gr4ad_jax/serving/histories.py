"""Latest events of users: in the server's own journal, and in a Redis where servers share one.

With Redis, events go to the journal first and from there to Redis, in order, as soon as it can be
reached; while it is away a server answers from its journal and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from typing import NamedTuple

from gr4ad_jax.data.records import Action
from gr4ad_jax.serving.journal import Event, Journal

REDIS_TIMEOUT_S = 0.05  # of one answer; a slower Redis counts as away
REDIS_PAUSE_S = 1.0  # after a failure it is not asked for so long
SHARED = 10_000  # events of a user that Redis keeps
_BATCH = 500  # events sent at once


class RedisLink:
  """A Redis that may be away: asked no more for a while after a failure."""

  def __init__(self, url: str):
    """Connects when it is first needed.

    Raises:
      ValueError: the package redis is missing, or the URL is none.
    """
    try:
      import redis.asyncio as redis
    except ImportError:
      raise ValueError("redis is not installed; pip install 'redis>=5.2'") from None
    self.client = redis.from_url(
      url, socket_timeout=REDIS_TIMEOUT_S, socket_connect_timeout=REDIS_TIMEOUT_S
    )
    self._errors = (redis.RedisError, OSError, asyncio.TimeoutError)
    self._away_until_s = 0.0

  async def call(self, command):
    """The result of `command(client)`; None where Redis is away, and (None,) for a null."""
    if time.monotonic() < self._away_until_s:
      return None
    try:
      return (await command(self.client),)
    except self._errors:
      self._away_until_s = time.monotonic() + REDIS_PAUSE_S
      return None

  async def close(self) -> None:
    """Ends the connections."""
    await self.client.aclose()


class Latest(NamedTuple):
  """A user's events since the log."""

  events: list[Event]  # oldest first
  version: str  # changes with every event
  degraded: bool  # the shared store is away, and its events are missing
  earlier: Sequence[Event] = ()  # those before that the model does not read, where asked for


class Histories:
  """Events of users; where servers share a Redis, `carry` takes the journal's events there."""

  def __init__(self, journal: Journal, limit: int, link: RedisLink | None = None):
    """The model reads the last `limit` events of each user."""
    self._journal, self._limit, self._link = journal, limit, link
    self._sent, self._wake = journal.position("redis"), asyncio.Event()

  async def latest(self, user_id: str, *, whole: bool = False) -> Latest:
    """What is in Redis, and of this server's events those that are not, or no longer, there.

    `whole` reads the `earlier` events too: all of this server's, and SHARED of those in Redis.
    """
    shared, degraded, limit = {}, False, SHARED if whole else self._limit
    if self._link is not None:
      reply = await self._link.call(
        lambda client: client.lrange(_key(user_id), -limit, -1)
      )
      degraded = reply is None
      rows = [json.loads(row) for row in reply[0]] if reply else []
      shared = {row["from"]: _from_json(row["event"]) for row in rows}
    # An event that is in both has one name, and so stands there once.
    if whole:  # which may be many
      own = await asyncio.to_thread(self._journal.of_user, user_id, None)
    else:
      own = self._journal.of_user(user_id, limit)
    events = shared | {self._name(seq): event for seq, event in own}
    in_time = sorted(events.values(), key=lambda event: event.time_s)
    last = max(0, len(in_time) - self._limit)
    earlier = in_time[:last] if whole else ()
    return Latest(in_time[last:], " ".join(sorted(events)), degraded, earlier)

  def added(self) -> None:
    """The journal has new events, which `carry` need not wait for."""
    self._wake.set()

  async def carry(self) -> None:
    """Sends the next events to Redis, or waits a moment for some."""
    rows = await asyncio.to_thread(self._journal.after, self._sent, _BATCH)
    if not rows:
      self._wake.clear()
      with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(self._wake.wait(), REDIS_PAUSE_S)
    elif await self._link.call(lambda client: self._send(client, rows)):
      self._sent = rows[-1][0]
      await asyncio.to_thread(self._journal.set_position, "redis", self._sent)
    else:
      await asyncio.sleep(REDIS_PAUSE_S)

  async def _send(self, client, rows: list[tuple[int, Event]]) -> bool:
    """Once each, also where an earlier call got through and its answer did not."""
    last = f"gr4ad:sent:{self._journal.id}"
    sent = int(await client.get(last) or 0)
    pipeline = client.pipeline(transaction=True)
    for seq, event in rows:
      if seq > sent and (event.action > Action.IMPRESSION or event.ad_id is None):
        row = {"from": self._name(seq), "event": event._asdict()}
        pipeline.rpush(_key(event.user_id), json.dumps(row))
        pipeline.ltrim(_key(event.user_id), -max(SHARED, self._limit), -1)
    pipeline.set(last, rows[-1][0])
    await pipeline.execute()
    return True

  def _name(self, seq: int) -> str:
    """An event's name among those of all servers."""
    return f"{self._journal.id}:{seq}"


def _key(user_id: str) -> str:
  return f"gr4ad:events:{user_id}"


def _from_json(event: dict) -> Event:
  return Event(**(event | {"action": Action(event["action"])}))
