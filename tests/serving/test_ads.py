"""Ads at the HTTP border: which come, which are refused, what outlives a restart."""

import dataclasses
from urllib.parse import quote

from fastapi.testclient import TestClient

from gr4ad_jax.catalog import catalog
from gr4ad_jax.serving import ads as serving_ads
from gr4ad_jax.serving.journal import Journal
from gr4ad_jax.serving.server import build_app
from tests.serving.support import ONE, ask, make

FRESH = dataclasses.replace(ONE, cache_ttl_s=0)  # cached answers learn of new ads a minute later
ODD = ("sku[/0]", "[bold]", "a/b [link=x]", "[/]", "]][[", "sku\\[red]")


def put(client, *ads):
  fields = [{"advertiser_id": "newcomer", "text": "a thing"} | ad for ad in ads]
  return client.post("/v1/ads", json={"ads": fields})


def click(client, ad_id):
  return client.post("/v1/events", json={"events": [{"user_id": "u1", "ad_id": ad_id}]}).status_code


def found(client, advertiser="newcomer"):
  ads = ask(client, user_id="u1", k=100, where=[f"advertiser_id={advertiser}"])["ads"]
  return {ad["ad_id"] for ad in ads}


def test_similar_ads_come_in_any_number_and_a_batch_in_part(served_run, tmp_path, monkeypatch):
  """No SID is left: ads with known first codes share one, the others are refused by name."""
  monkeypatch.setattr(catalog, "MIN_SPARE_SIDS", 0)
  service = make(served_run, tmp_path, config=dataclasses.replace(FRESH, spare=0.0))
  sids = len(service.catalog.now.snapshot.index.sids_SL)
  with TestClient(build_app(service)) as client:
    replies = {text: put(client, {"ad_id": text, "text": text}) for text in (
      "food snack product", "zebra", "tax law", "quantum physics", "shoes", "guitar strings",
      "home care product", "mortgage", "holiday in Spain", "dog food", "car tyres", "opera",
    )}
    came = [text for text, reply in replies.items() if reply.status_code == 200]
    refused = [text for text, reply in replies.items() if reply.status_code == 503]
    assert len(came) >= 2 and refused and len(came) + len(refused) == len(replies)
    assert "serving.spare" in replies[refused[0]].json()["detail"]
    assert found(client) == set(came)

    version = service.catalog.now.snapshot.version
    texts = [came[0], refused[0], came[1]]
    reply = put(client, *({"ad_id": f"again {t}", "text": t} for t in texts)).json()
    assert set(reply["sids"]) == {f"again {came[0]}", f"again {came[1]}"}
    (left_out,) = reply["refused"]
    assert left_out["ad_id"] == f"again {refused[0]}" and "serving.spare" in left_out["reason"]
    assert service.catalog.now.snapshot.version == version + 1  # one write
    assert {ad for ad, _, _ in service.journal.ads()} == found(client)

    many = put(client, *({"ad_id": f"many {i}", "text": came[0]} for i in range(1_000)))
    assert len(many.json()["sids"]) == 1_000 and not many.json()["refused"]
    assert len(service.catalog.now.snapshot.index.sids_SL) == sids
    assert service.catalog.now.is_live("many 999")


def test_ads_of_any_name_come_go_and_come_back_over_restarts(served_run, tmp_path, capsys):
  first = make(served_run, tmp_path, config=FRESH)
  with TestClient(build_app(first)) as client:
    assert put(client, *({"ad_id": name, "text": name} for name in ODD)).status_code == 200
    assert put(client, {"ad_id": "ad3", "text": "other words"}).status_code == 200  # of the log
    for name in (*ODD, "ad3"):
      assert client.delete(f"/v1/ads/{quote(name, safe='')}").status_code == 200
    assert put(client, {"ad_id": ODD[0]}, {"ad_id": ODD[1]}).status_code == 200
    assert client.delete(f"/v1/ads/{quote(ODD[1], safe='')}").status_code == 200
  journal_ads = {ad: live for ad, _, live in _restarted_ads(tmp_path)}
  assert journal_ads == dict.fromkeys((*ODD, "ad3"), False) | {ODD[0]: True}

  # A misfit with such a name is told of as it is, and keeps nothing else out.
  _spoil(tmp_path, ODD[0])
  second = make(served_run, tmp_path, config=FRESH)
  assert f"ad {ODD[0]!r} of the store is left out" in " ".join(capsys.readouterr().err.split())
  with TestClient(build_app(second)) as client:
    assert not found(client)
    assert not second.catalog.now.is_live("ad3") and click(client, "ad3") == 200
    for name in ODD[1:]:  # late events of ads that went before the restart
      assert click(client, name) == 200, name
    assert click(client, "never there") == 422
    known = ask(client, user_id="nobody", history=[{"ad_id": ODD[1]}, {"ad_id": "never there"}])
    assert known["unknown_items"] == 1
    assert put(client, *({"ad_id": name} for name in ODD)).status_code == 200
    assert found(client) == set(ODD)


def _restarted_ads(tmp_path):
  journal = Journal(tmp_path / "store" / "journal.sqlite")
  rows = journal.ads()
  journal.close()
  return rows


def _spoil(tmp_path, ad_id):
  journal = Journal(tmp_path / "store" / "journal.sqlite")
  journal.put_ads({ad_id: {"ad_id": ad_id, "advertiser_id": "x", "category": "", "price": -1}})
  journal.close()


def test_a_start_does_not_grow_with_every_ad_that_ever_went(served_run, tmp_path, monkeypatch):
  journal = Journal(tmp_path / "store" / "journal.sqlite")
  for i in range(6):
    ad = {"ad_id": f"short lived {i}", "advertiser_id": "x", "category": "", "text": "a thing"}
    journal.put_ads({ad["ad_id"]: ad})
  for i in (0, 1, 2, 3, 5, 4):
    journal.remove_ad(f"short lived {i}")
  journal.remove_ad("ad7")  # of the log: it would come back if it were forgotten
  journal.close()
  monkeypatch.setattr(serving_ads, "MOST_DEPARTED", 2)
  service = make(served_run, tmp_path, config=FRESH)
  snapshot = service.catalog.now.snapshot
  known = [i for i in range(6) if snapshot.find(f"short lived {i}") >= 0]
  assert known == [4, 5] and not service.catalog.now.is_live("ad7")
  assert [ad for ad, _, _ in service.journal.ads()] == ["short lived 5", "short lived 4", "ad7"]
