"""An exported search behind HTTP answers as the artifact does."""

import concurrent.futures

import numpy as np
import pytest
from fastapi.testclient import TestClient

from gr4ad_jax.api import open_run
from gr4ad_jax.search.export import export_run
from gr4ad_jax.serving.artifact_server import ArtifactEngine, build_artifact_app
from tests.serving.support import SERVING


@pytest.fixture(scope="module")
def engine(served_run, tmp_path_factory):
  folder = tmp_path_factory.mktemp("artifact") / "artifact"
  export_run(open_run(served_run), folder)
  engine = ArtifactEngine(folder, SERVING)
  engine.warm()
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
  ({"feature_BF": [2**40, 0]}, "out of bounds"),
])
def test_contexts_that_do_not_fit_are_refused(engine, client, change, words):
  context = {k: v for k, v in (context_of(engine) | change).items() if v is not None}
  reply = client.post("/v1/recommend", json={"context": context})
  assert reply.status_code == 422 and words in reply.text


def test_health_manifest_and_key(engine, client):
  assert client.get("/readyz").json() == {"ready": True}
  assert client.get("/v1/about").json() == engine.artifact.manifest
  assert "gr4ad_requests_total" in client.get("/metrics").text
  assert client.get("/v1/about", headers={"x-api-key": "no"}).status_code == 401
