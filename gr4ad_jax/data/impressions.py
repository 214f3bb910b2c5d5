"""Requests with everything that they showed, clicked or not: what a reward model learns from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gr4ad_jax.data.pipeline import pad
from gr4ad_jax.data.records import Action
from gr4ad_jax.data.sequences import Example, ExampleMaker
from gr4ad_jax.data.splits import SPLITS
from gr4ad_jax.data.validation import LogError
from gr4ad_jax.machine.progress import track

MAX_SHOWN = 8  # ads of a row; a request that showed more gives several rows


class Impressions(NamedTuple):
  """R rows, in the order of users and time; a row is a request or a part of one."""

  contexts: list[Example]  # without targets
  shown_RC: np.ndarray  # int32 ads, -1 = padding
  action_RC: np.ndarray  # int8, deepest Action of each, -1 = padding


def read_impressions(maker: ExampleMaker, split: str) -> Impressions:
  """The impressions of a split, a name of SPLITS.

  Raises:
    LogError: no ad was shown without being clicked, so that clicks cannot be told from views.
  """
  users = range(len(maker.logs.users.user_id))
  contexts, shown, actions = [], [], []
  action_E, ad_E = maker.logs.events.action, maker.logs.events.ad
  for user in track(users, f"impressions ({split}), users"):
    for context, rows in maker.impressions(user, SPLITS.index(split)):
      ad, inverse = np.unique(ad_E[rows], return_inverse=True)
      action = np.zeros(len(ad), np.int8)
      np.maximum.at(action, inverse, action_E[rows])
      for at in range(0, len(ad), MAX_SHOWN):
        contexts.append(context)
        shown.append(ad[at : at + MAX_SHOWN])
        actions.append(action[at : at + MAX_SHOWN])
  width = max((len(ads) for ads in shown), default=1)
  shown_RC, action_RC = pad(shown, width), pad(actions, width, dtype=np.int8)
  if not (action_RC == Action.IMPRESSION).any():
    raise LogError(
      f"{maker.logs.source}: the {split} split has no ad event with action impression; a reward "
      "model needs ads that were shown and not clicked"
    )
  return Impressions(contexts, shown_RC, action_RC)
