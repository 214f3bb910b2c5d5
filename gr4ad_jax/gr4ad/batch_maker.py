"""Examples -> padded batches of GR4AD."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from gr4ad_jax.data.neighbours import to_arrays
from gr4ad_jax.data.pipeline import ad_facts, hash_ids, look_up, pad, with_rows
from gr4ad_jax.data.records import AdTable
from gr4ad_jax.data.sequences import NUM_AGE_BUCKETS, NUM_COUNT_BUCKETS, Example
from gr4ad_jax.data.shortlist import AdFacts, shortlists
from gr4ad_jax.data.splits import SequenceConfig
from gr4ad_jax.data.tastes import Tastes, likeness
from gr4ad_jax.data.transitions import Transitions
from gr4ad_jax.data.trending import NO_TRENDING, NUM_TREND_BUCKETS, Trending
from gr4ad_jax.gr4ad.batch import Batch, Context, KnownAds, Vocabulary
from gr4ad_jax.gr4ad.config import LossConfig
from gr4ad_jax.gr4ad.value import ValueScale, sample_weight, value_bucket

NUM_ORGANIC_BUCKETS = 8192  # that ids of organic contents are hashed into


@dataclasses.dataclass(frozen=True)
class BatchMaker:
  """Pads examples to one shape and replaces ads and contents by their codes.

  Attributes:
    sequence: history and target limits.
    loss: value weights.
    scale: value buckets and weight means.
    codes_AL: int32 SID codes of every ad.
    content_codes_OL: int32 codes of every organic content, -1 where it has none.
    content_bucket_O: int32 hash bucket of every organic content id.
    content_ad_O: int32 ad of the same product, -1 = none.
    trending: current shares by period, or None.
    user_hash_U, ad_hash_A: int32 hashes of ids, for models that know them; else None.
    facts, shortlist: what shortlists need of ads, and their size, for models with a copy path; else
      None, 0.
    tastes: vectors of ads, or None.
    transitions, neighbours: what tells a history's neighbours, and how many; None, 0 = none.
  """

  sequence: SequenceConfig
  loss: LossConfig
  scale: ValueScale
  codes_AL: np.ndarray
  content_codes_OL: np.ndarray
  content_bucket_O: np.ndarray
  content_ad_O: np.ndarray
  trending: Trending | None
  user_hash_U: np.ndarray | None = None
  ad_hash_A: np.ndarray | None = None
  facts: AdFacts | None = None
  shortlist: int = 0
  tastes: Tastes | None = None
  transitions: Transitions | None = None
  neighbours: int = 0

  def vocabulary(
    self, feature_sizes: Sequence[int], codebook_sizes: Sequence[int], ads: KnownAds | None = None
  ) -> Vocabulary:
    """Sizes that the model needs for these batches, with the ads that an item scorer scores."""
    return Vocabulary(
      tuple(codebook_sizes), tuple(feature_sizes), self.scale.num_bins, NUM_COUNT_BUCKETS,
      NUM_AGE_BUCKETS, NUM_TREND_BUCKETS, self.sequence.num_trending, NUM_ORGANIC_BUCKETS, ads,
    )

  @property
  def tables(self) -> dict[str, np.ndarray]:
    """What raw histories need beside logs and examples, see `raw_histories.Kinds`."""
    tables = {}
    if self.tastes is not None:
      tables |= {f"taste_{name}": x for name, x in self.tastes._asdict().items()}
    if self.transitions is not None:
      sizes = {
        "near_behind": self.shortlist, "near_most": self.neighbours,
        "near_latest": self.sequence.max_ad_history,
      }
      tables |= {name: np.array(x) for name, x in sizes.items()}
      table = to_arrays(self.transitions.table)
      tables |= {f"near_table_{name}": x for name, x in table.items()}
    return tables

  def with_ads(self, row_N: np.ndarray, ads: AdTable, code_NL: np.ndarray) -> BatchMaker:
    """The same with the SIDs of some ads; rows past the end follow without a gap."""
    ad_hash_A, facts = self.ad_hash_A, self.facts
    if ad_hash_A is not None:
      ad_hash_A = with_rows(ad_hash_A, row_N, hash_ids(ads.ad_id))
    if facts is not None:
      facts = AdFacts(*map(with_rows, facts, (row_N, row_N), ad_facts(ads)))
    return dataclasses.replace(
      self, codes_AL=with_rows(self.codes_AL, row_N, code_NL), ad_hash_A=ad_hash_A, facts=facts
    )

  def with_trending(self, trending: Trending) -> BatchMaker:
    """The same with other shares of engagement."""
    return dataclasses.replace(self, trending=trending)

  def context(
    self, examples: Sequence[Example], *, user_ids: Sequence[str] | None = None
  ) -> Context:
    """What the model reads of the requests, padded to the history limits; see `ContextMaker`."""
    user_id_B = None
    if self.user_hash_U is not None:
      user_id_B = (
        self.user_hash_U[[e.user for e in examples]] if user_ids is None
        else hash_ids(np.array(user_ids, object))
      )
    num_ads, num_organics = self.sequence.max_ad_history, self.sequence.max_organic_history
    ad_BT = pad([e.ad_T for e in examples], num_ads)
    organic_BO = pad([e.organic_O for e in examples], num_organics)
    time_s_B = np.array([e.time_s for e in examples])
    trend_BN, share_BN = self._trending(time_s_B)
    return Context(
      feature_BF=np.stack([e.feature_F for e in examples]).astype(np.int32),
      ad_code_BTL=look_up(self.codes_AL, ad_BT),
      ad_count_BT=pad([e.ad_count_T for e in examples], num_ads),
      ad_age_BT=pad([e.ad_age_T for e in examples], num_ads),
      ad_trend_BT=self._share_buckets(time_s_B, ad_BT, ad_BT),
      organic_code_BOL=look_up(self.content_codes_OL, organic_BO),
      organic_id_BO=look_up(self.content_bucket_O, organic_BO),
      organic_count_BO=pad([e.organic_count_O for e in examples], num_organics),
      organic_age_BO=pad([e.organic_age_O for e in examples], num_organics),
      organic_trend_BO=self._share_buckets(
        time_s_B, organic_BO, look_up(self.content_ad_O, organic_BO)
      ),
      trend_code_BNL=look_up(self.codes_AL, trend_BN),
      trend_share_BN=share_BN,
      user_id_B=user_id_B,
      ad_id_BT=None if self.ad_hash_A is None else look_up(self.ad_hash_A, ad_BT),
      **self._shortlists(examples, time_s_B),
    )

  def _shortlists(
    self, examples: Sequence[Example], time_s_B: np.ndarray
  ) -> dict[str, np.ndarray]:
    """Codes and numbers of each request's shortlist."""
    if self.facts is None:
      return {}
    trending = self.trending or NO_TRENDING
    row_B = trending.rows(time_s_B)
    ad_BM, number_BMF = shortlists(
      [(e.met_P, e.met_count_PH) for e in examples], trending.ad_DN[row_B],
      functools.partial(trending.shares, row_B[:, None]), self.facts, self.shortlist,
      likeness_of=functools.partial(likeness, self.tastes, time_s_B) if self.tastes else None,
      near=self.transitions and [self.transitions.of(e, most=self.neighbours) for e in examples],
    )
    return {"short_code_BML": look_up(self.codes_AL, ad_BM), "short_number_BMF": number_BMF}

  def _share_buckets(
    self, time_s_B: np.ndarray, item_BX: np.ndarray, ad_BX: np.ndarray
  ) -> np.ndarray:
    """Buckets of the shares of a history's ads; -1 where an item is padding."""
    if self.trending is None:
      return np.minimum(item_BX, 0)
    row_B = self.trending.rows(time_s_B)
    bucket_BX = [self.trending.bucket_of(r, ad_X) for r, ad_X in zip(row_B, ad_BX, strict=True)]
    return np.where(item_BX < 0, -1, np.stack(bucket_BX))

  def _trending(self, time_s_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The trending ads of each request and buckets of their shares, -1 = none."""
    ad_BN = np.full((len(time_s_B), self.sequence.num_trending), -1, np.int32)
    bucket_BN = ad_BN.copy()
    if self.trending is not None:
      row_B1 = self.trending.rows(time_s_B)[:, None]
      known = np.arange(min(ad_BN.shape[1], self.trending.ad_DN.shape[1]))
      ad_BN[:, known] = self.trending.ad_DN[row_B1, known]
      bucket_BN[:, known] = self.trending.bucket_DN[row_B1, known]
    return ad_BN, np.where(ad_BN < 0, -1, bucket_BN)

  def __call__(self, examples: Sequence[Example]) -> Batch:
    """A training batch."""
    num_targets = self.sequence.max_targets
    target_BC = pad([e.target_C for e in examples], num_targets)
    bucket = [value_bucket(self.scale, e.value_C, e.ecpm_C) for e in examples]
    weight = [
      sample_weight(
        self.scale, self.loss, np.full(len(e.target_C), e.past_value), e.action_C,
        np.full(len(e.target_C), e.num_targets),
      )
      for e in examples
    ]
    return Batch(
      self.context(examples),
      look_up(self.codes_AL, target_BC),
      pad(bucket, num_targets),
      pad(weight, num_targets, fill=0.0, dtype=np.float32),
    )
