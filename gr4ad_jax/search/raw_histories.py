"""Raw histories -> the numbers of a context's arrays; imports nothing but numpy.

`gr4ad export` puts copies of this file, shortlist.py, tastes.py and neighbours.py beside reader.py,
the copy of artifact.py, which needs them.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

if __package__:
  from gr4ad_jax.data import neighbours as near
  from gr4ad_jax.data.shortlist import PERIOD_S, AdFacts, ShareTable, met_ads, shares_at, shortlists
  from gr4ad_jax.data.tastes import Tastes, likeness
else:  # in the folder of an artifact
  # pyrefly: ignore[missing-import]
  import neighbours as near

  # pyrefly: ignore[missing-import]
  from shortlist import PERIOD_S, AdFacts, ShareTable, met_ads, shares_at, shortlists

  # pyrefly: ignore[missing-import]
  from tastes import Tastes, likeness

_ACTIONS = ("impression", "click", "conversion")


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
    listed = functools.cache(lambda: self._shortlist(items, now_s))  # for codes and numbers
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
      "shortlist codes": lambda below: tables["ad_code_AL"][listed()[0]],
      "shortlist numbers": lambda below: listed()[1],
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
    """Bucket of the share of engagement of each ad that has one then, best first."""
    if "trending_ad_DN" not in self._arrays:
      return {}
    row = self._row_of(now_s)
    ads, buckets = (self._arrays[f"trending_{name}_DN"][row].tolist() for name in ("ad", "bucket"))
    return {ad: bucket for ad, bucket in zip(ads, buckets, strict=True) if ad >= 0}

  def _row_of(self, now_s: int) -> int:
    """Row of the period in the tables of shares."""
    last = len(self._arrays["trending_ad_DN"]) - 1
    return min(max(now_s // PERIOD_S - int(self._arrays["trending_table_first_period"]), 0), last)

  def _shortlist(self, items, now_s: int) -> tuple[np.ndarray, np.ndarray]:
    """All ads that a shortlist can have, the likeliest first, and their numbers."""
    ad_O, past = self._arrays["content_ad_O"], [item for item in items if item["time"] < now_s]
    rows, row_O = self._rows["ad_id"], self._rows["content_id"]
    ads = [
      (rows[item["ad_id"]], item["time"]) for item in past
      if item.get("ad_id") in rows and item["action"] != "impression"
    ]
    organic = [
      (ad_O[row_O[item["content_id"]]], item["time"]) for item in past
      if item.get("content_id") in row_O
    ]
    pairs = [np.array(group, np.int64).reshape(-1, 2).T for group in (ads, organic)]
    limit = int(self._arrays["max_met_ads"])
    met = met_ads(*pairs[0], *pairs[1], now_s=now_s, limit=limit)
    trending, shares_of = np.zeros(0, np.int32), lambda ad_1X: 0.0  # where the data have none
    if "trending_ad_DN" in self._arrays:
      names = [f"trending_table_{name}" for name in ShareTable._fields]
      table, row = ShareTable(*(self._arrays[name] for name in names)), self._row_of(now_s)
      ad_N = self._arrays["trending_ad_DN"][row]
      trending, shares_of = ad_N[ad_N >= 0], functools.partial(shares_at, table, row)
    facts = AdFacts(self._arrays["ad_key_AK"], self._arrays["ad_price_A"])
    likeness_of, found = None, None
    if "taste_made_s_D" in self._arrays:
      tastes = Tastes(*(self._arrays[f"taste_{name}"] for name in Tastes._fields))
      likeness_of = functools.partial(likeness, tastes, np.array([now_s]))
    size = len(met[0]) + len(trending)
    if "near_most" in self._arrays:
      size, most = min(size, int(self._arrays["near_behind"])), int(self._arrays["near_most"])
      latest = [row for row, _, _ in self._met(items, "ad_id", now_s)]
      latest_T = np.array(latest[: int(self._arrays["near_latest"])], np.int64)
      number_KA = near.neighbour_numbers(self._near, latest_T)
      found = near.neighbours(number_KA, met[0], most)
    (ad_M,), (number_MF,) = shortlists(
      [met], trending[None], shares_of, facts, size, likeness_of=likeness_of,
      near=None if found is None else [found],
    )
    return ad_M[ad_M >= 0], number_MF[ad_M >= 0]

  @functools.cached_property
  def _near(self) -> near.NeighbourTable:
    """What tells the neighbours of a history."""
    prefix = "near_table_"
    return near.from_arrays({
      name.removeprefix(prefix): x for name, x in self._arrays.items() if name.startswith(prefix)
    })

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


def finite(name: str, array: np.ndarray) -> np.ndarray:
  """An array of a context whose numbers count nothing, as float32."""
  if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
    raise ValueError(f"context: {name} holds {array.dtype}, needs finite numbers")
  return array.astype(np.float32)


def _half_octave(x: float, below: int) -> int:
  """1, 1.4, 2, 2.8, 4, ... -> 0, 1, 2, 3, 4, ..."""
  return min(int(2 * math.log2(x) + 1e-6), below - 1)


def _digest(text: str) -> int:
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
