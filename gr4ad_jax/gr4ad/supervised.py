"""VSL: value-aware supervised learning. Source: paper 3.3, eq. 12-15."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gr4ad_jax.gr4ad.config import LossConfig


class VslTerms(NamedTuple):
  """The parts of the loss, float32 [B, C]; 0 with zero gradient where the row is masked."""

  sid_BC: jax.Array  # L_SID, nats summed over levels
  ecpm_BC: jax.Array  # L_eCPM, nats
  mtp_BC: jax.Array  # L_MTP, nats summed over levels 2..L
  item_BC: jax.Array  # of the item scorer alone, nats
  total_BC: jax.Array  # L_SID + lambda_e L_eCPM + lambda_mtp L_MTP + ..., not weighted; smoothed


def vsl_loss(
  sid_log_prob_BCL: jax.Array,
  ecpm_log_prob_BCV: jax.Array,
  mtp_log_prob_BCL: jax.Array | None,
  code_mean_BCL: jax.Array | None = None,
  item_log_prob_BC: jax.Array | None = None,
  *,
  ecpm_bin_BC: jax.Array,
  where_BC: jax.Array,
  config: LossConfig,
) -> VslTerms:
  """L_NTP + lambda_mtp L_MTP per target.

      L_SID  = - sum_t log p(s_t | s_<t, X)          (12)
      L_eCPM = - log p(v | y, X)                     (13)
      L_NTP  = L_SID + lambda_e L_eCPM               (14)
      L_VSL  = E[w (L_NTP + lambda_mtp L_MTP)]       (15)  the caller applies w and the mean

  Level 1 is left out of L_MTP: where position 1 bypasses Fuse, its un-fused pass is the main one.

  With label smoothing epsilon the target of level t is (1 - epsilon) 1[v = s_t] + epsilon / V_t
  over its V_t codes v, so that in L_NTP

      L_SID  = - sum_t ((1 - epsilon) log p(s_t | s_<t, X) + epsilon mean_v log p(v | s_<t, X))

  What is returned as L_SID stays (12), to be held against that of validation.

  An item scorer adds lambda_item times its own loss, - log p(y | history) over all ads: so it
  learns of every target, and not only of those that the mixture leaves to it.

  Args:
    sid_log_prob_BCL: float32, of the target codes.
    ecpm_log_prob_BCV: float32, over value buckets.
    mtp_log_prob_BCL: float32, of the target codes without token input; None = no L_MTP.
    code_mean_BCL: float32, means over the codes of each level; None = no smoothing.
    item_log_prob_BC: float32, of the targets by the item scorer; None = it is off.
    ecpm_bin_BC: int32, the target bucket; -1 drops the eCPM term of that row.
    where_BC: bool, False = padding.
    config: lambda_e, lambda_mtp, lambda_item and epsilon.
  """
  sid_BC = -jnp.sum(sid_log_prob_BCL, axis=-1)
  picked_BC = jnp.take_along_axis(
    ecpm_log_prob_BCV, jnp.maximum(ecpm_bin_BC, 0)[..., None], axis=-1
  )[..., 0]
  ecpm_BC = jnp.where(ecpm_bin_BC >= 0, -picked_BC, 0.0)
  mtp_BC = jnp.zeros_like(sid_BC)
  if mtp_log_prob_BCL is not None:
    mtp_BC = -jnp.sum(mtp_log_prob_BCL[..., 1:], axis=-1)
  item_BC = jnp.zeros_like(sid_BC) if item_log_prob_BC is None else -item_log_prob_BC
  sid_BC, ecpm_BC, mtp_BC, item_BC = (
    jnp.where(where_BC, x, 0.0) for x in (sid_BC, ecpm_BC, mtp_BC, item_BC)
  )
  total_BC = sid_BC + config.ecpm_weight * ecpm_BC + config.mtp_weight * mtp_BC
  total_BC += config.item_weight * item_BC
  if code_mean_BCL is not None:
    uniform_BC = jnp.where(where_BC, -jnp.sum(code_mean_BCL, axis=-1), 0.0)
    total_BC += config.label_smoothing * (uniform_BC - sid_BC)
  return VslTerms(sid_BC, ecpm_BC, mtp_BC, item_BC, total_BC)
