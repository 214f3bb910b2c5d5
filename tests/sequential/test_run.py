"""Runs of trained baselines: trained, resumed, evaluated, and set beside each other."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

from gr4ad_jax import api
from gr4ad_jax.catalog.prepared import open_logs
from gr4ad_jax.cli.main import main
from gr4ad_jax.config import ConfigError, to_json
from gr4ad_jax.data.examples import read_split
from gr4ad_jax.machine import storage
from gr4ad_jax.search.held_out import eval_requests, group_requests
from gr4ad_jax.search.ranking import mean_metrics
from gr4ad_jax.sequential.config import SasrecConfig, SasrecModel
from gr4ad_jax.sequential.run import SasrecRun, open_baseline, train_baseline

TRAIN = ("--train.num-steps", "150", "--train.batch-size", "32", "--train.eval-every", "50",
         "--train.checkpoint-every", "50", "--train.learning-rate", "0.003",
         "--train.data-parallel", "1")


def run_of(data, **train) -> SasrecRun:
  config = SasrecConfig(SasrecModel(width=16, num_blocks=1, max_history=8, dropout=0.2))
  changes = {"num_steps": 12, "batch_size": 16, "eval_every": 4, "checkpoint_every": 4,
             "rank_requests": 8, "eval_batches": 1, "data_parallel": 1} | train
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
  return SasrecRun(storage.absolute(data), config)


@pytest.fixture(scope="module")
def runs(tiny_data, tmp_path_factory):
  """A SASRec and two towers, trained from the command line."""
  folder = tmp_path_factory.mktemp("baselines")
  for system, more in (("sasrec", ("--model.width", "32", "--model.dropout", "0")),
                       ("two_tower", ())):
    main(["train", "--system", system, "--data", str(tiny_data), "--workdir",
          str(folder / system), *TRAIN, *more])
  return folder


def test_they_learn_and_keep_the_best_step_by_ranking(runs, tiny_data):
  for system in ("sasrec", "two_tower"):
    rows = map(json.loads, (runs / system / "train_log.jsonl").read_text().splitlines())
    judged = {row["step"]: row for row in rows if row["kind"] == "validation"}
    assert max(row["ndcg@50"] for row in judged.values()) > 0.5
    data = open_logs(tiny_data)
    groups = group_requests(read_split(data.examples, "validation"))
    assert len(groups) <= 1024  # so that the sample of training is all of them
    ranked_RK = open_baseline(runs / system, data).rank([g[0] for g in groups], 50, None)
    found = mean_metrics(ranked_RK, eval_requests(groups), k=50)
    best = max(judged.values(), key=lambda row: row["ndcg@50"])
    assert found["ndcg@50"] == pytest.approx(best["ndcg@50"], abs=1e-6)


def test_evaluated_beside_simple_baselines_and_each_other(runs, capsys):
  workdir, other = str(runs / "sasrec"), str(runs / "two_tower")
  main(["evaluate", "--workdir", workdir, "--baseline-run", other])
  assert "SASREC" in (printed := capsys.readouterr().out) and "two towers" in printed
  metrics = json.loads((runs / "sasrec" / "metrics.json").read_text())
  for metric in ("recall@50", "prospecting/recall@50", "value_recall@50"):
    for row in ("two_tower", "rule", "popularity"):
      difference = metrics[metric] - metrics[f"baseline/{row}/{metric}"]
      assert metrics[f"difference/{row}/{metric}"] == pytest.approx(difference, abs=1e-9)
  # Users keep to two of the four categories, which popularity knows nothing of.
  assert metrics["ndcg@10"] > metrics["baseline/popularity/ndcg@10"] + 0.05
  system, turned = api.evaluate_run(runs / "two_tower", baseline_runs=[workdir])
  assert system == "two_tower"
  assert turned["ndcg@10"] == metrics["baseline/two_tower/ndcg@10"]
  assert turned["baseline/sasrec/prospecting/ndcg@10"] == metrics["prospecting/ndcg@10"]


def test_beside_a_run_that_searches(runs, tiny_data, tmp_path):
  settings = {"train.num_steps": 2, "search.widths": (8, 16, 32), "train.data_parallel": 1}
  opened = api.train(tiny_data, tmp_path / "run", preset="tiny", settings=settings)
  metrics = api.evaluate(opened, baseline_runs=[runs / "sasrec", runs / "two_tower"])
  alone = json.loads((runs / "sasrec" / "metrics.json").read_text())
  for metric in ("recall@10", "prospecting/ndcg@50"):
    assert metrics[f"baseline/sasrec/{metric}"] == pytest.approx(alone[metric])
  # And the other way round: the run that searches as a row.
  _, turned = api.evaluate_run(runs / "sasrec", baseline_runs=[tmp_path / "run"])
  for metric in ("recall@50", "prospecting/recall@50"):
    assert turned[f"baseline/gr4ad/{metric}"] == pytest.approx(metrics[metric])
  with pytest.raises(ConfigError, match="two baseline runs of sasrec"):
    api.evaluate(opened, baseline_runs=[runs / "sasrec", runs / "sasrec"])


def test_a_killed_training_resumes_to_the_same_bits(tiny_data, tmp_path):
  run = run_of(tiny_data)
  straight = train_baseline(run, tmp_path / "straight")
  shutil.copytree(tmp_path / "straight", tmp_path / "cut")
  for step in (tmp_path / "cut" / "checkpoints").iterdir():
    if step.name in ("8", "12"):
      shutil.rmtree(step)
  resumed = train_baseline(run, tmp_path / "cut", resume=True)
  for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
    np.testing.assert_array_equal(a, b)
  with pytest.raises(ConfigError, match="pass --resume"):
    train_baseline(run, tmp_path / "cut")
  with pytest.raises(ConfigError, match=re.escape("config.train.num_steps: 12 -> 13")):
    train_baseline(run_of(tiny_data, num_steps=13), tmp_path / "cut", resume=True)


def test_other_data_and_other_systems_are_refused(runs, tiny_data, tmp_path, capsys):
  other, begun = tmp_path / "data", tmp_path / "begun"
  begun.mkdir()
  run = dataclasses.replace(run_of(tiny_data), fingerprint=open_logs(tiny_data).fingerprint)
  (begun / "run.json").write_text(to_json(run))
  shutil.copytree(tiny_data, other)
  config = json.loads((other / "examples" / "examples.json").read_text())
  config["config"]["max_targets"] = 5
  (other / "examples" / "examples.json").write_text(json.dumps(config))
  with pytest.raises(ConfigError, match="was trained on other logs or examples than those in"):
    api.open_baseline(runs / "sasrec", open_logs(other), place=other)
  with pytest.raises(ConfigError, match="examples have changed since the model was trained"):
    train_baseline(run_of(other), begun, resume=True)
  with pytest.raises(ConfigError, match="no semantic IDs to search"):
    api.open_run(runs / "two_tower")
  with pytest.raises(SystemExit):
    main(["train", "--system", "two_tower", "--data", str(tiny_data), "--workdir",
          str(runs / "sasrec"), "--resume"])
  assert "holds a run of the system 'sasrec', not 'two_tower'" in capsys.readouterr().err


def test_validation_may_be_of_prospecting(tiny_data, tmp_path):
  """What is seen is left out of the lists that name the best checkpoint, new targets alone count.
  """
  run = run_of(tiny_data, rank_requests=1000)
  run = dataclasses.replace(run, config=dataclasses.replace(run.config, exclude_seen=True))
  train_baseline(run, tmp_path / "run")
  rows = map(json.loads, (tmp_path / "run" / "train_log.jsonl").read_text().splitlines())
  best = max((row for row in rows if row["kind"] == "validation"), key=lambda r: r["ndcg@50"])
  metrics = api.evaluate_run(tmp_path / "run", split="validation")[1]
  assert metrics["prospecting/ndcg@50"] == pytest.approx(best["ndcg@50"], abs=1e-6)


def test_meshes_agree(tiny_data, tmp_path):
  """Dropout off, as its bits are drawn by shape: one device, and rows over four, ads over two."""
  losses = {}
  for name, mesh in (("one", {}), ("eight", {"data_parallel": 4, "tensor": 2})):
    run = run_of(tiny_data, best_by="loss", **mesh)
    model = dataclasses.replace(run.config.model, dropout=0.0)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, model=model))
    train_baseline(run, tmp_path / name)
    rows = map(json.loads, (tmp_path / name / "train_log.jsonl").read_text().splitlines())
    losses[name] = [row["loss"] for row in rows]
  assert losses["eight"] == pytest.approx(losses["one"], rel=1e-5)


def test_a_refit_learns_from_validation_too_and_is_judged_on_test_alone(
  runs, tiny_data, tmp_path, capsys
):
  tuned, refit = str(runs / "two_tower"), str(tmp_path / "refit")
  main(["train", "--system", "two_tower", "--refit", tuned, "--workdir", refit])
  rows = map(json.loads, (tmp_path / "refit" / "train_log.jsonl").read_text().splitlines())
  log = list(rows)
  assert {row["kind"] for row in log} == {"train"}
  best = re.search(r"step (\d+) is its best", said := capsys.readouterr().err)
  counts = open_logs(tiny_data).examples.counts
  learned, added = (counts[split]["examples"] for split in ("train", "validation"))
  assert f"through the {learned + added} of training and validation" in said
  assert log[-1]["step"] == round(int(best[1]) * (1 + added / learned))
  beside = api.evaluate_run(runs / "sasrec", baseline_runs=[refit])[1]
  system, metrics = api.evaluate_run(tmp_path / "refit")
  assert system == "two_tower" and metrics["ndcg@50"] == beside["baseline/two_tower/ndcg@50"]
  for workdir, baseline_runs in ((refit, []), (runs / "sasrec", [refit])):
    with pytest.raises(ConfigError, match="the run of two_tower has learned from the validation"):
      api.evaluate_run(
        storage.place(str(workdir)), split="validation", baseline_runs=baseline_runs
      )
  for argv, words in (
    (["--refit", refit], "has learned from the validation requests"),
    (["--refit", tuned, "--train.num-steps", "3"], "settings are those of the tuned run"),
    (["--refit", str(runs / "sasrec")], "holds a run of the system 'sasrec'"),
    ([], "--data is missing"),
  ):
    with pytest.raises(SystemExit):
      main(["train", "--system", "two_tower", "--workdir", str(tmp_path / "no"), *argv])
    assert words in capsys.readouterr().err
