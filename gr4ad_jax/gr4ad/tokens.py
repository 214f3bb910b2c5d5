"""Output heads, and the path that copies codes of the shortlist."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from gr4ad_jax.gr4ad.batch import Context, Vocabulary
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.gr4ad.copy_path import CopyPath, CopySource, CopyState, safe_log
from gr4ad_jax.nn import NEG_INF
from gr4ad_jax.nn.code_tables import CodeTables
from gr4ad_jax.nn.layers import Linear
from gr4ad_jax.search.generator import MayGet


class TokenOutput(nn.Module):
  """Log-probabilities of the next code: tied softmax heads, with the copy path where it is on."""

  config: ModelConfig
  vocabulary: Vocabulary
  tables: CodeTables

  def setup(self):
    self.ecpm_head = Linear(self.vocabulary.num_ecpm_bins)
    if self.config.copy_path:
      self.copy = CopyPath(self.config, self.vocabulary)

  def copy_source(self, context: Context, *, deterministic: bool = True) -> CopySource | None:
    """What the copy path needs of the context; None where it is off."""
    if not self.config.copy_path:
      return None
    return self.copy.source(context, deterministic=deterministic)

  def target_log_probs(
    self, h_BRLD: jax.Array, target_BCL: jax.Array, source: CopySource | None
  ) -> tuple[jax.Array, jax.Array | None]:
    """log p(target code | its prefix, X) of every level, float32 [B, C, L].

    Also log p(target SID) by the item scorer alone, [B, C]; None where it is off.

    Args:
      h_BRLD: last decoder states of the SID positions; R = C, or 1 where all targets share them.
      target_BCL: int32 codes; padding (-1) gives any finite value.
      source: from `copy_source`; None = the generator alone.
    """
    log_prob_BCL = jnp.stack(
      [
        _pick_log_softmax(
          self.tables.logits(h_BRLD[:, :, level], level), jnp.maximum(target_BCL[..., level], 0)
        )
        for level in range(self.vocabulary.num_levels)
      ],
      axis=-1,
    )
    if source is None:
      return log_prob_BCL, None
    mass = self.copy.target_mass(source, target_BCL)
    # Of the target's first 0 to L codes.
    log_gen_BCP = jnp.pad(jnp.cumsum(log_prob_BCL, axis=-1), ((0, 0), (0, 0), (1, 0)))
    logit_BC1 = self.copy.logit(h_BRLD[:, :, 0])[..., None]
    mixed_BCP = jnp.logaddexp(
      jax.nn.log_sigmoid(-logit_BC1) + log_gen_BCP,
      jax.nn.log_sigmoid(logit_BC1) + mass.log_BCP,
    )
    return mixed_BCP[..., 1:] - mixed_BCP[..., :-1], mass.item_BC

  def for_search(self, source: CopySource | None, may_get: MayGet) -> CopySource | None:
    """What a search copies from."""
    return None if source is None else self.copy.for_search(source, may_get)

  def begin_copy(self, source: CopySource | None) -> CopyState | None:
    """What a beam without codes remembers; None where the copy path is off."""
    return None if source is None else self.copy.begin(source)

  def follow(
    self, source: CopySource | None, copy: CopyState | None, code_BW: jax.Array,
    level: int | jax.Array,
  ) -> CopyState | None:
    """The state after the codes chosen at `level`, 0-based: fewer ads match."""
    if source is None or copy is None:
      return None
    code_BM = jax.lax.dynamic_index_in_dim(source.code_BML, level, axis=2, keepdims=False)
    same_BWM = code_BM[:, None, :] == code_BW[..., None]
    # The tables' inputs are sqrt(d) times the rows of the heads.
    row_BWD = self.tables.embed(code_BW, level) * self.config.width**-0.5
    log_gen_BW = jnp.sum(copy.h_BWD.astype(jnp.float32) * row_BWD, axis=-1) - copy.norm_BW
    return copy._replace(
      match_BWM=copy.match_BWM & same_BWM, logit_BW=copy.logit_BW - log_gen_BW
    )

  def log_probs(
    self,
    h_BCD: jax.Array,
    level: int | jax.Array,
    source: CopySource | None,
    copy: CopyState | None,
  ) -> tuple[jax.Array, CopyState | None]:
    """log p(. | prefix, X) over the codes of one level.

    Args:
      h_BCD: last decoder states.
      level: 0-based; level L (a Python int) is the value bucket; a traced level gives rows padded
        to the largest codebook with NEG_INF.
      source: from `copy_source`.
      copy: what the beams remember, after `follow`.

    Returns:
      float32 [B, C, V], and what the beams remember then.
    """
    if isinstance(level, int) and level == self.vocabulary.num_levels:
      return self.ecpm_log_probs(h_BCD), copy
    if not isinstance(level, int):
      sizes = self.vocabulary.codebook_sizes

      def padded(level: int):
        logp_BCV, then = self.log_probs(h_BCD, level, source, copy)
        width = ((0, 0), (0, 0), (0, max(sizes) - sizes[level]))
        return jnp.pad(logp_BCV, width, constant_values=NEG_INF), then

      return jax.lax.switch(level, [lambda i=i: padded(i) for i in range(len(sizes))])
    logit_BCV = self.tables.logits(h_BCD, level)
    norm_BC = jax.nn.logsumexp(logit_BCV, axis=-1)
    log_prob_BCV = logit_BCV - norm_BC[..., None]
    if source is None or copy is None:
      return log_prob_BCV, None
    if level == 0:
      copy = copy._replace(logit_BW=self.copy.logit(h_BCD))
    terms = self.copy(source, copy.match_BWM, copy.logit_BW)
    one_hot_BMV = jax.nn.one_hot(source.code_BML[..., level], log_prob_BCV.shape[-1])
    copied_BCV = jnp.einsum("BCM,BMV->BCV", terms.attention_BWM, one_hot_BMV)
    mixed_BCV = jnp.logaddexp(
      terms.log_rest_BW[..., None] + log_prob_BCV,
      terms.log_copy_BW[..., None] + safe_log(copied_BCV),
    )
    return mixed_BCV, copy._replace(h_BWD=h_BCD, norm_BW=norm_BC)

  def ecpm_log_probs(self, h_BCD: jax.Array) -> jax.Array:
    """log p(bucket | SID, X), float32 [B, C, bins]. Source: eq. 13."""
    return jax.nn.log_softmax(self.ecpm_head(h_BCD.astype(jnp.float32)), axis=-1)


def _pick_log_softmax(logits_BRV: jax.Array, index_BC: jax.Array) -> jax.Array:
  """log softmax at the index, [B, C]; R = C or 1."""
  norm_BR = jax.nn.logsumexp(logits_BRV, axis=-1)
  if logits_BRV.shape[1] == 1:
    return jnp.take_along_axis(logits_BRV[:, 0], index_BC, axis=-1) - norm_BR
  return jnp.take_along_axis(logits_BRV, index_BC[..., None], axis=-1)[..., 0] - norm_BR
