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


@dataclasses.dataclass(frozen=True)
class HistoryConfig:
  """Sizes of a `HistoryEncoder`; a model's own config checks them."""

  width: int = 64
  """Of item vectors and states."""
  max_length: int = 32
  """Items of the longest history, and the period of the low-pass filter."""
  num_blocks: int = 2
  num_heads: int = 1
  """Must divide the width."""
  dropout: float = 0.5
  """On the items and on what each part of a block adds."""
  filter_share: float = 0.0
  """What the filter gives to a block's mix, beside attention; 0 = attention alone."""
  num_low: int = 3
  """Frequencies that the filter lets pass, 0 among them."""
