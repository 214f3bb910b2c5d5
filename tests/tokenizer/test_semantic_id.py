"""Semantic IDs of small hand-made logs: codes, contents, storage, health."""

import dataclasses
import importlib.util
import json

import numpy as np
import pandas as pd
import pytest

from gr4ad_jax.data.schema import LogError, build_logs
from gr4ad_jax.tokenizer import residual_kmeans, semantic_id
from gr4ad_jax.tokenizer.feature_hash import hash_codes
from gr4ad_jax.tokenizer.semantic_id import SemanticIds, TokenizerConfig, assign_semantic_ids

PAPER_COLUMNS = ("advertiser_id", "conversion_type")


def make_logs(num_ads=24, embedding=True, text=None):
  rng = np.random.default_rng(0)
  ads = pd.DataFrame({
    "ad_id": [f"ad{a}" for a in range(num_ads)],
    "advertiser_id": [f"brand{a % 3}" for a in range(num_ads)],
    "category": "Food > Snacks",
    "text": text or [f"snack of kind {a // 4}" for a in range(num_ads)],
    "price": rng.random(num_ads),
    "conversion_type": ["purchase" if a % 2 else "call" for a in range(num_ads)],
  })
  if embedding:
    ads["embedding"] = list(rng.standard_normal((num_ads, 6)).astype(np.float32))
  contents = pd.DataFrame({
    "content_id": ["same product", "article", "nameless"],
    "ad_id": ["ad5", None, None],
    "category": "",
    "text": ["", "snack of kind 0", ""],
  })
  events = pd.DataFrame({
    "user_id": ["u"], "time": [0], "ad_id": ["ad0"], "content_id": [None], "action": ["click"]
  })  # fmt: skip
  return build_logs(
    ads=ads, contents=contents, events=events, files={}, source="test", currency="USD"
  )


def small(**changes):
  fields = {"encoder": "given", "codebook_sizes": (6, 4, 32), "kmeans_iterations": 3, **changes}
  return TokenizerConfig(**fields)


def test_codes_are_residual_codes_then_the_hash():
  logs = make_logs()
  for columns in (PAPER_COLUMNS, ("ad_id",), ("category", "price", "ad_id")):
    sids = assign_semantic_ids(logs, small(hash_columns=columns, seed=5))
    assert sids.codes_AL.shape == (24, 3) and sids.codes_AL.dtype == np.int32
    assert [c.shape for c in sids.centroids] == [(6, 6), (4, 6)]
    unit_AD = logs.ads.embedding_AD / np.linalg.norm(logs.ads.embedding_AD, axis=1, keepdims=True)
    quantised_AL = residual_kmeans.encode(unit_AD, sids.centroids)
    np.testing.assert_array_equal(sids.codes_AL[:, :2], quantised_AL)
    hashed = hash_codes([getattr(logs.ads, name) for name in columns], size=32, seed=5)
    np.testing.assert_array_equal(sids.codes_AL[:, 2], hashed)


def test_without_hash_columns_every_level_is_quantised():
  sids = assign_semantic_ids(make_logs(), small(hash_columns=()))
  assert [len(c) for c in sids.centroids] == [6, 4, 32]
  assert sids.codes_AL.shape == (24, 3)


def test_contents_of_ads_share_codes_and_others_have_none_without_a_text_encoder():
  sids = assign_semantic_ids(make_logs(), small())
  np.testing.assert_array_equal(sids.content_codes_OL[0], sids.codes_AL[5])
  np.testing.assert_array_equal(sids.content_codes_OL[1:], -1)


@pytest.mark.skipif(importlib.util.find_spec("wordllama") is None, reason="needs wordllama")
def test_text_codes_follow_the_text():
  logs = make_logs(embedding=False)
  sids = assign_semantic_ids(logs, small(encoder="wordllama"))
  again = assign_semantic_ids(logs, small(encoder="wordllama"))
  np.testing.assert_array_equal(sids.codes_AL, again.codes_AL)
  for kind in range(6):
    of_kind_AL = sids.codes_AL[kind * 4 : kind * 4 + 4, :2]
    assert len(np.unique(of_kind_AL, axis=0)) == 1
  # The article has the text of ads 0 to 3, and the hash of its own id.
  np.testing.assert_array_equal(sids.content_codes_OL[1, :2], sids.codes_AL[0, :2])
  article_hash = hash_codes([np.array(["article"], object)], size=32)[0]
  assert sids.content_codes_OL[1, 2] == article_hash
  np.testing.assert_array_equal(sids.content_codes_OL[2], -1)


def test_sizes_follow_the_rule():
  assert semantic_id.default_sizes(24_500_000, PAPER_COLUMNS) == (16384, 4096, 1024)
  assert semantic_id.default_sizes(7516, PAPER_COLUMNS) == (256, 64, 16)
  assert semantic_id.default_sizes(7516, ("ad_id",)) == (256, 64, 256)
  assert semantic_id.default_sizes(1, PAPER_COLUMNS) == (4, 1, 16)
  sids = assign_semantic_ids(make_logs(), small(codebook_sizes=()))
  assert sids.codebook_sizes == semantic_id.default_sizes(24, ("ad_id",))


def test_round_trip_through_a_folder(tmp_path):
  config = small(hash_columns=PAPER_COLUMNS)
  sids = assign_semantic_ids(make_logs(), config)
  for _ in range(2):  # the second replaces the first
    semantic_id.save(sids, tmp_path / "sids")
  loaded = semantic_id.load(tmp_path / "sids")
  assert loaded.config == config and hash(loaded.config) == hash(config)
  assert loaded.codebook_sizes == sids.codebook_sizes
  for name in ("codes_AL", "content_codes_OL"):
    np.testing.assert_array_equal(getattr(loaded, name), getattr(sids, name))
  for table, saved in zip(loaded.centroids, sids.centroids, strict=True):
    np.testing.assert_array_equal(table, saved)
  assert [p.name for p in tmp_path.iterdir()] == ["sids"]  # nothing temporary stays behind
  with pytest.raises(ValueError, match=r"no codes\.npz"):
    semantic_id.load(tmp_path)


def test_health_by_hand():
  sids = SemanticIds(
    codes_AL=np.array([[0, 0], [0, 0], [0, 1], [1, 1]], np.int32),
    content_codes_OL=np.array([[0, 0], [-1, -1]], np.int32),
    codebook_sizes=(2, 4),
    centroids=(np.zeros((2, 3), np.float32),),
    config=TokenizerConfig(),
  )
  events, value = np.array([1, 2, 3, 4]), np.array([5.0, 0.0, 5.0, 10.0])
  result = semantic_id.health(sids, events_A=events, value_A=value)
  entropy = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
  expected = {
    "num_ads": 4, "num_sids": 3, "codebook_space": 8,
    "cpr": 4 / 3, "col": 1 / 3, "util": 3 / 8, "util_as_printed": 4 / 8,
    "sid_collision_rate": 2 / 4, "max_ads_per_sid": 2,
    "level1/used_share": 1, "level1/entropy_bits": entropy, "level1/perplexity": 2**entropy,
    "level2/used_share": 2 / 4, "level2/entropy_bits": 1, "level2/perplexity": 2,
    "content_coded_share": 1 / 2,
    "sid_collision_event_share": 3 / 10, "sid_collision_value_share": 5 / 20,
  }  # fmt: skip
  assert result == pytest.approx(expected)
  assert json.loads(json.dumps(result)) == result
  assert not any("share" in name for name in semantic_id.health(sids) if "event" in name)


def test_given_needs_an_embedding_of_finite_norm():
  with pytest.raises(LogError, match="column `embedding`"):
    assign_semantic_ids(make_logs(embedding=False), small())
  logs = make_logs()
  embedding_AD = logs.ads.embedding_AD.copy()
  embedding_AD[3] = 0
  bad = dataclasses.replace(logs, ads=dataclasses.replace(logs.ads, embedding_AD=embedding_AD))
  with pytest.raises(LogError, match=r"row 3 \(ad_id ad3\)"):
    assign_semantic_ids(bad, small())


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("encoder", "bert"),
    ("codebook_sizes", (16,)),
    ("codebook_sizes", (16, 0)),
    ("hash_columns", ("colour",)),
    ("seed", -1),
    ("kmeans_iterations", 0),
    ("balance_epsilon", -0.1),
  ],
)
def test_bad_configs_name_the_field(field, value):
  with pytest.raises(ValueError, match=field):
    TokenizerConfig(**{field: value})
