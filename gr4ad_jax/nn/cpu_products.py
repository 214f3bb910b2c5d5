"""A matrix product with a gradient written so that XLA's CPU compiler runs it as it stands.

The values are those of `jnp.einsum`, on every device. JAX's own gradient is right too, but on CPU
it copies large arrays, which costs a seventh of a training step.

Dimension key: `N` rows, `I` numbers of one that go in, `O` numbers that come out (in several axes
`OPQ`).
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
