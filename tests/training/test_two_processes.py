"""Two real processes, joined by gloo, against one: the same losses, one folder of checkpoints."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from gr4ad_jax.api import open_run
from gr4ad_jax.cli.main import main
from gr4ad_jax.config import ConfigError
from gr4ad_jax.evaluation.evaluate import evaluate
from gr4ad_jax.gr4ad.run import load_params, open_inputs, read_run
from gr4ad_jax.machine import distributed
from gr4ad_jax.training.metric_log import read_log
from tests.commands import by_two_processes, train_arguments

BY_SEARCH = (
  "--train.best-by", "recall@50", "--train.rank-requests", "100", "--train.ema", "0.5"
)


@pytest.fixture(scope="module")
def alone(tiny_data, tmp_path_factory):
  """The same run by this one process."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  main(train_arguments(tiny_data, workdir, *BY_SEARCH))
  return workdir


def params_of(workdir: Path):
  """Read by this one process on other devices than it was trained on."""
  run = read_run(workdir)
  return load_params(run, workdir, open_inputs(run).vocabulary)[1]


def test_two_processes_train_as_one_and_resume(tiny_data, alone, tmp_path, capsys):
  workdir = tmp_path / "run"
  result = by_two_processes(*train_arguments(tiny_data, workdir, *BY_SEARCH))
  assert "trained 8 steps" in result.stdout and result.stdout.count("trained") == 1
  rows, expected = read_log(workdir), read_log(alone)
  assert [(r["step"], r["kind"]) for r in rows] == [(r["step"], r["kind"]) for r in expected]
  np.testing.assert_allclose(
    [r["loss"] for r in rows], [r["loss"] for r in expected], rtol=2e-5
  )
  # Each process searches for its share of the requests.
  for row, want in zip(rows, expected, strict=True):
    if row["kind"] == "validation":
      assert row["ndcg@50"] == pytest.approx(want["ndcg@50"], abs=0.02)
  for got, want in zip(
    jax.tree.leaves(params_of(workdir)), jax.tree.leaves(params_of(alone)), strict=True
  ):
    assert np.mean(np.abs(got - want) > 1e-3) < 0.01

  with pytest.raises(SystemExit, match="2"):
    main(train_arguments(tiny_data, workdir, *BY_SEARCH))
  assert "pass --resume" in capsys.readouterr().err
  main(train_arguments(tiny_data, workdir, *BY_SEARCH, "--resume"))
  assert "trained 8 steps" in capsys.readouterr().out


def test_two_processes_evaluate_as_one(alone, tmp_path):
  """Each searches its share of the requests; the first writes what one process would."""
  workdir = tmp_path / "run"
  shutil.copytree(alone, workdir)
  result = by_two_processes("evaluate", "--workdir", str(workdir))
  assert result.stdout.count("test split, written to") == 1
  metrics = json.loads((workdir / "metrics.json").read_text())
  samples = json.loads((workdir / "samples.json").read_text())
  expected = evaluate(open_run(workdir))  # writes over them
  assert metrics.keys() == expected.keys()
  for name in metrics.keys() - {"decode_requests_per_second"}:
    assert metrics[name] == pytest.approx(expected[name], abs=1e-12), name
  for got, want in zip(
    samples, json.loads((workdir / "samples.json").read_text()), strict=True
  ):
    assert [g["ad_id"] for g in got["generated"]] == [w["ad_id"] for w in want["generated"]]


def test_shares_cover_all_rows_in_whole_batches():
  assert distributed.share_of(10, 4) == range(0, 12)
  np.testing.assert_array_equal(distributed.gather(np.arange(12), 10), np.arange(10))


def test_a_wrong_variable_is_refused(monkeypatch):
  for value in ("yes", "host,2,0", "host:1,2,2", "host:1,2"):
    monkeypatch.setenv(distributed.VARIABLE, value)
    with pytest.raises(ConfigError, match="needs auto, or HOST:PORT,PROCESSES,NUMBER"):
      distributed.join()
