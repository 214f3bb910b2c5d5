"""Table 2 of GPR: rows differ in what their names say, hits are counted by hand, all of it runs."""

import collections

import numpy as np
import pandas as pd
import pytest

from experiments import gpr_table2
from experiments._runs import split_groups
from experiments._thoughts import WEEK_S, kept_thoughts, sentence
from gr4ad_jax.catalog.prepared import open_logs
from gr4ad_jax.config import ConfigError, override_all
from gr4ad_jax.gpr.config import PRESETS
from gr4ad_jax.search.held_out import eval_requests
from gr4ad_jax.search.ranking import EvalRequests


def test_each_row_differs_from_hstu_in_what_its_name_says(tmp_path):
  options = gpr_table2.SIZES["full"]
  made = {
    name: gpr_table2.run_of_row(
      name, options, tmp_path, tmp_path, seed=0, thoughts=tmp_path / "thoughts.parquet"
    )
    for name in gpr_table2.ROWS
  }
  assert made.keys() == gpr_table2.PAPER.keys()
  assert {name: run.system for name, run in made.items() if run.system != "gpr"} == {
    "hstu": "hstu", "onerec": "onerec"
  }
  configs = {name: run.config for name, run in made.items()}
  assert configs["hstu"] == PRESETS["hstu-small"] and configs["gpr"] == PRESETS["gpr-small"]
  assert len({repr(config) for config in configs.values()}) == len(configs)
  told = {name for name, run in made.items() if run.thoughts}
  assert told == {"external_knowledge"} == {
    name for name, config in configs.items() if config.stream.thoughts
  }
  # As many labels a step at the most.
  onerec = configs["onerec"]
  assert onerec.train.batch_size * onerec.stream.labels == 16 * 16
  back = {"train.batch_size": 16, "model.attention": "hstu", "stream.labels": 16}
  assert override_all(onerec, back) == configs["hstu"]


def test_a_hit_is_counted_for_every_engaged_ad_by_hand():
  """Two requests; of the first one's two ads hstu finds one, the other row both, gpr none."""
  requests = EvalRequests(
    np.array([0, 1], np.int32), np.zeros(2, np.int64), np.array([[4, 2], [3, -1]], np.int32),
    np.ones((2, 2), np.float32), np.zeros((2, 2), bool),
  )
  lists = {
    "hstu": np.array([[[2, 1], [3, 1]], [[2, 1], [1, 0]]], np.int32),  # 2 of 3, then 1 of 3
    "mtp": np.array([[[4, 2], [3, 1]], [[4, 2], [1, 3]]], np.int32),  # all, twice
    "gpr": np.full((2, 2, 2), -1, np.int32),
  }
  results = gpr_table2.compared(lists, requests, advertiser_A=np.arange(5), bootstrap=20)
  assert results["hstu/hitr@100/seed0"] == pytest.approx(2 / 3)
  assert results["hstu/hitr@100"] == pytest.approx(1 / 2)
  assert results["mtp/hitr@100"] == 1 and results["gpr/hitr@100"] == 0
  assert results["difference/mtp/hitr@100"] == pytest.approx(1 / 2)
  assert results["difference/hstu/hitr@100/ci_high"] == 0
  assert results["hstu/hitr@100/ci_low"] <= 1 / 2 <= results["hstu/hitr@100/ci_high"]


def test_unknown_rows_are_told_with_what_there_is(tmp_path):
  with pytest.raises(ConfigError, match="'thinkin'.*thinking"):
    gpr_table2.run(tmp_path, size="cpu", overrides={"settings.rows": "thinkin"})


def test_rows_are_trained_for_every_seed_and_judged_beside_rules(tiny_data, tmp_path, monkeypatch):
  """HSTU finds nothing with seed 0 and all with seed 1; OneRec finds all."""
  requests = eval_requests(split_groups(open_logs(tiny_data).examples, "test", 12))
  best_RK = np.full((12, 100), -1, np.int32)
  best_RK[:, : requests.target_RC.shape[1]] = requests.target_RC
  trained = {}

  def train_run(run, folder, *, resume):
    assert resume and run.data == str(tiny_data)
    trained[folder.relative_to(tmp_path).as_posix()] = run

  def found_ads(folder, split, *, k, limit):
    assert (split, k, limit) == ("test", 100, 12) and len(trained) == 4
    return best_RK * 0 - 1 if folder == tmp_path / "hstu" / "seed0" else best_RK

  monkeypatch.setattr(
    gpr_table2, "_prepared", lambda workdir, options: (tiny_data, tiny_data / "sids")
  )
  monkeypatch.setattr(gpr_table2, "train_run", train_run)
  monkeypatch.setattr(gpr_table2, "found_ads", found_ads)
  monkeypatch.setattr(gpr_table2, "read_log", lambda folder: [
    {"step": 50, "examples_per_second": 5.0, "kind": "train"}
  ])
  results = gpr_table2.run(tmp_path, size="cpu", overrides={
    "settings.rows": "onerec", "settings.seeds": "2", "settings.requests": "12",
    "settings.bootstrap": "5", "train.batch_size": "2", "stream.labels": "3",
  })
  assert sorted(trained) == ["hstu/seed0", "hstu/seed1", "onerec/seed0", "onerec/seed1"]
  assert [run.config.train.seed for run in trained.values()] == [0, 1, 0, 1]
  assert results["hstu/hitr@100"] == 0.5 and results["onerec/hitr@100"] == 1
  assert results["difference/onerec/hitr@100"] == 0.5
  assert results["onerec/minutes"] == pytest.approx(50 * 6 / 5 / 60)
  assert results["rule/hitr@100"] == 1  # forty ads
  page = gpr_table2.table(results)
  assert "| HSTU | 0.5000 (0.5000 to 0.5000) | - | - | 18.98% |" in page
  assert "| OneRec | 1.0000 (1.0000 to 1.0000) | +0.5000 (+0.5000 to +0.5000) | +100.0% | " in page
  assert "2 seeds, 600 steps each, 12 test requests, 40 ads" in page
  assert gpr_table2.plots(results)


def test_what_is_met_most_is_named_first_and_equals_by_name():
  counts = {"ads": collections.Counter("bacbdeb"), "brands": collections.Counter()}
  assert sentence(counts.items()) == "Most of all ads: b, a, c"
  assert sentence([("brands", counts["brands"])]) == ""


def test_a_thought_holds_the_whole_past_strictly_before_its_time(tiny_data, tmp_path):
  """Counted anew from the log's events, for every week of two users."""
  file = kept_thoughts(tiny_data, tmp_path / "thoughts.parquet")
  found = pd.read_parquet(file)
  logs = open_logs(tiny_data).logs
  events, first_s = logs.events, int(logs.events.time_s.min())
  for user in (0, 33):
    mine = found[found.user_id == logs.users.user_id[user]].set_index("timestamp")
    expected, said = {}, ""
    for stop_s in range(first_s + WEEK_S, int(events.time_s.max()) + 1, WEEK_S):
      before = (events.user == user) & (events.time_s < stop_s)
      ads = events.ad[before & (events.ad >= 0)].tolist()
      contents = events.content[before & (events.content >= 0)].tolist()
      text = sentence((name, collections.Counter(w for w in words if w)) for name, words in (
        ("ads", [logs.ads.text[ad] for ad in ads]),
        ("kinds of ads", [logs.ads.category[ad] for ad in ads]),
        ("brands", [logs.ads.advertiser_id[ad] for ad in ads]),
        ("contents", [logs.contents.text[content] for content in contents]),
        ("kinds of contents", [logs.contents.category[content] for content in contents]),
      ))
      if text != said:
        expected[stop_s] = said = text
    assert mine.text.to_dict() == expected and len(expected) > 5
  written_at = file.stat().st_mtime_ns
  assert kept_thoughts(tiny_data, file).stat().st_mtime_ns == written_at
