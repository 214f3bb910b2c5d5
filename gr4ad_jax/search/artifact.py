"""Reads and answers with an exported search; imports nothing but jax and numpy.

`gr4ad export` puts a copy of this file into the artifact as reader.py, so that the folder stands
alone: `python ARTIFACT/reader.py` answers its sample request, and

    from reader import Artifact
    artifact = Artifact("ARTIFACT")
    ads, scores = artifact.recommend(context, k=10)

Files: manifest.json (settings, versions, the arrays of a request), program.bin (a serialised
jax.export program for CPU, CUDA and TPU, any batch size), arrays.npz (parameters, prefix tree,
value of the buckets, ads of each SID), sample.npz (one request). To read programs jax needs the
package flatbuffers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.export
import numpy as np

FORMAT = 1
NEG_INF = -1e30  # that of gr4ad_jax.nn, which this file does without
# Arrays of the context with SIDs of the history, in artifacts whose manifest does not name them.
_HISTORY = ("ad_code_BTL", "organic_code_BOL")


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


class Artifact:
  """An exported search with its ads."""

  def __init__(self, folder: str | Path):
    """Reads the folder; compiles at the first call of each batch size.

    Raises:
      ValueError: no artifact there, or of another format.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").exists():
      raise ValueError(f"{folder}: holds no manifest.json; `gr4ad export` makes an artifact")
    self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if self.manifest["format"] != FORMAT:
      raise ValueError(f"{folder}: format {self.manifest['format']}, this reader knows {FORMAT}")
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
      self._arrays = {name: arrays[name] for name in arrays.files}
    program = jax.export.deserialize((folder / "program.bin").read_bytes())
    counts = self.manifest["program_arrays"]
    # Every array that the program reads lies on the device once.
    self._fixed = jax.device_put([self._arrays[f"program_{i:04d}"] for i in range(counts)])
    self._search = jax.jit(program.call, compiler_options=compiler_options())

  def check(self, context: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The request's arrays in the program's types.

    Raises:
      ValueError: an array is missing or has another shape; its name and the rule.
    """
    checked, rows = {}, None
    for name, shape in self.manifest["context"].items():
      if name not in context:
        raise ValueError(f"context: {name} is missing; it has the shape [requests, *{shape}]")
      array = np.asarray(context[name], np.int32)
      rows = len(array) if rows is None and array.ndim else rows
      if array.shape != (rows, *shape) or not rows:
        raise ValueError(f"context: {name} has shape {array.shape}, needs ({rows}, *{shape})")
      checked[name] = array
    return checked

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
      ValueError: see `check`.
    """
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


if __name__ == "__main__":
  here = Path(__file__).resolve().parent
  with np.load(here / "sample.npz") as sample:
    answer = Artifact(here).recommend(dict(sample), k=10)
  for rank, (ad, score) in enumerate(zip(answer[0][0], answer[1][0], strict=True), start=1):
    print(f"{rank:3d}  {ad}  {score:.4f}")
