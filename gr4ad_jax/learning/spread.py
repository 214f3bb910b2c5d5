"""How far the candidates of a request lie from each other."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Spread(NamedTuple):
  """Rewards of each request, float32."""

  apart_BC: jax.Array  # less their mean; 0 at padding
  mean_B1: jax.Array
  sigma_B1: jax.Array  # of the population


def spread(reward_BC: jax.Array, where_BC: jax.Array) -> Spread:
  """Mean and deviation among the candidates that `where_BC` sets, and each one's distance."""
  count_B1 = jnp.maximum(jnp.sum(where_BC, axis=-1, keepdims=True), 1)
  mean_B1 = jnp.sum(jnp.where(where_BC, reward_BC, 0.0), axis=-1, keepdims=True) / count_B1
  apart_BC = jnp.where(where_BC, reward_BC - mean_B1, 0.0)
  sigma_B1 = jnp.sqrt(jnp.sum(apart_BC**2, axis=-1, keepdims=True) / count_B1)
  return Spread(apart_BC, mean_B1, sigma_B1)
