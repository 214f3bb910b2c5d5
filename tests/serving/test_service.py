"""A server in this process, called through its HTTP border."""

import concurrent.futures
import sqlite3
import threading
import time

import jax
import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient

from gr4ad_jax.api import open_run
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.segments import append_segment, segment_files
from gr4ad_jax.search.recommend import recommend_for_user
from gr4ad_jax.serving.engine import Query
from gr4ad_jax.serving.journal import Event, Journal
from gr4ad_jax.serving.segments import export_segment, exported
from gr4ad_jax.serving.server import build_app
from gr4ad_jax.training.published import publish
from tests.serving.support import ONE, SERVING, ask, make


@pytest.fixture(scope="module")
def service(served_run, tmp_path_factory):
  return make(served_run, tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def client(service):
  with TestClient(build_app(service)) as client:
    yield client


def test_gives_what_the_command_line_gives(client, service, served_run):
  """A second path to the same search: `gr4ad recommend` at base widths."""
  found = recommend_for_user(open_run(served_run), "u7", 5)
  events = service.opened.logs.events
  last = np.flatnonzero(service.opened.logs.users.user_id[events.user] == "u7")[-1]
  reply = ask(
    client, user_id="u7", k=5, beam_factor=1.0, time=int(events.time_s[last]),
    features={"scene": events.features["scene"][last]},
  )
  assert [ad["ad_id"] for ad in reply["ads"]] == [ad.ad_id for ad in found.ads]
  assert [tuple(ad["sid"]) for ad in reply["ads"]] == [ad.sid for ad in found.ads]
  assert reply["currency"] == "EUR" and reply["schedule"]["widths"] == [8, 12, 16]
  assert reply["known_user"] and not reply["unknown_items"]
  for ad in reply["ads"]:
    assert np.prod(ad["level_probability"]) == pytest.approx(ad["probability"], rel=1e-4)


def test_requests_of_one_call_get_what_they_get_alone(service):
  catalog = service.catalog.now
  advertiser = f"advertiser_id={catalog.ads.advertiser_id[2]}"
  queries = [
    Query(service.users.profile(f"u{u}", None, catalog, now_s=service.clock.now_s, features={},
                                history=None).example, f"u{u}", 5, where, exclude_N)
    for u, where, exclude_N in (
      (3, (), None), (4, (advertiser,), None), (5, (), None), (6, (), np.arange(30))
    )
  ]
  together = service.engine(queries, factor=1.0)
  apart = [service.engine([query], factor=1.0)[0] for query in queries]
  for one, alone in zip(together, apart, strict=True):
    np.testing.assert_array_equal(one.found.ad_RK, alone.found.ad_RK)
    np.testing.assert_allclose(one.found.logp_RK, alone.found.logp_RK, atol=1e-4)
  assert together[2].found.ad_RK.min() < 30 <= together[3].found.ad_RK.min()


def test_wider_beams_never_find_less(client):
  """Probability of the SIDs found by 16 and 24 beams."""
  def found(factor):
    ads = ask(client, user_id="u1", k=50, beam_factor=factor)["ads"]
    return sum({tuple(ad["sid"]): ad["probability"] for ad in ads}.values())

  assert found(1.0) <= found(1.6) * 1.0001


def test_a_request_may_leave_out_what_the_user_has_seen(client, service):
  """Of the user's whole past: max_history is 50 events, and the first is older than those."""
  program = service.engine.searcher.program(service.engine.widths[1.0])
  compiled, begin_s = program._cache_size(), int(service.clock.now_s) - 1_000
  live = {"ad_id": "live", "advertiser_id": "live shop", "text": "food snack product number 4"}
  assert client.post("/v1/ads", json={"ads": [live]}).status_code == 200
  first = {"user_id": "prospect", "ad_id": "ad4", "action": "click", "time": begin_s}
  assert client.post("/v1/events", json={"events": [first]}).status_code == 200
  alone = ask(client, user_id="prospect", k=40, exclude_seen=True)
  events = [{"ad_id": "ad11", "action": "conversion"}] * 60 + [
    {"content_id": "c3"},  # of ad3
    {"content_id": "c29"},  # of none
    {"ad_id": "ad8", "action": "impression"}, {"ad_id": "live", "action": "click"},
  ]
  assert client.post("/v1/events", json={"events": [
    {"user_id": "prospect", "time": begin_s + 10 + i} | event for i, event in enumerate(events)
  ]}).status_code == 200
  body = {"user_id": "prospect", "k": 40, "beam_factor": 1.0}

  def found(**more) -> set[str]:
    return {ad["ad_id"] for ad in ask(client, **body, **more)["ads"]}

  every, fresh = found(), found(exclude_seen=True)
  seen = {"ad3", "ad4", "ad11", "live"}
  assert every & seen and not fresh & seen and len(fresh) >= 16
  for ad in seen | {"ad8"}:  # an advertiser's few ads are all found, but for what was seen
    where = [f"advertiser_id={'live shop' if ad == 'live' else f'brand{int(ad[2:]) % 8}'}"]
    assert ad in found(where=where)
    assert (ad in found(where=where, exclude_seen=True)) == (ad == "ad8")
  # What is seen later, or by others, does not count; and a history in the request is the past.
  assert "ad11" in found(time=begin_s + 5, exclude_seen=True, where=["advertiser_id=brand3"])
  assert "ad4" not in {ad["ad_id"] for ad in alone["ads"]}
  history = [{"ad_id": "ad11"}, {"ad_id": "ad4", "action": "impression"}]
  given = ask(client, history=history, k=40, exclude_seen=True, where=["advertiser_id=brand3"])
  assert {ad["ad_id"] for ad in given["ads"]} == {"ad3", "ad19", "ad27", "ad35"}
  assert program._cache_size() == compiled
  client.delete("/v1/ads/live")


def test_targeting_holds(client, service):
  advertiser = service.catalog.now.ads.advertiser_id[0]
  reply = ask(client, user_id="u1", k=20, where=[f"advertiser_id={advertiser}"])
  assert reply["ads"] and all(ad["advertiser_id"] == advertiser for ad in reply["ads"])
  bad = client.post("/v1/recommend", json={"where": ["advertiser_id=nobody"]})
  assert bad.status_code == 422 and "no ad has it" in bad.json()["detail"]


def test_an_event_is_seen_by_the_next_request_and_ends_the_cached_answer(client):
  first = ask(client, user_id="u9", k=3)
  assert not first["cached"] and ask(client, user_id="u9", k=3)["cached"]
  ads = ask(client, user_id="u9", k=40)["ads"]
  reply = client.post("/v1/events", json={"events": [
    {"user_id": "u9", "ad_id": ads[-1]["ad_id"], "action": "click"}
  ] * 3})
  assert reply.status_code == 200 and reply.json()["accepted"] == 3
  after = ask(client, user_id="u9", k=3)
  assert not after["cached"]
  probability = {ad["ad_id"]: ad["probability"] for ad in ask(client, user_id="u9", k=40)["ads"]}
  before = {ad["ad_id"]: ad["probability"] for ad in ads}
  assert any(abs(probability[a] / before[a] - 1) > 1e-6 for a in before if a in probability)


def test_a_history_in_the_request_is_the_history(client, service):
  """The stored history of a user, given in the request by nobody known."""
  begin_s = int(service.clock.now_s) - 100
  client.post("/v1/events", json={"events": [
    {"user_id": "new user", "ad_id": f"ad{i}", "action": "click", "time": begin_s + i}
    for i in range(5)
  ]})
  stored = ask(client, user_id="new user", k=5, beam_factor=1.0)
  given = ask(client, k=5, beam_factor=1.0, history=[
    {"ad_id": f"ad{i}", "action": "click", "time": begin_s + i} for i in range(5)
  ])
  assert stored["known_user"] and not given["known_user"]
  assert [a["ad_id"] for a in stored["ads"]] == [a["ad_id"] for a in given["ads"]]


def test_a_new_ad_is_recommended_without_compilation_and_a_removed_one_never(client, service):
  compiled = service.engine.searcher.program(service.engine.widths[1.6])._cache_size()
  ad = {"ad_id": "fresh/1", "advertiser_id": "newcomer", "category": "food", "text": "fresh thing"}
  reply = client.post("/v1/ads", json={"ads": [ad]})
  assert reply.status_code == 200, reply.text
  where = ["advertiser_id=newcomer"]
  found = ask(client, user_id="u1", k=3, where=where)["ads"]
  assert [a["ad_id"] for a in found] == ["fresh/1"]
  assert found[0]["sid"] == reply.json()["sids"]["fresh/1"]
  # The same ad with another text moves; it does not stand there twice.
  client.post("/v1/ads", json={"ads": [ad | {"text": "something else altogether"}]})
  found = ask(client, user_id="u1", k=3, where=where)["ads"]
  assert [(a["ad_id"], a["text"]) for a in found] == [("fresh/1", "something else altogether")]
  assert client.delete("/v1/ads/fresh/1").status_code == 200
  assert ask(client, user_id="u1", k=3, where=where)["ads"] == []
  assert client.delete("/v1/ads/fresh/1").status_code == 404
  assert service.engine.searcher.program(service.engine.widths[1.6])._cache_size() == compiled


def test_a_cached_answer_with_a_removed_ad_is_not_given_again(client):
  client.post("/v1/ads", json={"ads": [
    {"ad_id": "gone soon", "advertiser_id": "a passer-by", "text": "thing"}
  ]})
  body = {"user_id": "u2", "k": 2, "where": ["advertiser_id=a passer-by"]}
  assert ask(client, **body)["ads"] and ask(client, **body)["cached"]
  client.delete("/v1/ads/gone soon")
  assert ask(client, **body)["ads"] == []


@pytest.mark.parametrize("body, words", [
  ({"k": 0}, "greater than or equal to 1"),
  ({"k": 101}, "at most 100"),
  ({"kk": 1}, "Extra inputs"),
  ({"user_id": ""}, "at least 1 character"),
  ({"user_id": 7}, "valid string"),
  ({"history": [{"ad_id": "a", "content_id": "b"}]}, "exactly one of"),
  ({"history": [{"ad_id": "ad1"}] * 51}, "at most 50"),
  ({"features": {"shoe size": "44"}}, "shoe size"),
  ({"beam_factor": 3.0}, "must be one of 1, 1.6"),
  ({"time": -1}, "greater than or equal to 0"),
  ({"where": ["colour=red"]}, "COLUMN=VALUE"),
])
def test_bad_requests_are_refused_with_the_rule(client, body, words):
  reply = client.post("/v1/recommend", json=body)
  assert reply.status_code == 422 and words in reply.text


def test_events_of_unknown_ads_are_refused_as_a_whole(client, service):
  before = service.journal.last_seq
  reply = client.post("/v1/events", json={"events": [
    {"user_id": "u1", "ad_id": "ad1"}, {"user_id": "u1", "ad_id": "never heard of"}
  ]})
  assert reply.status_code == 422 and "events[1].ad_id" in reply.text
  assert service.journal.last_seq == before


def test_bad_ads_change_nothing(client, service):
  version = service.catalog.now.snapshot.version
  for ads, words in (
    ([{"ad_id": "x", "advertiser_id": "y", "price": -1}], "greater than or equal"),
    ([{"ad_id": "x", "advertiser_id": "y"}] * 2, "unique"),
    ([], "at least 1"),
  ):
    reply = client.post("/v1/ads", json={"ads": ads})
    assert reply.status_code == 422 and words in reply.text
  assert service.catalog.now.snapshot.version == version


def test_health_metrics_docs_and_page(client):
  assert client.get("/healthz").json() == {"status": "ok"}
  assert client.get("/readyz").json() == {"ready": True}
  text = client.get("/metrics").text
  for name in ("gr4ad_requests_total", "gr4ad_cache_total", "gr4ad_beam_factor", "gr4ad_live_ads"):
    assert name in text
  assert 'path="/v1/ads/{ad_id:path}"' in text and "fresh/1" not in text  # routes, not addresses
  assert "/v1/recommend" in client.get("/openapi.json").json()["paths"]
  assert "Generated ads" in client.get("/").text


def test_large_bodies_are_refused(client):
  reply = client.post("/v1/recommend", content=b"[" * (SERVING.max_body_bytes + 1))
  assert reply.status_code == 413
  assert client.post("/v1/recommend", content=b"[" * 100_000).status_code in (400, 422)


def test_api_key(service):
  with_key = TestClient(build_app(service, api_key="secret"))
  assert with_key.get("/v1/about").status_code == 401
  assert with_key.get("/v1/about", headers={"x-api-key": "wrong"}).status_code == 401
  assert with_key.get("/healthz").status_code == 200
  # Nothing of a stranger's body is read, and the pages below /docs know that a key is needed.
  large = b"[" * (SERVING.max_body_bytes + 1)
  assert with_key.post("/v1/events", content=large).status_code == 401
  assert "X-API-Key" in str(with_key.get("/openapi.json").json()["components"]["securitySchemes"])
  for headers in ({"x-api-key": "secret"}, {"authorization": "Bearer secret"}):
    assert with_key.get("/v1/about", headers=headers).status_code == 200


def test_published_parameters_are_taken_over_while_requests_run(served_run, tmp_path):
  folder = tmp_path / "published"
  service = make(served_run, tmp_path / "b", config=ONE)
  template = jax.tree.map(np.asarray, service.parameters.template)
  publish(folder, 5, template, {})
  service.parameters.published = folder  # as --published
  with TestClient(build_app(service)) as client:
    stop, statuses = threading.Event(), []

    def requests():
      while not stop.is_set():
        statuses.append(client.post("/v1/recommend", json={"user_id": "u3", "k": 3}).status_code)

    thread = threading.Thread(target=requests)
    thread.start()
    publish(folder, 6, jax.tree.map(lambda x: 1.5 * x, template), {})
    deadline = time.monotonic() + 60
    while ask(client, user_id="u3", k=3)["step"] != 6 and time.monotonic() < deadline:
      time.sleep(0.1)
    assert client.post("/v1/reload").json() == {"step": 6, "changed": False}
    stop.set()
    thread.join()
  assert service.engine.step == 6 and set(statuses) == {200}


def test_ads_and_events_survive_a_restart(served_run, tmp_path):
  first = make(served_run, tmp_path, config=ONE)
  with TestClient(build_app(first)) as client:
    client.post("/v1/ads", json={"ads": [{"ad_id": "kept", "advertiser_id": "lasting"}]})
    client.delete("/v1/ads/ad3")
    client.post("/v1/events", json={"events": [{"user_id": "u1", "ad_id": "kept"}]})
  second = make(served_run, tmp_path, config=ONE)
  with TestClient(build_app(second)) as client:
    found = ask(client, user_id="u1", where=["advertiser_id=lasting"])["ads"]
    assert [ad["ad_id"] for ad in found] == ["kept"]
    assert not second.catalog.now.is_live("ad3")
    assert second.journal.last_seq == 1


def test_segments_hold_every_event_once_and_can_be_learned_from(service, tmp_path):
  journal, folder = Journal(tmp_path / "journal.sqlite"), tmp_path / "segments"
  ads = service.opened.logs.ads.ad_id
  events = [
    Event(f"u{i % 7}", 1_700_000_000 + i, str(ads[i % 9]), None, 2, None, 1.5, None,
          {"scene": "feed"})
    for i in range(40)
  ] + [Event("u1", 1_700_000_100, None, "c3", 1, None, 0.0, 2.0, {})]
  journal.add_events(events[:30])
  assert export_segment(journal, folder, feature_names=("scene",)) == 30
  assert export_segment(journal, folder) == 0
  journal.add_events(events[30:])
  assert export_segment(journal, folder, feature_names=("scene",)) == 11
  # A kill between the file and the note of it must not write the rows again.
  journal.set_position("exported", 30)
  assert exported(journal, folder) == 41 and export_segment(journal, folder) == 0
  frames = [pd.read_parquet(file) for file in segment_files(folder)]
  assert [len(frame) for frame in frames] == [30, 11]
  # Another journal in the same folder has numbers of its own.
  other = Journal(tmp_path / "other.sqlite")
  other.add_events(events[:5])
  assert export_segment(other, tmp_path / "both") == 5 and exported(other, folder) == 5
  other.close()
  logs = service.opened.logs
  before = len(logs.events.user)
  for file in segment_files(folder):
    appended = append_segment(logs, file)
    assert not appended.left_out
    logs = appended.logs
  assert len(logs.events.user) == before + 41
  assert logs.events.value[-1:].dtype == np.float32
  journal.close()


def test_views_are_no_history_and_end_no_cached_answer(client, service):
  first = ask(client, user_id="u11", k=3)
  ads = [{"user_id": "u11", "ad_id": ad["ad_id"], "action": "impression"} for ad in first["ads"]]
  assert client.post("/v1/events", json={"events": ads * 30}).json()["accepted"] == 90
  assert ask(client, user_id="u11", k=3)["cached"]
  client.post("/v1/events", json={"events": [ads[0] | {"action": "click"}]})
  assert not ask(client, user_id="u11", k=3)["cached"]
  assert len(service.journal.of_user("u11", 50)) == 1


def test_a_store_that_no_longer_fits_does_not_keep_the_server_down(served_run, tmp_path, capsys):
  journal = Journal(tmp_path / "store" / "journal.sqlite")
  good = {"ad_id": "good", "advertiser_id": "lasting", "category": "", "text": "a thing"}
  journal.put_ads({"bad": {"ad_id": "bad", "price": -1}, "good": good})
  journal.close()
  service = make(served_run, tmp_path, config=ONE)
  assert service.catalog.now.is_live("good") and not service.catalog.now.is_live("bad")
  assert "'bad' of the store is left out" in " ".join(capsys.readouterr().err.split())
  with pytest.raises(ConfigError, match="a server .* is at work here"):
    make(served_run, tmp_path, config=ONE)


def test_a_full_disk_is_503_and_nothing_has_changed(client, service, monkeypatch):
  def full(*args, **options):
    raise sqlite3.OperationalError("database or disk is full")

  version = service.catalog.now.snapshot.version
  monkeypatch.setattr(service.journal, "put_ads", full)
  monkeypatch.setattr(service.journal, "add_events", full)
  ad = {"ad_id": "unkept", "advertiser_id": "x"}
  assert client.post("/v1/ads", json={"ads": [ad]}).status_code == 503
  event = {"user_id": "u1", "ad_id": "ad1"}
  reply = client.post("/v1/events", json={"events": [event]})
  assert reply.status_code == 503 and reply.headers["retry-after"]
  assert service.catalog.now.snapshot.version == version
  assert not service.catalog.now.is_live("unkept")


def test_deep_and_long_mistakes_get_short_answers(client):
  for depth in (900, 960, 966, 970, 5_000):
    body = '{"user_id": ' + "[" * depth + "]" * depth + "}"
    reply = client.post("/v1/recommend", content=body, headers={"content-type": "application/json"})
    assert reply.status_code in (400, 422)
  reply = client.post("/v1/recommend", json={"history": [{"x": 1}] * 9_000})
  assert reply.status_code == 422 and len(reply.content) < 10_000


def test_a_segment_without_a_valid_row_is_an_empty_one(service, tmp_path):
  file = tmp_path / "quiet.parquet"
  pd.DataFrame({
    "user_id": ["u1"], "time": [1_800_000_000], "ad_id": ["unheard of"], "action": ["click"],
  }).to_parquet(file)
  appended = append_segment(service.opened.logs, file)
  assert not appended.new_R.any() and sum(appended.left_out.values()) == 1
  assert len(appended.logs.events.user) == len(service.opened.logs.events.user)


def test_many_askers_of_one_thing_compute_it_once(client, service):
  answered = service.metrics._batch._sum.get()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    replies = list(pool.map(lambda _: ask(client, user_id="u20", k=4), range(8)))
  assert len({tuple(ad["ad_id"] for ad in reply["ads"]) for reply in replies}) == 1
  assert sum(not reply["cached"] for reply in replies) == 1
  assert service.metrics._batch._sum.get() - answered == 1
