"""A market that answers what any ad of its log would bring: the truth in a reward model's place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gr4ad_jax import config as config_lib
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.sequences import Example, FeatureVocabulary
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.market.world import SCENES, Market, MarketConfig, Requests, Truth, truth
from gr4ad_jax.market.worlds import build_market


@dataclasses.dataclass(frozen=True)
class Simulator:
  """The truth about requests of a market's log.

  Attributes:
    market: with its truth.
    features: of the log, which tell a request's scene.
    user_U, ad_A: int, the market's numbers of the log's users and ads.
  """

  market: Market
  features: FeatureVocabulary
  user_U: np.ndarray
  ad_A: np.ndarray

  def __call__(self, contexts: Sequence[Example], ad_RC: np.ndarray) -> Truth:
    """Click and conversion rates and eCPM of ads, float32 [R, C]; zeros where an ad is -1."""
    asked = requests_of(contexts, self.features)
    asked = asked._replace(user_R=self.user_U[asked.user_R])
    return truth(self.market, asked, np.where(ad_RC < 0, -1, self.ad_A[np.maximum(ad_RC, 0)]))


def requests_of(contexts: Sequence[Example], features: FeatureVocabulary) -> Requests:
  """What the market must know of each context to tell the truth."""
  scene = len(features.user) + list(features.request).index("scene")
  values = ["", *features.request["scene"]]
  return Requests(
    np.array([c.user for c in contexts], np.int32), np.array([c.time_s for c in contexts]),
    np.array([SCENES.index(values[c.feature_F[scene]]) for c in contexts], np.int8),
  )


def open_simulator(folder: Place, logs: Logs, features: FeatureVocabulary) -> Simulator:
  """The market whose market.json lies in a folder.

  Raises:
    ConfigError: none lies there, or the log is of something else.
  """
  file = folder / "market.json"
  if not storage.exists(file):
    raise ConfigError(f"{folder}: holds no market.json, which `gr4ad market` writes")
  market = build_market(config_lib.read_json(MarketConfig, storage.fetch(file)))
  try:
    user_U, ad_A = (ids.astype(np.int64) for ids in (logs.users.user_id, logs.ads.ad_id))
  except ValueError:
    user_U = ad_A = np.array([-1])
  fits = all(
    len(ids) and 0 <= ids.min() and ids.max() < most
    for ids, most in ((user_U, len(market.taste_UD)), (ad_A, market.num_ads))
  )
  if not fits or "scene" not in features.request:
    raise ConfigError(f"{file}: {logs.source} is no log of this market")
  return Simulator(market, features, user_U, ad_A)
