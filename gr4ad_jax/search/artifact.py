"""Reads and answers with an exported search; imports nothing but jax and numpy.

`gr4ad export` puts a copy of this file into the artifact as reader.py, so that the folder stands
alone: `python ARTIFACT/reader.py` answers its sample request, and

    from reader import Artifact
    artifact = Artifact("ARTIFACT")
    context = artifact.context([{"ad_id": "7", "time": 1700000000}], features={"scene": "feed"})
    ads, scores = artifact.recommend(context, k=10)

Files: manifest.json (settings, versions, the arrays of a request and the bounds of their numbers),
program.bin (a serialised jax.export program for CPU, CUDA and TPU, any batch size), without.bin
(the same for requests that exclude ads), arrays.npz (parameters, prefix tree, value of the buckets,
ads of each SID, what histories are looked up in), sample.npz (one request). To read programs jax
needs the package flatbuffers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import time as clock
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

if __package__:
  from gr4ad_jax.search.raw_histories import Kinds, finite, read_items
else:  # reader.py, in the folder of an artifact
  from raw_histories import Kinds, finite, read_items  # pyrefly: ignore[missing-import]

FORMAT = 1
NEG_INF = -1e30  # that of gr4ad_jax.nn, which this file does without
# Arrays of the context with SIDs of the history, in artifacts whose manifest does not name them.
_HISTORY = ("ad_code_BTL", "organic_code_BOL")
_WITHOUT = "without.bin"
_REMOVED = {"new_ad_bonus"}  # what earlier versions ranked by, too


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


def score_beams(beams: Mapping[str, np.ndarray], *, value_exponent: float) -> np.ndarray:
  """What SIDs are ranked by: log p(SID | X) + gamma log(expected value).

  Args:
    beams: `logp_BW`, `sid_BW` and, where gamma is not 0, `expected_value_BW`.
    value_exponent: gamma.

  Returns:
    float32 [R, W]; NEG_INF where a beam is not filled.
  """
  score_RW = beams["logp_BW"]
  if value_exponent:
    score_RW = score_RW + value_exponent * np.log(np.maximum(beams["expected_value_BW"], 1e-6))
  return np.where(beams["sid_BW"] >= 0, score_RW, NEG_INF)


def without_ads(
  keep_A: np.ndarray, word_U: np.ndarray, ad_N: np.ndarray, *, sid_of_ad_A: np.ndarray,
  ads_start: np.ndarray, ads_A: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """Ads that may come and the SIDs that hold one, less some ads; an SID goes with its last ad.

  Args:
    keep_A: bool.
    word_U: uint32, bit s % 32 of word s // 32 is SID s.
    ad_N: ads to take out.
    sid_of_ad_A, ads_start, ads_A: the SID of each ad (-1 = none), and the ads of SID s:
      ads_A[ads_start[s] : ads_start[s + 1]].

  Returns:
    Copies of the first two.
  """
  keep_A, word_U = keep_A.copy(), word_U.copy()
  keep_A[ad_N] = False
  sid_N = np.unique(sid_of_ad_A[ad_N])
  sid_N = sid_N[sid_N >= 0]
  first_N, count_N = ads_start[sid_N], ads_start[sid_N + 1] - ads_start[sid_N]
  of_E = np.repeat(np.arange(len(sid_N)), count_N)  # one entry for each ad of these SIDs
  within_E = np.arange(len(of_E)) - (np.cumsum(count_N) - count_N)[of_E]
  left_N = np.bincount(of_E, keep_A[ads_A[first_N[of_E] + within_E]], len(sid_N))
  gone_N = sid_N[left_N == 0]
  np.bitwise_and.at(word_U, gone_N // 32, ~(np.uint32(1) << (gone_N % 32).astype(np.uint32)))
  return keep_A, word_U


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
    self._search = self._program("program.bin")
    # Every array that the programs read lies on the device once.
    self._fixed = jax.device_put([self._arrays[name] for name in fixed])

  def _program(self, name: str) -> Callable[..., dict[str, jax.Array]]:
    try:
      program = jax.export.deserialize(self._checked(name).read_bytes())
    except Exception as error:  # of the format's own reader, which knows no better
      raise _unreadable(self._folder / name, error) from None
    return jax.jit(program.call, compiler_options=compiler_options())

  @property
  def can_exclude(self) -> bool:
    """Whether ads can be left out; artifacts of earlier versions have no program for it."""
    return (self._folder / _WITHOUT).is_file()

  @functools.cached_property
  def _search_some(self) -> Callable[..., dict[str, jax.Array]]:
    return self._program(_WITHOUT)

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
      if name in self.manifest.get("floats", ()):
        checked[name] = finite(name, array)
        continue
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
    kinds, now_s = self._kinds, _now_s(time)
    made = kinds.of(read_items(history, now_s), features or {}, user_id, now_s)
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

  def seen(
    self, history: Sequence[Mapping[str, Any]], *, time: float | None = None
  ) -> list[str]:
    """Ids of the ads whose product a history engages with, itself or as a content.

    Args:
      history, time: as `context` takes them; give the whole history, the model may read less of it.
    """
    now_s = _now_s(time)
    rows = self._kinds.seen(read_items(history, now_s), now_s)
    return self._arrays["ad_id_A"][rows].tolist()

  @functools.cached_property
  def _kinds(self) -> Kinds:
    """What makes numbers of histories."""
    if "kinds" not in self.manifest:
      raise ValueError(
        f"{self._folder}: takes no histories; its system has none for artifacts, or an earlier "
        "version exported it"
      )
    ids = {"ad_id": self._row_of_ad, "content_id": _rows(self._arrays["content_id_O"])}
    return Kinds(self._arrays, ids, self.manifest["features"])

  @functools.cached_property
  def _row_of_ad(self) -> dict[str, int]:
    return _rows(self._arrays["ad_id_A"])

  def search(
    self, context: Mapping[str, np.ndarray], word_BU: np.ndarray | None = None
  ) -> dict[str, np.ndarray]:
    """The most probable SIDs of each request, best first.

    Args:
      context: arrays as the manifest lists them, one row a request, -1 = padding but in floats.
      word_BU: uint32, the SIDs that each request may get (bit s % 32 of word s // 32); None = all.

    Returns:
      `code_BWL`, `logp_BW`, `level_logp_BWL`, `sid_BW` and `expected_value_BW`, as the records of
      `gr4ad_jax.search.beam_search.Beams`.

    Raises:
      ValueError: see `check`.
    """
    context = self.check(context)
    if word_BU is None:
      found = self._search(self._fixed, context)
    else:
      found = self._search_some(self._fixed, context, word_BU)
    return {name: np.asarray(array) for name, array in found.items()}

  def recommend(
    self, context: Mapping[str, np.ndarray], k: int, *,
    exclude: Sequence[Sequence[str]] | None = None,
  ) -> tuple[list[list[str]], list[list[float]]]:
    """Ids of the k best ads of each request and the scores of their SIDs, best first.

    Args:
      context: as `search`.
      k: ads wanted.
      exclude: of each request, ids of ads that never come and take no place in the search, such as
        `seen` gives; others are ignored. None = every ad may come.

    Raises:
      ValueError: k below 1, not one `exclude` a request, an artifact of an earlier version that
        cannot; and see `check`.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
      raise ValueError(f"k={k!r}: must be a whole number of at least 1")
    context = self.check(context)
    keep_RA, word_RU = None, None
    if exclude is not None:
      if len(exclude) != (rows := len(next(iter(context.values())))):
        raise ValueError(f"exclude: of {len(exclude)} request, the context has {rows}")
      keep_RA, word_RU = map(np.stack, zip(*map(self._without, exclude), strict=True))
    beams = self.search(context, word_RU)
    score_RW = score_beams(beams, **self.manifest["ranking"])
    order_RW = np.argsort(-score_RW, axis=1, kind="stable")
    start, ads, ids = (self._arrays[name] for name in ("ads_start", "ads_A", "ad_id_A"))
    all_ids, all_scores = [], []
    for row, (order_W, score_W, sid_W) in enumerate(
      zip(order_RW, score_RW, beams["sid_BW"], strict=True)
    ):
      pairs = [
        (str(ids[ad]), float(score_W[beam]))
        for beam in order_W if sid_W[beam] >= 0
        for ad in ads[start[sid_W[beam]] : start[sid_W[beam] + 1]]
        if keep_RA is None or keep_RA[row, ad]
      ][:k]
      all_ids.append([ad for ad, _ in pairs])
      all_scores.append([score for _, score in pairs])
    return all_ids, all_scores

  def _without(self, ad_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The ads that are left, and the bitmap of their SIDs."""
    start, ads = self._arrays["ads_start"], self._arrays["ads_A"]
    rows = [self._row_of_ad[ad] for ad in ad_ids if ad in self._row_of_ad]
    every_A = np.ones(len(self._sid_of_ad_A), bool)
    every_U = np.full((len(start) - 1) // 32 + 1, 0xFFFFFFFF, np.uint32)
    return without_ads(
      every_A, every_U, np.array(rows, np.int64), sid_of_ad_A=self._sid_of_ad_A, ads_start=start,
      ads_A=ads,
    )

  @functools.cached_property
  def _sid_of_ad_A(self) -> np.ndarray:
    start, sid_of_ad_A = self._arrays["ads_start"], np.full(len(self._arrays["ad_id_A"]), -1)
    sid_of_ad_A[self._arrays["ads_A"]] = np.repeat(np.arange(len(start) - 1), np.diff(start))
    return sid_of_ad_A


def _now_s(time: float | None) -> int:
  """Seconds; only what lies before counts."""
  return int(clock.time() if time is None else time) + 1


def _rows(ids: np.ndarray) -> dict[str, int]:
  return {x: row for row, x in enumerate(ids.tolist())}


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
  for name in _REMOVED & set(manifest["ranking"]):
    value = manifest["ranking"].pop(name)
    print(f"{file}: ranking.{name}={value} is no setting any more and is left out", file=sys.stderr)
  if set(manifest["ranking"]) != {"value_exponent"}:
    raise ValueError(f"{file}: ranking must name value_exponent, and no other")
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
