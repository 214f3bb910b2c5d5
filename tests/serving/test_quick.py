"""A server that starts with one compiled program and gets the others while it serves."""

import threading

import jax
import pytest
from fastapi.testclient import TestClient

from experiments._faults import within
from gr4ad_jax.serving.server import build_app
from tests.serving.support import SERVING, ask, make


@pytest.fixture
def gated(served_run, tmp_path, monkeypatch):
  """A service whose other programs are compiled once the gate is open."""
  jax.clear_caches()  # of programs that other tests' services share with this one
  service, gate = make(served_run, tmp_path, quick=True), threading.Event()
  compile_rest = service.engine.compile_rest

  def later():
    gate.wait()
    return compile_rest()

  monkeypatch.setattr(service.engine, "compile_rest", later)
  yield service, gate
  gate.set()


def test_one_program_answers_everything_until_there_are_all(gated):
  service, gate = gated
  assert list(service.engine.call_s) == [(1.0, 1)]
  program = service.engine.searcher.program(service.engine.widths[1.0])
  assert program._cache_size() == 1
  with TestClient(build_app(service)) as client:
    assert client.get("/readyz").status_code == 200
    advertiser = service.catalog.now.ads.advertiser_id[0]
    plain = {"user_id": "u1", "k": 5, "beam_factor": 1.0}
    first = ask(client, **plain)["ads"]
    some = ask(client, **plain, where=[f"advertiser_id={advertiser}"])["ads"]
    assert first and some and all(ad["advertiser_id"] == advertiser for ad in some)
    later = client.post("/v1/recommend", json=plain | {"beam_factor": 1.6})
    assert later.status_code == 503 and later.headers["retry-after"]
    assert "still being compiled" in later.json()["detail"]
    assert client.post("/v1/recommend", json=plain | {"beam_factor": 9}).status_code == 422
    assert [s["factor"] for s in client.get("/v1/about").json()["schedules"]] == [1.0]
    assert program._cache_size() == 1

    gate.set()
    assert within(120, lambda: service.parts_ms)
    assert [s["factor"] for s in client.get("/v1/about").json()["schedules"]] == [1.0, 1.6]
    assert set(service.engine.call_s) == {(f, n) for f in (1.0, 1.6) for n in (1, 4)}
    assert ask(client, **plain | {"beam_factor": 1.6})["schedule"]["factor"] == 1.6
    again = client.post("/v1/recommend", json=plain, headers={"cache-control": "no-cache"}).json()
    assert [ad["ad_id"] for ad in again["ads"]] == [ad["ad_id"] for ad in first]


def test_a_stop_does_not_wait_for_what_is_not_compiled_yet(gated):
  service, gate = gated
  with TestClient(build_app(service)):
    opening = threading.Timer(1.0, gate.set)  # the stop comes first
    opening.start()
  opening.join()
  assert service.engine.compile_rest() is None
  assert list(service.engine.call_s) == [(1.0, 1)]
  assert service.engine.config.batch_sizes == SERVING.batch_sizes[:1]
