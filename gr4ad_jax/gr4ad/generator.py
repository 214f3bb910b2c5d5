"""A GR4AD decoder as the search sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gr4ad_jax.gr4ad.build import Decoder, start_fn, step_fn
from gr4ad_jax.gr4ad.layouts import LAYOUTS
from gr4ad_jax.gr4ad.precision import at_precision
from gr4ad_jax.search.generator import Generator


def generator_of(decoder: Decoder) -> Generator:
  """The functions and sizes that search, export and serving take."""

  def other(precision: str) -> tuple[Generator, Callable[[Any], Any]]:
    low, convert = at_precision(decoder, precision)
    return generator_of(low), convert

  def encode(params: Any, context: Any) -> Any:
    return decoder.apply(
      {"params": params}, context, method=lambda module, context: module.context_processor(context)
    )

  return Generator(
    start=start_fn(decoder), step=step_fn(decoder),
    codebook_sizes=decoder.vocabulary.codebook_sizes,
    history=("ad_code_BTL", "organic_code_BOL"), at_precision=other, encode=encode,
    layouts=LAYOUTS,
  )
