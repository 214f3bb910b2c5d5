"""Raw histories -> the numbers of a context's arrays; imports nothing but numpy.

`gr4ad export` puts a copy of this file beside reader.py, the copy of artifact.py, which needs it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_ACTIONS = ("impression", "click", "conversion")
_DAY_S = 86_400


class Kinds:
  """Numbers of a context's arrays by kind, as the run makes them of the same history."""

  def __init__(
    self, arrays: Mapping[str, np.ndarray], rows: Mapping[str, Mapping[str, int]],
    features: Mapping[str, tuple[int, list[str]]],
  ):
    self._arrays, self._rows, self._features = arrays, rows, features

  def of(self, items, features, user_id: str, now_s: int) -> dict[str, Any]:
    """Kind -> (bounds of its numbers) -> the numbers, most recent first."""
    ads, contents = (self._met(items, name, now_s) for name in ("ad_id", "content_id"))
    tables, shares = self._arrays, self._shares(now_s)
    ad_ids = [str(tables["ad_id_A"][row]) for row, _, _ in ads]
    content_ids = [str(tables["content_id_O"][row]) for row, _, _ in contents]
    made = {
      "features": lambda below: self._feature(features, len(below)),
      "user hash": lambda below: _digest(user_id) >> 1,
      "ad hashes": lambda below: [_digest(ad) >> 1 for ad in ad_ids],
      "content hashes": lambda below: [_digest(content) % below[0] for content in content_ids],
      "trending codes": lambda below: [tables["ad_code_AL"][ad] for ad in shares],
      "trending shares": lambda below: [*shares.values()],
      "ad shares": lambda below: [shares.get(row, 0) for row, _, _ in ads],
      "content shares": lambda below: [
        shares.get(int(tables["content_ad_O"][row]), 0) for row, _, _ in contents
      ],
    }
    for word, codes, met in ("ad", "ad_code_AL", ads), ("content", "content_code_OL", contents):
      made |= {
        f"{word} codes": lambda below, codes=codes, met=met: [tables[codes][m[0]] for m in met],
        f"{word} counts": lambda below, met=met: [_half_octave(m[1], below[0]) for m in met],
        f"{word} ages": lambda below, met=met: [
          _half_octave(1 + max(now_s - m[2], 0) / 3600, below[0]) for m in met
        ],
      }
    return made

  def _met(self, items, name: str, now_s: int) -> list[tuple[int, int, int]]:
    """Row, times met and last time of each distinct item, most recent first."""
    rows, met = self._rows[name], {}
    for item in items:
      engaged = name != "ad_id" or item["action"] != "impression"
      if item.get(name) in rows and engaged and item["time"] < now_s:
        row = rows[item[name]]
        met[row] = (met.pop(row, (0, 0))[0] + 1, item["time"])  # at the end, as the latest
    return [(row, count, time_s) for row, (count, time_s) in reversed(met.items())]

  def seen(self, items, now_s: int) -> list[int]:
    """Rows of the ads whose product was engaged with: clicked, bought, or met as a content."""
    ad_O = self._arrays["content_ad_O"]
    rows = {row for row, _, _ in self._met(items, "ad_id", now_s)}
    rows |= {int(ad_O[row]) for row, _, _ in self._met(items, "content_id", now_s)}
    return sorted(rows - {-1})

  def _shares(self, now_s: int) -> dict[int, int]:
    """Bucket of the share of engagement of each ad that has one on that day, best first."""
    if "trending_ad_DN" not in self._arrays:
      return {}
    ad_DN, first = self._arrays["trending_ad_DN"], int(self._arrays["trending_first_day"])
    day = min(max(now_s // _DAY_S - first, 0), len(ad_DN) - 1)
    pairs = zip(ad_DN[day].tolist(), self._arrays["trending_bucket_DN"][day].tolist(), strict=True)
    return {ad: bucket for ad, bucket in pairs if ad >= 0}

  def _feature(self, features: Mapping[str, str], count: int) -> list[int]:
    numbers = [0] * count
    for name, value in features.items():
      if name not in self._features:
        known = ", ".join(self._features)
        raise ValueError(f"features: {name!r} is none of the model's: {known}")
      place, values = self._features[name]
      numbers[place] = 1 + values.index(value) if value in values else 0
    return numbers


def read_items(history: Sequence[Mapping[str, Any]], now_s: int) -> list[dict[str, Any]]:
  """A history by time, checked; items without a time are of just now, the second before `now_s`.

  Raises:
    ValueError: an item breaks a rule.
  """
  items = []
  for at, given in enumerate(history):
    item = {"action": "click", "time": None} | dict(given)
    unknown = set(item) - {"ad_id", "content_id", "action", "time", "value"}
    if unknown:
      raise ValueError(f"history[{at}]: {min(unknown)!r} is no field of an item")
    if (item.get("ad_id") is None) == (item.get("content_id") is None):
      raise ValueError(f"history[{at}]: exactly one of ad_id and content_id is needed")
    if item["action"] not in _ACTIONS:
      raise ValueError(f"history[{at}].action={item['action']!r}: one of {', '.join(_ACTIONS)}")
    time_s = now_s - 2 if item["time"] is None else item["time"]
    if not isinstance(time_s, int | float | np.number) or not math.isfinite(time_s):
      raise ValueError(f"history[{at}].time={time_s!r}: must be unix seconds")
    items.append(item | {"time": int(time_s)})
  return sorted(items, key=lambda item: item["time"])


def _half_octave(x: float, below: int) -> int:
  """1, 1.4, 2, 2.8, 4, ... -> 0, 1, 2, 3, 4, ..."""
  return min(int(2 * math.log2(x) + 1e-6), below - 1)


def _digest(text: str) -> int:
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
