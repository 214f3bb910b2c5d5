"""The public names: from two files to ranked ads, and cheap to import."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import gr4ad_jax as gr
from gr4ad_jax import api


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Forty days of thirty users, each faithful to one of three brands."""
  folder = tmp_path_factory.mktemp("files")
  rng = np.random.default_rng(0)
  ads = pd.DataFrame({
    "ad_id": [f"ad{i}" for i in range(24)],
    "advertiser_id": [f"brand{i % 3}" for i in range(24)],
    "category": "shop",
    "text": [f"item {i} of brand {i % 3}" for i in range(24)],
  })
  events = pd.DataFrame([
    (f"u{user}", 1_600_000_000 + 86400 * day + user, f"ad{user % 3 + 3 * rng.integers(8)}", 2.5)
    for user in range(30) for day in range(40)
  ], columns=["user_id", "time", "ad_id", "value"]).assign(action="conversion", ecpm=3500.0)
  ads.to_parquet(folder / "ads.parquet")
  events.to_parquet(folder / "events.parquet")
  return folder


def test_from_two_files_to_ranked_ads(files, tmp_path, capsys):
  counts = gr.prepare(
    gr.Parquet(ads=files / "ads.parquet", events=files / "events.parquet"), tmp_path / "data",
    num_trending=4,
  )
  assert counts["ads"] == 24
  health = gr.tokenize(tmp_path / "data", codebook_sizes=(8, 4, 8))
  assert health["num_ads"] == 24
  run = gr.train(tmp_path / "data", tmp_path / "run", preset="tiny", settings={
    "train.num_steps": 60, "train.eval_every": 30, "train.checkpoint_every": 30,
    "train.data_parallel": 1, "model.width": 32,
  })
  assert run.step in (30, 60)
  # A setting of earlier versions, which is no more, is said once and left out.
  there = json.loads((tmp_path / "run" / "run.json").read_text())
  there["config"]["search"]["new_ad_bonus"] = 1.0
  (tmp_path / "run" / "run.json").write_text(json.dumps(there))
  capsys.readouterr()
  again = gr.open_run(tmp_path / "run")
  said = capsys.readouterr().err
  assert said.count("new_ad_bonus") == 1
  assert "run.json: config.search.new_ad_bonus=1.0 is no setting any more" in said
  ads = gr.recommend(again, "u7", k=5)
  columns = ["ad_id", "advertiser_id", "text", "sid", "logp", "expected_value", "score", "new"]
  assert list(ads.columns) == columns
  assert ads.logp.is_monotonic_decreasing and len(ads) == 5
  assert again.value_of == "impression"
  np.testing.assert_allclose(ads.expected_value, 3.5, rtol=1e-5)  # currency, of one impression
  assert (ads.advertiser_id == "brand1").mean() >= 0.6  # the only brand that u7 ever buys
  only = gr.recommend(again, "u7", k=24, where=["advertiser_id=brand2"])
  assert set(only.advertiser_id) == {"brand2"} and len(only) == 8
  assert only.new.all() and not ads[ads.advertiser_id == "brand1"].new.all()
  # u7 buys eight of the twenty-four ads, again and again.
  unseen = gr.recommend(again, "u7", k=24, exclude_seen=True)
  bought = {*pd.read_parquet(files / "events.parquet").query("user_id == 'u7'").ad_id}
  assert {*unseen.ad_id} == {f"ad{i}" for i in range(24)} - bought and len(bought) == 8
  some = gr.recommend_many(again, ["u3", "u7"], k=24, exclude_seen=True)
  assert some[some.user_id == "u7"].ad_id.tolist() == unseen.ad_id.tolist()
  every = gr.recommend_many(again, k=5)
  assert every.groupby("user_id").size().to_dict() == {f"u{i}": 5 for i in range(30)}
  assert every[every.user_id == "u7"].ad_id.tolist() == ads.ad_id.tolist()
  assert gr.recommend_many(again, ["u7", "u3", "u7"], k=1).user_id.tolist() == ["u7", "u3"]
  with pytest.raises(ValueError, match="user 'nobody' and 1 more: not in"):
    gr.recommend_many(again, ["u7", "nobody", "none"])
  assert gr.export(again, tmp_path / "artifact") > 0
  with pytest.raises(ValueError, match=r"settings|setting 'train.steps'"):
    gr.train(tmp_path / "data", tmp_path / "run2", settings={"train.steps": 5})


def test_a_run_whose_settings_are_cut_is_named(tmp_path):
  (tmp_path / "run.json").write_text('{"data": "')
  with pytest.raises(ValueError, match="run.json: not JSON"):
    gr.open_run(tmp_path)


def test_the_package_is_imported_in_no_time():
  """Not even jax comes with it; every public name is there all the same."""
  code = (
    "import sys, gr4ad_jax as gr; assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
    "print(sorted(set(gr.__all__) - {n for n in gr.__all__ if getattr(gr, n, None) is not None}))"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"
  assert sorted(gr.__all__) == sorted(api.__all__)
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    _ = gr.nothing
