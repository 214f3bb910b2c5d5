"""A user's past at the server: the log's events and what came since, request by request."""

import types

import numpy as np
import pytest

from gr4ad_jax.catalog.prepared import open_logs
from gr4ad_jax.data.records import Action
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.serving.histories import Latest
from gr4ad_jax.serving.journal import Event
from gr4ad_jax.serving.users import Users


@pytest.fixture(scope="module")
def data(tiny_data):
  return open_logs(tiny_data)


def profile(data, events, user="u7"):
  ads = data.logs.ads.ad_id.tolist()
  find = types.SimpleNamespace(find=lambda ad: ads.index(ad) if ad in ads else -1)
  return Users(data.logs, data.examples).profile(
    user, Latest(events, "", False), types.SimpleNamespace(snapshot=find),
    now_s=1_600_000_000, features={}, history=None,
  )


def event(time_s, ad, action, request, **features) -> Event:
  return Event("u7", time_s, ad, None, action, request, 0.0, None, features)


def test_events_since_the_log_stand_in_their_requests(data):
  """A view begins its request; two engagements of one request belong together, others do not."""
  since = 1_590_000_000
  past = profile(data, [
    event(since, "ad1", Action.IMPRESSION, "r", scene="feed"),
    event(since + 9, "ad2", Action.CLICK, "r", scene="feed"),
    event(since + 20, "ad3", Action.CLICK, None, scene="no such scene"),
    event(since + 20, "ad3", Action.CLICK, None),
    event(since + 30, "ad2", Action.CONVERSION, "r", scene="feed"),
  ]).example.past
  logged = ExampleMaker(data.logs, data.examples.config).past(7)
  np.testing.assert_array_equal(past.ad_request[:-4], logged.ad_request)
  first, second, third, last = past.ad_request[-4:].tolist()
  assert first == last and len({first, second, third}) == 3
  assert not {first, second, third} & {*logged.ad_request.tolist()}
  assert (past.ad_request_s[-4:] - since).tolist() == [0, 20, 20, 0]
  assert past.ad_action[-4:].tolist() == [1, 1, 1, 2]
  feed = 1 + data.examples.features.request["scene"].index("feed")
  assert past.ad_feature[-4:].tolist() == [[feed], [0], [0], [feed]]


def test_an_unknown_user_has_the_past_that_came_since(data):
  example = profile(data, [event(5, "ad4", Action.CLICK, "r")], user="nobody").example
  assert example.past.ads.tolist() == example.ad_T.tolist() == [4]
  assert len(profile(data, [], user="nobody").example.past.ads) == 0
