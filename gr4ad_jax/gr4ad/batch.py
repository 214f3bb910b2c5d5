"""What crosses from the data pipeline to the model: plain records of arrays."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from gr4ad_jax.data.shortlist import BELOW


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
  # 31-bit hashes of ids; None where the model knows none (ModelConfig.id_rows, item_scorer).
  user_id_B: np.ndarray | None = None
  ad_id_BT: np.ndarray | None = None  # of the ad history
  # The shortlist; None where the model has no copy path.
  short_code_BML: np.ndarray | None = None  # int32, SID codes of its ads
  short_number_BMF: np.ndarray | None = None  # int32, see data/shortlist.py

  def present(self) -> dict[str, np.ndarray]:
    """Fields that are there, by name."""
    return {name: x for name, x in self._asdict().items() if x is not None}


class Batch(NamedTuple):
  """Requests with their logged positive ads (C per request, padded)."""

  context: Context
  target_BCL: np.ndarray  # int32 SID codes, -1 = padding
  ecpm_bin_BC: np.ndarray  # int32 bucket, -1 = no eCPM
  weight_BC: np.ndarray  # float32 w_user * w_behavior with training mean 1; 0 = padding


@dataclasses.dataclass(frozen=True, eq=False)
class KnownAds:
  """The ads that a model was made for; equal, and hashed, by what they hold.

  Attributes:
    hash_A: int32, 31-bit hashes of their ids.
    code_AL: int32 SID codes, ascending, so that ads whose SIDs start alike are neighbours.
  """

  hash_A: np.ndarray
  code_AL: np.ndarray

  @classmethod
  def of(cls, hash_N: np.ndarray, code_NL: np.ndarray) -> KnownAds:
    """Those of some ads that have an SID."""
    row_A = np.flatnonzero(code_NL[:, 0] >= 0)
    row_A = row_A[np.lexsort((hash_N[row_A], *code_NL[row_A].T[::-1]))]
    return cls(hash_N[row_A].astype(np.int32), code_NL[row_A].astype(np.int32))

  def __len__(self) -> int:
    return len(self.hash_A)

  @functools.cached_property
  def _digest(self) -> bytes:
    held = (np.array(self.code_AL.shape), self.hash_A, self.code_AL)
    return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in held)).digest()

  def __eq__(self, other: object) -> bool:
    return isinstance(other, KnownAds) and self._digest == other._digest

  def __hash__(self) -> int:
    return hash(self._digest)


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
  ads: KnownAds | None = None
  """The ads that an item scorer scores; None where the model has none."""

  @property
  def num_levels(self) -> int:
    """L, SID levels."""
    return len(self.codebook_sizes)


class EncodedContext(NamedTuple):
  """X of the paper: S = 1 + F + T + O + N tokens, normalised."""

  token_BSD: jax.Array
  mask_BS: jax.Array  # bool, True = a real token


def random_vocabulary(codebook_sizes: Sequence[int], *, num_ads: int = 0) -> Vocabulary:
  """Sizes as a small run has them, with these codebooks, two features and so many known ads."""
  rng = np.random.default_rng(0)
  code_AL = np.stack([rng.integers(0, size, num_ads) for size in codebook_sizes], axis=-1)
  ads = KnownAds.of(rng.integers(0, 2**31 - 1, num_ads), code_AL) if num_ads else None
  return Vocabulary(
    codebook_sizes=tuple(codebook_sizes), feature_sizes=(8, 16), num_ecpm_bins=32,
    num_count_buckets=16, num_age_buckets=32, num_trend_buckets=32, num_trending=0,
    num_organic_buckets=8192, ads=ads,
  )


def random_context(
  vocabulary: Vocabulary, batch: int, context_tokens: int, *, shortlist: tuple[int, int] = (0, 0),
  seed: int = 0,
) -> Context:
  """A full context: no padding, half ads and half organic contents; `shortlist` = ads, numbers.

  Raises:
    ValueError: no token left for the histories.
  """
  rng = np.random.default_rng(seed)
  fixed = 1 + len(vocabulary.feature_sizes) + vocabulary.num_trending
  if context_tokens < fixed + 2:
    raise ValueError(f"context_tokens={context_tokens}: must be at least {fixed + 2}")
  ads = (context_tokens - fixed) // 2
  organic = context_tokens - fixed - ads

  def codes(width: int) -> np.ndarray:
    parts = [rng.integers(0, size, (batch, width), np.int32) for size in vocabulary.codebook_sizes]
    return np.stack(parts, axis=-1)

  def below(size: int, width: int) -> np.ndarray:
    return rng.integers(0, size, (batch, width), np.int32)

  count, age, trend = (
    vocabulary.num_count_buckets, vocabulary.num_age_buckets, vocabulary.num_trend_buckets
  )
  features = [below(size, 1) for size in vocabulary.feature_sizes]
  return Context(
    feature_BF=np.concatenate(features, axis=1) if features else np.zeros((batch, 0), np.int32),
    ad_code_BTL=codes(ads), ad_count_BT=below(count, ads), ad_age_BT=below(age, ads),
    organic_code_BOL=codes(organic), organic_id_BO=below(vocabulary.num_organic_buckets, organic),
    organic_count_BO=below(count, organic), organic_age_BO=below(age, organic),
    ad_trend_BT=below(trend, ads), organic_trend_BO=below(trend, organic),
    trend_code_BNL=codes(vocabulary.num_trending),
    trend_share_BN=below(trend, vocabulary.num_trending),
    ad_id_BT=None if vocabulary.ads is None else rng.choice(vocabulary.ads.hash_A, (batch, ads)),
    **({
      "short_code_BML": codes(shortlist[0]),
      "short_number_BMF": rng.integers(0, BELOW // 2, (batch, *shortlist), np.int32),
    } if shortlist[0] else {}),
  )
