"""`gr4ad bench decode` and experiments.bench_decoding at a tiny size."""

import functools
import json

import numpy as np
import pytest

from experiments import bench_decoding
from gr4ad_jax.cli import bench_decode
from gr4ad_jax.cli import main as cli
from gr4ad_jax.cli.bench_config import DecodeConfig
from gr4ad_jax.gr4ad.batch import random_context, random_vocabulary
from gr4ad_jax.gr4ad.config import Config, ModelConfig

TINY = ModelConfig(width=16, num_heads=2, num_layers=2, num_lazy_layers=1)


def test_measures_every_cell_of_the_grid():
  config = DecodeConfig(
    decoders=("lazy", "multi_token"), batch_sizes=(1, 2), widths=("2-3-4",),
    codebook_sizes=(8, 6, 4), num_sids=60, context_tokens=12, repeats=3,
  )
  result = bench_decode.run_bench(TINY, config)
  cells = {(row["decoder"], row["batch"], tuple(row["widths"])) for row in result["rows"]}
  assert len(cells) == len(result["rows"]) == 2 * 2
  for row in result["rows"]:
    assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
    assert row["requests_per_s"] == pytest.approx(row["batch"] / row["p50_ms"] * 1e3)
    assert row["flop_share"] > 0 and row["memory_mb"] > 0 and row["compile_s"] > 0
  json.dumps(result)


def test_programs_take_turns():
  called = []
  seconds = bench_decode.time_in_turns(
    {name: lambda name=name: called.append(name) for name in "ab"}, repeats=3
  )
  assert called == list("aabb" * 3)  # the first of each pair is not timed
  assert all(len(values) == 3 for values in seconds.values())


def test_context_is_full_and_as_long_as_asked():
  vocabulary = random_vocabulary((8, 6, 4))
  context = random_context(vocabulary, 2, 20)
  tokens = 1 + context.feature_BF.shape[1] + context.ad_count_BT.shape[1]
  assert tokens + context.organic_count_BO.shape[1] == 20
  assert all((x >= 0).all() for x in context.present().values())
  with pytest.raises(ValueError, match="context_tokens=4: must be at least 5"):
    random_context(vocabulary, 2, 4)


def test_command_writes_json_and_names_bad_widths(tmp_path, capsys):
  out = tmp_path / "bench.json"
  argv = ["bench", "decode", "--preset", "tiny", "--decoders", "lazy", "--batch-sizes", "1",
          "--codebook-sizes", "8", "6", "4", "--num-sids", "50", "--context-tokens", "12",
          "--repeats", "2"]  # fmt: skip
  cli.main([*argv, "--widths", "2-3-4", "--out", str(out)])
  row, = json.loads(out.read_text())["rows"]
  assert row["decoder"] == "lazy" and row["widths"] == [2, 3, 4]
  assert "lazy" in capsys.readouterr().out
  for widths, words in (("2-x", "write them as"), ("2-3", "one positive width for each of the 3")):
    with pytest.raises(SystemExit) as stop:
      cli.main([*argv, "--widths", widths])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_experiment_has_its_numbers_and_finds_no_invalid_sid(tmp_path, monkeypatch):
  small = functools.partial(
    DecodeConfig, widths=("2-3-4",), codebook_sizes=(8, 6, 4), num_sids=60, context_tokens=12
  )
  monkeypatch.setattr(bench_decoding, "DecodeConfig", small)
  monkeypatch.setattr(bench_decoding, "preset", lambda name: Config(TINY))
  overrides = {
    "settings.data": str(tmp_path), "settings.repeats": "2", "settings.generated": "9000",
    "settings.search_repeats": "2",
  }  # fmt: skip
  results = bench_decoding.run(tmp_path, size="cpu", overrides=overrides)
  names = "lazyar_over_ar/b1 lazyar_over_ar/b8 flop_share/b8 constrained_ms/b1_k10 "
  names += "constrained_ms/b1_k100 constrained_ms/b1_k512 constrained_ms/b16_k100"
  assert all(results[name] > 0 for name in names.split())
  assert results["generated_sids"] >= 9000
  assert results["invalid_sids"] == results["repeated_sids"] == 0
  assert "STATIC" in bench_decoding.table(results) and bench_decoding.plots(results)


def test_invalid_sids_are_counted(monkeypatch):
  """A search that returns SIDs outside the set is found out."""
  sids = np.unique(np.random.default_rng(0).integers(0, 256, (50, 4)), axis=0).astype(np.int32)
  broken = bench_decoding.compile_constrained

  def shifted(tree, beams):
    search = broken(tree, beams)
    return lambda *args: (lambda b: b._replace(code_BWL=b.code_BWL + 1))(search(*args))

  monkeypatch.setattr(bench_decoding, "compile_constrained", shifted)
  counts = bench_decoding.count_invalid(sids, 100)
  assert counts["invalid_sids"] > 0.9 * counts["generated_sids"]
