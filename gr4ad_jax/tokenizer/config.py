"""Settings of the tokenizer."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from gr4ad_jax.embedding.config import ENCODERS, Encoder
from gr4ad_jax.tokenizer.health_line import LastLevel

Method = Literal["balanced_kmeans", "kmeans", "rq_vae", "rq_kmeans_plus", "fsq"]
METHODS: tuple[Method, ...] = get_args(Method)
HASH_COLUMNS = (
  "advertiser_id", "account_id", "campaign_id", "conversion_type", "ad_id", "category", "price",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """How ads become semantic IDs."""

  encoder: Encoder = "wordllama"
  """Text encoder (uae = MiniLM fine-tuned on these logs), or your own embeddings."""
  quantizer: Method = "balanced_kmeans"
  """How embeddings become codes."""
  codebook_sizes: tuple[int, ...] = ()
  """Codes per level; default by catalogue size."""
  last_level: LastLevel = "hash"
  """What the last level holds: a hash of --hash-columns, a number that tells apart ads with the
  same codes, or one more quantised code."""
  hash_columns: tuple[str, ...] = ("ad_id",)
  """Ad columns hashed into the last level; the paper's are account_id conversion_type."""
  seed: int = 0
  """Seed of the quantizer, of fine-tuning and of the hash."""
  kmeans_iterations: int = 20
  """k-means iterations a level."""
  balance_epsilon: float = 1.0
  """balanced_kmeans halves codes that hold more than (1 + this) times their even share of distinct
  embeddings."""

  def __post_init__(self):
    if self.encoder not in ENCODERS:
      raise ValueError(f"encoder: {self.encoder!r} is none of {', '.join(ENCODERS)}")
    if self.quantizer not in METHODS:
      raise ValueError(f"quantizer: {self.quantizer!r} is none of {', '.join(METHODS)}")
    if len(self.codebook_sizes) == 1 or any(size < 1 for size in self.codebook_sizes):
      raise ValueError(
        f"codebook_sizes: {self.codebook_sizes}, expected two or more sizes >= 1, or ()"
      )
    if self.last_level not in get_args(LastLevel):
      kinds = ", ".join(get_args(LastLevel))
      raise ValueError(f"last_level: {self.last_level!r} is none of {kinds}")
    for name in self.hash_columns:
      if name not in HASH_COLUMNS:
        raise ValueError(f"hash_columns: {name!r} is none of {', '.join(HASH_COLUMNS)}")
    if self.last_level == "hash" and not self.hash_columns:
      raise ValueError("hash_columns: empty; name a column, or take last_level 'quantised'")
    if not 0 <= self.seed < 2**31:
      raise ValueError(f"seed: {self.seed}, must be in [0, 2^31)")
    if self.kmeans_iterations < 1:
      raise ValueError(f"kmeans_iterations: {self.kmeans_iterations}, must be >= 1")
    if not self.balance_epsilon >= 0:
      raise ValueError(f"balance_epsilon: {self.balance_epsilon}, must be >= 0")

  def num_quantised(self, num_levels: int) -> int:
    """Levels that come from the embedding."""
    return num_levels - (self.last_level != "quantised")
