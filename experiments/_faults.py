"""Load that never stops, and damage done to files: the tools of `bench_faults`."""

from __future__ import annotations

import asyncio
import collections
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import jax
import numpy as np
from flax import serialization

from gr4ad_jax.machine import atomic

SENDERS = 8
ASKERS = 2
TIMEOUT_S = 30.0  # of one request


class Tally:
  """What the clients of all servers of an experiment have seen."""

  def __init__(self):
    self.acknowledged: set[str] = set()
    self.unacknowledged: list[dict[str, Any]] = []  # sent again to the next server
    self.statuses: collections.Counter[int] = collections.Counter()
    self.nan_served = 0
    self.numbers = itertools.count()

  @property
  def unplanned_5xx(self) -> int:
    """Answers that no rule of the server explains; 503 says that it cannot now."""
    return sum(n for status, n in self.statuses.items() if status >= 500 and status != 503)


class Load:
  """Events and questions, from the moment of entering to that of leaving; one server."""

  def __init__(self, url: str, tally: Tally, ad_ids: Sequence[str]):
    self._url, self._tally, self._ad_ids = url, tally, ad_ids
    self._stop = threading.Event()
    self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

  def __enter__(self) -> Load:
    self._thread.start()
    return self

  def __exit__(self, *error) -> None:
    self._stop.set()
    self._thread.join()

  async def _run(self) -> None:
    limit = aiohttp.ClientTimeout(TIMEOUT_S)
    async with aiohttp.ClientSession(self._url, timeout=limit) as client:
      await asyncio.gather(
        *(self._send(client) for _ in range(SENDERS)), *(self._ask(client) for _ in range(ASKERS))
      )

  def _next_event(self) -> dict[str, Any]:
    if self._tally.unacknowledged:
      return self._tally.unacknowledged.pop()
    number = next(self._tally.numbers)
    return {
      "user_id": f"event {number}", "event_id": str(number),
      "ad_id": self._ad_ids[number % len(self._ad_ids)],
    }

  async def _send(self, client: aiohttp.ClientSession) -> None:
    while not self._stop.is_set():
      event = self._next_event()
      try:
        async with client.post("/v1/events", json={"events": [event]}) as reply:
          self._tally.statuses[reply.status] += 1
          if reply.status == 200:
            self._tally.acknowledged.add(event["user_id"])
            continue
      except (aiohttp.ClientError, OSError, TimeoutError):  # the server is gone, or is going
        pass
      self._tally.unacknowledged.append(event)
      await asyncio.sleep(0.05)

  async def _ask(self, client: aiohttp.ClientSession) -> None:
    while not self._stop.is_set():
      try:
        user = f"event {int(np.random.randint(1000))}"
        async with client.post("/v1/recommend", json={"user_id": user, "k": 5}) as reply:
          self._tally.statuses[reply.status] += 1
          if reply.status == 200 and not sound(await reply.text()):
            self._tally.nan_served += 1
      except (aiohttp.ClientError, OSError, TimeoutError):
        await asyncio.sleep(0.05)
      await asyncio.sleep(0.02)


def sound(answer: str) -> bool:
  """Whether an answer holds ads, each with a probability and a value that are numbers."""
  ads = json.loads(answer)["ads"]
  return bool(ads) and all(
    isinstance(ad[name], int | float) and math.isfinite(ad[name])
    for ad in ads for name in ("probability", "expected_value")
  )


class Said(NamedTuple):
  """What a command ended with."""

  code: int
  error: str  # standard error
  out: str


def gr4ad(*words: object, timeout_s: float = 300.0) -> Said:
  """Runs a command to its end; one that hangs ends with code -9."""
  command = [sys.executable, "-m", "gr4ad_jax", *map(str, words)]
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    env=os.environ | {"COLUMNS": "500"},
  )
  try:
    out, error = process.communicate(timeout=timeout_s)
  except subprocess.TimeoutExpired:
    process.kill()
    out, error = process.communicate()
  return Said(process.returncode, error, out)


def answers(url: str, body: dict | None, *, within_s: float) -> bool:
  """Whether a request is answered well."""
  data = None if body is None else json.dumps(body).encode()
  request = urllib.request.Request(url, data, {"content-type": "application/json"})
  try:
    with urllib.request.urlopen(request, timeout=within_s) as reply:
      return reply.status == 200 and (body is None or sound(reply.read().decode()))
  except (urllib.error.URLError, OSError):
    return False


def within(seconds: float, ready: Callable[[], bool]) -> bool:
  """Whether something comes true in time."""
  deadline = time.monotonic() + seconds
  while not ready():
    if time.monotonic() > deadline:
      return False
    time.sleep(0.2)
  return True


def half(file: Path) -> None:
  """Cuts a file in the middle."""
  os.truncate(file, file.stat().st_size // 2)


def overwrite(text: str) -> Callable[[Path], object]:
  """Damage that leaves other text in a file's place."""
  return lambda file: file.write_text(text)


def scribble(file: Path) -> None:
  """Overwrites the second half of every 4,096 bytes from the third on, as a torn disk may."""
  with file.open("r+b") as stream:
    for page in range(2, file.stat().st_size // 4096):
      stream.seek(page * 4096 + 2048)
      stream.write(b"\xab" * 2048)


def largest(folder: Path) -> Path:
  """The largest file below a folder."""
  return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def poisons(good: bytes) -> dict[str, bytes]:
  """What must never be served, by what is wrong with it."""
  params = serialization.msgpack_restore(good)
  leaves, tree = jax.tree.flatten(params)
  at = max(range(len(leaves)), key=lambda n: leaves[n].size)
  one_nan = np.array(leaves[at])
  one_nan.reshape(-1)[one_nan.size // 2] = np.nan

  def bytes_of(leaves: list[np.ndarray]) -> bytes:
    return serialization.msgpack_serialize(jax.tree.unflatten(tree, leaves))

  flipped = bytearray(good)
  flipped[len(good) // 2] ^= 0x40
  return {
    "cut": good[: len(good) // 2],
    "a bit flipped": bytes(flipped),
    "one NaN": bytes_of([*leaves[:at], one_nan, *leaves[at + 1 :]]),
    "all NaN": bytes_of([np.full_like(leaf, np.nan) for leaf in leaves]),
    "times 1e30": bytes_of([leaf * np.asarray(1e30, leaf.dtype) for leaf in leaves]),
    "all zero": bytes_of([np.zeros_like(leaf) for leaf in leaves]),
    "another model": serialization.msgpack_serialize({"weights": np.ones(3, np.float32)}),
    "nothing": b"",
  }


def publish(folder: Path, step: int, data: bytes, sha256: str) -> Path:
  """Puts parameters where a learner would, without its checks."""
  file = folder / f"params-{step:08d}.msgpack"
  file.write_bytes(data)
  pointer = json.dumps({"step": step, "file": file.name, "sha256": sha256})
  atomic.write_text(folder / "latest.json", pointer)
  return file
