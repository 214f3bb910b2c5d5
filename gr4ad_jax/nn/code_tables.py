"""Tables of SID codes, one a level, that inputs and heads share."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from gr4ad_jax.machine.sharding import ROWS, TENSOR, constrain


class CodeTables(nn.Module):
  """One table E_l per SID level: input embeddings sqrt(d) E_l[s] and tied heads W_l = E_l.

  Papers leave both open; with sqrt(d) an input starts at the size of a normalised state.
  """

  width: int
  codebook_sizes: tuple[int, ...]
  compute_dtype: str = "float32"

  def setup(self):
    init = nn.initializers.normal(self.width**-0.5)
    self.tables = [
      self.param(f"level_{level}", init, (size, self.width))
      for level, size in enumerate(self.codebook_sizes)
    ]

  def embed(self, code: jax.Array, level: int | jax.Array) -> jax.Array:
    """Token input of codes of one level.

    Args:
      code: int32 [...]; negative codes (padding) give zeros.
      level: 0-based; a traced level is resolved by a switch.

    Returns:
      [..., D] in the compute dtype.
    """
    if not isinstance(level, int):
      branches = [lambda c, i=i: self.embed(c, i) for i in range(len(self.tables))]
      return jax.lax.switch(level, branches, code)
    dtype = jnp.dtype(self.compute_dtype)
    table_VD = self.tables[level].astype(dtype) * self.width**0.5
    return constrain(jnp.where((code >= 0)[..., None], table_VD[jnp.maximum(code, 0)], 0), ROWS)

  def embed_all(self, code_L: jax.Array) -> jax.Array:
    """Sum of the embeddings of a whole SID: int32 [..., L] -> [..., D]."""
    return sum(self.embed(code_L[..., level], level) for level in range(len(self.tables)))

  def logits(self, h_D: jax.Array, level: int) -> jax.Array:
    """Scores of all codes of a level: [..., D] -> float32 [..., V]."""
    table_VD = self.tables[level].astype(h_D.dtype)
    logits_V = jnp.einsum("...D,VD->...V", h_D, table_VD, preferred_element_type=jnp.float32)
    return constrain(logits_V, ROWS, *(None,) * (logits_V.ndim - 2), TENSOR)
