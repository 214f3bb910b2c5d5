"""The best ads of a request among all, exactly."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.data.engagements import SeenAds
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.sequential.system import System

_MAX_CELLS = 1 << 22  # scores held at once, requests x ads
_MAX_ROWS = 256


class Ranker:
  """Ranks every ad; compiled once for any parameters."""

  def __init__(self, system: System):
    """Compiles nothing yet."""
    self._system = system
    self._rows = max(1, min(_MAX_ROWS, _MAX_CELLS // system.num_ads))

    @functools.partial(jax.jit, static_argnames="k")
    def best(params: Any, batch: Any, seen_BA: np.ndarray, k: int) -> jax.Array:
      score_BA = jnp.where(seen_BA, -jnp.inf, system.scores(params, batch))
      score_BK, ad_BK = jax.lax.top_k(score_BA, k)
      return jnp.where(score_BK > -jnp.inf, ad_BK, -1)

    self._best = best

  def __call__(
    self, params: Any, examples: Sequence[Example], k: int, *, seen: SeenAds | None = None
  ) -> np.ndarray:
    """Lists for requests.

    Args:
      params: of the system's task.
      examples: the requests; their targets are not looked at.
      k: length of the lists.
      seen: leaves out what users had seen before each request; None = nothing.

    Returns:
      ranked_RK: int32 ads, best first, equal ones by number; -1 beyond those that may stand there.
    """
    num_ads, rows = self._system.num_ads, self._rows
    ranked_RK = np.full((len(examples), k), -1, np.int32)
    for at in range(0, len(examples), rows):
      part = list(examples[at : at + rows])
      seen_BA = np.zeros((rows, num_ads), bool)
      for row, example in enumerate(part if seen is not None else ()):
        seen_BA[row, seen.before(example.user, example.time_s)] = True
      filled = part + part[-1:] * (rows - len(part))  # one program
      best_BK = self._best(params, self._system.make_batch(filled), seen_BA, min(k, num_ads))
      ranked_RK[at : at + len(part), : best_BK.shape[1]] = np.asarray(best_BK)[: len(part)]
    return ranked_RK
