"""Matrix products with gradients written so that XLA's CPU compiler runs them as they stand.

The values are those of `jnp.einsum` and `jnp.matmul`, on every device. JAX's own gradients are
right too, but on CPU they copy large arrays or fall back on a slow library, which costs a seventh
of a training step and more.

Dimension key: `N` rows, `I` numbers of one that go in, `O` numbers that come out (in several axes
`OPQ`); `R`, `K`, `S` rows, inner numbers and columns of small matrices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gr4ad_jax.machine.sharding import TENSOR, is_split


@jax.custom_vjp
def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x W over the last axis of x: [..., I] and [I, O...] give [..., O...].

  JAX would give W's gradient transposed and copy both the gradient of y, which is large, and the
  result. XLA's CPU compiler transposes a W of several output axes before it multiplies by it, so
  they become one here where no mesh splits them.
  """
  out = _output_axes(kernel)
  return jnp.einsum(f"...I,I{out}->...{out}", x, kernel)  # quantisation recognises its weight


def _output_axes(kernel: jax.Array) -> str:
  return "OPQ"[: kernel.ndim - 1]


def _project_forward(x, kernel):
  return project(x, kernel), (x, kernel)


def _project_backward(kept, y_bar):
  x, kernel = kept
  x_NI = x.reshape(-1, x.shape[-1])
  kernel_IO = kernel if is_split(TENSOR) else kernel.reshape(kernel.shape[0], -1)
  y_bar_NO = y_bar.reshape(len(x_NI), *kernel_IO.shape[1:])
  out = _output_axes(kernel_IO)
  x_bar_NI = jnp.einsum(f"N{out},I{out}->NI", y_bar_NO, kernel_IO)
  kernel_bar_IO = jnp.einsum(f"NI,N{out}->I{out}", x_NI, y_bar_NO)
  return x_bar_NI.reshape(x.shape), kernel_bar_IO.reshape(kernel.shape)


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
