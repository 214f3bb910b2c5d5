"""From a config to a decoder, its parameters, and its functions for search."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gr4ad_jax.gr4ad.autoregressive import AutoregressiveDecoder
from gr4ad_jax.gr4ad.batch import Context, Vocabulary
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.gr4ad.lazy_decoder import LazyDecoder
from gr4ad_jax.gr4ad.multi_token import MultiTokenDecoder

Decoder = LazyDecoder | AutoregressiveDecoder | MultiTokenDecoder


def build_decoder(config: ModelConfig, vocabulary: Vocabulary) -> Decoder:
  """The decoder that `config.decoder` names."""
  match config.decoder:
    case "autoregressive":
      return AutoregressiveDecoder(config, vocabulary)
    case "multi_token":
      return MultiTokenDecoder(config, vocabulary)
  return LazyDecoder(config, vocabulary)


def init_params(decoder: Decoder, key: jax.Array) -> Any:
  """Fresh float32 parameters."""
  vocabulary = decoder.vocabulary
  levels = vocabulary.num_levels
  one = jnp.zeros((1, 1), jnp.int32)
  codes = jnp.zeros((1, 1, levels), jnp.int32)
  numbers = jnp.zeros((1, 1, decoder.config.copied_numbers), jnp.int32)
  trending = jnp.zeros((1, vocabulary.num_trending), jnp.int32)
  context = Context(
    feature_BF=jnp.zeros((1, len(vocabulary.feature_sizes)), jnp.int32),
    ad_code_BTL=codes, ad_count_BT=one, ad_age_BT=one, ad_trend_BT=one,
    organic_code_BOL=codes, organic_id_BO=one, organic_count_BO=one, organic_age_BO=one,
    organic_trend_BO=one,
    trend_code_BNL=jnp.zeros((*trending.shape, levels), jnp.int32), trend_share_BN=trending,
    user_id_B=one[0] if decoder.config.id_rows else None,
    ad_id_BT=one if decoder.config.id_rows or decoder.config.item_scorer else None,
    **({"short_code_BML": codes, "short_number_BMF": numbers} if decoder.config.copy_path else {}),
  )
  return _compile_init(decoder)(key, context, codes)["params"]


@functools.lru_cache(maxsize=16)
def _compile_init(decoder: Decoder) -> Callable[..., Any]:
  return jax.jit(decoder.init)


@functools.lru_cache(maxsize=16)  # one function has one set of programs
def start_fn(decoder: Decoder):
  """(params, context, may_get) -> shared, one-beam state, log p(s_1 | X)."""
  return lambda params, context, may_get: decoder.apply(
    {"params": params}, context, may_get, method="start"
  )


@functools.lru_cache(maxsize=16)
def step_fn(decoder: Decoder):
  """(params, shared, state, code_BW, level) -> state, log-probs."""
  return lambda params, shared, state, code_BW, level: decoder.apply(
    {"params": params}, shared, state, code_BW, level, method="step"
  )
