"""The command that runs experiments, on a small made-up one; and the table of demo_baselines."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

import experiments
from experiments import demo_baselines, run
from experiments._runs import Lists, training_minutes
from gr4ad_jax.catalog.prepared import open_logs
from gr4ad_jax.data.examples import read_split
from gr4ad_jax.evaluation.rivals import Rivals
from gr4ad_jax.search.held_out import eval_requests, group_requests

DOUBLED = '''"""Twice a number.

Run time: none.
"""

from matplotlib.figure import Figure


def run(workdir, *, size, overrides):
  (workdir / "log.txt").write_text(size)
  return {"x": 1.0, "twice/x": 2 * float(overrides.get("train.learning_rate", 1))}


def table(results):
  return f"| x | twice |\\n|---|---|\\n| {results['x']} | {results['twice/x']} |"


def plots(results):
  figure = Figure(figsize=(1, 1))
  figure.subplots().bar(list(results), list(results.values()))
  return {"bars": figure}
'''


@pytest.fixture
def doubled(tmp_path, monkeypatch):
  """An experiment `doubled`, in a folder beside the real ones."""
  (tmp_path / "more").mkdir()
  (tmp_path / "more" / "doubled.py").write_text(DOUBLED)
  monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(tmp_path / "more")])


def fails(capsys, *argv) -> list[str]:
  """Lines that a command with exit code 2 leaves on stderr."""
  with pytest.raises(SystemExit) as stop:
    run.main([str(arg) for arg in argv])
  assert stop.value.code == 2
  return capsys.readouterr().err.splitlines()


def test_writes_results_table_and_plots(tmp_path, doubled):
  out = tmp_path / "a" / "b"
  run.main(["doubled", "--size", "full", "--set", "train.learning_rate=3", "--workdir", str(out)])
  assert json.loads((out / "results.json").read_text()) == {"x": 1.0, "twice/x": 6.0}
  assert (out / "log.txt").read_text() == "full"
  page = (out / "results.md").read_text()
  assert "doubled --size full --set train.learning_rate=3" in page
  assert "| 1.0 | 6.0 |" in page and "![bars](bars.png)" in page
  assert imread(out / "bars.png").ndim == 3


def test_set_takes_several_and_repeats(tmp_path, doubled):
  argv = ["doubled", "--workdir", str(tmp_path / "a"), "--set", "a=1", "b=x=y", "--set", "c=2"]
  run.main(argv)
  written = json.loads((tmp_path / "a" / "experiment.json").read_text())
  assert written == {"name": "doubled", "size": "cpu", "overrides": ["a=1", "b=x=y", "c=2"]}


def test_a_folder_keeps_to_its_settings(tmp_path, doubled, capsys):
  argv = ["doubled", "--workdir", str(tmp_path / "a")]
  run.main(argv)
  run.main(argv)
  (line,) = fails(capsys, *argv, "--set", "train.learning_rate=3")
  assert str(tmp_path / "a") in line and "other settings" in line


def test_an_unknown_name_lists_the_experiments(tmp_path, doubled, capsys):
  first, *rest = fails(capsys, "demo_baseline", "--workdir", tmp_path / "a")
  assert first == "experiments.run: error: unknown experiment 'demo_baseline'"
  assert "  doubled: Twice a number." in rest
  assert f"  demo_baselines: {demo_baselines.__doc__.splitlines()[0]}" in rest
  assert not any(line.strip().startswith(("run:", "__init__:")) for line in rest)
  assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
  ("setting", "words"),
  [
    ("train.num_stepz=5", ["train.num_stepz", "did you mean 'train.num_steps'?"]),
    ("train.num_steps=many", ["num_steps='many'", "must be int"]),
    ("model.width=90", ["model.num_heads", "must divide model.width"]),
    ("train.num_steps", ["--set 'train.num_steps'", "must be path=value"]),
  ],
)
def test_a_bad_setting_is_one_line(tmp_path, capsys, setting, words):
  (line,) = fails(capsys, "demo_baselines", "--workdir", tmp_path / "a", "--set", setting)
  assert all(word in line for word in words)
  assert not (tmp_path / "a" / "experiment.json").exists()


def test_demo_baselines_averages_over_seeds_and_draws_users(tiny_data, tmp_path, monkeypatch):
  """Seed 0 finds every target at the top, seed 1 nothing; the rival finds nothing."""
  requests = eval_requests(group_requests(read_split(open_logs(tiny_data).examples, "test")))
  best_RK = np.full((len(requests.user_R), 50), -1, np.int32)
  best_RK[:, : requests.target_RC.shape[1]] = requests.target_RC
  nothing_RK = np.full_like(best_RK, -1)
  trained = []

  def found_lists(folder, split):
    assert split == "test"
    return Lists(*(2 * [best_RK if folder.name == "seed0" else nothing_RK]))

  def find_rivals(logs, examples, requests, *, k, with_likeness):
    assert with_likeness
    lists = {"popularity": nothing_RK[:, :k]}
    return Rivals(None, lists, None, lists)

  monkeypatch.setattr(demo_baselines, "prepared_journey", lambda workdir: tiny_data)
  monkeypatch.setattr(demo_baselines, "train_run", lambda run, *_, **__: trained.append(run.config))
  monkeypatch.setattr(demo_baselines, "read_log", lambda folder: [])
  monkeypatch.setattr(demo_baselines, "found_lists", found_lists)
  monkeypatch.setattr(demo_baselines, "find_rivals", find_rivals)
  results = demo_baselines.run(
    tmp_path, size="cpu",
    overrides={"settings.seeds": "2", "settings.bootstrap": "20", "model.width": "32"},
  )
  assert [config.train.seed for config in trained] == [0, 1]
  assert {(c.train.num_steps, c.model.width) for c in trained} == {
    (demo_baselines.STEPS["cpu"], 32)
  }
  assert results["recall@50"] == pytest.approx(0.5) and results["recall@50/seed0"] == 1
  # Whoever is drawn brings both seeds: no doubt about users is left.
  assert results["recall@50/ci_low"] == results["recall@50/ci_high"] == pytest.approx(0.5)
  assert results["difference/popularity/prospecting/recall@50"] == pytest.approx(0.5)
  assert results["prospecting/recall@50/seed1"] == 0
  assert results["num_requests"] == len(requests.user_R)


def test_training_minutes_by_hand():
  # 50 steps of 64 at 64 a second, then 100 at 32 a second: 50 s + 200 s.
  rows = [
    {"step": 1, "kind": "train"},
    {"step": 50, "kind": "train", "examples_per_second": 64.0},
    {"step": 50, "kind": "validation"},
    {"step": 150, "kind": "train", "examples_per_second": 32.0},
  ]
  assert training_minutes(rows, 64) == pytest.approx(250 / 60)


def results_of(ours: float) -> dict[str, float]:
  """Made-up metrics: ours, popularity .2, a fourth baseline `trending` .25; no new targets."""
  results = {"training_minutes": 1.5, "num_steps": 900, "num_requests": 80, "num_users": 20,
             "num_ads": 70, "recall@50/seed0": 0.31, "recall@50/seed1": 0.29}
  for prefix, value in (("", ours), ("baseline/popularity/", 0.2), ("baseline/trending/", 0.25)):
    for name in ("recall@50", "value_recall@50"):
      key = prefix + name
      results |= {key: value, f"{key}/ci_low": value - 0.01, f"{key}/ci_high": value + 0.01}
    results |= {f"{prefix}recall@10": value / 2, f"{prefix}ndcg@50": value / 4}
  return results


def test_demo_baselines_table():
  page = demo_baselines.table(results_of(0.3))
  assert "| GR4AD | 0.150 | 0.075 | 0.300 (0.290-0.310) | 0.300 (0.290-0.310) | - | - |" in page
  assert "| popularity | 0.100 | 0.050 | 0.200 (0.190-0.210) |" in page
  assert "| trending |" in page
  assert "clearly above every baseline" in page
  assert "900 steps, 1.5 minutes of training a seed. recall@50 of each seed: 0.3100, 0.2900" in page
  assert "above every baseline" not in demo_baselines.table(results_of(0.21))


def test_demo_baselines_plot_shows_every_list():
  figure = demo_baselines.plots(results_of(0.3))["recall"]
  left, right = figure.axes
  assert [label.get_text() for label in left.get_yticklabels()] == [
    "GR4AD", "popularity", "trending"
  ]
  for ax in (left, right):
    assert [line.get_xdata()[0] for line in ax.lines] == [0.3, 0.2, 0.25]
