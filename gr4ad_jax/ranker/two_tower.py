"""Two-tower retrieval: a vector of the request, a vector of the ad, their product says "clicked".

The first stage of the DLRM cascade that Table 1 starts from. Trained by a softmax over the ads
shown in the batch, corrected for how often each is shown (logQ). Our choice; after Yi et al. 2019,
"Sampling-bias-corrected neural modeling for large corpus item recommendations".
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.machine.sharding import TENSOR, Layouts
from gr4ad_jax.nn import NEG_INF
from gr4ad_jax.ranker.batch import RewardBatch, RewardVocabulary, empty_batch, masked_mean
from gr4ad_jax.ranker.config import RewardConfig
from gr4ad_jax.training.task import Metrics, Task

# Tables lie by rows; the reward model's bear the same names.
LAYOUTS: Layouts = ((r"ad_\d+|content|features", (TENSOR, None)),)

_SCALE = 10.0  # of the cosine of the two vectors


class TwoTower(nn.Module):
  """`user` and `ad` give unit vectors of the same width."""

  config: RewardConfig
  vocabulary: RewardVocabulary

  def setup(self):
    width, vocabulary = 2 * self.config.width, self.vocabulary
    start = nn.initializers.normal(0.1)

    def table(name: str, size: int) -> jax.Array:
      return self.param(name, start, (max(1, size), width))

    self.ad_tables = [table(f"ad_{x}", n) for x, n in enumerate(vocabulary.ad_field_sizes)]
    self.contents = table("content", vocabulary.content_field_sizes[0])
    self.features = table("features", sum(vocabulary.feature_sizes))
    self.hidden, self.out = nn.Dense(4 * width), nn.Dense(width)
    self.ad_hidden, self.ad_out = nn.Dense(4 * width), nn.Dense(width)

  def ad(self, field_X: jax.Array) -> jax.Array:
    """int32 [..., 4] fields -> [..., D]."""
    x = sum(table_VD[field_X[..., i]] for i, table_VD in enumerate(self.ad_tables))
    return _unit(x + self.ad_out(jax.nn.relu(self.ad_hidden(x))))

  def user(self, rows: RewardBatch) -> jax.Array:
    """Requests -> [B, D]."""
    offsets_F = jnp.cumsum(jnp.array((0, *self.vocabulary.feature_sizes)))[:-1]
    feature_BFD = self.features[rows.feature_BF + offsets_F[None]]
    ad_BTD = sum(self.ad_tables[i][rows.ad_BTX[..., i]] for i in range(3))
    organic = rows.organic_BOX
    organic_BOD = self.contents[organic[..., 0]] + self.ad_tables[2][organic[..., 1]]
    ad_BD = masked_mean(ad_BTD, rows.ad_BTX[..., 0] > 0)
    organic_BD = masked_mean(organic_BOD, organic[..., 0] > 0)
    x_BD = jnp.concatenate([ad_BD, organic_BD, feature_BFD.sum(axis=1)], axis=-1)
    return _unit(ad_BD + organic_BD + self.out(jax.nn.relu(self.hidden(x_BD))))

  def __call__(self, rows: RewardBatch) -> tuple[jax.Array, jax.Array]:
    """[B, D] requests and [B, C, D] candidates."""
    return self.user(rows), self.ad(rows.candidate_BCX)


def _unit(x: jax.Array) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def match_scores(user_BD: jax.Array, ad_BCD: jax.Array) -> jax.Array:
  """float32 [B, C]."""
  return _SCALE * jnp.einsum("BD,BCD->BC", user_BD, ad_BCD)


def match_loss(
  user_BD: jax.Array, ad_BCD: jax.Array, batch: RewardBatch
) -> tuple[jax.Array, jax.Array]:
  """Sum and count: log loss of clicked ads among all ads shown in the batch, logQ-corrected."""
  shown_N = batch.where_BC.reshape(-1)
  score_BN = _SCALE * user_BD @ ad_BCD.reshape(-1, ad_BCD.shape[-1]).T
  score_BN = score_BN - batch.log_share_BC.reshape(1, -1)
  logp_BN = jax.nn.log_softmax(jnp.where(shown_N, score_BN, NEG_INF), axis=-1)
  num_rows, width = batch.where_BC.shape
  own_BC = jnp.arange(num_rows)[:, None] * width + jnp.arange(width)[None]
  picked_BC = jnp.take_along_axis(logp_BN, own_BC, axis=1)
  clicked_BC = batch.where_BC & batch.click_BC
  total = -jnp.sum(jnp.where(clicked_BC, picked_BC, 0.0))
  return total, jnp.sum(clicked_BC).astype(jnp.float32)


def two_tower_task(model: TwoTower) -> Task:
  """Mean of `match_loss`."""

  def loss(params: Any, batch: RewardBatch, key: jax.Array | None) -> Metrics:
    del key  # no dropout
    return {"loss": match_loss(*model.apply({"params": params}, batch), batch)}

  return Task(lambda key: model.init(key, empty_batch(model.vocabulary))["params"], loss, LAYOUTS)


def nearest_ads(user_BD: np.ndarray, ad_AD: np.ndarray, k: int) -> np.ndarray:
  """int32 [B, k], the ads whose vectors agree best with the request's, best first."""
  score_BA = user_BD @ ad_AD.T
  k = min(k, score_BA.shape[1])
  top_BK = np.argpartition(-score_BA, k - 1, axis=1)[:, :k]
  order_BK = np.argsort(-np.take_along_axis(score_BA, top_BK, axis=1), axis=1, kind="stable")
  return np.take_along_axis(top_BK, order_BK, axis=1).astype(np.int32)
