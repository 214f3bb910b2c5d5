"""Latest events of users: in the server's own journal, or in a Redis that several servers share.

With Redis, events go to the journal first and from there to Redis, in order, as soon as it can be
reached; while it is away a server answers from its journal and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import NamedTuple

from gr4ad_jax.data.records import Action
from gr4ad_jax.serving.journal import Event, Journal
from gr4ad_jax.serving.keys import cache_key

REDIS_TIMEOUT_S = 0.05  # of one answer; a slower Redis counts as away
REDIS_PAUSE_S = 1.0  # after a failure it is not asked for so long
_BATCH = 500  # events sent at once


class Latest(NamedTuple):
  """A user's events."""

  events: list[Event]  # oldest first
  version: str  # changes with every event
  degraded: bool  # the shared store is away, and its events are missing


class JournalHistories:
  """Of one server alone."""

  def __init__(self, journal: Journal, limit: int):
    self._journal, self._limit = journal, limit

  async def latest(self, user_id: str) -> Latest:
    """The user's last events."""
    rows = self._journal.of_user(user_id, self._limit)
    return Latest([e for _, e in rows], str(rows[-1][0]) if rows else "", False)


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
      raise ValueError("redis is not installed; pip install 'gr4ad_jax[redis]'") from None
    self.client = redis.from_url(
      url, socket_timeout=REDIS_TIMEOUT_S, socket_connect_timeout=REDIS_TIMEOUT_S
    )
    self._errors = (redis.RedisError, OSError, asyncio.TimeoutError)
    self._away_until_s = 0.0

  @property
  def away(self) -> bool:
    """Whether it failed a moment ago."""
    return time.monotonic() < self._away_until_s

  async def call(self, command):
    """The result of `command(client)`; None where Redis is away, and (None,) for a null."""
    if self.away:
      return None
    try:
      return (await command(self.client),)
    except self._errors:
      self._away_until_s = time.monotonic() + REDIS_PAUSE_S
      return None

  async def close(self) -> None:
    """Ends the connections."""
    await self.client.aclose()


class RedisHistories:
  """Shared by servers; `carry` takes the journal's events there."""

  def __init__(self, journal: Journal, link: RedisLink, limit: int):
    self._journal, self._link, self._limit = journal, link, limit
    self._server = journal.id
    self._sent, self._wake = journal.position("redis"), asyncio.Event()

  async def latest(self, user_id: str) -> Latest:
    """What is in Redis, and of this server's events those that are not, or no longer, there."""
    reply = await self._link.call(
      lambda client: client.lrange(_key(user_id), -self._limit, -1)
    )
    if reply is None:
      own = await JournalHistories(self._journal, self._limit).latest(user_id)
      return own._replace(degraded=True)
    rows = [json.loads(row) for row in reply[0]]
    own = self._journal.of_user(user_id, self._limit)
    there = {row["from"] for row in rows}
    own = [(seq, event) for seq, event in own if f"{self._server}:{seq}" not in there]
    version = cache_key(sorted(there), [seq for seq, _ in own])
    events = [_from_json(row["event"]) for row in rows] + [event for _, event in own]
    events.sort(key=lambda event: event.time_s)
    return Latest(events[-self._limit :], version, False)

  def added(self) -> None:
    """The journal has new events."""
    self._wake.set()

  async def carry(self) -> None:
    """Sends the next events, or waits a moment for some."""
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
    last = f"gr4ad:sent:{self._server}"
    sent = int(await client.get(last) or 0)
    pipeline = client.pipeline(transaction=True)
    for seq, event in rows:
      if seq > sent and (event.action > Action.IMPRESSION or event.ad_id is None):
        row = {"from": f"{self._server}:{seq}", "event": event._asdict()}
        pipeline.rpush(_key(event.user_id), json.dumps(row))
        pipeline.ltrim(_key(event.user_id), -self._limit, -1)
    pipeline.set(last, rows[-1][0])
    await pipeline.execute()
    return True


def _key(user_id: str) -> str:
  return f"gr4ad:events:{user_id}"


def _from_json(event: dict) -> Event:
  return Event(**(event | {"action": Action(event["action"])}))
