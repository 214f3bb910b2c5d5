"""Matrix products with gradients written so that XLA's CPU compiler runs them as they stand.

The values are those of `jnp.einsum` and `jnp.matmul`, on every device. JAX's own gradients are
right too, but on CPU they copy large arrays or fall back on a slow library, which costs a seventh
of a training step and more.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gr4ad_jax.machine.sharding import TENSOR, is_split


@jax.custom_vjp
def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x W over the last axis of x: [..., A] and [A, ...] give [..., ...].

  JAX would give W's gradient transposed and copy both the gradient of y, which is large, and the
  result. XLA's CPU compiler transposes a W of several output axes before it multiplies by it, so
  they become one here where no mesh splits them.
  """
  axes = "bcd"[: kernel.ndim - 1]  # one einsum, whose weight quantisation can recognise
  return jnp.einsum(f"...a,a{axes}->...{axes}", x, kernel)


def _project_forward(x, kernel):
  return project(x, kernel), (x, kernel)


def _project_backward(kept, y_bar):
  x, kernel = kept
  x_NA, kernel_AB = x.reshape(-1, x.shape[-1]), kernel
  axes = "bcd"[: kernel.ndim - 1]
  if not is_split(TENSOR):
    axes, kernel_AB = "b", kernel.reshape(kernel.shape[0], -1)
  y_bar_NB = y_bar.reshape(len(x_NA), *kernel_AB.shape[1:])
  x_bar_NA = jnp.einsum(f"n{axes},a{axes}->na", y_bar_NB, kernel_AB)
  kernel_bar_AB = jnp.einsum(f"na,n{axes}->a{axes}", x_NA, y_bar_NB)
  return x_bar_NA.reshape(x.shape), kernel_bar_AB.reshape(kernel.shape)


project.defvjp(_project_forward, _project_backward)


@jax.custom_vjp
def matmul(left_RK: jax.Array, right_KS: jax.Array) -> jax.Array:
  """Products of many small matrices, in float32; leading axes are the same in both.

  JAX would give the gradient of `right` as a sum over R with R first in both factors. XLA's CPU
  compiler has no fast product of that form for small matrices: it calls another library once for
  each of them, and that library allocates at each call. Here `left` is transposed before.

  Args:
    left_RK: [..., R, K]; computed with in the type of `right_KS`.
    right_KS: [..., K, S].
  """
  return jnp.matmul(
    left_RK.astype(right_KS.dtype), right_KS, preferred_element_type=jnp.float32
  )


def _matmul_forward(left_RK, right_KS):
  return matmul(left_RK, right_KS), (left_RK, right_KS)


def _matmul_backward(kept, bar_RS):
  left_RK, right_KS = kept
  bar_RS = bar_RS.astype(right_KS.dtype)
  left_bar_RK = jnp.einsum(
    "...RS,...KS->...RK", bar_RS, right_KS, preferred_element_type=left_RK.dtype
  )
  left_KR = jax.lax.platform_dependent(
    left_RK.astype(right_KS.dtype), cpu=_transposed_copy, default=lambda x: x.mT
  )
  return left_bar_RK, jnp.einsum("...KR,...RS->...KS", left_KR, bar_RS)


def _transposed_copy(x: jax.Array) -> jax.Array:
  return jax.lax.optimization_barrier(x.mT)  # else it is folded into the product that follows


matmul.defvjp(_matmul_forward, _matmul_backward)
