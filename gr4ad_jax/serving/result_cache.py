"""Replies given again: the same user, the same context, the same parameters, a minute at most.

Whoever asks for what is being computed waits for that. Keys hold everything that a reply depends
on but the index; the reader checks that the ads are still there. Source: paper 4.2 (reco result
cache).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from cachetools import TTLCache

from gr4ad_jax.serving.histories import RedisLink

How = Literal["hit", "joined", "miss"]


def cache_key(*parts: Any) -> str:
  """One name for JSON values; other values have another."""
  text = json.dumps(parts, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class LocalStore:
  """Keeps JSON values for a while, in this process."""

  def __init__(self, *, size: int, ttl_s: float):
    self._values = TTLCache(size, ttl_s)

  async def get(self, key: str) -> Any | None:
    """The value, None where there is none."""
    return self._values.get(key)

  async def set(self, key: str, value: Any) -> None:
    """Keeps it."""
    self._values[key] = value


class RedisStore:
  """The same, shared by servers; holds nothing while Redis is away."""

  def __init__(self, link: RedisLink, *, ttl_s: float):
    self._link, self._ttl_ms = link, max(1, round(1000 * ttl_s))

  async def get(self, key: str) -> Any | None:
    """The value, None where there is none."""
    reply = await self._link.call(lambda client: client.get(f"gr4ad:answer:{key}"))
    return json.loads(reply[0]) if reply and reply[0] else None

  async def set(self, key: str, value: Any) -> None:
    """Keeps it."""
    text = json.dumps(value)
    await self._link.call(
      lambda client: client.set(f"gr4ad:answer:{key}", text, px=self._ttl_ms)
    )


class ResultCache:
  """A store, and who is computing what."""

  def __init__(self, store: LocalStore | RedisStore):
    self._store = store
    self._running: dict[str, asyncio.Task] = {}

  async def get(
    self,
    key: str,
    compute: Callable[[], Awaitable[Any]],
    *,
    usable: Callable[[Any], bool],
  ) -> tuple[Any, How]:
    """A value and how it was come by; `compute` runs at most once at a time for a key.

    Args:
      key: of `cache_key`.
      compute: makes a JSON value. What it raises goes to all who wait for it.
      usable: whether a value that somebody else asked for may be given.
    """
    kept = await self._store.get(key)
    if kept is not None and usable(kept):
      return kept, "hit"
    if key in self._running:
      value = await asyncio.shield(self._running[key])
      return (value, "joined") if usable(value) else (await compute(), "miss")
    # A task of its own: a client that goes away must not take the answer from those who wait.
    task = asyncio.create_task(self._computed(key, compute))
    self._running[key] = task
    task.add_done_callback(lambda _: self._running.pop(key))
    return await asyncio.shield(task), "miss"

  async def _computed(self, key: str, compute: Callable[[], Awaitable[Any]]) -> Any:
    value = await compute()
    await self._store.set(key, value)
    return value
