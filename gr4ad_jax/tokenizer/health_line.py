"""One line of the health report, and the limits between its verdicts.

Limits are rules of thumb; each says where it comes from. A pair (a, b) with a < b grades a number
that should be small: up to a is fine, up to b worth a look, above it will hurt. With a > b the
number should be large.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

Verdict = Literal["fine", "look", "will hurt"]
VERDICTS: tuple[Verdict, ...] = ("fine", "look", "will hurt")
LastLevel = Literal["hash", "suffix", "quantised"]

# Share of ads on shared SIDs. The published systems, by ads: GR4AD 23.6 % (from its Cpr 1.07 and
# Col 18.26 %), GPR 20.6 to 23.2 %; RQ-Kmeans without a hash level in GR4AD 77 to 96 %.
COLLISION = (0.05, 0.25)
# Col: 18.26 % is the best of GR4AD's Table 2, 59.72 % the next.
COL = (0.05, 0.20)
# Cpr: 1.07 is the best of GR4AD's Table 2, 1.78 the next, which cost it revenue.
CPR = (1.1, 1.5)
# Ads on one SID: half of a list of ten; a whole list of 50.
ADS_PER_SID = (5, 50)
# SIDs / codebook space: from here on new ads find their place taken.
UTIL = (0.2, 0.6)
# Used codes of a quantised level; of a hashed one, relative to what a uniform hash would use.
USED = (0.95, 0.70)
USED_OF_HASH = (0.90, 0.50)
# Perplexity / codes (or / ads, where these are fewer). A uniform hash of as many ads as codes has
# 0.56 and is the worst of the uniform ones.
BALANCE = (0.50, 0.20)
# Largest code, in multiples of an even share. Balanced k-means stays near 1.1.
LARGEST = (5, 20)
# Children per prefix at a quantised level: at 1 the level repeats what the one before said.
CHILDREN_MEAN = (2.0, 1.2)
# Largest number of children, in multiples of the beams kept after that level.
CHILDREN_MAX = (1, 10)
BEAM_WIDTHS = (64, 96, 128)  # default of SearchConfig
# Ads whose quantised codes are another ad's too: the last code alone tells them apart.
PREFIX_COLLISION = 0.5
# Ads whose embedding is another ad's: no quantizer can tell them apart.
TWINS = (0.05, 0.30)
# Squared error relative to the spread of the embeddings: 1 = as bad as one code for all ads.
RECONSTRUCTION = (0.5, 0.8)
# On the scale from chance (or from one code for all ads) at 0 to perfect at 1.
GAIN = (0.5, 0.2)
# On that scale, what codes reach that have nothing to do with the embeddings.
NO_RELATION = 0.05
# The same for recall of the embedding at 1, 5, 10, set between QARM (.541, .812, .893) and
# Qwen3-VL (.769, .948, .977) of GR4AD's Table 2, where chance is near 0.
RECALL = {1: (0.70, 0.40), 5: (0.85, 0.60), 10: (0.90, 0.70)}
# Of the embedding's recall above chance, what survives quantisation.
KEPT = (0.8, 0.5)
# How much more often two ads of one prefix share the label than any two.
LIFT = (3.0, 1.5)
# Organic contents with codes: the others are known to the model by their id alone.
CODED = (0.8, 0.5)


@dataclasses.dataclass(frozen=True)
class Made:
  """How the SIDs were made: what the verdicts need to know, and what advice need not repeat.

  Attributes:
    last_level: what the last level holds. The codes of a hash should be even; a suffix that counts
      the ads of a prefix never is. None = "quantised" or "hash", as num_quantised says.
    hash_columns: that a hashed last level hashes.
    quantizer: of the other levels.
    encoder: of the embeddings.
  """

  last_level: LastLevel | None = None
  hash_columns: tuple[str, ...] = ()
  quantizer: str | None = None
  encoder: str | None = None

  def __post_init__(self):
    if self.last_level not in (None, *get_args(LastLevel)):
      raise ValueError(f"last_level: {self.last_level!r} is none of quantised, hash, suffix")


@dataclasses.dataclass(frozen=True)
class HealthLine:
  """One line of the report.

  Attributes:
    name: of the number in `health.measure`.
    group: heading under which the line stands.
    label: in words.
    value: the number.
    unit: "share" (0.05 reads 5 %), "count", "number".
    verdict: "fine", "look" or "will hurt".
    reason: one sentence: what it means for the recommender and, unless fine, what to change.
  """

  name: str
  group: str
  label: str
  value: float
  unit: Literal["share", "count", "number"]
  verdict: Verdict
  reason: str


def grade(value: float, limits: tuple[float, float]) -> Verdict:
  """The verdict of one number; a limit itself still belongs to the better side."""
  sign = 1 if limits[0] < limits[1] else -1
  return VERDICTS[sum(sign * value > sign * limit for limit in limits)]


def gain(value: float, base: float) -> float:
  """How far a number is from a base (0) to perfect (1); 1 where the base is perfect already."""
  return (value - base) / (1 - base) if base < 1 - 1e-9 else 1.0
