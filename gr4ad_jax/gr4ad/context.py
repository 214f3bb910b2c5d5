"""The lightweight context processor: token groups, one Linear each, concatenated.

Features, ad history and organic history are the paper's three groups; the currently trending ads
are a fourth, ours (see data/trending.py), and empty where the data was prepared without.

Source: paper 3.2 (Fig. 1). A learned constant token stands before the features, so
that a user without history or features still gives attention something to read.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from gr4ad_jax.gr4ad.batch import Context, EncodedContext, Vocabulary
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.machine.sharding import ROWS, TENSOR, constrain
from gr4ad_jax.nn.code_tables import CodeTables
from gr4ad_jax.nn.layers import Linear, Norm


class ContextProcessor(nn.Module):
  """Structured features, ad history and cross-domain (organic) history -> context tokens."""

  config: ModelConfig
  vocabulary: Vocabulary
  tables: CodeTables

  @nn.compact
  def __call__(self, context: Context) -> EncodedContext:
    width, vocabulary = self.config.width, self.vocabulary
    dtype = jnp.dtype(self.config.compute_dtype)
    num_rows = context.feature_BF.shape[0]

    def table(name: str, size: int, index: jax.Array) -> jax.Array:
      table_VD = self.param(name, nn.initializers.normal(1.0), (size, width)).astype(dtype)
      return jnp.where((index >= 0)[..., None], table_VD[jnp.maximum(index, 0)], 0)

    constant_11D = self.param("constant", nn.initializers.normal(1.0), (1, 1, width)).astype(dtype)
    features_BFD = jnp.broadcast_to(constant_11D, (num_rows, 1, width))
    embed_ids = Ids(self.config, name="ids") if self.config.id_rows else None
    if embed_ids:
      features_BFD += embed_ids(context.user_id_B[:, None])
    if vocabulary.feature_sizes:
      offsets_F = jnp.cumsum(jnp.array((0, *vocabulary.feature_sizes[:-1])))
      index_BF = context.feature_BF + offsets_F[None]
      value_BFD = table("features", sum(vocabulary.feature_sizes), index_BF)
      features_BFD = jnp.concatenate([features_BFD, value_BFD], axis=1)
    features_BFD = Linear(width, name="feature_projection")(features_BFD)

    def history(group: str, code: jax.Array, count: jax.Array, age: jax.Array, trend: jax.Array):
      return (
        self.tables.embed_all(code)
        + table(f"{group}_count", vocabulary.num_count_buckets, count)
        + table(f"{group}_age", vocabulary.num_age_buckets, age)
        + table(f"{group}_trend", vocabulary.num_trend_buckets, trend)
      )

    ad_BTD = history(
      "ad", context.ad_code_BTL, context.ad_count_BT, context.ad_age_BT, context.ad_trend_BT
    )
    if embed_ids:
      ad_BTD += embed_ids(context.ad_id_BT)
    ad_BTD = Linear(width, name="ad_projection")(ad_BTD)
    organic_BOD = history(
      "organic", context.organic_code_BOL, context.organic_count_BO, context.organic_age_BO,
      context.organic_trend_BO,
    )
    organic_BOD += table("organic_id", vocabulary.num_organic_buckets, context.organic_id_BO)
    organic_BOD = Linear(width, name="organic_projection")(organic_BOD)
    groups_BSD = [features_BFD, ad_BTD, organic_BOD]
    if vocabulary.num_trending:
      rank_BN = jnp.arange(vocabulary.num_trending)[None]
      trend_BND = self.tables.embed_all(context.trend_code_BNL)
      trend_BND += table("trend_rank", vocabulary.num_trending, rank_BN)
      trend_BND += table("trend_share", vocabulary.num_trend_buckets, context.trend_share_BN)
      groups_BSD.append(Linear(width, name="trend_projection")(trend_BND))

    return EncodedContext(
      # Split along the width, as heads are: lazy keys and values are these tokens.
      constrain(
        Norm(self.config.norm, name="norm")(jnp.concatenate(groups_BSD, axis=1)),
        ROWS, None, TENSOR,
      ),
      jnp.concatenate(
        [
          jnp.ones((num_rows, features_BFD.shape[1]), bool),
          context.ad_count_BT >= 0,
          context.organic_count_BO >= 0,
          context.trend_share_BN >= 0,
        ],
        axis=1,
      ),
    )


class Ids(nn.Module):
  """Hashed ids of users and ads: a narrow table of any number of rows, then one Linear."""

  config: ModelConfig

  def setup(self):
    shape = (self.config.id_rows, self.config.id_width)
    self.table_NE = self.param("table", nn.initializers.normal(shape[1] ** -0.5), shape)
    self.projection = Linear(self.config.width)

  def __call__(self, hash: jax.Array) -> jax.Array:
    """int32 hashes [...], -1 = padding (zeros) -> [..., D]."""
    row = jnp.maximum(hash, 0) % self.config.id_rows
    row_E = jnp.where((hash >= 0)[..., None], self.table_NE[row], 0)
    return self.projection(constrain(row_E, ROWS).astype(jnp.dtype(self.config.compute_dtype)))


