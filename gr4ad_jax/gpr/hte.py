"""HTE, the evaluator: what a request's ad is worth, before its first code and after each one."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from gr4ad_jax.gpr.batch import Vocabulary
from gr4ad_jax.gpr.config import ModelConfig
from gr4ad_jax.nn.layers import Linear

_LEAST = 1e-6  # currency, so that a value has a logarithm


class Evaluator(nn.Module):
  """V_0 = MLP_0(u_1), V_l = MLP_l([u_l; E_l[z_l]]), with u_l the state that emitted code z_l.

  Nothing that goes in gets a gradient: values learn from the decoders, never the other way round.
  Source: GPR 2.2, with one value more than printed: the critic's last value does not see the last
  code, the item's must.
  """

  config: ModelConfig
  vocabulary: Vocabulary

  def setup(self):
    levels = range(self.vocabulary.num_levels + 1)
    self.hidden = [Linear(self.config.width) for _ in levels]
    self.out = [Linear(1) for _ in levels]
    # Where the values of labels lie: 5% below the one, 5% above the other.
    self.low_V = self.param("low", nn.initializers.constant(-0.5), (len(levels),))
    self.high_V = self.param("high", nn.initializers.constant(0.5), (len(levels),))
    self.biases = self.param("bias", nn.initializers.zeros, (len(levels), self.config.width + 1))

  def before(self, state: jax.Array) -> jax.Array:
    """V_0, float32 [...]: of the state that emits the first code, [..., D]."""
    return self._value(jax.lax.stop_gradient(state), 0)

  def after(self, state: jax.Array, token: jax.Array, level: int) -> jax.Array:
    """V_l, float32 [...]: of the state that emitted the code of a level, 1-based, and the code.

    Args:
      state: [..., D].
      token: the code's embedding, [..., D].
      level: 1 to L.
    """
    both = jnp.concatenate([state, token], axis=-1)
    return self._value(jax.lax.stop_gradient(both), level)

  def promise(self, state: jax.Array, token: jax.Array, level: int | jax.Array) -> jax.Array:
    """clip((V_l - q05) / (q95 - q05), 0, 1), float32 [...]; arguments as `after`.

    A level that is traced is one of 1 to L - 1.
    """

    def of(level: int) -> jax.Array:
      low, high = self.low_V[level], self.high_V[level]
      return jnp.clip(
        (self.after(state, token, level) - low) / jnp.maximum(high - low, _LEAST), 0, 1
      )

    if isinstance(level, int):
      return of(level)
    return jnp.stack([of(one) for one in range(1, self.vocabulary.num_levels)])[level - 1]

  def _value(self, x: jax.Array, level: int) -> jax.Array:
    bias = self.biases[level].reshape((1,) * (x.ndim - 1) + (-1,))
    hidden = jax.nn.gelu(self.hidden[level](x.astype(jnp.float32)) + bias[..., :-1])
    return (self.out[level](hidden) + bias[..., -1:])[..., 0]


def currency(value: jax.Array, vocabulary: Vocabulary) -> jax.Array:
  """What V says in currency: V is the value less its mean over training labels, per deviation."""
  return jnp.maximum(vocabulary.value_mean + vocabulary.value_std * value, _LEAST)


def range_losses(
  value_BPV: jax.Array, low_V: jax.Array, high_V: jax.Array, where_BP: jax.Array
) -> jax.Array:
  """What quantiles of 5% and 95% cost, over all levels, float32 [B, P]; 0 where masked.

  max(q u, (q - 1) u) with u = V - quantile; V gets no gradient. The quantiles that search goes by
  are learned with the values, so that they are a part of every checkpoint.
  """
  total_BP = jnp.zeros(where_BP.shape)
  for share, quantile_V in ((0.05, low_V), (0.95, high_V)):
    apart_BPV = jax.lax.stop_gradient(value_BPV) - quantile_V[None, None]
    apart_BPV = jnp.where(where_BP[..., None], apart_BPV, 0.0)
    total_BP += jnp.sum(jnp.maximum(share * apart_BPV, (share - 1) * apart_BPV), axis=-1)
  return total_BP


def value_losses(
  value_BPV: jax.Array, worth_BP: jax.Array, where_BP: jax.Array, vocabulary: Vocabulary
) -> jax.Array:
  """sum_{l=0..L} (V_l - R)^2 of each label, float32 [B, P]; 0 with gradient 0 where masked.

  Args:
    value_BPV: V_0 to V_L.
    worth_BP: float32, what the engagement was worth, currency.
    where_BP: bool, the labels that count.
    vocabulary: mean and deviation of what labels are worth, by which R is scaled.
  """
  target_BP = (worth_BP - vocabulary.value_mean) / vocabulary.value_std
  error_BPV = jnp.where(where_BP[..., None], value_BPV - target_BP[..., None], 0.0)
  return jnp.sum(error_BPV**2, axis=-1)
