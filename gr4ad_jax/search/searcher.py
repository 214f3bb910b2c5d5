"""Searches of one model, compiled once for each schedule of beams: pads, searches, cuts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gr4ad_jax.catalog.legal_prefixes import LegalPrefixes, PrefixTree
from gr4ad_jax.catalog.targeting import Allowed
from gr4ad_jax.data.pipeline import repeat_last
from gr4ad_jax.machine import sharding
from gr4ad_jax.search.beam_search import Beams, Sampling, compile_search
from gr4ad_jax.search.generator import Generator, num_requests


class Searcher:
  """Parameters, prefixes and contexts are arguments of a search, so each may change between two."""

  def __init__(
    self,
    generator: Generator,
    tree: PrefixTree,
    *,
    precision: str = "trained",
    bin_means: Sequence[float] | None = None,
    mesh: Mesh | None = None,
  ):
    """Compiles nothing yet.

    Args:
      generator: the model.
      tree: static facts of the prefixes that will be searched.
      precision: number type of the search.
      bin_means: mean value of each bucket, for expected values; None = none are computed.
      mesh: devices of this host that share the parameters and the requests of a call; None = the
        default device alone.

    Raises:
      ValueError: see `AtPrecision`.
    """
    self.generator, self._convert = generator.at_precision(precision)
    self.tree, self._mesh = tree, mesh
    self._programs: dict[tuple[int, ...], Callable[..., Beams]] = {}
    self._bin_means = None
    if bin_means is not None:
      self._bin_means = self.everywhere(np.asarray(bin_means, np.float32))

  def lay_out(self, params: Any) -> Any:
    """Trained parameters as the searches take them: in their number type, on their devices."""
    params = self._convert(params)
    if self._mesh is None:
      return jax.device_put(params)
    return jax.device_put(
      params, sharding.state_sharding(self._mesh, params, self.generator.layouts)
    )

  def everywhere(self, arrays: Any) -> Any:
    """Arrays on every device of the search."""
    return jax.device_put(arrays, None if self._mesh is None else sharding.replicated(self._mesh))

  def program(self, widths: tuple[int, ...]) -> Callable[..., Beams]:
    """The search with these beams after each level; its arguments are those of `compile_search`."""
    if widths not in self._programs:
      generator = self.generator
      search = compile_search(
        generator.start, generator.step, self.tree, widths, generator.among, generator.guide
      )
      if self._mesh is not None:
        search = sharding.MeshProgram(self._mesh, search)
      self._programs[widths] = search
    return self._programs[widths]

  def __call__(
    self,
    params: Any,
    prefixes: LegalPrefixes,
    context: Any,
    *,
    size: int,
    widths: tuple[int, ...],
    allowed: Sequence[Allowed] | None = None,
    sampling: Sampling | None = None,
  ) -> Beams:
    """The most probable SIDs of each request, best first, as numpy arrays.

    Args:
      params: from `lay_out`.
      prefixes: that exist, from `everywhere`.
      context: of R requests.
      size: requests of the compiled call; the batch is filled up to it with its last row.
      widths: beams after each level.
      allowed: what each request may get; None = all ads, by a program without that question.
      sampling: draws SIDs instead.
    """
    padded = jax.tree.map(lambda x: repeat_last(np.asarray(x), size), context)
    if self._mesh is not None:
      padded = jax.device_put(padded, sharding.batch_sharding(self._mesh))
    subsets = None, None
    if allowed is not None:
      word_BU = repeat_last(np.stack([row.word_U for row in allowed]), size)
      # Each request has a subset of its own.
      subsets = self.everywhere((word_BU, np.arange(size, dtype=np.int32)[:, None]))
    beams = self.program(widths)(
      params, padded, prefixes, self._bin_means, *subsets, sampling
    )
    num_rows = num_requests(context)
    return jax.tree.map(lambda x: np.asarray(x)[:num_rows], beams)
