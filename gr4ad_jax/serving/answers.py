"""An answer of the engine -> what a reply says of it, as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gr4ad_jax.catalog.catalog import Catalog
from gr4ad_jax.serving.ads import SHOWN_COLUMNS
from gr4ad_jax.serving.engine import Answer
from gr4ad_jax.serving.messages import Level, RecommendedAd

BEST_PREFIXES = 24  # of a level, in an explanation


def ads_of(answer: Answer) -> list[dict[str, Any]]:
  """The ads, best first."""
  found, columns = answer.found, answer.catalog.ads
  return [
    RecommendedAd(
      ad_id=str(columns.ad_id[ad]), advertiser_id=columns.advertiser_id[ad],
      category=columns.category[ad], text=columns.text[ad],
      sid=found.code_RKL[0, rank].tolist(),
      probability=float(np.exp(found.logp_RK[0, rank])),
      level_probability=np.exp(found.level_logp_RKL[0, rank]).tolist(),
      expected_value=float(found.expected_value_RK[0, rank]),
    ).model_dump()
    for rank, ad in enumerate(found.ad_RK[0].tolist()) if ad >= 0
  ]


def still_there(ads: Sequence[dict[str, Any]], where: tuple[str, ...], now: Catalog) -> bool:
  """Whether every ad of an earlier reply is live and as it was, and still meets the conditions.

  Contents are compared, not versions of the index, as servers of several indices may share replies.
  """
  keep_A = now.allowed(where).keep_A if where else None
  for ad in ads:
    if not now.is_live(ad["ad_id"]):
      return False
    row = now.snapshot.find(ad["ad_id"])
    if keep_A is not None and not keep_A[row]:
      return False
    if now.snapshot.codes_of(ad["ad_id"]).tolist() != ad["sid"] or any(
      getattr(now.ads, name)[row] != ad[name] for name in SHOWN_COLUMNS
    ):
      return False
  return True


def levels_of(answer: Answer) -> list[dict[str, Any]]:
  """How the beams were narrowed: of each level those prefixes that lead to a found SID."""
  code_WL, level_WL = answer.beams.code_BWL[0], answer.beams.level_logp_BWL[0]
  filled = answer.beams.sid_BW[0] >= 0
  code_WL, logp_WL = code_WL[filled], np.cumsum(level_WL[filled], axis=1)
  result, place_of = [], {(): 0}
  for level, kept in enumerate(answer.widths):
    prefixes: dict[tuple[int, ...], float] = {}
    for codes, logp in zip(code_WL[:, : level + 1].tolist(), logp_WL[:, level], strict=True):
      prefixes.setdefault(tuple(codes), float(logp))
    # Children of prefixes that are shown themselves.
    shown = [p for p in sorted(prefixes, key=prefixes.get, reverse=True) if p[:-1] in place_of]
    shown = shown[:BEST_PREFIXES]
    result.append(Level(
      kept=kept, surviving=len(prefixes),
      best=[[p[-1], place_of[p[:-1]], prefixes[p]] for p in shown],
    ).model_dump())
    place_of = {p: place for place, p in enumerate(shown)}
  return result
