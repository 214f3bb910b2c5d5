"""A GR4AD decoder as the search sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from gr4ad_jax.data import shortlist
from gr4ad_jax.gr4ad.batch import Vocabulary
from gr4ad_jax.gr4ad.build import Decoder, start_fn, step_fn
from gr4ad_jax.gr4ad.layouts import LAYOUTS
from gr4ad_jax.gr4ad.precision import at_precision
from gr4ad_jax.search.generator import ContextArray, Generator


@functools.lru_cache(maxsize=16)  # one generator has one set of programs
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
    layouts=LAYOUTS, arrays=_arrays(decoder.vocabulary),
  )


def _arrays(vocabulary: Vocabulary) -> dict[str, ContextArray]:
  """What each field of a `Context` holds."""
  count, age = (vocabulary.num_count_buckets,), (vocabulary.num_age_buckets,)
  codes, share = vocabulary.codebook_sizes, (vocabulary.num_trend_buckets,)
  return {
    "feature_BF": ContextArray("features", vocabulary.feature_sizes),
    "ad_code_BTL": ContextArray("ad codes", codes),
    "ad_count_BT": ContextArray("ad counts", count),
    "ad_age_BT": ContextArray("ad ages", age),
    "ad_trend_BT": ContextArray("ad shares", share),
    "organic_code_BOL": ContextArray("content codes", codes),
    "organic_id_BO": ContextArray("content hashes", (vocabulary.num_organic_buckets,)),
    "organic_count_BO": ContextArray("content counts", count),
    "organic_age_BO": ContextArray("content ages", age),
    "organic_trend_BO": ContextArray("content shares", share),
    "trend_code_BNL": ContextArray("trending codes", codes),
    "trend_share_BN": ContextArray("trending shares", share),
    "user_id_B": ContextArray("user hash", (2**31,)),
    "ad_id_BT": ContextArray("ad hashes", (2**31,)),
    "short_code_BML": ContextArray("shortlist codes", codes),
    "short_number_BMF": ContextArray("shortlist numbers", (shortlist.BELOW,)),
  }
