"""What the lower layers of a frozen model say of histories: pooled states, whitened.

Dimension key beyond docs/architecture.md: `T` tokens, `E` places of a text that are read, `F`
numbers of a place, `C` whitened components.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.advertiser.llama import Llama, causal
from gr4ad_jax.machine.progress import track

LATEST = 16  # tokens of the second mean
TOKENS_PER_BATCH = 2048
_LENGTHS = 32


class Places(NamedTuple):
  """Texts to be read, and places in them that stand for texts that begin alike.

  Attributes:
    texts: token numbers; none is the beginning of another one.
    text_N: int64, the text that holds each of the N asked ones.
    end_N: int64, its tokens.
  """

  texts: list[tuple[int, ...]]
  text_N: np.ndarray
  end_N: np.ndarray


def share_beginnings(asked: Sequence[Sequence[int]]) -> Places:
  """The fewest texts that hold all of these as beginnings: windows of one user share one reading.
  """
  order = sorted(range(len(asked)), key=lambda n: tuple(asked[n]))
  texts: list[tuple[int, ...]] = []
  text_N = np.empty(len(asked), np.int64)
  for n in reversed(order):  # the longer of two that begin alike comes first
    mine = tuple(asked[n])
    if not texts or texts[-1][: len(mine)] != mine:
      texts.append(mine)
    text_N[n] = len(texts) - 1
  return Places(texts, text_N, np.array([len(tokens) for tokens in asked], np.int64))


def pool(state_BTD: jax.Array, end_BE: jax.Array) -> jax.Array:
  """Means over the tokens before each place: all of them, and the latest; float32 [B, E, 2 D].

  Each state is divided by its root mean square. The first token is left out: models leave there
  what they attend to when nothing matters, with a norm far above all others.

  Args:
    state_BTD: of the tokens.
    end_BE: int32, tokens up to each place, at least 2.
  """
  state = state_BTD.astype(jnp.float32)
  mean_BT1 = jnp.mean(state * state, axis=-1, keepdims=True)
  unit = (state * jax.lax.rsqrt(mean_BT1 + 1e-6)).at[:, 0].set(0)
  sum_BTD = jnp.cumsum(unit, axis=1)

  def upto(at_BE: jax.Array) -> jax.Array:
    return jnp.take_along_axis(sum_BTD, at_BE[..., None], axis=1)

  last_BE = end_BE - 1
  before_BE = jnp.maximum(last_BE - LATEST, 0)
  all_BED = upto(last_BE) / jnp.maximum(last_BE, 1)[..., None]
  latest = upto(last_BE) - upto(before_BE)
  return jnp.concatenate([all_BED, latest / jnp.maximum(last_BE - before_BE, 1)[..., None]], -1)


@functools.lru_cache(maxsize=4)
def _program(llama: Llama) -> Callable[..., jax.Array]:
  @jax.jit
  def read(params: Any, token_BT: jax.Array, end_BE: jax.Array) -> jax.Array:
    position_BT = jnp.broadcast_to(jnp.arange(token_BT.shape[1])[None], token_BT.shape)
    # What is behind a text's end is never looked at from before it.
    allow_BTS = causal(jnp.zeros(token_BT.shape, jnp.int32))
    state_BTD = llama.apply(
      {"params": params}, token_BT, position_BT=position_BT, allow_BTS=allow_BTS,
      method=Llama.layer_states,
    )
    return pool(state_BTD, end_BE)

  return read


def read_texts(llama: Llama, params: Any, asked: Sequence[Sequence[int]]) -> np.ndarray:
  """float32 [N, F], what the model's last layer says at the end of each text.

  Args:
    llama: the lower layers, see `llama.lower_layers`.
    params: theirs.
    asked: N token lists, each of at least 2 tokens.
  """
  places, read = share_beginnings(asked), _program(llama)
  read_at: list[list[int]] = [[] for _ in places.texts]
  for n, text in enumerate(places.text_N):
    read_at[text].append(n)
  found = np.empty((len(asked), 2 * llama.config.width), np.float32)
  batches = list(_batches(places, read_at))
  for rows, width, size, most in track(batches, "read histories, batches", len(batches)):
    token_BT, end_BE = np.zeros((size, width), np.int32), np.full((size, most), 2, np.int32)
    for b, text in enumerate(rows):
      token_BT[b, : len(places.texts[text])] = places.texts[text]
      end_BE[b, : len(read_at[text])] = places.end_N[read_at[text]]
    pooled_BEF = np.asarray(read(params, token_BT, end_BE))
    for b, text in enumerate(rows):
      found[read_at[text]] = pooled_BEF[b, : len(read_at[text])]
  return found


def _batches(places: Places, read_at: list[list[int]]):
  """(texts, padded length, padded rows, padded places) in few shapes."""
  order = sorted(range(len(places.texts)), key=lambda n: len(places.texts[n]))
  at = 0
  while at < len(order):
    size = max(1, TOKENS_PER_BATCH // _padded(len(places.texts[order[at]])))
    rows = order[at : at + size]
    width = _padded(len(places.texts[rows[-1]]))
    most = max(len(read_at[text]) for text in rows)
    yield rows, width, size, 1 << (most - 1).bit_length()
    at += size


def _padded(length: int) -> int:
  return -(-length // _LENGTHS) * _LENGTHS


class Whitening(NamedTuple):
  """Principal components of unit variance: (x - mean) turned and scaled."""

  mean_F: np.ndarray
  turn_FC: np.ndarray

  def __call__(self, x_NF: np.ndarray) -> np.ndarray:
    """float32 [N, C]."""
    return ((x_NF - self.mean_F) @ self.turn_FC).astype(np.float32)


def whiten(x_NF: np.ndarray, components: int) -> Whitening:
  """The `components` directions in which x varies most, at most as many as vary at all."""
  mean_F = x_NF.mean(axis=0, dtype=np.float64)
  centred_NF = x_NF - mean_F
  value_F, turn_FF = np.linalg.eigh(centred_NF.T @ centred_NF / max(len(x_NF) - 1, 1))
  best = np.argsort(-value_F)[:components]
  best = best[value_F[best] > 1e-9 * value_F.max()]
  return Whitening(
    mean_F.astype(np.float32), (turn_FF[:, best] / np.sqrt(value_F[best])).astype(np.float32)
  )
