"""What a decoder layer needs to know of a model."""

from __future__ import annotations

import dataclasses
from typing import Literal

KvMode = Literal["lazy", "projected"]  # the normalised context itself, or projections per layer
NormKind = Literal["rms", "layer"]
Remat = Literal["none", "products", "all"]


@dataclasses.dataclass(frozen=True)
class LayerConfig:
  """Sizes and kinds of a layer's parts; a model's own config says what they mean and checks them.

  Layers compute in the type of the states that enter them, norms and softmax in float32.
  """

  width: int
  num_heads: int
  feed_forward_width: int
  kv_mode: KvMode = "lazy"
  norm: NormKind = "rms"
  dropout: float = 0.0
  remat: Remat = "none"
