"""Events of users at the HTTP border: what is kept, once; and what is refused, and named."""

import pytest
from fastapi.testclient import TestClient

from gr4ad_jax.serving.journal import Event, Journal
from gr4ad_jax.serving.server import build_app
from tests.serving.support import ONE, make


@pytest.fixture(scope="module")
def service(served_run, tmp_path_factory):
  return make(served_run, tmp_path_factory.mktemp("events"), config=ONE)


@pytest.fixture(scope="module")
def client(service):
  with TestClient(build_app(service)) as client:
    yield client


def send(client, *events):
  return client.post("/v1/events", json={"events": list(events)})


@pytest.mark.parametrize("features", [
  {"colour": "red"}, {"scene": "feed", "Scene": "feed"}, {"feature_scene": "feed"},
  {"city": "city1"},  # a user's: a segment has no column for it
])
def test_a_feature_that_requests_do_not_have_is_refused_by_name(client, service, features):
  before = service.journal.last_seq
  click = {"user_id": "u1", "ad_id": "ad1"}
  reply = send(client, click, click | {"features": features})
  unknown = next(name for name in features if name != "scene")
  assert reply.status_code == 422
  assert f"events[1].features: {unknown!r}" in reply.json()["detail"]
  assert "(scene)" in reply.json()["detail"]  # what it may be
  assert service.journal.last_seq == before
  assert send(client, click | {"features": {"scene": "feed"}}).status_code == 200


def test_an_event_that_is_sent_again_counts_once(client, service):
  click = {"user_id": "again", "ad_id": "ad1", "action": "conversion", "value": 9}
  counts = service.metrics.events._value
  before = counts.get()
  first = send(client, click | {"event_id": "a"}, click | {"event_id": "b"}).json()
  assert (first["accepted"], first["repeated"]) == (2, 0)
  # A retry of both with a new one between, and one id twice in a call.
  retry = send(client, *(click | {"event_id": name} for name in "acbc")).json()
  assert (retry["accepted"], retry["repeated"]) == (1, 3)
  assert retry["last_event"] == first["last_event"] + 1
  # The id is one of the user's; and events without one are all different.
  assert send(client, click | {"user_id": "other", "event_id": "a"}).json()["accepted"] == 1
  assert send(client, click, click).json()["accepted"] == 2
  assert len(service.journal.of_user("again", 50)) == 5
  assert counts.get() - before == 6


def test_ids_of_events_are_known_after_a_restart_for_as_long_as_events_are_kept(tmp_path):
  event = Event("u1", 1_000, "ad1", None, 2, None, 1.5, None, {})
  journal = Journal(tmp_path / "journal.sqlite")
  assert journal.add_events([event], ["a"], now_s=1_000).events == [event]
  journal.close()
  journal = Journal(tmp_path / "journal.sqlite")
  assert journal.add_events([event], ["a"], now_s=1_001).events == []
  journal.forget(before_s=1_000, up_to=0)
  assert journal.add_events([event], ["a"], now_s=1_002).events == []
  journal.forget(before_s=1_001, up_to=0)
  assert journal.add_events([event], ["a"], now_s=1_003).events == [event]
  assert len(journal.of_user("u1", 50)) == 2
  journal.close()


def test_contents_that_no_model_knows_are_counted(client):
  contents = [{"user_id": "u1", "content_id": name} for name in ("c1", "unheard of")]
  reply = send(client, *contents, {"user_id": "u1", "ad_id": "ad1"}).json()
  assert (reply["accepted"], reply["unknown_contents"]) == (3, 1)
