"""How good semantic IDs are, said in a few lines."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gr4ad_jax.data.records import Logs
from gr4ad_jax.embedding.embeddings import LogEmbeddings
from gr4ad_jax.tokenizer import semantic_id
from gr4ad_jax.tokenizer.health import measure
from gr4ad_jax.tokenizer.health_line import HealthLine, Made
from gr4ad_jax.tokenizer.health_verdicts import verdicts

PRODUCT = "advertiser and category"  # what stands for "the same product" in a log


def judge(sids: semantic_id.SemanticIds, metrics: Mapping[str, float]) -> list[HealthLine]:
  """The verdicts on what `health` has measured."""
  config = sids.config
  made = Made(config.last_level, config.hash_columns, config.quantizer, config.encoder)
  return verdicts(metrics, made=made, label_name=PRODUCT)


def health(
  logs: Logs, sids: semantic_id.SemanticIds, embedded: LogEmbeddings | None = None
) -> dict[str, float]:
  """Tokenizer health, weighted by ad events and their value.

  Args:
    logs: of the semantic IDs.
    sids: codes of the ads.
    embedded: what was quantised; adds reconstruction and retrieval of ads with the same advertiser
      and category, which stand for the same product.
  """
  events, num_ads = logs.events, len(logs.ads.ad_id)
  paid = events.ad >= 0
  of_embedding = {}
  if embedded is not None:
    pairs = zip(logs.ads.advertiser_id, logs.ads.category, strict=True)
    of_embedding = {
      "embedding_AD": embedded.ad_AD, "reconstruction_AD": sids.reconstruct(),
      "product_A": np.array(["\0".join(pair) for pair in pairs], object),
    }
  return measure(
    sids.codes_AL, sids.codebook_sizes, num_quantised=sids.num_quantised,
    content_codes_OL=sids.content_codes_OL,
    events_A=np.bincount(events.ad[paid], minlength=num_ads).astype(np.float64),
    value_A=np.bincount(events.ad[paid], weights=events.value[paid], minlength=num_ads),
    **of_embedding,
  )
