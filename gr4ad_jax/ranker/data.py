"""Impressions -> batches of a reward model: fields of ads and contents, padded histories."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from gr4ad_jax.data.impressions import Impressions
from gr4ad_jax.data.pipeline import pad
from gr4ad_jax.data.records import Action, Logs
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.ranker.batch import RewardBatch, RewardVocabulary
from gr4ad_jax.ranker.config import RewardConfig


@dataclasses.dataclass(frozen=True)
class RewardBatchMaker:
  """Looks up fields and pads.

  Attributes:
    config: history limit.
    ad_field_AX: int32 [A + 1, 4], ad, advertiser, category, price bucket, from 1; row 0 = none.
    content_field_OX: int32 [O + 1, 3], content, category, ad of the same product; row 0 = none.
    feature_sizes: of the request's features.
    log_share_A: float32, log of each ad's share of the impressions learned from.
  """

  config: RewardConfig
  ad_field_AX: np.ndarray
  content_field_OX: np.ndarray
  feature_sizes: tuple[int, ...]
  log_share_A: np.ndarray

  @property
  def vocabulary(self) -> RewardVocabulary:
    """Sizes for the model."""
    ads, contents = self.ad_field_AX, self.content_field_OX
    # Contents may have categories that no ad has.
    categories = max(ads[:, 2].max(), contents[:, 1].max()) + 1
    sizes = (len(ads), int(ads[:, 1].max()) + 1, int(categories), self.config.num_price_bins + 1)
    return RewardVocabulary(self.feature_sizes, sizes, (len(contents), int(categories), len(ads)))

  def __call__(
    self, contexts: Sequence[Example], ad_BC: np.ndarray, action_BC: np.ndarray | None = None
  ) -> RewardBatch:
    """A batch.

    Args:
      contexts: of B requests.
      ad_BC: int32 ads to judge, -1 = padding.
      action_BC: int8, deepest Action of each; None = unknown.
    """
    if action_BC is None:
      action_BC = np.zeros(ad_BC.shape, np.int8)
    most = self.config.max_history
    return RewardBatch(
      np.stack([e.feature_F for e in contexts]).astype(np.int32),
      self.ad_field_AX[pad([e.ad_T[:most] for e in contexts], most) + 1],
      self.content_field_OX[pad([e.organic_O[:most] for e in contexts], most) + 1],
      self.ad_field_AX[ad_BC + 1],
      action_BC >= Action.CLICK,
      action_BC == Action.CONVERSION,
      ad_BC >= 0,
      self.log_share_A[ad_BC],
    )


def of_rows(
  make_batch: RewardBatchMaker, impressions: Impressions, rows: Sequence[int]
) -> RewardBatch:
  """A batch of some rows of impressions."""
  contexts = [impressions.contexts[row] for row in rows]
  return make_batch(contexts, impressions.shown_RC[rows], impressions.action_RC[rows])


def full_batches(
  contexts: Sequence[Example], size: int = 1024
) -> Iterator[tuple[slice, list[Example]]]:
  """Where each batch stands, and its contexts, the last repeated up to `size`: one program."""
  for at in range(0, len(contexts), size):
    rows = list(contexts[at : at + size])
    yield slice(at, at + len(rows)), rows + rows[-1:] * (size - len(rows))


def reward_batch_maker(
  logs: Logs, config: RewardConfig, feature_sizes: tuple[int, ...], *, train_E: np.ndarray
) -> RewardBatchMaker:
  """Fields of all ads and contents of the logs; `train_E` bool, events that may be learned from."""
  ads, contents = logs.ads, logs.contents
  categories = np.unique(np.append(ads.category, contents.category).astype(str))
  price_A = np.nan_to_num(ads.price, nan=-1.0)
  known = price_A[price_A >= 0]
  price_bin_A = np.zeros(len(price_A), np.int32)
  if known.size:
    quantiles = np.arange(1, config.num_price_bins) / config.num_price_bins
    edges = np.unique(np.quantile(known, quantiles))
    price_bin_A = np.where(price_A >= 0, 1 + np.searchsorted(edges, price_A, side="right"), 0)
  ad_AX = np.stack([
    1 + np.arange(len(ads.ad_id)),
    1 + np.unique(ads.advertiser_id.astype(str), return_inverse=True)[1],
    1 + np.searchsorted(categories, ads.category.astype(str)),
    price_bin_A,
  ], axis=1)
  content_OX = np.stack([
    1 + np.arange(len(contents.content_id)),
    1 + np.searchsorted(categories, contents.category.astype(str)),
    1 + contents.ad,
  ], axis=1)
  shown = logs.events.ad[train_E & (logs.events.ad >= 0)]
  shown_A = np.bincount(shown, minlength=len(ads.ad_id)) + 1.0
  return RewardBatchMaker(
    config, *(np.insert(x, 0, 0, axis=0).astype(np.int32) for x in (ad_AX, content_OX)),
    tuple(feature_sizes),
    np.log(shown_A / shown_A.sum()).astype(np.float32),
  )


def bids_of(logs: Logs, train_E: np.ndarray) -> np.ndarray:
  """float32 [A], currency per conversion: the ad's bid, else what its conversions were worth.

  An ad with neither takes the mean value of all conversions. Only events of `train_E` count.
  """
  events = logs.events
  rows = np.flatnonzero(train_E & (events.ad >= 0) & (events.action == Action.CONVERSION))
  count_A = np.bincount(events.ad[rows], minlength=len(logs.ads.ad_id))
  value_A = np.bincount(events.ad[rows], events.value[rows], minlength=len(logs.ads.ad_id))
  overall = value_A.sum() / max(count_A.sum(), 1)
  mean_A = np.where(count_A > 0, value_A / np.maximum(count_A, 1), overall)
  return np.where(np.isnan(logs.ads.bid), mean_A, logs.ads.bid).astype(np.float32)
