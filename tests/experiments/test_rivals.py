"""The table of rivals: from a data folder, and beside a run's own lists."""

import json

import numpy as np
import pytest

from experiments import rivals, run
from gr4ad_jax.catalog.prepared import open_logs
from gr4ad_jax.data.examples import read_split
from gr4ad_jax.machine import storage
from gr4ad_jax.search.held_out import group_requests
from gr4ad_jax.sequential import run as sequential
from gr4ad_jax.sequential.config import SasrecConfig, SasrecModel, TwoTowerConfig
from gr4ad_jax.training.config import TrainConfig


@pytest.fixture(scope="module")
def results(tiny_data, tmp_path_factory):
  folder = tmp_path_factory.mktemp("rivals")
  argv = ["rivals", "--set", f"settings.data={tiny_data}", "settings.bootstrap=20"]
  run.main([*argv, "--workdir", str(folder)])
  return folder, json.loads((folder / "results.json").read_text())


def test_rows_of_a_data_folder(results):
  folder, numbers = results
  for row in ("rule", "counter", "popularity", "cooccurrence", "own_history", "trending"):
    for metric in ("recall@50", "value_recall@50", "prospecting/recall@50"):
      low, high = (numbers[f"{row}/{metric}/{end}"] for end in ("ci_low", "ci_high"))
      assert low <= numbers[f"{row}/{metric}"] <= high
    assert 0 < numbers[f"{row}/ndcg@50"] <= 1
  assert not any(name.startswith(("ours/", "difference/", "baseline/")) for name in numbers)
  page = (folder / "results.md").read_text()
  assert "| rule of two terms | " in page and "Ours minus each" not in page


def test_beside_a_run_its_lists_are_compared_with_each_row(
  results, tiny_data, tmp_path, monkeypatch
):
  """A run that ranks as popularity does, but that its lists of prospecting are empty."""
  folder, before = results
  lists, prospecting = rivals.load_lists(folder / "lists.npz")

  class Opened:
    unscorable, held_out = "", ("validation", "test")
    data, without_sids = tiny_data, open_logs(tiny_data)
    examples = without_sids.examples
    contexts = search = recommender = staticmethod(lambda: None)

  class Found:
    class recommendations:
      ad_RK = lists["popularity"]

  monkeypatch.setattr(rivals, "open_run", lambda place: Opened)
  monkeypatch.setattr(rivals, "search_split", lambda *args: Found)
  monkeypatch.setattr(rivals, "prospecting_lists",
                      lambda *args: np.full_like(prospecting["rule"], -1))
  rivals.save_lists(rivals.Rivals(None, lists, None, prospecting), tmp_path / "lists.npz")
  overrides = {"settings.run": "somewhere", "settings.bootstrap": "20"}
  numbers = rivals.run(tmp_path, size="cpu", overrides=overrides)
  assert numbers["ours/recall@50"] == before["popularity/recall@50"]
  assert numbers["difference/popularity/recall@50"] == 0
  for row in ("rule", "counter", "own_history"):
    for metric in ("recall@50", "value_recall@50"):
      assert numbers[f"{row}/{metric}"] == before[f"{row}/{metric}"]
      ours, theirs = numbers[f"ours/{metric}"], numbers[f"{row}/{metric}"]
      assert numbers[f"difference/{row}/{metric}"] == pytest.approx(ours - theirs)
      assert f"difference/{row}/{metric}/ci_low" in numbers
    theirs = numbers[f"{row}/prospecting/recall@50"]
    assert numbers[f"difference/{row}/prospecting/recall@50"] == pytest.approx(-theirs)
  assert "| popularity | +0.000 (+0.000 to +0.000)" in rivals.table(numbers)
  assert rivals.plots(numbers).keys() == {"recall"}
  assert len(group_requests(read_split(Opened.examples, "test"))) == len(lists["rule"])


def test_trained_rivals_are_named_or_trained_here(tiny_data, tmp_path, monkeypatch, results):
  """Two towers that were trained before, a SASRec that is trained in the folder of results."""
  few = TrainConfig(num_steps=4, batch_size=16, eval_every=4, eval_batches=1, data_parallel=1)
  lists, prospecting = rivals.load_lists(results[0] / "lists.npz")
  known = rivals.Rivals(None, lists, None, prospecting)
  monkeypatch.setattr(rivals, "find_rivals", lambda *args, **how: known)
  place = storage.absolute(tiny_data)
  monkeypatch.setattr(rivals, "SasrecRun", lambda data: sequential.SasrecRun(
    data, SasrecConfig(SasrecModel(width=8, num_blocks=1, max_history=8), few)
  ))
  sequential.train_baseline(
    sequential.TwoTowerRun(place, TwoTowerConfig(train=few)), tmp_path / "towers"
  )
  numbers = rivals.run(tmp_path / "table", size="cpu", overrides={
    "settings.data": str(tiny_data), "settings.bootstrap": "20", "settings.train_rivals": "true",
    "settings.two_tower": str(tmp_path / "towers"),
  })
  assert (tmp_path / "table" / "sasrec" / "run.json").exists()
  assert not (tmp_path / "table" / "two_tower").exists()
  for row in ("sasrec", "two_tower"):
    assert 0 < numbers[f"{row}/recall@50"] <= 1 and numbers[f"{row}/prospecting/recall@50"] > 0
  page = rivals.table(numbers)
  assert "| SASRec | " in page and "| two towers | " in page


@pytest.mark.parametrize("overrides", [{}, {"settings.run": "a", "settings.data": "b"}])
def test_one_of_run_and_data(overrides, tmp_path):
  with pytest.raises(ValueError, match="give one of them"):
    rivals.run(tmp_path, size="cpu", overrides=overrides)
