"""What a logged engagement is worth: eCPM buckets and sample weights of VSL.

Where a log has no eCPM at all, the logged value (currency) of the engagement takes its place.
Buckets are cut in the log's own numbers. What a bucket is worth to a search, and with it every
expected value that anybody is shown, is currency: of showing the ad once, which is eCPM / 1000, or
of one engagement.

Source: GR4AD, arXiv 2602.22732, 3.3. The number of buckets and the weights' bounds are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from gr4ad_jax.config import require
from gr4ad_jax.data.examples import ExampleSet
from gr4ad_jax.data.records import Action
from gr4ad_jax.gr4ad.batch import Batch
from gr4ad_jax.gr4ad.config import LossConfig
from gr4ad_jax.machine import distributed

IMPRESSIONS_OF_ECPM = 1000


@dataclasses.dataclass(frozen=True)
class ValueScale:
  """Fixed numbers, from training data only, that turn value into buckets and weights.

  Attributes:
    uses_ecpm: whether buckets hold logged eCPM (else the logged value).
    bin_edges: ascending inner edges, in units of what the buckets hold; bucket = number of
      edges <= x.
    bin_means: mean of the training samples of each bucket, currency: eCPM / 1000, or value.
    mean_log_past_value: training mean of log1p(user's trailing revenue).
    mean_weight: training mean of w_user * w_behavior * w_request, by which weights are divided.
  """

  uses_ecpm: bool
  bin_edges: tuple[float, ...]
  bin_means: tuple[float, ...]
  mean_log_past_value: float
  mean_weight: float

  @property
  def num_bins(self) -> int:
    """Buckets left after equal quantiles were merged."""
    return len(self.bin_means)


def fit_value_scale(examples: ExampleSet, config: LossConfig) -> ValueScale:
  """Equiprobable buckets and weight means of the training targets.

  Raises:
    ConfigError: all training targets have weight 0.
  """
  uses_ecpm = bool(np.isfinite(examples.train_ecpm_N).any())
  value_N = examples.train_ecpm_N if uses_ecpm else examples.train_value_N
  value_N = value_N[np.isfinite(value_N)].astype(np.float64)
  quantiles = np.arange(1, config.num_ecpm_bins) / config.num_ecpm_bins
  edges = np.unique(np.quantile(value_N, quantiles, method="higher"))
  edges = edges[edges > value_N.min()].astype(np.float32)  # no bucket below the smallest value
  bucket_N = np.searchsorted(edges, value_N.astype(np.float32), side="right")
  sums = np.bincount(bucket_N, weights=value_N, minlength=len(edges) + 1)
  counts = np.bincount(bucket_N, minlength=len(edges) + 1)
  mean_V = sums / np.maximum(counts, 1) / (IMPRESSIONS_OF_ECPM if uses_ecpm else 1)
  scale = ValueScale(
    uses_ecpm, tuple(edges.tolist()), tuple(mean_V.tolist()),
    float(np.log1p(examples.train_past_value_N).mean()), 1.0,
  )
  weight_N = sample_weight(
    scale, config, examples.train_past_value_N, examples.train_action_N,
    examples.train_of_request_N,
  )
  mean = float(weight_N.mean())
  require(mean > 0, "loss", config, "gives every training target of these logs the weight 0")
  return dataclasses.replace(scale, mean_weight=mean)


def sample_weight(
  scale: ValueScale, config: LossConfig, past_value_N: np.ndarray, action_N: np.ndarray,
  of_request_N: np.ndarray,
) -> np.ndarray:
  """w_user * w_behavior * w_request / training mean, float32.

  Args:
    scale: from `fit_value_scale`.
    config: bounds and behaviour weights.
    past_value_N: currency, the user's ad revenue before the sample.
    action_N: Action of each sample.
    of_request_N: targets of the request of each sample.
  """
  user_N = np.ones(len(past_value_N))
  if scale.mean_log_past_value > 0:  # else no user has brought anything, and all count alike
    user_N = np.log1p(past_value_N) / scale.mean_log_past_value
    user_N = np.clip(user_N, *config.user_weight_range)
  behaviour = np.zeros(len(Action))
  behaviour[Action.CLICK] = config.click_weight
  behaviour[Action.CONVERSION] = config.conversion_weight
  request_N = of_request_N.astype(np.float64) ** -config.request_size_power
  return (user_N * behaviour[action_N] * request_N / scale.mean_weight).astype(np.float32)


def level_weights(batches: Sequence[Batch]) -> list[Batch]:
  """The same batches with weights of mean 1 over their targets (of all hosts), as training has.

  Users of later days have spent more before. Weighted by the training mean, their loss would be
  larger than that of training where the model knows them just as well.
  """
  sums = [(b.weight_BC.sum(), (b.target_BCL[..., 0] >= 0).sum()) for b in batches]
  own = np.sum(sums, axis=0, dtype=np.float64).reshape(1, 2)
  weight, targets = distributed.gather(own, jax.process_count()).sum(axis=0)
  factor = np.float32(targets / weight if weight > 0 else 1)
  return [batch._replace(weight_BC=batch.weight_BC * factor) for batch in batches]


def value_bucket(scale: ValueScale, value_N: np.ndarray, ecpm_N: np.ndarray) -> np.ndarray:
  """Bucket of each sample, int32; -1 where the log has eCPM but not for this sample."""
  x_N = ecpm_N if scale.uses_ecpm else value_N
  bucket_N = np.searchsorted(np.array(scale.bin_edges, np.float32), x_N, side="right")
  return np.where(np.isfinite(x_N), bucket_N, -1).astype(np.int32)
