"""Thoughts on users by a rule: no language model writes them, as none is at hand offline.

Once a week a sentence says of each user what they have done most in their whole past, strictly
before: the ads they clicked or bought, and the contents they met, with kinds and brands. A stream
holds the latest requests alone; a thought holds what lies before them, too, but nothing that is
known of the world, as a language model's would.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from gr4ad_jax.catalog.prepared import open_logs
from gr4ad_jax.data.records import DAY_S
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.machine import atomic
from gr4ad_jax.machine.progress import console

WEEK_S = 7 * DAY_S
_NAMED = 3  # of each kind, the most frequent ones


def kept_thoughts(data: Path, file: Path) -> Path:
  """The weekly thoughts on the users of prepared data, as `gr4ad train --thoughts` takes them.

  Args:
    data: folder of the data.
    file: parquet, made where it is not there.
  """
  if not file.exists():
    console.print("thoughts by rule")
    opened = open_logs(data)
    users = ExampleMaker(
      opened.logs, opened.examples.config, vocabulary=opened.examples.features
    )
    with atomic.new_file(file) as out:
      weekly_thoughts(users).to_parquet(out)
  return file


def weekly_thoughts(users: ExampleMaker) -> pd.DataFrame:
  """user_id, timestamp (unix seconds) and text; a week that changes nothing has none.

  Weeks are counted from the first event of the log.
  """
  logs = users.logs
  first_s, last_s = int(logs.events.time_s.min()), int(logs.events.time_s.max())
  stop_s_W = np.arange(first_s + WEEK_S, last_s + 1, WEEK_S)
  of_ads = {
    "ads": logs.ads.text, "kinds of ads": logs.ads.category, "brands": logs.ads.advertiser_id
  }
  of_contents = {"contents": logs.contents.text, "kinds of contents": logs.contents.category}
  rows = []
  for user, user_id in enumerate(logs.users.user_id):
    past, said = users.past(user), ""
    counts = {name: Counter[str]() for name in (*of_ads, *of_contents)}
    ad_end_W, organic_end_W = (
      np.searchsorted(time_s, stop_s_W, side="left")
      for time_s in (past.ad_time_s, past.organic_time_s)
    )
    ad_done = organic_done = 0
    for stop_s, ad_end, organic_end in zip(stop_s_W, ad_end_W, organic_end_W, strict=True):
      for columns, items in (
        (of_ads, past.ads[ad_done:ad_end]), (of_contents, past.organics[organic_done:organic_end]),
      ):
        for name, column in columns.items():
          counts[name].update(word for word in column[items].tolist() if word.strip())
      ad_done, organic_done = ad_end, organic_end
      text = sentence(counts.items())
      if text != said:
        rows.append((user_id, int(stop_s), text))
      said = text
  return pd.DataFrame(rows, columns=["user_id", "timestamp", "text"])


def sentence(counts: Iterable[tuple[str, Counter[str]]]) -> str:
  """What was met most often of each kind; equally often, by name. "" = nothing was met."""
  named = [
    f"{name}: " + ", ".join(heapq.nsmallest(_NAMED, count, key=lambda word: (-count[word], word)))
    for name, count in counts if count
  ]
  return "Most of all " + "; ".join(named) if named else ""
