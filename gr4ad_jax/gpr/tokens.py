"""The unified input: groups of U, O, E and I tokens, and thoughts. Letters as in `attention.py`.

Beyond them: `X` thoughts of a row, `E` numbers that tell one, `P` labels of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gr4ad_jax.data.sequences import NUM_COUNT_BUCKETS
from gr4ad_jax.gpr.attention import NUM_TYPES
from gr4ad_jax.gpr.batch import (
  NUM_ACTIONS,
  NUM_GAP_BUCKETS,
  Context,
  SeenThoughts,
  Vocabulary,
)
from gr4ad_jax.gpr.config import ModelConfig
from gr4ad_jax.machine.sharding import ROWS, constrain
from gr4ad_jax.nn.code_tables import CodeTables
from gr4ad_jax.nn.layers import Linear, Norm


class Stream(NamedTuple):
  """A row's tokens, the newest group last."""

  token_BGYD: jax.Array
  there_BGY: jax.Array  # bool, False = padding, or no ad yet
  age_BGY: jax.Array  # int32, seconds to the row's last request


def layout(context: Context) -> tuple[jax.Array, jax.Array]:
  """Which tokens are there, bool [B, G, Y], and how old each is, int32 [B, G, Y] in seconds."""
  group_BG1, ad_BG1 = (age_BG[..., None] for age_BG in (context.age_BG, context.ad_age_BG))
  age_BGY = jnp.concatenate([group_BG1, group_BG1, group_BG1, ad_BG1], axis=-1)
  return age_BGY >= 0, jnp.maximum(age_BGY, 0)


class UnifiedInput(nn.Module):
  """Context -> tokens of one width.

    x_U = W_U (sum of user features + ads engaged with before)
    x_O = W_O mean_contents(sum_l E_l[z_l]), a learned vector where there are none
    x_E = W_E (sum of request features, hour and weekday)
    x_I = W_I mean_ads(sum_l E_l[z_l]) + mean_ads(action)

  Each with its type's vector, and that of the time since the request before: an age that is counted
  from the row's end would tell earlier requests when later ones come. E_l are the tables that the
  token decoder writes with. Source: GPR 2.1.
  """

  config: ModelConfig
  vocabulary: Vocabulary
  tables: CodeTables

  @nn.compact
  def __call__(self, context: Context) -> Stream:
    width, dtype = self.config.width, jnp.dtype(self.config.compute_dtype)
    num_rows, num_groups = context.age_BG.shape

    def rows_of(name: str, size: int, index: jax.Array) -> jax.Array:
      table_VD = self.param(name, nn.initializers.normal(1.0), (size, width)).astype(dtype)
      return jnp.where((index >= 0)[..., None], table_VD[jnp.maximum(index, 0)], 0)

    def features(name: str, sizes: Sequence[int], index: jax.Array) -> jax.Array:
      """Sum of one row for each feature; -1 gives none."""
      offsets_F = jnp.cumsum(jnp.array((0, *sizes[:-1])))
      offsets = offsets_F.reshape((1,) * (index.ndim - 1) + offsets_F.shape)
      index = jnp.where(index < 0, -1, index + offsets)
      return jnp.sum(rows_of(name, sum(sizes), index), axis=-2)

    def mean_of(x: jax.Array, there: jax.Array) -> jax.Array:
      """Mean over the items of each group that are there, [B, G, D]; zeros where none is."""
      x = jnp.where(there[..., None], x, 0).reshape(num_rows, num_groups, -1, width)
      there = there.reshape(num_rows, num_groups, -1)
      count_BG = jnp.maximum(jnp.sum(there, axis=-1), 1)
      return jnp.sum(x, axis=2) / count_BG[..., None].astype(dtype)

    user_BGD = rows_of("count", NUM_COUNT_BUCKETS, context.count_BG)
    if self.vocabulary.user_sizes:
      user_BD = features("user_features", self.vocabulary.user_sizes, context.user_BF)
      user_BGD += user_BD[:, None]
    request_BGD = features(
      "request_features", self.vocabulary.request_sizes, context.request_BGF
    )
    known_BO = context.organic_code_BOL[..., 0] >= 0
    organic_BGD = mean_of(self.tables.embed_all(context.organic_code_BOL), known_BO)
    organic_BGD = Linear(width, name="organic_projection")(organic_BGD)
    empty_D = self.param("no_organic", nn.initializers.normal(1.0), (width,)).astype(dtype)
    any_BG1 = jnp.any(known_BO.reshape(num_rows, num_groups, -1), axis=-1, keepdims=True)
    organic_BGD = jnp.where(any_BG1, organic_BGD, empty_D[None, None])
    known_BT = context.ad_code_BTL[..., 0] >= 0
    ad_BGD = mean_of(self.tables.embed_all(context.ad_code_BTL), known_BT)
    ad_BGD = Linear(width, name="ad_projection")(ad_BGD)
    action_BTD = rows_of("action", NUM_ACTIONS, context.ad_action_BT)
    ad_BGD += mean_of(action_BTD, context.ad_action_BT >= 0)
    token_BGYD = jnp.stack([
      Linear(width, name="user_projection")(user_BGD), organic_BGD,
      Linear(width, name="request_projection")(request_BGD), ad_BGD,
    ], axis=2)
    type_YD = self.param("type", nn.initializers.normal(1.0), (NUM_TYPES, width)).astype(dtype)
    token_BGYD += type_YD[None, None]
    token_BGYD += rows_of("gap", NUM_GAP_BUCKETS, context.gap_BG)[:, :, None]
    there_BGY, age_BGY = layout(context)
    token_BGYD = jnp.where(there_BGY[..., None], token_BGYD, 0)
    return Stream(constrain(token_BGYD, ROWS), there_BGY, age_BGY)


class ThoughtTokens(nn.Module):
  """LN(W_th e + t) of each thought, for the token decoder alone. Source: GPR 2.2.

  t is the vector of their type; W_th begins with rows as long as it.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, embedding_BXE: jax.Array) -> jax.Array:
    width, dtype = self.config.width, jnp.dtype(self.config.compute_dtype)
    scale = embedding_BXE.shape[-1] ** 0.5  # e has norm 1
    project = Linear(width, scale, name="thought_projection")
    type_D = self.param("type", nn.initializers.normal(1.0), (width,)).astype(dtype)
    token_BXD = project(embedding_BXE.astype(dtype)) + type_D[None, None]
    return Norm("layer", name="norm")(constrain(token_BXD, ROWS))


def sees_thought(thoughts: SeenThoughts, group_BP: jax.Array) -> jax.Array:
  """Which thoughts of its row the request of each label's group sees, bool [B, P, X]."""
  first_BP1, end_BP1 = (
    jnp.take_along_axis(edge_BG, group_BP, axis=1)[..., None]
    for edge_BG in (thoughts.first_BG, thoughts.end_BG)
  )
  place_11X = jnp.arange(thoughts.embedding_BXE.shape[1])[None, None]
  return (place_11X >= first_BP1) & (place_11X < end_BP1)
