"""What crosses from the data pipeline to GPR: plain records of arrays.

Dimension key beyond docs/architecture.md: `G` groups of a row, the newest in the last place; `I`,
`J` ads and contents that a token bundles, so that T = G x I and O = G x J; `P` labels of a row, `N`
heads, `U` words of 32 codes, `X` thoughts of a row, `E` numbers that tell one.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

NUM_HOURS, NUM_WEEKDAYS = 24, 7
NUM_ACTIONS = 3  # of records.Action
NUM_GAP_BUCKETS = 32


class SeenThoughts(NamedTuple):
  """Thoughts on a row's user that its asked requests see, oldest first, and which sees which.

  What lies between the first and the end is strictly older than the request of the group.
  """

  embedding_BXE: np.ndarray  # float32, rows of norm 1, behind them zeros
  first_BG: np.ndarray  # int32 in 0..X
  end_BG: np.ndarray  # int32 in 0..X, one past the last; not above the first = none is seen


class Context(NamedTuple):
  """The stream U O E I | U O E I | ... | U O E of one user; -1 = padding in every field.

  A group is one ad request: the user (U), organic contents met since the request before it (O), the
  request (E), the ads engaged with in it (I). Padding groups stand first.
  """

  user_BF: np.ndarray  # int32, value number of each user feature, 0 = unknown
  request_BGF: np.ndarray  # int32, of each request feature, then hour and weekday (UTC)
  count_BG: np.ndarray  # int32, bucket of 1 + the ads engaged with before the request
  gap_BG: np.ndarray  # int32, bucket of the time since the request before; -1 at the first one
  age_BG: np.ndarray  # int32, seconds from the request to the row's last one, >= 0
  ad_age_BG: np.ndarray  # int32, the same from the last engagement in the request; -1 = none yet
  ad_code_BTL: np.ndarray  # int32, SID codes of the ads of each group
  ad_action_BT: np.ndarray  # int32, what was done with each, an Action
  organic_code_BOL: np.ndarray  # int32, codes of the contents of each group
  thoughts: SeenThoughts | None = None  # None = the run has none


class Batch(NamedTuple):
  """Rows with P labels each: what is to be told at a request, by every head."""

  context: Context
  group_BP: np.ndarray  # int32, the group whose request is asked, -1 = no label
  target_BPNL: np.ndarray  # int32 SID codes: head j has an ad of the j-th request from there; -1
  legal_BPNLU: np.ndarray  # uint32 bitmaps: which codes lead on from the target's first l codes
  worth_BP: np.ndarray  # float32, what the first head's engagement was worth, currency; 0 = padding
  weight_BPN: np.ndarray | None = None  # float32, w^V of each target; None = all count alike


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Sizes of everything that the model embeds or predicts; fixed by data and tokenizer."""

  codebook_sizes: tuple[int, ...]
  """V_l of each SID level."""
  user_sizes: tuple[int, ...]
  """Values of each user feature, the unknown value 0 included."""
  request_sizes: tuple[int, ...]
  """The same of each request feature; hour and weekday come last."""
  value_mean: float = 0.0
  """Mean of what a label of training is worth, currency."""
  value_std: float = 1.0
  """Its standard deviation; 1 where all are worth the same."""
  thought_size: int = 0
  """E, numbers that tell a thought; 0 = the run has none."""

  @property
  def num_levels(self) -> int:
    """L, SID levels."""
    return len(self.codebook_sizes)
