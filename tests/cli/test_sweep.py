"""Grids are read, finished runs kept, failures told; power laws are found again."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from experiments._scaling import fit_power_law, fitted
from gr4ad_jax.cli import main as cli
from gr4ad_jax.cli.sweep import run_sweep
from gr4ad_jax.cli.sweep_config import Range, Sweep, parse_grid
from gr4ad_jax.config import ConfigError, override_all, to_json
from gr4ad_jax.gpr import config as gpr
from gr4ad_jax.gpr.run import RunFile

TINY = {
  "model.width": "16", "model.num_heads": "2", "model.num_layers": "2",
  "model.num_lazy_layers": "1", "train.num_steps": "2", "train.batch_size": "8",
  "train.eval_batches": "1", "search.widths": "8,8,8", "train.data_parallel": "1",
}


def sweep_of(data, workdir, *grid, **more) -> Sweep:
  shared = tuple(f"{path}={value}" for path, value in TINY.items())
  return Sweep(data, workdir, grid, preset="tiny", set=shared, **more)


def test_grids_are_products_of_what_varies_together():
  grid = parse_grid(["model.width+model.num_heads=16+1,64+2", "train.seed=0,1",
                     "train.learning_rate=1e-4:1e-2:log", "model.num_layers=2:4",
                     "search.widths=8 8 8"])
  points = list(grid.points())
  assert len(points) == 4
  assert points[3] == {"model.width": "64", "model.num_heads": "2", "train.seed": "1",
                       "search.widths": "8,8,8"}
  assert grid.ranges == {"train.learning_rate": Range(1e-4, 1e-2, True),
                         "model.num_layers": Range(2, 4)}


@pytest.mark.parametrize("texts, words", [
  (["model.width"], "PATH=VALUE,VALUE"), (["a+b=1,2"], "needs 2 parts"), (["a=1", "a=2"], "twice"),
  (["a=2:1"], "LOW < HIGH"), (["a=0:1:log"], "LOW < HIGH"), (["a=x:y"], "LOW < HIGH"),
])  # fmt: skip
def test_grids_that_cannot_be_read_are_refused(texts, words):
  with pytest.raises(ConfigError, match=words):
    parse_grid(texts)


def test_mistakes_are_told_before_anything_runs(tmp_path):
  with pytest.raises(ConfigError, match="did you mean 'model.width'"):
    sweep_of(tmp_path, tmp_path / "s", "model.widht=8,16")
  with pytest.raises(ConfigError, match="--trials and a range"):
    sweep_of(tmp_path, tmp_path / "s", "train.learning_rate=1e-4:1e-2")


def test_a_sweep_goes_on_where_it_was_and_outlives_a_failure(tiny_data, tmp_path, capfd):
  """The second learning rate blows up; finished runs are not trained again."""
  workdir = tmp_path / "sweep"
  argv = ["sweep", "--data", str(tiny_data), "--workdir", str(workdir), "--preset", "tiny",
          "--set", *(f"{path}={value}" for path, value in TINY.items()), "--jobs", "2",
          "--grid", "train.learning_rate=1e-3,1e+30"]  # fmt: skip
  with pytest.raises(SystemExit) as stopped:
    cli.main(argv)
  assert stopped.value.code == 1
  output = capfd.readouterr()
  assert "exit code 1: " in output.err and "failed" in output.out
  good, bad = json.loads((workdir / "results.json").read_text())
  assert good["status"] == "finished" and 0 < good["loss"] < 30 and bad["status"] == "failed"
  log = workdir / "train.learning_rate=1e-3" / "output.log"
  before = log.read_bytes()
  again = sweep_of(tiny_data, workdir, "train.learning_rate=1e-3")
  (result,) = run_sweep(again)
  assert result.loss == good["loss"] and log.read_bytes() == before
  longer = (*again.set, "train.num_steps=3")
  with pytest.raises(ConfigError, match="other settings .*train.num_steps"):
    run_sweep(dataclasses.replace(again, set=longer))


def test_a_preset_says_which_system_is_trained(tiny_data, tmp_path):
  sweep = Sweep(tiny_data, tmp_path, ("model.width=16",), preset="gpr-tiny", launch="echo")
  assert [result.status for result in run_sweep(sweep)] == ["failed"]  # echo trains nothing
  folder = tmp_path / "model.width=16"
  assert " --system gpr --preset gpr-tiny " in (folder / "output.log").read_text()
  config = override_all(gpr.PRESETS["gpr-tiny"], {"model.width": "16"})
  places = str(tiny_data.resolve()), str(tiny_data.resolve() / "sids")
  (folder / "run.json").write_text(to_json(RunFile(*places, config, fingerprint="f")))
  run_sweep(sweep)
  with pytest.raises(ConfigError, match="other settings .*model.num_heads"):
    run_sweep(dataclasses.replace(sweep, set=("model.num_heads=1",)))
  with pytest.raises(ConfigError, match="holds a run of the system 'gpr', not 'gr4ad'"):
    run_sweep(sweep_of(tiny_data, tmp_path, "model.width=16"))
  with pytest.raises(ConfigError, match="loss.head_weights"):
    Sweep(tiny_data, tmp_path, ("loss.head_weight=equal",), preset="gpr-tiny")


def test_a_run_that_ended_early_is_finished_and_gives_its_best(tiny_data, tmp_path):
  sweep = sweep_of(tiny_data, tmp_path, "train.seed=7", launch="false")
  early = ("train.num_steps=9", "train.patience=1", "train.best_by=ndcg@50")
  sweep = dataclasses.replace(sweep, set=(*sweep.set, *early))
  folder = tmp_path / "train.seed=7"
  (folder / "checkpoints" / "6").mkdir(parents=True)
  rows = [{"step": step, "kind": "validation", "loss": 9 - step, "ndcg@50": ndcg}
          for step, ndcg in ((2, 0.25), (4, 0.5), (6, 0.375))]  # fmt: skip
  for count, status in ((2, "failed"), (3, "finished")):
    (folder / "train_log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:count]))
    (result,) = run_sweep(sweep)
    assert result.status == status
  assert (result.loss, result.best, result.values["ndcg@50"]) == (3, 0.5, 0.375)


def test_a_launch_stands_before_the_command(tiny_data, tmp_path):
  sweep = sweep_of(tiny_data, tmp_path / "s", "train.seed=4,5", launch="echo slice-{number} --")
  assert [result.status for result in run_sweep(sweep)] == ["failed"] * 2  # echo trains nothing
  words = (tmp_path / "s" / "train.seed=5" / "output.log").read_text()
  assert words.startswith("slice-1 -- gr4ad train --data") and "--train.seed 5" in words


def test_a_search_goes_on(tiny_data, tmp_path):
  """The runs are those of a stand-in for training, whose loss is its learning rate."""
  (trainer := tmp_path / "trainer.py").write_text(
    "import json, pathlib, sys\n"
    "value = lambda option: sys.argv[sys.argv.index(option) + 1]\n"
    "folder = pathlib.Path(value('--workdir'))\n"
    "(folder / 'checkpoints' / value('--train.num_steps')).mkdir(parents=True)\n"
    "row = {'step': int(value('--train.num_steps')), 'kind': 'validation',\n"
    "       'loss': float(value('--train.learning_rate'))}\n"
    "(folder / 'train_log.jsonl').write_text(json.dumps(row))\n"
  )
  search = {"launch": f"{sys.executable} {trainer}"}
  grid = ("train.learning_rate=1e-4:1e-2:log",)
  (first,) = run_sweep(sweep_of(tiny_data, tmp_path / "s", *grid, trials=1, **search))
  results = run_sweep(sweep_of(tiny_data, tmp_path / "s", *grid, trials=3, **search))
  assert results[0] == first and len(results) == 3
  rates = [float(result.settings["train.learning_rate"]) for result in results]
  assert len(set(rates)) == 3 and all(1e-4 <= rate <= 1e-2 for rate in rates)
  assert [result.best for result in results] == [result.loss for result in results] == rates


def test_a_power_law_is_found_again():
  sizes = np.array([3e4, 1e5, 5e5, 1e6, 3e6, 7e6])
  law = fit_power_law(sizes, 2.5 + 40 * sizes**-0.31)
  assert law.floor == pytest.approx(2.5, abs=1e-3)
  assert law.exponent == pytest.approx(0.31, abs=1e-3)
  found = fitted(sizes, 40 * sizes**-0.31)
  assert found["floor"] == pytest.approx(0, abs=0.02) and found["r2"] > 0.9999
  assert found["predicted_loss_error"] < 1e-3
  rng = np.random.default_rng(0)
  noise = fitted(sizes, rng.normal(3, 1, len(sizes)))
  assert noise["r2"] < 0.9
  with pytest.raises(ValueError, match="needs three"):
    fit_power_law(sizes[:2], sizes[:2])
