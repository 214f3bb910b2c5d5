"""Two towers as a rival: a vector of the history, a vector of each advertiser, their product.

Dimension key beyond docs/architecture.md: `B` rows, `H` latest conversions, `A` advertisers, `D`
numbers of a title's vector, `W` width of the towers, `S` steps of an epoch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gr4ad_jax.advertiser.histories import Rows
from gr4ad_jax.advertiser.prepared import Prepared, own_advertisers, training_rows
from gr4ad_jax.advertiser.rival_features import OLDER, Titles, history_titles

WIDTH = 64
BATCH = 256
_RATE, _DECAY = 3e-3, 0.1
_MOST_EPOCHS, _PATIENCE = 30, 3


class Towers(NamedTuple):
  """What both towers learn."""

  own_AW: jax.Array
  advertiser_AW: jax.Array
  title_DW: jax.Array
  bias_A: jax.Array


class TowerRows(NamedTuple):
  """B histories."""

  own_BH: np.ndarray  # int32, advertisers converted with, the newest in the last place; -1 = none
  title_BD: np.ndarray  # float32, of the history
  target_B: np.ndarray  # int32, advertisers; -1 = none


def scores(towers: Towers, rows: TowerRows, title_AD: jax.Array) -> jax.Array:
  """u . v + bias, float32 [B, A].

      u = sum_h w_h E[a_h] + P t,   w_h ~ .8^(conversions since), sum 1;   v_a = F[a] + P t_a

  Args:
    towers: E, F, P and the bias.
    rows: histories.
    title_AD: t_a, titles of the advertisers.
  """
  H = rows.own_BH.shape[1]
  known_BH = rows.own_BH >= 0
  weight_BH = jnp.where(known_BH, (OLDER ** jnp.arange(H - 1, -1, -1))[None], 0.0)
  weight_BH = weight_BH / jnp.maximum(weight_BH.sum(axis=1, keepdims=True), 1e-9)
  own_BHW = towers.own_AW[jnp.maximum(rows.own_BH, 0)]
  user_BW = jnp.einsum("BH,BHW->BW", weight_BH, own_BHW) + rows.title_BD @ towers.title_DW
  ad_AW = towers.advertiser_AW + title_AD @ towers.title_DW
  return jnp.einsum("BW,AW->BA", user_BW, ad_AW) + towers.bias_A[None]


def _mean_loss(towers: Towers, rows: TowerRows, title_AD: jax.Array) -> jax.Array:
  """Mean of -log p(target) among all advertisers: there are few, so that none need be drawn."""
  logp_BA = jax.nn.log_softmax(scores(towers, rows, title_AD), axis=-1)
  return -jnp.take_along_axis(logp_BA, rows.target_B[:, None], axis=1).mean()


_optimizer = optax.adamw(_RATE, weight_decay=_DECAY)
_scores = jax.jit(scores)
_validate = jax.jit(_mean_loss)


@jax.jit
def _epoch(state, rows: TowerRows, order_SB: jax.Array, title_AD: jax.Array):
  """(towers, optimizer's state) after one pass."""

  def step(state, at_B):
    towers, memory = state
    grads = jax.grad(_mean_loss)(towers, jax.tree.map(lambda x: x[at_B], rows), title_AD)
    updates, memory = _optimizer.update(grads, memory, towers)
    return (optax.apply_updates(towers, updates), memory), None

  return jax.lax.scan(step, state, order_SB)[0]


def tower_rows(data: Prepared, rows: Rows, vectors: Titles) -> TowerRows:
  """Histories as the towers take them."""
  return TowerRows(
    own_advertisers(data, rows), history_titles(rows, vectors).astype(np.float32), rows.target_R
  )


def fit_towers(data: Prepared, vectors: Titles) -> Callable[[Rows], np.ndarray]:
  """Learns from every later advertiser of each training stream; the epoch is chosen on validation.

  Args:
    data: prepared.
    vectors: of titles.

  Returns:
    Rows -> float32 [R, A], scores.
  """
  rng, title_AD = np.random.default_rng(0), jnp.asarray(vectors.advertiser_AD)
  learned, asked = training_rows(data), data.splits["validation"]
  asked = asked.take(asked.target_R >= 0)
  D, count_A = title_AD.shape[1], np.bincount(learned.target_R, minlength=len(title_AD))
  # Both tables begin alike, so that an advertiser is near to whom has converted with it.
  own_AW = jnp.asarray(rng.normal(0, 0.1, (len(title_AD), WIDTH)), jnp.float32)
  towers = Towers(
    own_AW, own_AW, jnp.asarray(rng.normal(0, D**-0.5, (D, WIDTH)), jnp.float32),
    jnp.asarray(np.log1p(count_A), jnp.float32),
  )
  train, validation = (jax.device_put(tower_rows(data, of, vectors)) for of in (learned, asked))
  state, best, in_vain = (towers, _optimizer.init(towers)), (np.inf, towers), 0
  size = max(1, min(BATCH, len(learned)))
  for _ in range(_MOST_EPOCHS):
    order_SB = rng.permutation(len(learned))[: len(learned) // size * size].reshape(-1, size)
    state = _epoch(state, train, order_SB, title_AD)
    loss = float(_validate(state[0], validation, title_AD))
    in_vain = 0 if loss < best[0] else in_vain + 1
    best = (loss, state[0]) if loss < best[0] else best
    if in_vain == _PATIENCE:
      break
  return functools.partial(_score, data, vectors, best[1])


def _score(data: Prepared, vectors: Titles, towers: Towers, rows: Rows) -> np.ndarray:
  return np.asarray(_scores(towers, tower_rows(data, rows, vectors), vectors.advertiser_AD))
