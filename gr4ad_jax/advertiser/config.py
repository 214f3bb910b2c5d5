"""Settings of the advertiser model."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gr4ad_jax.config import Bounded, Count, Positive


@dataclasses.dataclass(frozen=True)
class PrepareConfig(Bounded, section="prepare"):
  """How a log becomes histories, labels and texts."""

  form: Literal["stream", "prompt"] = "stream"
  """stream: a history is a sequence of `brand: title` lines, and every later brand is a label;
  prompt: a summary of each history with one label, as in the paper."""
  max_history: Count = 20
  """Latest conversions of a user that a text tells."""
  title_chars: Count = 80
  """Characters of a title, cut between words."""
  prompt_chars: Count = 1600
  """Characters of a prompt; what is dropped first, see `prompts.write_prompt`."""
  label_days: Positive = 7.0
  """The label is the first advertiser converted with within so many days behind the cut (logs that
  are cut by time)."""
  popular_days: Positive = 28.0
  """Days before a cut over which popularity is counted (logs that are cut by time)."""
  cuts: Count = 8
  """Cuts of training, `label_days` apart, the last one that far before validation (logs that are
  cut by time)."""
