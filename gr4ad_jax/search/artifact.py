"""Reads and answers with an exported search; imports nothing but jax and numpy.

`gr4ad export` puts a copy of this file into the artifact as reader.py, so that the folder stands
alone: `python ARTIFACT/reader.py` answers its sample request, and

    from reader import Artifact
    artifact = Artifact("ARTIFACT")
    context = artifact.context([{"ad_id": "7", "time": 1700000000}], features={"scene": "feed"})
    ads, scores = artifact.recommend(context, k=10)

Files: manifest.json (settings, versions, the arrays of a request and the bounds of their numbers),
program.bin (a serialised jax.export program for CPU, CUDA and TPU, any batch size), arrays.npz
(parameters, prefix tree, value of the buckets, ads of each SID, what histories are looked up in),
sample.npz (one request). To read programs jax needs the package flatbuffers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
import time as clock
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

FORMAT = 1
NEG_INF = -1e30  # that of gr4ad_jax.nn, which this file does without
# Arrays of the context with SIDs of the history, in artifacts whose manifest does not name them.
_HISTORY = ("ad_code_BTL", "organic_code_BOL")
_ACTIONS = ("impression", "click", "conversion")
_DAY_S = 86_400


@functools.cache
def compiler_options() -> dict[str, str]:
  """Options of jax.jit for programs of many products with few rows, such as a search's.

  On CPU, XLA's library for products (ynn) brings the weights of each into its own order at every
  call, which takes longer than multiplying a few rows with them; without it they are multiplied as
  they lie. {} where the compiler has no such option.
  """
  if jax.default_backend() != "cpu":
    return {}
  options = {"xla_cpu_experimental_ynn_fusion_type": ""}
  try:
    jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
  except Exception:  # of another jaxlib
    return {}
  return options


def score_beams(
  beams: Mapping[str, np.ndarray],
  history_RTL: np.ndarray,
  *,
  value_exponent: float,
  new_ad_bonus: float,
) -> np.ndarray:
  """What SIDs are ranked by: log p(SID | X) + gamma log(expected value) + bonus for new SIDs.

  Args:
    beams: `logp_BW`, `code_BWL`, `sid_BW` and, where gamma is not 0, `expected_value_BW`.
    history_RTL: int32 codes of the ads and contents that the request's history shows.
    value_exponent: gamma.
    new_ad_bonus: nats added to SIDs that are not in the history.

  Returns:
    float32 [R, W]; NEG_INF where a beam is not filled.
  """
  score_RW = beams["logp_BW"]
  if value_exponent:
    score_RW = score_RW + value_exponent * np.log(np.maximum(beams["expected_value_BW"], 1e-6))
  if new_ad_bonus:
    score_RW = score_RW + new_ad_bonus * ~in_history(beams["code_BWL"], history_RTL)
  return np.where(beams["sid_BW"] >= 0, score_RW, NEG_INF)


def in_history(code_RWL: np.ndarray, met_RTL: np.ndarray) -> np.ndarray:
  """bool [R, W]: the SID is one of the request's history."""
  sizes = 1 + np.maximum(code_RWL.max(axis=(0, 1)), met_RTL.max(axis=(0, 1))).astype(np.int64)
  weight_L = np.append(np.cumprod(sizes[:0:-1])[::-1], 1)
  flat_RW, flat_RT = code_RWL @ weight_L, met_RTL @ weight_L
  return (flat_RW[:, :, None] == flat_RT[:, None, :]).any(axis=-1)


def digest(file: Path) -> str:
  """SHA-256 of a file."""
  with file.open("rb") as opened:
    return hashlib.file_digest(opened, "sha256").hexdigest()


class Artifact:
  """An exported search with its ads."""

  def __init__(self, folder: str | Path):
    """Reads the folder; compiles at the first call of each batch size.

    Raises:
      ValueError: no artifact there, a damaged one, or one of another format.
    """
    self._folder = Path(folder)
    self.manifest = _manifest(self._folder / "manifest.json")
    self._arrays = self._read("arrays.npz")
    fixed = [f"program_{i:04d}" for i in range(self.manifest["program_arrays"])]
    for name in ("ads_start", "ads_A", "ad_id_A", *fixed):
      if name not in self._arrays:
        raise ValueError(f"{self._folder / 'arrays.npz'}: lacks {name}; export the run again")
    try:
      program = jax.export.deserialize(self._checked("program.bin").read_bytes())
    except Exception as error:  # of the format's own reader, which knows no better
      raise _unreadable(self._folder / "program.bin", error) from None
    # Every array that the program reads lies on the device once.
    self._fixed = jax.device_put([self._arrays[name] for name in fixed])
    self._search = jax.jit(program.call, compiler_options=compiler_options())

  def _checked(self, name: str) -> Path:
    """A file, which is what was exported."""
    file, known = self._folder / name, self.manifest.get("sha256", {})
    if not file.is_file():
      raise ValueError(f"{file}: is missing; export the run again")
    if name in known and digest(file) != known[name]:
      raise ValueError(f"{file}: is damaged (another SHA-256 than in manifest.json)")
    return file

  def _read(self, name: str) -> dict[str, np.ndarray]:
    try:
      with self._checked(name).open("rb") as raw, np.load(raw, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}
    except Exception as error:  # whatever NumPy and zlib say of a damaged file
      raise _unreadable(self._folder / name, error) from None

  def sample(self) -> dict[str, np.ndarray]:
    """The context of one request."""
    return self.check(self._read("sample.npz"))

  def check(self, context: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The request's arrays in the program's types.

    Raises:
      ValueError: an array is missing, has another shape, or holds a number that the model does not
        know; its name and the rule.
    """
    checked, rows = {}, None
    for name, shape in self.manifest["context"].items():
      if name not in context:
        raise ValueError(f"context: {name} is missing; it has the shape [requests, *{shape}]")
      try:
        array = np.asarray(context[name])
      except ValueError:
        raise ValueError(f"context: {name} is no array; its rows differ in length") from None
      rows = len(array) if rows is None and array.ndim else rows
      if array.shape != (rows, *shape) or not rows:
        raise ValueError(f"context: {name} has shape {array.shape}, needs ({rows}, *{shape})")
      if array.dtype.kind not in "iu" and array.size:
        raise ValueError(f"context: {name} holds {array.dtype}, needs whole numbers of 64 bits")
      bad = (array < -1) | (array >= np.array(self._below(name), np.int64))
      if bad.any():
        at = tuple(np.argwhere(bad)[0].tolist())
        below = np.broadcast_to(self._below(name), array.shape)[at]
        raise ValueError(
          f"context: {name} holds {array[at]} at {list(at)}, must be in [-1, {below}), -1 = nothing"
        )
      checked[name] = array.astype(np.int32)
    return checked

  def _below(self, name: str) -> list[int]:
    """Bounds of the numbers of an array, along its last axis."""
    if name in self.manifest.get("below", {}):
      return self.manifest["below"][name]
    codes = name in self.manifest.get("history", _HISTORY) and "codebook_sizes" in self.manifest
    return self.manifest["codebook_sizes"] if codes else [2**31]

  def context(
    self,
    history: Sequence[Mapping[str, Any]] = (),
    *,
    features: Mapping[str, str] | None = None,
    user_id: str = "",
    time: float | None = None,
  ) -> dict[str, np.ndarray]:
    """The context of one request, of what the HTTP API of a run takes.

    Args:
      history: what the user did: `ad_id` or `content_id`, `action` (click), `time` (unix seconds,
        just now). Views are no history; ads and contents that the run did not know are left out.
      features: of user and request, by name; values that training did not meet count as unknown.
      user_id: hashed where the model has a table of ids.
      time: unix seconds of the request; None = now.

    Raises:
      ValueError: an item or a feature breaks a rule, or the artifact was exported without this.
    """
    if "kinds" not in self.manifest:
      raise ValueError(f"{self._folder}: takes no histories; export the run with this version")
    now_s = int(clock.time() if time is None else time) + 1
    kinds = _Kinds(self._arrays, self._rows, self.manifest["features"])
    made = kinds.of(_items(history, now_s), features or {}, user_id, now_s)
    context = {}
    for name, kind in self.manifest["kinds"].items():
      shape = self.manifest["context"][name]
      values = made[kind](self._below(name))
      context[name] = np.full((1, *shape), -1, np.int32)
      if not shape:
        context[name][0] = values
      for place, value in enumerate(values[: shape[0]] if shape else ()):
        context[name][0, place] = value
    return context

  @functools.cached_property
  def _rows(self) -> dict[str, dict[str, int]]:
    """Rows of ads and contents by their ids."""
    ids = {"ad_id": self._arrays["ad_id_A"], "content_id": self._arrays["content_id_O"]}
    return {name: {x: row for row, x in enumerate(array.tolist())} for name, array in ids.items()}

  def search(self, context: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The most probable SIDs of each request, best first.

    Args:
      context: int32 arrays as the manifest lists them, one row a request, -1 = padding.

    Returns:
      `code_BWL`, `logp_BW`, `level_logp_BWL`, `sid_BW` and `expected_value_BW`, as the records of
      `gr4ad_jax.search.beam_search.Beams`.

    Raises:
      ValueError: see `check`.
    """
    found = self._search(self._fixed, self.check(context))
    return {name: np.asarray(array) for name, array in found.items()}

  def recommend(
    self, context: Mapping[str, np.ndarray], k: int
  ) -> tuple[list[list[str]], list[list[float]]]:
    """Ids of the k best ads of each request and the scores of their SIDs, best first.

    Raises:
      ValueError: k below 1; and see `check`.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
      raise ValueError(f"k={k!r}: must be a whole number of at least 1")
    context = self.check(context)
    beams = self.search(context)
    names = self.manifest.get("history", _HISTORY)
    history_RTL = np.concatenate([context[name] for name in names], axis=1)
    ranking = self.manifest["ranking"]
    score_RW = score_beams(beams, history_RTL, **ranking)
    order_RW = np.argsort(-score_RW, axis=1, kind="stable")
    start, ads, ids = (self._arrays[name] for name in ("ads_start", "ads_A", "ad_id_A"))
    all_ids, all_scores = [], []
    for order_W, score_W, sid_W in zip(order_RW, score_RW, beams["sid_BW"], strict=True):
      pairs = [
        (str(ids[ad]), float(score_W[beam]))
        for beam in order_W if sid_W[beam] >= 0
        for ad in ads[start[sid_W[beam]] : start[sid_W[beam] + 1]]
      ][:k]
      all_ids.append([ad for ad, _ in pairs])
      all_scores.append([score for _, score in pairs])
    return all_ids, all_scores


class _Kinds:
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


def _items(history: Sequence[Mapping[str, Any]], now_s: int) -> list[dict[str, Any]]:
  """A history by time, checked."""
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


def _manifest(file: Path) -> dict[str, Any]:
  """The manifest of an artifact that this reader can read."""
  if not file.is_file():
    raise ValueError(f"{file.parent}: holds no manifest.json; `gr4ad export` makes an artifact")
  try:
    manifest = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise _unreadable(file, error) from None
  if not isinstance(manifest, dict) or "format" not in manifest:
    raise ValueError(f"{file}: names no format; it is none that `gr4ad export` wrote")
  if manifest["format"] != FORMAT:
    raise ValueError(f"{file}: format {manifest['format']}, this reader knows {FORMAT}")
  for name, kind in (("context", dict), ("program_arrays", int), ("ranking", dict)):
    if not isinstance(manifest.get(name), kind):
      raise ValueError(f"{file}: {name} is missing or no {kind.__name__}; export the run again")
  if set(manifest["ranking"]) != {"value_exponent", "new_ad_bonus"}:
    raise ValueError(f"{file}: ranking must name value_exponent and new_ad_bonus, and no other")
  return manifest


def _unreadable(file: Path, error: Exception) -> ValueError:
  if isinstance(error, ValueError) and str(error).startswith(str(file)):
    return error
  words = " ".join(str(error).split())[:200] or type(error).__name__
  return ValueError(f"{file}: is not readable ({words}); export the run again")


if __name__ == "__main__":
  try:
    here = Artifact(Path(__file__).resolve().parent)
    answer = here.recommend(here.sample(), k=10)
  except ValueError as error:
    sys.exit(f"error: {error}")
  for rank, (ad, score) in enumerate(zip(answer[0][0], answer[1][0], strict=True), start=1):
    print(f"{rank:3d}  {ad}  {score:.4f}")
