"""A GPR model as the search sees it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gr4ad_jax.gpr.config import GuidedSearchConfig
from gr4ad_jax.gpr.model import LAYOUTS, BeamState, Gpr
from gr4ad_jax.search.generator import Generator, ValueGuide

PLAIN = GuidedSearchConfig()


def generator_of(model: Gpr, search: GuidedSearchConfig = PLAIN) -> Generator:
  """The functions and sizes that search, export and serving take.

  Args:
    model: with its vocabulary.
    search: says whether values guide it; nothing else of it is asked.
  """
  search = GuidedSearchConfig(
    most_children=search.most_children, least_children=search.least_children
  )
  return _generator_of(model, search)


@functools.lru_cache(maxsize=16)  # one generator has one set of programs
def _generator_of(model: Gpr, search: GuidedSearchConfig) -> Generator:

  def applied(method: str) -> Callable[..., Any]:
    return lambda params, *args: model.apply({"params": params}, *args, method=method)

  return Generator(
    start=applied("start"), step=applied("step"),
    codebook_sizes=model.vocabulary.codebook_sizes, history=("ad_code_BTL", "organic_code_BOL"),
    at_precision=functools.partial(_at_precision, model, search), encode=applied("encode"),
    layouts=LAYOUTS, among="children",
    guide=ValueGuide(
      search.least_children, search.most_children,
      lambda params, *args: model.apply({"params": params}, *args, method=_promise),
    ) if search.most_children else None,
  )


def _promise(
  module: Gpr, beam: BeamState, code_BW: jax.Array, level: int | jax.Array
) -> jax.Array:
  """Of beams after so many codes, by V of the last one; see `ValueGuide`."""
  token_BWD = module.tables.embed(code_BW, level - 1)
  return module.hte.promise(beam.state_BWD, token_BWD, level)


def _at_precision(
  model: Gpr, search: GuidedSearchConfig, precision: str
) -> tuple[Generator, Callable[[Any], Any]]:
  if precision == "trained":
    return generator_of(model, search), lambda params: params
  if precision != "bfloat16":
    raise ValueError(f"precision={precision!r}: GPR searches in 'trained' or 'bfloat16'")
  config = dataclasses.replace(model.config, compute_dtype="bfloat16")
  # Vectors (norms, biases) are few, and are used in float32.
  return generator_of(Gpr(config, model.vocabulary), search), lambda params: jax.tree.map(
    lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, params
  )
