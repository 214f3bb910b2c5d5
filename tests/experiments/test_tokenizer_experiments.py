"""bench_tokenizer, table2_tokenizer and uae_generator, each at a tiny size."""

import dataclasses
import json
import math

import numpy as np
import pytest

from experiments import _runs, bench_tokenizer, table2_tokenizer, uae_generator
from tests.support import catalogue, ring_pairs, tiny_encoder


def test_bench_tokenizer_measures_every_part(tmp_path, monkeypatch):
  small = {
    "NUM_ROWS": 600, "WIDTH": 16, "SIZES": (8, 8, 8), "REPEATS": 1, "LARGE_SIZES": (32, 16, 8),
    "LARGE_WIDTH": 8, "NEW_ADS": 10, "_in_own_process": lambda f, *args: f(*args),
  }  # fmt: skip
  for name, value in small.items():
    monkeypatch.setattr(bench_tokenizer, name, value)
  overrides = {"settings.data": str(tmp_path / "none"), "settings.max_rows": "4000"}
  results = bench_tokenizer.run(tmp_path, size="cpu", overrides=overrides)
  assert not any(key.startswith("real/") for key in results)  # no texts there
  assert results["synthetic/final_unique_share"] == 1
  assert 0 < results["synthetic/ours_unique_share"] <= 1
  assert results["synthetic/ours_relative_error"] < 1
  assert results["scale/4000/embedding_bytes"] == 4000 * 8 * 4
  assert results["index/ads"] == 4000 and results["index/add_1000_seconds"] > 0
  assert "ours" in bench_tokenizer.table(results)
  assert bench_tokenizer.plots(results)


def test_relative_error_is_the_share_of_spread_within_codes():
  embedding = np.array([[0.0], [2.0], [10.0], [12.0]], np.float32)
  one_level = np.array([[0], [0], [1], [1]])
  spread = 36 + 16 + 16 + 36
  assert bench_tokenizer._relative_error(embedding, one_level) == pytest.approx(4 / spread)
  assert bench_tokenizer._relative_error(embedding, np.arange(4)[:, None]) == 0


@pytest.fixture
def tiny_table2(monkeypatch):
  """A catalogue of 40 ads; the data sets are not read. Returns how often it was asked for."""
  asked = []

  def read(folder):
    asked.append(folder)
    label_A = np.arange(40) % 4
    return table2_tokenizer.Catalogue(catalogue(), ring_pairs(), label_A)

  monkeypatch.setattr(table2_tokenizer, "read_journey", read)
  monkeypatch.setattr(table2_tokenizer, "load_minilm", tiny_encoder)
  monkeypatch.setattr(table2_tokenizer, "GPR_SIZES", (4, 4, 4))
  monkeypatch.setattr(table2_tokenizer, "GPR_ROWS", {"kmeans": "RQ-Kmeans"})
  return asked


def test_table2_has_all_rows_and_goes_on(tmp_path, tiny_table2):
  overrides = {
    "settings.data": str(tmp_path / "none"), "settings.seeds": "2", "uae.attribute_steps": "3",
    "uae.cooccurrence_steps": "3", "uae.batch_size": "8", "uae.max_tokens": "32",
  }  # fmt: skip
  results = table2_tokenizer.run(tmp_path, size="cpu", overrides=overrides)
  rows = {tuple(key.split("/")[:3]) for key in results}
  expected = {("journey", "embedding", row) for row in table2_tokenizer.EMBEDDINGS}
  expected |= {("journey", "quantizer", row) for row in table2_tokenizer.QUANTIZERS}
  expected |= {("journey", "gpr", row) for row in table2_tokenizer.GPR_ROWS}
  assert rows == expected
  parts = [json.loads((tmp_path / "parts" / f"journey-{s}.json").read_text()) for s in (0, 1)]
  values = [part["embedding/it_cl/r@1"] for part in parts]
  assert results["journey/embedding/it_cl/r@1/mean"] == pytest.approx(np.mean(values))
  spread = abs(values[0] - values[1]) / math.sqrt(2)
  assert results["journey/embedding/it_cl/r@1/spread"] == pytest.approx(spread)
  page = table2_tokenizer.table(results)
  assert all(label in page for label in table2_tokenizer.QUANTIZERS.values())
  assert table2_tokenizer.plots(results)
  before = len(tiny_table2)
  again = table2_tokenizer.run(tmp_path, size="cpu", overrides=overrides)
  np.testing.assert_equal(again, results)
  assert len(tiny_table2) == before  # finished parts are read, not measured again


def test_label_of_an_unknown_brand_is_no_product(tmp_path):
  ads = catalogue(8)
  brand = ads.advertiser_id.copy()
  brand[:2] = table2_tokenizer.UNKNOWN_BRAND
  label_A = table2_tokenizer._labels(dataclasses.replace(ads, advertiser_id=brand))
  assert (label_A[:2] == -1).all() and (label_A[2:] >= 0).all()


def test_uae_generator_pairs_the_seeds(tmp_path, monkeypatch):
  made = []

  def tokenize(data, out, config):
    made.append(config.encoder)
    out.mkdir()
    metrics = {"sid_collision_rate": 0.1, "retrieval/embedding_r@1": 0.9, "level2/label_lift": 2.0}
    (out / "health.json").write_text(json.dumps({"metrics": metrics}))

  def trained_metrics(folder, data, sids, config):
    encoder, seed = folder.name.split("-")[0], config.train.seed
    gain = {"minilm": 0.0, "uae": (0.01, 0.02, 0.03)[seed]}[encoder]
    assert sids.name == f"sids_{encoder}" and config.train.num_steps == 500
    return dict.fromkeys(uae_generator.METRICS, 0.3 + 0.1 * seed + gain)

  monkeypatch.setattr(_runs.prepare, "prepare_logs", lambda source, config: None)
  monkeypatch.setattr(_runs, "tokenize", tokenize)
  monkeypatch.setattr(uae_generator, "trained_metrics", trained_metrics)
  results = uae_generator.run(tmp_path, size="cpu", overrides={})
  assert made == ["minilm", "uae"]
  found = [results[f"difference/recall@50/{key}"] for key in ("mean", "ci_low", "ci_high")]
  half = 4.302653 * 0.01 / math.sqrt(3)  # t quantile of two degrees of freedom
  np.testing.assert_allclose(found, [0.02, 0.02 - half, 0.02 + half], rtol=1e-5)
  assert "+0.0200" in uae_generator.table(results)
  assert uae_generator.plots(results)
