"""table3_serving, table4_beam_width and fig3_decoders without training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import fig3_decoders, table3_serving, table4_beam_width
from gr4ad_jax.catalog.legal_prefixes import build_prefix_tree
from gr4ad_jax.gr4ad.build import build_decoder, start_fn, step_fn
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.search.beam_search import compile_search
from tests.support import VOCABULARY, random_codes, random_context, shaken_params


@pytest.mark.parametrize("kind", ["lazy"])
def test_variants_without_caches_find_the_same(kind):
  """Decoding again without caches, and a copy of the context for each beam, change nothing."""
  config = ModelConfig(decoder=kind, width=16, num_heads=2, num_layers=2, num_lazy_layers=1,
                       copy_path=True)
  decoder = build_decoder(config, VOCABULARY)
  params = shaken_params(decoder)
  rng = np.random.default_rng(0)
  context = jax.tree.map(jnp.asarray, random_context(rng, 2))
  tree = build_prefix_tree(np.unique(random_codes(rng, 60), axis=0).astype(np.int32))
  start, step = start_fn(decoder), step_fn(decoder)
  tiled = table3_serving.tiled(step)
  variants = {
    "all": (start, step),
    "no_cache": table3_serving.replaying(start, step, 3),
    "no_sharing": (start, tiled),
    "none": table3_serving.replaying(start, tiled, 3),
  }
  found = {
    name: compile_search(*functions, tree, (5, 9, 12))(
      params, context, tree.arrays, np.arange(4, dtype=np.float32)
    )
    for name, functions in variants.items()
  }
  table3_serving.check_equal(found)
  for name, beams in found.items():
    np.testing.assert_array_equal(beams.sid_BW, found["all"].sid_BW, err_msg=name)
    np.testing.assert_allclose(
      beams.expected_value_BW, found["all"].expected_value_BW, atol=1e-4, err_msg=name
    )
  wrong = found["all"]._replace(logp_BW=found["all"].logp_BW - 1)
  with pytest.raises(ValueError, match="other SIDs"):
    table3_serving.check_equal(found | {"none": wrong})


def test_hits_of_the_result_cache_by_hand():
  """An answer lasts from when it was computed, not from its last use."""
  users, times = np.array([1, 1, 2, 1, 1]), np.array([0, 50, 55, 90, 130])
  assert table3_serving.hit_share(users, times, 60) == 2 / 5  # at 50 and, from 90, at 130
  assert table3_serving.hit_share(users, times, 0) == 0
  assert table3_serving.hit_share(users, times, 1000) == 3 / 5


def test_tables_and_plots_of_given_numbers():
  speed = {f"{name}/requests_per_s": 10.0 for name in table3_serving.VARIANTS}
  speed["none/requests_per_s"] = 2.5
  results = speed | {"selection_ms/pre_cut": 1.0, "selection_ms/global": 2.0}
  for name in table3_serving.PRECISIONS:
    for key in ("requests_per_s", "megabytes", "recall@50", "value_recall@50"):
      results[f"precision/{name}/{key}"] = 0.5
  results |= {f"cache/{name}/hit_share": 0.2 for name in table3_serving.TTL_S}
  page = table3_serving.table(results)
  assert "| without both | 2.50 | 4.00 |" in page and "x 1.25" in page
  assert table3_serving.plots(results)

  results = {}
  for name in table4_beam_width.SCHEDULES:
    results |= {f"{name}/requests_per_s": 20.0, f"{name}/recall@50": 0.4,
                f"{name}/value_recall@50": 0.3}
  results["512-512-512/requests_per_s"] = 10.0
  assert "| 128-256-512 | 20.0 | +100% |" in table4_beam_width.table(results)
  assert table4_beam_width.plots(results)


def test_fig3_trains_every_decoder_and_pairs_the_seeds(tmp_path, monkeypatch):
  trained = []

  def trained_metrics(folder, data, sids, config):
    trained.append((folder.name, config.model.decoder, config.model.num_lazy_layers))
    name, seed = folder.name.split("-")
    gain = {"ar": 0.0}.get(name, 0.01 * (1 + int(seed)))
    return dict.fromkeys(fig3_decoders.METRICS, 0.4 + 0.1 * int(seed) + gain)

  def speed(models, widths):
    assert widths == (64, 96, 128)
    return {f"{name}/requests_per_s": 10.0 for name in models}

  monkeypatch.setattr(fig3_decoders, "prepared_journey", lambda workdir: workdir)
  monkeypatch.setattr(fig3_decoders, "tokenized", lambda data, out, config: out)
  monkeypatch.setattr(fig3_decoders, "trained_metrics", trained_metrics)
  monkeypatch.setattr(fig3_decoders, "_speed", speed)
  results = fig3_decoders.run(tmp_path, size="cpu", overrides={})
  assert len(trained) == 12 and trained[0] == ("ar-0", "autoregressive", 2)
  assert ("lazy3-0", "lazy", 3) in trained and ("mtp-2", "multi_token", 2) in trained
  found = [results[f"lazy2/minus_ar/recall@50/{key}"] for key in ("mean", "ci_low", "ci_high")]
  half = 4.302653 * 0.01 / np.sqrt(3)
  np.testing.assert_allclose(found, [0.02, 0.02 - half, 0.02 + half], rtol=1e-5)
  assert "LazyAR, K = 3" in fig3_decoders.table(results) and fig3_decoders.plots(results)


def test_fig3_measures_speed(monkeypatch):
  monkeypatch.setattr(fig3_decoders, "SIZES", (8, 6, 4))
  monkeypatch.setattr(fig3_decoders, "NUM_SIDS", 50)
  monkeypatch.setattr(fig3_decoders, "CONTEXT_TOKENS", 12)
  model = ModelConfig(width=16, num_heads=2, num_layers=3, num_lazy_layers=2)
  models = {"a": model, "b": dataclasses.replace(model, decoder="multi_token")}
  speeds = fig3_decoders._speed(models, (3, 4, 5))
  assert set(speeds) == {"a/requests_per_s", "b/requests_per_s"} and min(speeds.values()) > 0
