"""What the reward model and the two-tower retrieval read: fields of requests, ads and histories."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RewardVocabulary:
  """Values of each field; number 0 stands for unknown or padding in all but the features."""

  feature_sizes: tuple[int, ...]
  ad_field_sizes: tuple[int, ...]
  """Ad, advertiser, category, price bucket."""
  content_field_sizes: tuple[int, ...]
  """Content, category (that of ads), ad of the same product (that of ads)."""


class RewardBatch(NamedTuple):
  """B requests and C ads each; X fields of an ad or content, 0 = unknown or padding."""

  feature_BF: np.ndarray  # int32
  ad_BTX: np.ndarray  # int32, fields of the ads met before
  organic_BOX: np.ndarray  # int32, fields of the contents met before
  candidate_BCX: np.ndarray  # int32, fields of the ads to judge
  click_BC: np.ndarray  # bool
  conversion_BC: np.ndarray  # bool
  where_BC: np.ndarray  # bool, False = padding
  log_share_BC: np.ndarray  # float32, log of the ad's share of all impressions in training


def empty_batch(vocabulary: RewardVocabulary) -> RewardBatch:
  """One request without anything, of the right shapes: for making parameters."""
  return RewardBatch(
    jnp.zeros((1, len(vocabulary.feature_sizes)), jnp.int32),
    *(jnp.zeros((1, 1, n), jnp.int32) for n in (4, 3, 4)),
    *(jnp.zeros((1, 1), bool) for _ in range(3)), jnp.zeros((1, 1)),
  )


def masked_mean(x_BND: jax.Array, there_BN: jax.Array) -> jax.Array:
  """[B, D], mean over the entries that are there; 0 where none is."""
  count_B1 = jnp.maximum(jnp.sum(there_BN, axis=1, keepdims=True), 1)
  return jnp.sum(jnp.where(there_BN[..., None], x_BND, 0), axis=1) / count_B1
