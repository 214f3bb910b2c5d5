"""The refining token: what the thinking tokens suggest, as the end of a short diffusion.

Noise is turned into the likely embedding of the next ad, step by step, given the thinking tokens.
Training adds noise to the true embedding and learns to name that noise; what generation reads
always comes from pure noise, in training too: anything made of the true embedding would hand the
label to its own codes. Source: GPR 2.2; DDIM (Song et al. 2021) and the cosine schedule of Nichol
and Dhariwal (2021). Letters: `B` rows, `P` requests, `D` width, `F` numbers of a request.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.gpr.config import ModelConfig
from gr4ad_jax.nn.layers import FeedForward, Linear, Norm, SelfAttention

_MOST = 3.0  # of a number of x_0: the first steps magnify errors 200-fold


def schedule(steps: int) -> np.ndarray:
  """abar_0 = 1, abar_1 .. abar_T, float64 [T + 1]: what is left of the signal after each step.

  Cosine, with no step above 0.999: without that nothing would be left in the end to divide by.
  """
  step_T = np.arange(steps + 1)
  f_T = np.cos((step_T / steps + 0.008) / 1.008 * np.pi / 2) ** 2
  loss_T = np.minimum(1 - f_T[1:] / f_T[:-1], 0.999)
  return np.append(1.0, np.cumprod(1 - loss_T))


def denoise(
  predict: Callable[[jax.Array, int], jax.Array], noise: jax.Array, steps: int
) -> jax.Array:
  """x_0 from x_T = `noise`, without further randomness (DDIM).

  Args:
    predict: (x_t, t) -> the noise that x_t holds.
    noise: any shape.
    steps: T.
  """
  kept_T, x, x0 = schedule(steps), noise, noise
  for step in range(steps, 0, -1):
    kept, before = kept_T[step], kept_T[step - 1]
    x0 = (x - (1 - kept) ** 0.5 * predict(x, step)) / kept**0.5
    x0 = jnp.clip(x0, -_MOST, _MOST)
    held = (x - kept**0.5 * x0) / (1 - kept) ** 0.5
    x = before**0.5 * x0 + (1 - before) ** 0.5 * held
  return x0


def request_noise(number_BPF: jax.Array, width: int) -> jax.Array:
  """Noise of requests, float32 [B, P, D]: the same whenever the same numbers are asked for.

  Args:
    number_BPF: int32, what is known of each request, whatever stands beside it in a batch.
    width: D.
  """
  seed_BP = jnp.zeros(number_BPF.shape[:2], jnp.uint32)
  for place in range(number_BPF.shape[2]):
    seed_BP = seed_BP * jnp.uint32(0x01000193) ^ number_BPF[..., place].astype(jnp.uint32)

  def drawn(seed: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), seed), (width,))

  return jax.vmap(jax.vmap(drawn))(seed_BP)


def unit_rms(x: jax.Array) -> jax.Array:
  """Of mean square 1 along the last axis, float32."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


class Refiner(nn.Module):
  """eps_theta, what it makes of noise, and what of that goes into BOS.

  One Transformer layer over three tokens: C (the sum of the thinking tokens), the step, and x_t,
  which stands last and so sees the other two. Its output is the noise in x_t.
  """

  config: ModelConfig

  def setup(self):
    config, width = self.config, self.config.width
    init = nn.initializers.normal(1.0)
    self.steps_TD = self.param("steps", init, (config.refining, width))
    self.types_QD = self.param("types", init, (3, width))
    self.attention = SelfAttention(config.token_layers)
    self.feed_forward = FeedForward(config.token_layers)
    self.norms = [Norm("layer") for _ in range(3)]
    self.out = Linear(width)
    self.into_bos = self.param("into_bos", nn.initializers.zeros, (width, width))

  def noise_in(self, x_BPD: jax.Array, step_BP: jax.Array, thought_BPD: jax.Array) -> jax.Array:
    """eps_theta(x_t, t, C), float32 [B, P, D].

    Args:
      x_BPD: float32.
      step_BP: int32, 1 to T.
      thought_BPD: C.
    """
    dtype = thought_BPD.dtype
    token_BPQD = jnp.stack(
      [thought_BPD, self.steps_TD[step_BP - 1].astype(dtype), x_BPD.astype(dtype)], axis=2
    )
    h_BPQD = token_BPQD + self.types_QD[None, None].astype(dtype)
    h_BPQD += self.attention(self.norms[0](h_BPQD))[0]
    h_BPQD += self.feed_forward(self.norms[1](h_BPQD))
    return self.out(self.norms[2](h_BPQD[:, :, -1])).astype(jnp.float32)

  def __call__(self, noise_BPD: jax.Array, thought_BPD: jax.Array) -> jax.Array:
    """What is added to BOS, [B, P, D]: W x_0', W beginning at zero; x_0' passes no gradient on."""

    def predict(x_BPD: jax.Array, step: int) -> jax.Array:
      return self.noise_in(x_BPD, jnp.full(x_BPD.shape[:2], step), thought_BPD)

    x0_BPD = jax.lax.stop_gradient(denoise(predict, noise_BPD, self.config.refining))
    dtype = thought_BPD.dtype
    return jnp.einsum("BPD,DO->BPO", x0_BPD.astype(dtype), self.into_bos.astype(dtype))

  def loss(self, target_BPD: jax.Array, thought_BPD: jax.Array, key: jax.Array) -> jax.Array:
    """mean_d (eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t, C))^2, float32 [B, P].

    Args:
      target_BPD: mean of the true ad's code embeddings; brought to unit RMS, and gets no gradient.
      thought_BPD: C, which learns from this.
      key: of t, uniform in 1 to T, and of eps.
    """
    step_key, noise_key = jax.random.split(key)
    x0_BPD = unit_rms(jax.lax.stop_gradient(target_BPD))
    step_BP = jax.random.randint(step_key, x0_BPD.shape[:2], 1, self.config.refining + 1)
    noise_BPD = jax.random.normal(noise_key, x0_BPD.shape)
    kept_BP1 = jnp.asarray(schedule(self.config.refining), jnp.float32)[step_BP][..., None]
    x_BPD = jnp.sqrt(kept_BP1) * x0_BPD + jnp.sqrt(1 - kept_BP1) * noise_BPD
    error_BPD = noise_BPD - self.noise_in(x_BPD, step_BP, thought_BPD)
    return jnp.mean(error_BPD**2, axis=-1)
