"""An exported search behind HTTP answers as the artifact does."""

import concurrent.futures
import time

import numpy as np
import pytest
from fastapi.testclient import TestClient

from gr4ad_jax.api import open_run
from gr4ad_jax.catalog.catalog import LiveCatalog
from gr4ad_jax.search.export import export_run
from gr4ad_jax.search.generator import named_arrays
from gr4ad_jax.serving.artifact_server import ArtifactEngine, build_artifact_app
from gr4ad_jax.serving.events import event_of
from gr4ad_jax.serving.messages import HistoryItem
from gr4ad_jax.serving.users import Users
from tests.serving.support import SERVING


@pytest.fixture(scope="module")
def engine(served_run, tmp_path_factory):
  folder = tmp_path_factory.mktemp("artifact") / "artifact"
  export_run(open_run(served_run), folder)
  engine = ArtifactEngine(folder, SERVING)
  engine.compile_all()
  return engine


@pytest.fixture(scope="module")
def client(engine):
  with TestClient(build_artifact_app(engine, api_key="secret")) as client:
    client.headers["x-api-key"] = "secret"
    yield client


def context_of(engine) -> dict:
  return {name: array[0].tolist() for name, array in engine._sample.items()}


def test_requests_that_share_a_call_get_what_the_artifact_gives(engine, client):
  context = context_of(engine)
  other = context | {"feature_BF": np.zeros_like(engine._sample["feature_BF"])[0].tolist()}
  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    replies = list(pool.map(
      lambda c: client.post("/v1/recommend", json={"context": c, "k": 7}), [context, other] * 3
    ))
  for reply, row in zip(replies, [context, other] * 3, strict=True):
    assert reply.status_code == 200, reply.text
    arrays = {name: np.array([values], np.int32) for name, values in row.items()}
    ids, scores = engine.artifact.recommend(arrays, 7)
    assert [ad["ad_id"] for ad in reply.json()["ads"]] == ids[0]
    np.testing.assert_allclose([ad["score"] for ad in reply.json()["ads"]], scores[0], atol=1e-4)


@pytest.mark.parametrize("change, words", [
  ({"ad_count_BT": None}, "ad_count_BT is missing"),
  ({"feature_BF": [1, 2, 3, 4, 5, 6, 7]}, "feature_BF has shape"),
  ({"colour": 1}, "'colour' is none of"),
  ({"feature_BF": [2**40, 0]}, "feature_BF holds 1099511627776 at [0, 0]"),
  ({"feature_BF": [2**70, 0]}, "needs whole numbers"),
  ({"history": [{"ad_id": "ad1"}]}, "exactly one of context and history"),
])
def test_contexts_that_do_not_fit_are_refused(engine, client, change, words):
  history = change.get("history")
  given = context_of(engine) | {k: v for k, v in change.items() if k != "history"}
  context = {k: v for k, v in given.items() if v is not None}
  reply = client.post("/v1/recommend", json={"context": context, "history": history})
  assert reply.status_code == 422 and words in reply.text


NOW_S = 1_506_100_000  # a day of the log
HISTORY = [
  {"ad_id": "ad1", "action": "click", "time": NOW_S - 90_000},
  {"content_id": "c3", "time": NOW_S - 5},
  {"ad_id": "ad7", "action": "conversion", "value": 3, "time": NOW_S - 3_000},
  {"ad_id": "ad1", "time": NOW_S - 80_000},
  {"ad_id": "ad2", "action": "impression", "time": NOW_S - 10},  # a view is no history
  {"content_id": "c29", "time": NOW_S - 5}, {"content_id": "c3", "time": NOW_S - 700_000},
  {"ad_id": "unheard of"}, {"content_id": "unheard of", "time": 3},
  {"ad_id": "ad5", "time": NOW_S + 100},  # not yet
  {"ad_id": "ad9"},
]


@pytest.mark.parametrize("history, features, time", [
  (HISTORY, {"scene": "feed", "city": "city2"}, NOW_S),
  ([], {}, NOW_S + 9_000_000),
  (HISTORY[:1] * 40, {"scene": "never seen"}, NOW_S - 4_000_000),
  ([{"ad_id": f"ad{i}", "time": NOW_S - 3_700 * i * i} for i in range(40)], {}, NOW_S),
])
def test_a_history_becomes_what_the_server_of_the_run_makes_of_it(
  engine, served_run, history, features, time
):
  """A second path to the same context: the run's own, by its logs and its tokenizer's codes."""
  opened = open_run(served_run)
  users = Users(opened.logs, opened.examples)
  given = [HistoryItem.model_validate(item) for item in history]
  with_ads = LiveCatalog(
    opened.logs.ads, opened.sids, opened.index, opened.contexts, encode=None, spare=0.0
  )
  profile = users.profile(
    None, None, with_ads.now, now_s=time + 1, features=features,
    history=[event_of(item, "", time - 1) for item in given],
  )
  expected = named_arrays(opened.contexts.context([profile.example], user_ids=[""]))
  context = engine.artifact.context(history, features=features, time=time)
  assert context.keys() == expected.keys()
  for name in expected:
    np.testing.assert_array_equal(context[name], expected[name], err_msg=name)
  assert engine.artifact.seen(history, time=time) == opened.logs.ads.ad_id[profile.seen_N].tolist()


def test_a_history_is_answered_over_http(client, engine):
  body = {"history": HISTORY, "features": {"scene": "feed"}, "time": NOW_S, "k": 5}
  reply = client.post("/v1/recommend", json=body)
  assert reply.status_code == 200, reply.text
  context = engine.artifact.context(HISTORY, features={"scene": "feed"}, time=NOW_S)
  assert [ad["ad_id"] for ad in reply.json()["ads"]] == engine.artifact.recommend(context, 5)[0][0]
  # c3 is a content of ad3; ad2 was only shown, and ad5 comes later.
  seen = {"ad1", "ad3", "ad7", "ad9"}
  every = client.post("/v1/recommend", json=body | {"k": 40}).json()["ads"]
  fresh = client.post("/v1/recommend", json=body | {"k": 40, "exclude_seen": True}).json()["ads"]
  assert seen & {ad["ad_id"] for ad in every} and len(fresh) >= 16
  assert not seen & {ad["ad_id"] for ad in fresh}
  assert [ad["ad_id"] for ad in fresh] == engine.artifact.recommend(
    context, 40, exclude=[[*seen]]
  )[0][0]
  for bad, words in (
    ({"history": None, "context": context_of(engine), "exclude_seen": True}, "needs a history"),
    ({"features": {"colour": "red"}}, "'colour' is none of the model's"),
    ({"k": -1}, "greater than or equal to 1"),
    ({"history": [{"ad_id": "ad1", "content_id": "c1"}]}, "exactly one of ad_id and content_id"),
  ):
    reply = client.post("/v1/recommend", json=body | bad)
    assert reply.status_code == 422 and words in reply.text


def test_answers_with_one_program_and_then_with_all(engine):
  quick = ArtifactEngine(engine.artifact._folder, SERVING)
  quick.compile_one()
  assert not quick.is_whole and list(quick.call_s) == [(1.0, 1)]
  with TestClient(build_artifact_app(quick)) as client:
    body = {"context": context_of(engine), "k": 3}
    first = client.post("/v1/recommend", json=body).json()["ads"]
    deadline = time.monotonic() + 60
    while not quick.is_whole and time.monotonic() < deadline:
      time.sleep(0.05)
    assert quick.is_whole and (1.0, 4) in quick.call_s
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      replies = list(pool.map(lambda _: client.post("/v1/recommend", json=body), range(8)))
  for ads in (reply.json()["ads"] for reply in replies):
    assert [ad["ad_id"] for ad in ads] == [ad["ad_id"] for ad in first]
    # Programs of other batch sizes may round otherwise.
    assert [ad["score"] for ad in ads] == pytest.approx([ad["score"] for ad in first], abs=1e-4)


def test_health_manifest_and_key(engine, client):
  assert client.get("/readyz").json() == {"ready": True}
  assert client.get("/v1/about").json() == engine.artifact.manifest
  assert "gr4ad_requests_total" in client.get("/metrics").text
  assert client.get("/v1/about", headers={"x-api-key": "no"}).status_code == 401


@pytest.mark.parametrize("host, status", [
  ("localhost:8000", 200), ("LOCALHOST", 200), ("[::1]:8000", 200), ("ads.example.com", 200),
  ("a.shop.example", 200), ("evil.example", 400), ("localhost.evil.example", 400),
  ("shop.example.evil", 400), ("localhost@evil.example", 400), ("127.0.0.1.evil.example", 400),
])
def test_only_names_that_are_allowed_are_answered(engine, host, status):
  """What a page in a browser asks under a name of its own (DNS rebinding) gets nothing."""
  hosts = ("localhost", "127.0.0.1", "[::1]", "ads.example.com", "*.shop.example")
  client = TestClient(build_artifact_app(engine, hosts=hosts))
  for path in ("/v1/about", "/healthz", "/docs"):
    assert client.get(path, headers={"host": host}).status_code == status, path
