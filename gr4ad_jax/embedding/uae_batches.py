"""Batches for unified ad embeddings: which ads, which of their fields hidden, which go together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from gr4ad_jax.data.records import AdTable
from gr4ad_jax.embedding.ad_text import INPUTS, ad_attributes, ad_inputs, input_of
from gr4ad_jax.embedding.cooccurrence import ItemPairs

NOTHING_HIDDEN = -1


@dataclass(frozen=True)
class TrainingAds:
  """What may be learned from; the ads left out are nowhere in it.

  Attributes:
    ads: those to learn from, A of them.
    class_AN: int32 [A, N], the class of each attribute; -1 = unknown.
    hidden_AV: int8 [A, 1 + V], the input of `INPUTS` hidden in each variant of the ad's text; the
      first variant hides nothing (-1), nor do others where there is nothing to hide.
    score_AA: sparse float32, > 0 where the column's ad goes together with the row's.
  """

  ads: AdTable
  class_AN: np.ndarray
  hidden_AV: np.ndarray
  score_AA: sp.csr_array


def training_ads(
  ads: AdTable,
  pairs: ItemPairs | None,
  train_A: np.ndarray | None,
  *,
  min_class_count: int,
  masked_variants: int,
  seed: int,
) -> TrainingAds:
  """Takes the ads to learn from out of a catalogue.

  Args:
    ads: the catalogue.
    pairs: ads that go together; None = none known.
    train_A: bool [A], ads that may be learned from; None = all.
    min_class_count: ads that a class of an attribute needs.
    masked_variants: V >= 0, texts of an ad with something hidden.
    seed: chooses what is hidden, among what is known of an ad.
  """
  rows = np.arange(len(ads.ad_id)) if train_A is None else np.flatnonzero(train_A)
  fields = {f.name: getattr(ads, f.name) for f in dataclasses.fields(ads)}
  taken = dataclasses.replace(
    ads, **{name: None if value is None else value[rows] for name, value in fields.items()}
  )
  attributes = ad_attributes(taken, min_count=min_class_count)
  class_AN = np.stack([*attributes.values()], 1) if attributes else np.empty((len(rows), 0), int)
  known_AG = np.zeros((len(rows), len(INPUTS)), bool)
  for name, class_A in attributes.items():
    known_AG[:, INPUTS.index(input_of(name))] |= class_A >= 0
  order_AG = np.argsort(
    np.random.default_rng(seed).random(known_AG.shape) + np.where(known_AG, 0, 1), axis=1
  )[:, :masked_variants]
  hidden_AV = np.full((len(rows), 1 + order_AG.shape[1]), NOTHING_HIDDEN, np.int8)
  hidden_AV[:, 1:] = np.where(np.take_along_axis(known_AG, order_AG, 1), order_AG, NOTHING_HIDDEN)
  return TrainingAds(taken, class_AN.astype(np.int32), hidden_AV, _scores(pairs, rows, ads, taken))


def _scores(pairs, rows, ads, taken):
  """Symmetric; between ads of the same text there is nothing to learn."""
  size = (len(rows), len(rows))
  if pairs is None or not len(pairs.item_P):
    return sp.csr_array(size, dtype=np.float32)
  number_A = np.full(len(ads.ad_id), -1, np.int64)
  number_A[rows] = np.arange(len(rows))
  item_P, neighbour_P = number_A[pairs.item_P], number_A[pairs.neighbour_P]
  kept_P = (item_P >= 0) & (neighbour_P >= 0)
  _, text_A = np.unique(ad_inputs(taken), return_inverse=True)
  kept_P &= text_A[item_P] != text_A[neighbour_P]
  score_AA = sp.csr_array(
    (pairs.score_P[kept_P], (item_P[kept_P], neighbour_P[kept_P])), size, dtype=np.float32
  )
  return sp.csr_array(score_AA.maximum(score_AA.T))


@dataclass(frozen=True)
class BatchPlan:
  """The batches of all S steps.

  Attributes:
    ad_SB: int64, rows of `TrainingAds`.
    text_SB: int64, which of `texts` is read.
    full_text_SB: int64, a number of the ad's text with nothing hidden.
    texts: U distinct str.
  """

  ad_SB: np.ndarray
  text_SB: np.ndarray
  full_text_SB: np.ndarray
  texts: list[str]


def plan_batches(
  train: TrainingAds,
  *,
  attribute_steps: int,
  cooccurrence_steps: int,
  batch_size: int,
  pair_share: float,
  mask_share: float,
  seed: int,
) -> BatchPlan:
  """Draws all batches, so that it is known which texts are needed.

  A batch of the first stage is a sample of the ads. One of the second begins with anchors, a sample
  of the ads that go together with others; then come their neighbours, one for each anchor in
  proportion to the scores; then, beyond pair_share, a sample of all ads. What goes together by
  chance is a positive as well.

  Args:
    train: the ads.
    attribute_steps: steps of the first stage.
    cooccurrence_steps: steps of the second stage; with these, some ads must go together.
    batch_size: B.
    pair_share: of a batch of the second stage.
    mask_share: of the texts, how often something is hidden.
    seed: of everything drawn.
  """
  steps, num_ads = attribute_steps + cooccurrence_steps, len(train.hidden_AV)
  ad_SB = np.empty((steps, batch_size), np.int64)
  hidden_SB = np.empty((steps, batch_size), np.int8)
  anchors = np.flatnonzero(np.diff(train.score_AA.indptr))
  num_anchors = max(1, int(pair_share * batch_size) // 2)
  for step in range(steps):
    rng = np.random.default_rng([seed, step])
    if step < attribute_steps:
      ad_SB[step] = _sample(rng, num_ads, batch_size)
    else:
      anchor_H = anchors[_sample(rng, len(anchors), num_anchors)]
      others = _sample(rng, num_ads, batch_size - 2 * num_anchors)
      ad_SB[step] = np.concatenate([anchor_H, _neighbours(rng, train.score_AA, anchor_H), others])
    variant_B = rng.integers(1, max(2, train.hidden_AV.shape[1]), batch_size)
    variant_B[rng.random(batch_size) >= mask_share] = 0
    variant_B = np.minimum(variant_B, train.hidden_AV.shape[1] - 1)
    hidden_SB[step] = train.hidden_AV[ad_SB[step], variant_B]
  needed = np.unique(ad_SB)
  full = ad_inputs(train.ads, rows=needed)
  _, full_M = np.unique(full, return_inverse=True)
  # An ad and what is hidden of it are one number, so that each text is made once.
  wanted_Q, wanted_SB = np.unique(
    ad_SB * (len(INPUTS) + 1) + hidden_SB - NOTHING_HIDDEN, return_inverse=True
  )
  ad_Q, hidden_Q = np.divmod(wanted_Q, len(INPUTS) + 1)
  masks = {name: hidden_Q - 1 == g for g, name in enumerate(INPUTS)}
  text_U, text_Q = np.unique(
    ad_inputs(train.ads, rows=ad_Q, masked=masks), return_inverse=True
  )
  return BatchPlan(
    ad_SB,
    text_Q[wanted_SB.reshape(ad_SB.shape)],
    full_M[np.searchsorted(needed, ad_SB)],
    text_U.tolist(),
  )


def _sample(rng, population, size):
  """Without repeats where there are enough."""
  if population >= size:
    return rng.choice(population, size, replace=False)
  return rng.integers(0, population, size)


def _neighbours(rng, score_AA, anchor_H):
  neighbour_H = np.empty_like(anchor_H)
  for h, anchor in enumerate(anchor_H):
    cells = slice(*score_AA.indptr[anchor : anchor + 2])
    total = np.cumsum(score_AA.data[cells], dtype=np.float64)
    drawn = np.searchsorted(total, rng.random() * total[-1], side="right")
    neighbour_H[h] = score_AA.indices[cells][min(drawn, len(total) - 1)]
  return neighbour_H


def pair_masks(train: TrainingAds, plan: BatchPlan, step: int) -> tuple[np.ndarray, np.ndarray]:
  """For each two ads of a batch, bool [B, B]: do they go together; are their texts different.

  Texts differ as they are read and with nothing hidden: twins are neither positives nor negatives.
  """
  ad_B, text_B, full_B = plan.ad_SB[step], plan.text_SB[step], plan.full_text_SB[step]
  positive_BB = train.score_AA[ad_B][:, ad_B].toarray() > 0
  different_BB = (text_B[:, None] != text_B) & (full_B[:, None] != full_B)
  return positive_BB & different_BB, different_BB
