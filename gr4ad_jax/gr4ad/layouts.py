"""How GR4AD's parameters lie on a mesh, and which of them learn sparsely."""

from __future__ import annotations

from gr4ad_jax.machine.sharding import FSDP, TENSOR, Layouts
from gr4ad_jax.nn.layers import LAYER_LAYOUTS

SPARSE_TABLES = ("ids/table",)

LAYOUTS: Layouts = (
  (r"ids/table", ((TENSOR, FSDP), None)),  # hash rows, width; optimizer: hash rows, 1
  (r"tables/level_\d+|features|organic_id", (TENSOR, None)),  # vocabulary, width
  (r"items/ad|items/level_\d+", (TENSOR, None)),  # ads or codes, width
  *LAYER_LAYOUTS,
  (r"\w+_projection/kernel", (FSDP, TENSOR)),  # width, width
  (r"(fuse|copy)/\w+/kernel", (FSDP, None)),  # width, width
)
