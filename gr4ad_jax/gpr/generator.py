"""A GPR model as the search sees it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gr4ad_jax.gpr.model import LAYOUTS, Gpr
from gr4ad_jax.search.generator import Generator


@functools.lru_cache(maxsize=16)  # one generator has one set of programs
def generator_of(model: Gpr) -> Generator:
  """The functions and sizes that search, export and serving take."""

  def applied(method: str) -> Callable[..., Any]:
    return lambda params, *args: model.apply({"params": params}, *args, method=method)

  return Generator(
    start=applied("start"), step=applied("step"),
    codebook_sizes=model.vocabulary.codebook_sizes, history=("ad_code_BTL", "organic_code_BOL"),
    at_precision=functools.partial(_at_precision, model), encode=applied("encode"),
    layouts=LAYOUTS, among="children",
  )


def _at_precision(model: Gpr, precision: str) -> tuple[Generator, Callable[[Any], Any]]:
  if precision == "trained":
    return generator_of(model), lambda params: params
  if precision != "bfloat16":
    raise ValueError(f"precision={precision!r}: GPR searches in 'trained' or 'bfloat16'")
  config = dataclasses.replace(model.config, compute_dtype="bfloat16")
  # Vectors (norms, biases) are few, and are used in float32.
  return generator_of(Gpr(config, model.vocabulary)), lambda params: jax.tree.map(
    lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, params
  )
