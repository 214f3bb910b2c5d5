"""Candidate lists -> padded batches for list-wise learning."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gr4ad_jax.data.list_records import CandidateList
from gr4ad_jax.data.records import Action
from gr4ad_jax.gr4ad.batch_maker import BatchMaker
from gr4ad_jax.gr4ad.unified_task import ListBatch
from gr4ad_jax.gr4ad.value import sample_weight, value_bucket
from gr4ad_jax.learning.preference import Lists, RewardScale


@dataclasses.dataclass(frozen=True)
class ListBatchMaker:
  """Pads lists to one size and turns eCPM into rewards.

  Attributes:
    make_batch: of the logged samples.
    scale: of the rewards; None = each list has its own.
    size: candidates of a padded list.
  """

  make_batch: BatchMaker
  scale: RewardScale | None
  size: int

  def __call__(self, rows: Sequence[CandidateList]) -> ListBatch:
    """A batch. Candidates without a finite eCPM are padding."""
    make, levels = self.make_batch, self.make_batch.codes_AL.shape[1]
    shape = (len(rows), self.size)
    code_BCL = np.full((*shape, levels), -1, np.int32)
    reward_BC, ref_BCL = np.zeros(shape, np.float32), np.zeros((*shape, levels), np.float32)
    has_ref_BC, where_BC = np.zeros(shape, bool), np.zeros(shape, bool)
    bin_BC, weight_BC = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    for i, row in enumerate(rows):
      part = slice(0, min(len(row.ad_C), self.size))
      ecpm_C, size = row.ecpm_C[part], part.stop
      code_BCL[i, part] = make.codes_AL[row.ad_C[part]]
      where_BC[i, part] = np.isfinite(ecpm_C)
      reward_BC[i, part] = np.nan_to_num((self.scale or _own_scale(ecpm_C))(ecpm_C))
      ref_BCL[i, part], has_ref_BC[i, part] = row.ref_logp_CL[part], row.has_ref_C[part]
      action_C = row.action_C[part]
      if make.scale.uses_ecpm:
        bin_BC[i, part] = value_bucket(make.scale, ecpm_C, ecpm_C)
      engaged_C = action_C >= Action.CLICK
      weight_C = sample_weight(
        make.scale, make.loss, np.full(size, row.context.past_value), np.maximum(action_C, 0),
        np.full(size, max(1, engaged_C.sum())),
      )
      weight_BC[i, part] = np.where(engaged_C, weight_C, 0)
    return ListBatch(
      make.context([row.context for row in rows]), code_BCL,
      Lists(reward_BC, ref_BCL, has_ref_BC, where_BC), bin_BC, weight_BC,
    )


def _own_scale(ecpm_C: np.ndarray) -> RewardScale:
  """From the smallest to the largest finite eCPM of a list; (0, 0) where there is none."""
  log_C = np.log1p(ecpm_C[np.isfinite(ecpm_C)])
  return RewardScale(*map(float, (log_C.min(), log_C.max()) if log_C.size else (0, 0)))
