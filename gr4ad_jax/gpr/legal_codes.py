"""Which codes lead on from each prefix of an SID: bitmaps, for the softmax of training."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class LegalCodes(NamedTuple):
  """Prefixes of all SIDs with their next codes.

  Attributes:
    node_AL: int32, the prefix that each ad has before level l, -1 = the ad has no SID.
    words_L: of each level, uint32 [prefixes, U]: bit v % 32 of word v // 32 says that code v leads
      on. U is the same for all levels.
  """

  node_AL: np.ndarray
  words_L: tuple[np.ndarray, ...]

  def of(self, ad: np.ndarray) -> np.ndarray:
    """uint32 [..., L, U] of ads, int32 [...]; no code leads on where an ad is -1 or has no SID."""
    legal = [
      np.where((node < 0)[..., None], np.uint32(0), words_NU[np.maximum(node, 0)])
      for node, words_NU in zip(
        np.moveaxis(np.where((ad < 0)[..., None], -1, self.node_AL[ad]), -1, 0), self.words_L,
        strict=True,
      )
    ]
    return np.stack(legal, axis=-2)


def legal_codes(code_AL: np.ndarray, num_codes: int) -> LegalCodes:
  """Of the SIDs of all ads, -1 = none; `num_codes` is the largest codebook."""
  has_A = code_AL[:, 0] >= 0
  node_AL = np.full(code_AL.shape, -1, np.int32)
  words_L = []
  for level in range(code_AL.shape[1]):
    prefixes, node = np.unique(code_AL[has_A, :level], axis=0, return_inverse=True)
    node_AL[has_A, level] = node.reshape(-1)
    words_NU = np.zeros((len(prefixes), -(-num_codes // 32)), np.uint32)
    code = code_AL[has_A, level]
    np.bitwise_or.at(words_NU, (node.reshape(-1), code // 32), np.uint32(1) << (code % 32).astype(
      np.uint32
    ))
    words_L.append(words_NU)
  return LegalCodes(node_AL, tuple(words_L))


def unpack(words: jax.Array, num_codes: int) -> jax.Array:
  """uint32 [..., U] -> bool [..., V]: which codes lead on."""
  code_V = np.arange(num_codes)
  bit_V = jnp.asarray(code_V % 32, jnp.uint32)
  word_V = words[..., code_V // 32]
  return (word_V >> bit_V.reshape((1,) * (word_V.ndim - 1) + bit_V.shape)) & 1 == 1
