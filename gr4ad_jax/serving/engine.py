"""Requests -> ads, many at a time: a family of compiled searches over batch sizes and widths.

Parameters and the catalogue can be replaced between any two calls; nothing is compiled then.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.catalog.catalog import Catalog, LiveCatalog
from gr4ad_jax.catalog.targeting import Allowed
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.data.trending import Trending
from gr4ad_jax.search.beam_schedule import scaled_widths
from gr4ad_jax.search.beam_search import Beams, compile_search
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.generator import Generator, whatever
from gr4ad_jax.search.recommender import Recommendations, rank_ads, without
from gr4ad_jax.search.searcher import Searcher
from gr4ad_jax.serving.compiled import REPEATS, Compiled, seconds_of
from gr4ad_jax.serving.config import ServingConfig
from gr4ad_jax.training.published import UnfitError


class Query(NamedTuple):
  """One request."""

  example: Example
  user_id: str  # hashed where the model has a table of ids
  k: int
  where: tuple[str, ...]  # conditions on ads
  exclude_N: np.ndarray | None = None  # int32, ads that must not come


@dataclasses.dataclass(frozen=True)
class Answer:
  """One request's ads.

  Attributes:
    found: one row.
    catalog: that was searched.
    beams: one row, every SID that was found.
    factor, widths: the schedule.
    step: of the parameters.
    seconds: of the call, by part: context (histories to arrays), search, rank.
    batch: requests that shared the call.
    place: of this one among them.
  """

  found: Recommendations
  catalog: Catalog
  beams: Beams
  factor: float
  widths: tuple[int, ...]
  step: int
  seconds: dict[str, float]
  batch: int
  place: int


class _Parameters(NamedTuple):
  on_device: Any
  step: int


class Engine(Compiled):
  """Answers batches; threads may call it at the same time."""

  def __init__(
    self,
    generator: Generator,
    params: Any,
    *,
    step: int,
    catalog: LiveCatalog,
    search: SearchConfig,
    bin_means: Sequence[float],
    config: ServingConfig,
  ):
    """Lays out the parameters of a `step`; `compile_all` or `compile_one` must follow.

    `search` gives base widths, precision and ranking, `bin_means` the mean value of each bucket.
    """
    super().__init__(config)
    self.catalog, self._search = catalog, search
    self.searcher = Searcher(
      generator, catalog.tree, precision=search.precision, bin_means=bin_means
    )
    self._parameters = _Parameters(self.searcher.lay_out(params), step)
    self.widths = {
      factor: scaled_widths(search.widths, factor, widen_last=config.widen_last)
      for factor in config.beam_factors
    }
    self.trending: Trending | None = None  # of now, where the model reads it; else the catalogue's
    self.example: Example | None = None  # any request, to compile with

  @property
  def step(self) -> int:
    """Training step of the parameters."""
    return self._parameters.step

  @property
  def params(self) -> Any:
    """On the device, as they are searched with."""
    return self._parameters.on_device

  def replace_params(self, params: Any, step: int, *, canary: Example) -> None:
    """Other parameters of the same model, from the next call on.

    Args:
      params: as trained.
      step: that they are of.
      canary: a request that they have to answer first.

    Raises:
      ValueError: another model.
      UnfitError: the answer is none.
    """
    on_device = jax.block_until_ready(self.searcher.lay_out(params))
    old, new = (
      jax.tree.map(lambda x: (np.shape(x), np.dtype(x.dtype).name), tree)
      for tree in (self._parameters.on_device, on_device)
    )
    if old != new:
      raise ValueError("parameters: of another model; shapes or types differ")
    self._require_answer(on_device, canary)
    self._parameters = _Parameters(on_device, step)

  def _require_answer(self, params: Any, canary: Example) -> None:
    """Raises UnfitError where a search with parameters tells ads no better than chance."""
    catalog = self.catalog.now
    beams = self.searcher(
      params, catalog.prefixes, self.context([Query(canary, "", 1, ())], catalog),
      size=self.config.call_size(1), widths=self.widths[1.0],
      allowed=None if self.is_whole else [catalog.allowed(())],
    )
    found_W = beams.sid_BW[0] >= 0
    logp_W = beams.logp_BW[0][found_W]
    if not found_W.any():
      raise UnfitError("a search with the parameters finds no ad")
    value_W = logp_W if beams.expected_value_BW is None else beams.expected_value_BW[0][found_W]
    if not (np.isfinite(logp_W) & np.isfinite(value_W)).all():
      raise UnfitError("a search with the parameters finds scores that are not finite")
    if len(logp_W) > 1 and np.ptp(logp_W) == 0:
      raise UnfitError("a search with the parameters finds all ads equally good")

  def run_program(self, factor: float, size: int, *, conditions: bool) -> None:
    """Answers `example` so many times."""
    assert self.example is not None
    queries = [Query(self.example, "", 10, ())] * size
    self._answers(queries, factor=factor, size=size, conditions=conditions)

  def parts_s(self) -> dict[str, float]:
    """Seconds of the parts of one request's search at base widths, each as a program of its own.

    context: histories to context tokens; trunk: what beams share, and the first level; levels: the
    others and the value step; top_k: selection alone, on made-up scores.
    """
    generator, catalog, widths = self.searcher.generator, self.catalog.now, self.widths[1.0]
    assert self.example is not None
    context = jax.device_put(self.context([Query(self.example, "", 1, ())], catalog))
    logp_LV = [
      jax.device_put(np.random.default_rng(level).normal(size=size).astype(np.float32))
      for level, size in enumerate(generator.codebook_sizes)
    ]

    def fixed_start(logp_LV, _, may_get):
      return None, jnp.zeros((1, 1)), logp_LV[0][None, None]

    def fixed_step(logp_LV, _, state, code_BW, level):
      logp_V = logp_LV[level] if isinstance(level, int) else logp_LV[-1]
      return state, jnp.broadcast_to(logp_V, (*code_BW.shape, len(logp_V)))

    encode, start = jax.jit(generator.encode), jax.jit(generator.start, static_argnums=2)
    select = compile_search(fixed_start, fixed_step, self.catalog.tree, widths)
    programs = {
      "context": lambda: encode(self.params, context),
      "trunk": functools.partial(start, self.params, context, whatever),
      "levels": lambda: self.searcher(
        self.params, catalog.prefixes, context, size=1, widths=widths
      ),
      "top_k": lambda: select(logp_LV, None, catalog.prefixes),
    }
    # The first call compiles, and is never the fastest.
    seconds = {
      name: min(seconds_of(program) for _ in range(1 + REPEATS))
      for name, program in programs.items()
    }
    levels = seconds["levels"] - seconds["trunk"] - seconds["top_k"]
    return {
      "context": seconds["context"], "trunk": max(0.0, seconds["trunk"] - seconds["context"]),
      "levels": max(0.0, levels), "top_k": seconds["top_k"],
    }

  def __call__(self, queries: Sequence[Query], *, factor: float) -> list[Answer]:
    """Answers up to the largest batch size of requests by the schedule of a factor.

    Raises:
      ConfigError: a condition that no ad meets.
    """
    # The program for conditions answers those without any, too: all that there is at first.
    conditions = not self.is_whole or any(
      query.where or query.exclude_N is not None for query in queries
    )
    size = self.config.call_size(len(queries))
    return self._answers(queries, factor=factor, size=size, conditions=conditions)

  def _answers(
    self, queries: Sequence[Query], *, factor: float, size: int, conditions: bool
  ) -> list[Answer]:
    began = time.perf_counter()
    catalog, (params, step) = self.catalog.now, self._parameters
    context = self.context(queries, catalog)
    allowed = [_allowed(query, catalog) for query in queries] if conditions else None
    searching = time.perf_counter()
    beams = self.searcher(
      params, catalog.prefixes, context, size=size, widths=self.widths[factor], allowed=allowed,
    )
    ranking = time.perf_counter()
    met_RTL = self.searcher.generator.met_codes(context)
    found = rank_ads(
      catalog.snapshot.index, beams, met_RTL, max(query.k for query in queries),
      config=self._search, allowed=allowed,
    )
    seconds = {
      "context": searching - began, "search": ranking - searching,
      "rank": time.perf_counter() - ranking,
    }
    return [
      Answer(
        Recommendations(*(x[row : row + 1, : query.k] for x in found)), catalog,
        jax.tree.map(lambda x, row=row: x[row : row + 1], beams), factor, self.widths[factor],
        step, seconds, len(queries), row,
      )
      for row, query in enumerate(queries)
    ]

  def context(self, queries: Sequence[Query], catalog: Catalog) -> Any:
    """What the model reads of the requests."""
    contexts = catalog.contexts
    if self.trending is not None:
      contexts = contexts.with_trending(self.trending)
    # Users may be new: the log's numbers do not do.
    return contexts.context(
      [query.example for query in queries], user_ids=[query.user_id for query in queries]
    )


def _allowed(query: Query, catalog: Catalog) -> Allowed:
  allowed = catalog.allowed(query.where)
  if query.exclude_N is None:
    return allowed
  return without(catalog.snapshot.index, allowed, query.exclude_N)
