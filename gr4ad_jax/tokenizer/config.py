"""Settings of the tokenizer."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from gr4ad_jax.config import Bounded, Count, NotNegative, Seed, require
from gr4ad_jax.embedding.config import ENCODERS, Encoder
from gr4ad_jax.tokenizer.health_line import LastLevel

Method = Literal["balanced_kmeans", "kmeans", "rq_vae", "rq_kmeans_plus", "fsq"]
METHODS: tuple[Method, ...] = get_args(Method)
HASH_COLUMNS = (
  "advertiser_id", "account_id", "campaign_id", "conversion_type", "ad_id", "category", "price",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(Bounded):
  """How ads become semantic IDs."""

  encoder: Encoder = "wordllama"
  """Text encoder (uae = MiniLM fine-tuned on these logs), or your own embeddings."""
  quantizer: Method = "balanced_kmeans"
  """How embeddings become codes."""
  codebook_sizes: tuple[Count, ...] = ()
  """Codes per level; default by catalogue size."""
  last_level: LastLevel = "hash"
  """What the last level holds: a hash of --hash-columns, a number that tells apart ads with the
  same codes, or one more quantised code."""
  hash_columns: tuple[str, ...] = ("ad_id",)
  """Ad columns hashed into the last level; the paper's are account_id conversion_type."""
  seed: Seed = 0
  """Seed of the quantizer, of fine-tuning and of the hash."""
  kmeans_iterations: Count = 20
  """k-means iterations a level."""
  balance_epsilon: NotNegative = 1.0
  """balanced_kmeans halves codes that hold more than (1 + this) times their even share of distinct
  embeddings."""

  def _check(self):
    named = [
      ("encoder", self.encoder, ENCODERS), ("quantizer", self.quantizer, METHODS),
      ("last_level", self.last_level, get_args(LastLevel)),
      *(("hash_columns", name, HASH_COLUMNS) for name in self.hash_columns),
    ]  # fmt: skip
    for field, value, known in named:
      require(value in known, field, value, f"is none of {', '.join(known)}")
    require(len(self.codebook_sizes) != 1, "codebook_sizes", self.codebook_sizes,
            "needs two levels or more, or () for those that fit the catalogue")
    require(self.last_level != "hash" or len(self.hash_columns) > 0, "hash_columns",
            self.hash_columns, "name a column, or take last_level 'quantised'")

  def num_quantised(self, num_levels: int) -> int:
    """Levels that come from the embedding."""
    return num_levels - (self.last_level != "quantised")
