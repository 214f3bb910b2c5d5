"""A request's context: what the log knows of the user, what came since, what the request says."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gr4ad_jax.catalog.catalog import Catalog
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.examples import ExampleSet
from gr4ad_jax.data.records import Action, Logs
from gr4ad_jax.data.sequences import Example, ExampleMaker, Past
from gr4ad_jax.serving.histories import Latest
from gr4ad_jax.serving.journal import Event


class Profile(NamedTuple):
  """A context and what it is made of."""

  example: Example
  known: bool  # the log or the store has the user
  unknown_items: int  # ads and contents of the history that the model cannot know
  seen_N: np.ndarray  # int32, distinct ads whose product was engaged with before


class Users:
  """The log's users; later events come with each request."""

  def __init__(self, logs: Logs, examples: ExampleSet):
    """Indexes the log; `examples` say how histories are cut."""
    self._maker = ExampleMaker(
      logs, examples.config, split_R=np.full(int(logs.events.request.max()) + 1, -1, np.int8),
      vocabulary=examples.features,
    )
    self._config = examples.config
    self._row_of = {user: row for row, user in enumerate(logs.users.user_id.tolist())}
    self._ad_of_content_O = logs.contents.ad
    self._content_row = {c: row for row, c in enumerate(logs.contents.content_id.tolist())}
    self.features = examples.features.user | examples.features.request  # name -> values
    # Name -> its place in `feature_F`, and the number of each value. Where user and request have a
    # feature of one name, it is the user's.
    self._numbers: dict[str, tuple[int, dict[str, int]]] = {}
    user_numbers, self._request_numbers = (
      {name: {value: i + 1 for i, value in enumerate(values)} for name, values in group.items()}
      for group in (examples.features.user, examples.features.request)
    )
    columns = [*user_numbers.items(), *self._request_numbers.items()]
    self._num_features = len(columns)
    for at, (name, numbers) in enumerate(columns):
      self._numbers.setdefault(name, (at, numbers))
    self.ids = logs.users.user_id
    self.request_features = tuple(examples.features.request)

  def starting_with(self, query: str, limit: int) -> list[str]:
    """Ids of the log's users that begin so."""
    found = (user for user in self._row_of if user.startswith(query))
    return list(itertools.islice(found, limit))

  def has_content(self, content_id: str) -> bool:
    """Whether it is a content of the log, the only ones that a model knows."""
    return content_id in self._content_row

  def profile(
    self,
    user_id: str | None,
    latest: Latest | None,
    catalog: Catalog,
    *,
    now_s: int,
    features: Mapping[str, str],
    history: Sequence[Event] | None,
  ) -> Profile:
    """The context of a request.

    Args:
      user_id: None = nobody known.
      latest: the user's events since the log; None = none are known.
      catalog: numbers of ads.
      now_s: unix seconds; only events before count.
      features: of user and request, by name; they replace those of the log. Values that training
        did not meet count as unknown.
      history: replaces everything that is known of the user; None = nothing does.

    Raises:
      ConfigError: a feature that the model does not have.
    """
    row = self._row_of.get(user_id, -1) if user_id is not None else -1
    since = list(latest.events) if latest else []
    past, unknown = self._past_of(history if history is not None else since, catalog)
    earlier, _ = self._past_of(latest.earlier if latest and history is None else (), catalog)
    feature_F = np.zeros(self._num_features, np.int32)
    if row >= 0:
      feature_F = self._maker.feature(row, None)
      if history is None:
        past = self._maker.past(row).merged(past)
    for name, value in features.items():
      if name not in self._numbers:
        known = ", ".join(self._numbers)
        raise ConfigError(f"features: {name!r} is none of the model's: {known}")
      at, number_of = self._numbers[name]
      feature_F[at] = number_of.get(value, 0)
    example = past.request(int(now_s), config=self._config, feature_F=feature_F, user=row)
    seen_N = self._seen(earlier.merged(past), int(now_s))
    return Profile(example, row >= 0 or bool(since), unknown, seen_N)

  def _seen(self, past: Past, now_s: int) -> np.ndarray:
    """Ads clicked or bought, or met as a content, as `SeenAds` has them of the log."""
    organic_N = past.organic_ads[past.organic_time_s < now_s]
    ad_N = np.append(past.ads[past.ad_time_s < now_s], organic_N)
    return np.unique(ad_N[ad_N >= 0]).astype(np.int32)

  def _past_of(self, events: Sequence[Event], catalog: Catalog) -> tuple[Past, int]:
    """Engagements and contents among events, by time; how many of them are not known."""
    ads, contents, unknown = [], [], 0
    requests: dict[str, tuple[int, int]] = {}  # id -> a number that no request of the log has, time
    for at, event in enumerate(sorted(events, key=lambda event: event.time_s)):
      request = -1 - at, event.time_s  # without an id it is one of its own
      if event.request_id is not None:
        request = requests.setdefault(event.request_id, request)
      if event.ad_id is not None:
        ad = catalog.snapshot.find(event.ad_id)
        if event.action >= Action.CLICK and ad >= 0:
          ads.append((ad, event, *request))
        unknown += ad < 0
      else:
        content = self._content_row.get(event.content_id, -1)
        if content >= 0:
          contents.append((content, event.time_s))
        unknown += content < 0
    content_N2 = np.array(contents, np.int64).reshape(-1, 2)
    return Past(
      np.array([ad for ad, *_ in ads], np.int32),
      np.array([event.time_s for _, event, *_ in ads], np.int64),
      np.array([event.value for _, event, *_ in ads], np.float64),
      np.array([event.action for _, event, *_ in ads], np.int8),
      np.array([request for *_, request, _ in ads], np.int64),
      np.array([request_s for *_, request_s in ads], np.int64),
      np.array([self._request_feature(event.features) for _, event, *_ in ads], np.int32).reshape(
        len(ads), len(self.request_features)
      ),
      content_N2[:, 0].astype(np.int32), content_N2[:, 1], self._ad_of_content_O[content_N2[:, 0]],
    ), unknown

  def _request_feature(self, features: Mapping[str, str]) -> list[int]:
    """Numbers of a request's features, 0 = unknown."""
    return [
      self._request_numbers[name].get(features.get(name, ""), 0) for name in self.request_features
    ]
