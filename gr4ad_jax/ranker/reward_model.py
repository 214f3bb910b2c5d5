"""A DLRM that predicts click and conversion of shown ads: the reward model and final ranker.

Fields of the request and of a candidate are embedded, the histories are pooled twice (their mean,
and by attention from the candidate), all pairs of fields enter as dot products, and an MLP with
two heads gives the logits of pCTR and of pCVR given a click. eCPM = 1000 * bid * pCTR * pCVR.

Two towers inside the model learn, beside it, which ads are clicked by whom among all that the batch
shows to anybody (`two_tower.py`). Their match enters as a field without gradient: from the shown
ads alone a ranker hardly learns what it means that an ad is never shown to such a user.

Source: paper 4.1 (a reward model trained on real exposures); its form is our choice, after DLRM
(arXiv 1906.00091) and DIN (arXiv 1706.06978).
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.nn import NEG_INF
from gr4ad_jax.ranker.batch import RewardBatch, RewardVocabulary, empty_batch, masked_mean
from gr4ad_jax.ranker.config import RewardConfig
from gr4ad_jax.ranker.two_tower import LAYOUTS, TwoTower, match_loss, match_scores
from gr4ad_jax.training.task import Metrics, Task


class RewardLogits(NamedTuple):
  """float32 [B, C]."""

  click_BC: jax.Array
  conversion_BC: jax.Array  # given a click
  user_BD: jax.Array  # of the towers
  ad_BCD: jax.Array


class RewardModel(nn.Module):
  """Context and candidates -> logits of click and conversion."""

  config: RewardConfig
  vocabulary: RewardVocabulary

  @nn.compact
  def __call__(self, batch: RewardBatch) -> RewardLogits:
    width, vocabulary = self.config.width, self.vocabulary
    start = nn.initializers.normal(0.05)

    def table(name: str, size: int) -> jax.Array:
      return self.param(name, start, (size, width))

    ad_tables = [table(f"ad_{x}", n) for x, n in enumerate(vocabulary.ad_field_sizes)]
    content_VD = table("content", vocabulary.content_field_sizes[0])
    offsets_F = jnp.cumsum(jnp.array((0, *vocabulary.feature_sizes)))[:-1]
    feature_VD = table("features", max(1, sum(vocabulary.feature_sizes)))
    feature_BFD = feature_VD[batch.feature_BF + offsets_F[None]]

    def of_ads(field: jax.Array) -> list[jax.Array]:
      return [table_VD[field[..., x]] for x, table_VD in enumerate(ad_tables)]

    ad_BTD = sum(of_ads(batch.ad_BTX)[:3])
    organic = batch.organic_BOX
    organic_BOD = content_VD[organic[..., 0]] + ad_tables[2][organic[..., 1]]
    organic_BOD += jnp.where((organic[..., 2] > 0)[..., None], ad_tables[0][organic[..., 2]], 0)
    there_BT, there_BO = batch.ad_BTX[..., 0] > 0, organic[..., 0] > 0
    candidate = of_ads(batch.candidate_BCX)
    query_BCD = sum(candidate[:3])
    fields = [
      *candidate,
      _attend(query_BCD, ad_BTD, there_BT),
      _attend(query_BCD, organic_BOD, there_BO),
      *(jnp.broadcast_to(x_BD[:, None], query_BCD.shape) for x_BD in (
        masked_mean(ad_BTD, there_BT), masked_mean(organic_BOD, there_BO),
        *(feature_BFD[:, f] for f in range(feature_BFD.shape[1])),
      )),
    ]
    pairs = [
      jnp.sum(a * b, axis=-1, keepdims=True) for a, b in itertools.combinations(fields, 2)
    ]
    user_BD, ad_BCD = TwoTower(self.config, vocabulary, name="towers")(batch)
    match_BC = jax.lax.stop_gradient(match_scores(user_BD, ad_BCD))
    h = jnp.concatenate([*fields, *pairs, match_BC[..., None]], axis=-1)
    for n, size in enumerate(self.config.mlp_widths):
      h = jax.nn.relu(nn.Dense(size, name=f"hidden_{n}")(h))
    logit_BC2 = nn.Dense(2, name="heads")(h)
    # Ids of ads and advertisers also speak for themselves.
    own_BC2 = sum(
      self.param(f"bias_{x}", nn.initializers.zeros, (size, 2))[batch.candidate_BCX[..., x]]
      for x, size in enumerate(vocabulary.ad_field_sizes)
    )
    logit_BC2 = (logit_BC2 + own_BC2).astype(jnp.float32)
    return RewardLogits(logit_BC2[..., 0], logit_BC2[..., 1], user_BD, ad_BCD)


def _attend(query_BCD: jax.Array, x_BND: jax.Array, there_BN: jax.Array) -> jax.Array:
  """What the candidate finds in the history; a constant 0 can be looked at instead."""
  score_BCN = jnp.einsum("BCD,BND->BCN", query_BCD, x_BND) * np.float32(4 / x_BND.shape[-1] ** 0.5)
  score_BCN = jnp.where(there_BN[:, None], score_BCN, NEG_INF)
  none_BC1 = jnp.zeros((*query_BCD.shape[:2], 1))
  weight_BCN = jax.nn.softmax(jnp.concatenate([score_BCN, none_BC1], axis=-1), axis=-1)[..., :-1]
  return jnp.einsum("BCN,BND->BCD", weight_BCN, x_BND)


@functools.lru_cache(maxsize=16)  # one task has one set of programs
def reward_task(model: RewardModel) -> Task:
  """Mean log loss of clicks over shown ads, plus that of conversions, plus that of the towers.

  All per shown ad; the towers' parameters see their own loss alone.
  """

  def loss(params: Any, batch: RewardBatch, key: jax.Array | None) -> Metrics:
    del key  # no dropout
    logits = model.apply({"params": params}, batch)
    clicked_BC = batch.where_BC & batch.click_BC
    click = jnp.sum(jnp.where(batch.where_BC, _log_loss(logits.click_BC, batch.click_BC), 0))
    conversion_BC = _log_loss(logits.conversion_BC, batch.conversion_BC)
    conversion = jnp.sum(jnp.where(clicked_BC, conversion_BC, 0))
    shown = jnp.sum(batch.where_BC).astype(jnp.float32)
    match, clicks = match_loss(logits.user_BD, logits.ad_BCD, batch)
    return {
      "loss": (click + conversion + match, shown),
      "match_loss": (match, clicks),
      "click_loss": (click, shown),
      "conversion_loss": (conversion, clicks),
    }

  return Task(lambda key: model.init(key, empty_batch(model.vocabulary))["params"], loss, LAYOUTS)


def _log_loss(logit: jax.Array, label: jax.Array) -> jax.Array:
  return jnp.logaddexp(0.0, logit) - jnp.where(label, logit, 0.0)
