"""SASRec: causal self-attention over a history, a softmax over ads for what comes next.

Source: Kang and McAuley, arXiv 1808.09781; with a softmax over the whole catalogue in place of one
negative a target: Klenitskiy and Vasilev, arXiv 2309.07602.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.machine.sharding import TENSOR, Layouts
from gr4ad_jax.nn import NEG_INF
from gr4ad_jax.nn.config import HistoryConfig
from gr4ad_jax.nn.history_encoder import HistoryEncoder
from gr4ad_jax.sequential.batch import HistoryBatch
from gr4ad_jax.sequential.config import SasrecModel
from gr4ad_jax.training.task import Metrics, Task

LAYOUTS: Layouts = ((r"ads", (TENSOR, None)),)


class Sasrec(nn.Module):
  """A vector of the request, and one of every ad, the same as where the ad stands in a history."""

  config: SasrecModel
  num_ads: int

  def setup(self):
    config = self.config
    self.ad_AD = self.param("ads", nn.initializers.normal(0.02), (self.num_ads, config.width))
    self.bias_A = self.param("bias", nn.initializers.zeros, (self.num_ads,))
    self.encoder = HistoryEncoder(HistoryConfig(
      width=config.width, max_length=config.max_history, num_blocks=config.num_blocks,
      num_heads=config.num_heads, dropout=config.dropout, filter_share=config.filter_share,
    ))

  def __call__(self, batch: HistoryBatch, *, deterministic: bool = True) -> jax.Array:
    """What each request's history says, [B, D]; zeros where there is none."""
    return self.encoder(self.ad_AD[batch.ad_BT], batch.ad_BT >= 0, deterministic=deterministic)

  def scores(self, batch: HistoryBatch) -> jax.Array:
    """float32 [B, A]: the logits of all ads."""
    return all_scores(self(batch), self.ad_AD, self.bias_A)


def all_scores(h_BD: jax.Array, ad_AD: jax.Array, bias_A: jax.Array) -> jax.Array:
  """[B, A], products of requests and ads, and what an ad has without a request."""
  return h_BD @ ad_AD.T + bias_A[None]


def softmax_loss(score_BA: jax.Array, target_BC: jax.Array) -> jax.Array:
  """float32 [B, C]: -log p(target) among all ads; 0 at padding, -1.

  Source: Klenitskiy and Vasilev 2023, for requests with several targets.
  """
  logp_BA = jax.nn.log_softmax(score_BA, axis=-1)
  logp_BC = jnp.take_along_axis(logp_BA, jnp.maximum(target_BC, 0), axis=1)
  return jnp.where(target_BC >= 0, -logp_BC, 0.0)


def sampled_softmax_loss(
  target_score_BC: jax.Array,
  drawn_score_BN: jax.Array,
  *,
  target_BC: jax.Array,
  drawn_N: jax.Array,
  log_rate_N: jax.Array,
) -> jax.Array:
  """float32 [B, C]: `softmax_loss` with the sum over all other ads estimated by ads drawn.

  The estimate of the sum has no bias: a drawn ad counts 1 / (how often it is drawn), and not where
  it is the target itself, which counts once.

  Args:
    target_score_BC: logits of the targets.
    drawn_score_BN: logits of the drawn ads.
    target_BC: int32 ads, -1 = padding, which costs 0.
    drawn_N: int32 ads, drawn with replacement.
    log_rate_N: log of how often each of them is drawn in a step, on average (logQ).

  Source: Bengio and Senecal 2008; Yi et al. 2019.
  """
  others_BN = drawn_score_BN - log_rate_N[None]
  itself_BCN = target_BC[:, :, None] == drawn_N[None, None]
  others_BC = jax.nn.logsumexp(jnp.where(itself_BCN, NEG_INF, others_BN[:, None]), axis=-1)
  loss_BC = jnp.logaddexp(target_score_BC, others_BC) - target_score_BC
  return jnp.where(target_BC >= 0, loss_BC, 0.0)


class Draws:
  """Ads drawn with replacement: half by their share among the targets of training, half uniformly.
  """

  def __init__(self, share_A: np.ndarray, number: int):
    """Takes float shares, which add up to 1, and how many ads a draw has, an even number."""
    self._number = number
    self._upto_A = np.cumsum(share_A).astype(np.float32)
    # As float32 draws them.
    drawn_A = np.diff(self._upto_A, prepend=np.float32(0)) / self._upto_A[-1]
    self.log_rate_A = np.log(number / 2 * (drawn_A + 1 / len(share_A))).astype(np.float32)

  def __call__(self, key: jax.Array) -> jax.Array:
    """int32 [N] ads."""
    popular, uniform = jax.random.split(key)
    half, last = (self._number // 2,), len(self._upto_A) - 1
    at_N = jax.random.uniform(popular, half, maxval=self._upto_A[-1])
    popular_N = jnp.minimum(jnp.searchsorted(self._upto_A, at_N, side="right"), last)
    return jnp.append(popular_N, jax.random.randint(uniform, half, 0, last + 1))


def sasrec_task(model: Sasrec, share_A: np.ndarray) -> Task:
  """Mean loss over targets, by the full softmax or, with `negatives`, the sampled one.

  Args:
    model: what is trained.
    share_A: float, share of each ad among the targets of training.
  """
  draws = Draws(share_A, model.config.negatives) if model.config.negatives else None

  def loss(params: Any, batch: HistoryBatch, key: jax.Array | None) -> Metrics:
    how, drawing = {"deterministic": True}, jax.random.key(0)  # validation always draws the same
    if key is not None:
      drawing, dropout = jax.random.split(key)
      how = {"deterministic": False, "rngs": {"dropout": dropout}}
    h_BD = model.apply({"params": params}, batch, **how)
    ad_AD, bias_A, target_BC = params["ads"], params["bias"], batch.target_BC
    if draws is None:
      loss_BC = softmax_loss(all_scores(h_BD, ad_AD, bias_A), target_BC)
    else:
      drawn_N = draws(drawing)
      loss_BC = sampled_softmax_loss(
        jnp.einsum("BD,BCD->BC", h_BD, ad_AD[target_BC]) + bias_A[target_BC],
        all_scores(h_BD, ad_AD[drawn_N], bias_A[drawn_N]),
        target_BC=target_BC, drawn_N=drawn_N, log_rate_N=jnp.asarray(draws.log_rate_A)[drawn_N],
      )
    return {"loss": (loss_BC.sum(), jnp.sum(target_BC >= 0).astype(jnp.float32))}

  def init(key: jax.Array) -> Any:
    one = np.zeros((1, 1), np.int32)
    return model.init(key, HistoryBatch(one, one))["params"]

  return Task(init, loss, LAYOUTS)
