"""What crosses from the data pipeline to the model: plain records of arrays."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np


class Context(NamedTuple):
  """What is known of a request before an ad is chosen. Padding is -1 in every integer field.

  Histories hold distinct ads (contents), most recent first, with count and age buckets.
  """

  feature_BF: np.ndarray  # int32, value number within its feature, 0 = unknown
  ad_code_BTL: np.ndarray  # int32, SID codes of the ads met before
  ad_count_BT: np.ndarray  # int32, bucket of how often
  ad_age_BT: np.ndarray  # int32, bucket of the time since the last meeting
  organic_code_BOL: np.ndarray  # int32, codes of organic contents; -1 where a content has none
  organic_id_BO: np.ndarray  # int32, hashed content id
  organic_count_BO: np.ndarray  # int32
  organic_age_BO: np.ndarray  # int32
  ad_trend_BT: np.ndarray  # int32, bucket of the ad's current share of engagement
  organic_trend_BO: np.ndarray  # int32, the same of the ad of that product
  trend_code_BNL: np.ndarray  # int32, SID codes of the currently most engaged ads, best first
  trend_share_BN: np.ndarray  # int32, bucket of their share
  # 31-bit hashes of ids; None where the model has no table of ids (ModelConfig.id_rows).
  user_id_B: np.ndarray | None = None
  ad_id_BT: np.ndarray | None = None  # of the ad history

  def present(self) -> dict[str, np.ndarray]:
    """Fields that are there, by name."""
    return {name: x for name, x in self._asdict().items() if x is not None}


class Batch(NamedTuple):
  """Requests with their logged positive ads (C per request, padded)."""

  context: Context
  target_BCL: np.ndarray  # int32 SID codes, -1 = padding
  ecpm_bin_BC: np.ndarray  # int32 bucket, -1 = no eCPM
  weight_BC: np.ndarray  # float32 w_user * w_behavior with training mean 1; 0 = padding


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Sizes of everything that the model embeds or predicts; fixed by data and tokenizer."""

  codebook_sizes: tuple[int, ...]
  """V_l of each SID level."""
  feature_sizes: tuple[int, ...]
  """Values of each user or request feature, the unknown value 0 included."""
  num_ecpm_bins: int
  num_count_buckets: int
  num_age_buckets: int
  num_trend_buckets: int
  num_trending: int
  """Currently trending ads in the context."""
  num_organic_buckets: int
  """Hash buckets of organic content ids."""

  @property
  def num_levels(self) -> int:
    """L, SID levels."""
    return len(self.codebook_sizes)
