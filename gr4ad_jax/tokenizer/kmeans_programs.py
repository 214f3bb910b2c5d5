"""What residual k-means compiles: first centroids, sums over rows, the next centroids, codes.

N points of width D, V codes; for sums, points lie in G groups of K blocks of R rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gr4ad_jax.machine import sharding
from gr4ad_jax.tokenizer.groups import add_in_order, map_groups

INIT_ROUNDS = 16  # in which the first centroids are drawn
MOVE_BELOW = 0.1  # a code moves to one that is so many times its size
SPLIT_STEP = 0.1  # half the distance of the two halves of a code when it is split, in its spread


class LevelState(NamedTuple):
  """What the fit of one level changes."""

  centroid_VD: jax.Array
  count_V: jax.Array  # float, rows behind each centroid, earlier batches counting less


@functools.partial(jax.jit, static_argnames="size")
def first_centroids(point_ND: jax.Array, key: jax.Array, *, size: int) -> jax.Array:
  """Points drawn ~ squared distance to those drawn before, many a round."""
  N, D = point_ND.shape
  per_round = -(-size // INIT_ROUNDS)
  rounds = -(-size // per_round)
  norm_N = jnp.square(point_ND).sum(-1)

  def draw(r, state):
    centroid_VD, nearest_N, free_N = state
    noise_N = jax.random.gumbel(jax.random.fold_in(key, r), (N,))
    weight_N = jnp.log(jnp.maximum(nearest_N, 1e-20)) + noise_N
    _, chosen = jax.lax.top_k(jnp.where(free_N, weight_N, -jnp.inf), per_round)
    new_CD = point_ND[chosen]
    centroid_VD = jax.lax.dynamic_update_slice(centroid_VD, new_CD, (r * per_round, 0))
    distance_NC = squared_distance(point_ND, new_CD) + norm_N[:, None]
    nearest_N = jnp.minimum(nearest_N, jnp.maximum(distance_NC.min(-1), 0))
    return centroid_VD, nearest_N, free_N.at[chosen].set(False)

  # At first all distances are equal, so the draw is uniform.
  state = (jnp.zeros((rounds * per_round, D)), jnp.full(N, 1e9), jnp.ones(N, bool))
  return jax.lax.fori_loop(0, rounds, draw, state)[0][:size]


def squared_distance(point_ND: jax.Array, centroid_VD: jax.Array) -> jax.Array:
  """[N, V] up to the point's own norm, which does not change its ranking of centroids."""
  with jax.default_matmul_precision("float32"):  # the same codes on every kind of device
    dot_NV = jnp.einsum("ND,VD->NV", point_ND, centroid_VD)
  return jnp.square(centroid_VD).sum(-1)[None] - 2 * dot_NV


class Sums(NamedTuple):
  """Over rows, one partial sum for each group; the last code is that of padding."""

  sum_GWD: jax.Array  # vectors of each code, W = V + 1
  count_GW: jax.Array
  distance_GW: jax.Array  # squared, to the code's centroid


@functools.cache
def compile_accumulate(mesh: Mesh) -> Callable:
  """(points [G, K, R, D], real rows [G, K], centroids, first block, stop) -> sums over blocks."""

  def assign(shared, group):
    centroid_VD, first, stop = shared
    point_KRD, rows_K = group
    V, D = centroid_VD.shape

    def add_block(k, sums):
      point_RD = point_KRD[k]
      distance_RV = squared_distance(point_RD, centroid_VD)
      code_R = jnp.where(jnp.arange(len(point_RD)) < rows_K[k], distance_RV.argmin(-1), V)
      distance_R = jnp.maximum(distance_RV.min(-1) + jnp.square(point_RD).sum(-1), 0)
      return jax.tree.map(lambda sum_W, x_R: sum_W.at[code_R].add(x_R), sums,
                          Sums(point_RD, 1, distance_R))

    zeros = Sums(jnp.zeros((V + 1, D)), jnp.zeros(V + 1, jnp.int32), jnp.zeros(V + 1))
    return jax.lax.fori_loop(first, stop, add_block, zeros)

  def accumulate(point_GKRD, rows_GK, centroid_VD, first, stop):
    return map_groups(assign, (centroid_VD, first, stop), (point_GKRD, rows_GK), mesh)

  return jax.jit(accumulate)


add_sums = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)


@functools.cache
def compile_update(mesh: Mesh) -> Callable:
  """(sums, state, key, epsilon, count decay) -> state one iteration later."""

  def update(sums, state, key, epsilon, decay):
    centroid_VD, count_V = state
    V, D = centroid_VD.shape
    sum_VD, new_V, distance_V = (add_in_order(x)[:V] for x in sums)
    # Means; earlier batches keep a share that decays.
    count_V = decay * count_V + new_V
    step_VD = sum_VD - new_V[:, None] * centroid_VD
    centroid_VD = centroid_VD + step_VD / jnp.maximum(count_V, 1e-9)[:, None]
    # The j-th smallest code leaves its place and halves the j-th largest one.
    even = count_V.sum() / V
    from_V = jnp.argsort(count_V, stable=True)
    to_V = from_V[::-1]
    small_V, large_V = count_V[from_V], count_V[to_V]
    moves_V = (large_V > (1 + epsilon) * even) & (small_V < MOVE_BELOW * large_V)
    moves_V |= (small_V < 0.5) & (large_V >= 2)
    moves_V &= jnp.arange(V) < V // 2
    spread_V = jnp.sqrt(distance_V / jnp.maximum(new_V, 1) / D)[to_V]
    offset_VD = SPLIT_STEP * spread_V[:, None] * jax.random.normal(key, (V, D))
    half_V = jnp.where(moves_V, large_V / 2, large_V)
    kept_VD = jnp.where(moves_V[:, None], centroid_VD[to_V] - offset_VD, centroid_VD[to_V])
    moved_VD = jnp.where(moves_V[:, None], centroid_VD[to_V] + offset_VD, centroid_VD[from_V])
    centroid_VD = centroid_VD.at[to_V].set(kept_VD)
    count_V = count_V.at[to_V].set(half_V)
    first = jnp.where(moves_V, from_V, V)  # codes that do not move are left as they are
    centroid_VD = centroid_VD.at[first].set(moved_VD, mode="drop")
    count_V = count_V.at[first].set(half_V, mode="drop")
    return LevelState(centroid_VD, count_V)

  return jax.jit(update, out_shardings=sharding.replicated(mesh))


@functools.cache
def compile_encode(mesh: Mesh) -> Callable:
  """(centroids of each level, points [K, R, D]) -> codes [K, R, levels]."""

  def block(centroids, residual_RD):
    codes = []
    for centroid_VD in centroids:
      codes.append(squared_distance(residual_RD, centroid_VD).argmin(-1).astype(jnp.int32))
      residual_RD = residual_RD - centroid_VD[codes[-1]]
    return jnp.stack(codes, -1)

  return jax.jit(lambda centroids, point_KRD: map_groups(block, centroids, point_KRD, mesh))
