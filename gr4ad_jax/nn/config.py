"""What a decoder layer needs to know of a model."""

from __future__ import annotations

import dataclasses
from typing import Literal

KvMode = Literal["lazy", "projected"]
NormKind = Literal["rms", "layer"]
Remat = Literal["none", "products", "all"]


@dataclasses.dataclass(frozen=True)
class LayerConfig:
  """Sizes and kinds of a layer's parts; a model's own config checks them and gives one.

  Layers compute in the type of the states that enter them, norms and softmax in float32.
  """

  width: int
  """d, the width of every hidden state."""
  num_heads: int
  """Attention heads; must divide the width."""
  feed_forward_width: int
  """Inner width of the feed-forward block."""
  kv_mode: KvMode = "lazy"
  """Cross-attention keys and values: the normalised context itself, or projections per layer."""
  norm: NormKind = "rms"
  """Normalisation before each sub-layer."""
  dropout: float = 0.0
  """Dropout rate on sub-layer outputs during training."""
  remat: Remat = "none"
  """What the backward pass computes again instead of keeping: nothing, all of a layer but its
  matrix products, or all of a layer."""
