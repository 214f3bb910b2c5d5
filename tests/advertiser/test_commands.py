"""`gr4ad advertiser` as it is typed."""

import json

import pandas as pd
import pytest

from gr4ad_jax.cli.main import main
from tests.advertiser import support


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  folder = tmp_path_factory.mktemp("adv")
  support.write_home(folder)
  main(["advertiser", "prepare", "--data", f"{folder}/windows", "--out", f"{folder}/data"])
  return folder


def _fails(capsys, *words) -> str:
  with pytest.raises(SystemExit) as error:
    main(["advertiser", *map(str, words)])
  assert error.value.code == 2
  return capsys.readouterr().err


def test_from_windows_to_predictions(home, capsys):
  main(["advertiser", "evaluate", "--data", f"{home}/data", "--out", f"{home}/rivals.json"])
  shown = capsys.readouterr().out
  assert "30 rows, 6 advertisers" in shown and "R@5 - linear" in shown
  assert json.loads((home / "rivals.json").read_text())["linear/recall@20"] == 1
  main(["advertiser", "train", "--data", f"{home}/data", "--workdir", f"{home}/run",
        "--weights", f"{home}/tiny.gguf", "--tuning", "head", "--model.layer", "1",
        "--train.num-steps", "10", "--train.batch-size", "16", "--train.eval-every", "5"])
  about = json.loads((home / "run" / "run.json").read_text())
  # What is not named is the head's own, not that of adapters.
  assert about["config"]["train"]["learning_rate"] == 2e-3
  main(["advertiser", "evaluate", "--workdir", f"{home}/run", "--rows", "20"])
  shown = capsys.readouterr().out
  assert "20 rows" in shown and "\n  head " in shown
  assert "head/recall@1" in json.loads((home / "run" / "metrics.json").read_text())
  main(["advertiser", "grpo", "--workdir", f"{home}/run", "--out", f"{home}/grpo",
        "--train.num-steps", "4", "--train.batch-size", "16", "--grpo.group", "2"])
  assert "trained 4 steps" in capsys.readouterr().out
  main(["advertiser", "evaluate", "--workdir", f"{home}/grpo", "--rows", "20"])
  assert "\n  grpo " in capsys.readouterr().out
  out = home / "predictions.parquet"
  main(["advertiser", "predict", "--workdir", f"{home}/run", "--out", str(out), "--most", "2"])
  assert "30 users, 30 of them computed, 1 shards" in capsys.readouterr().out
  assert len(pd.read_parquet(out)) == 60  # any reader of Parquet reads the folder
  with pytest.raises(SystemExit):
    main(["evaluate", "--workdir", f"{home}/run"])
  assert "names advertisers, not ads; `gr4ad advertiser evaluate`" in capsys.readouterr().err


def test_bad_input_gets_one_line(home, capsys):
  data = home / "data"
  assert "holds prepared histories already" in _fails(
    capsys, "prepare", "--data", home / "windows", "--out", data
  )
  assert "--workdir or --data: one of them must be given" in _fails(capsys, "evaluate")
  assert "--rows=-1: must be at least 0" in _fails(capsys, "evaluate", "--data", data, "--rows", -1)
  assert "--combine: needs a model" in _fails(capsys, "evaluate", "--data", data, "--combine")
  assert "weights='nothing': must be smollm2, a .gguf file, or a folder" in _fails(
    capsys, "train", "--data", data, "--workdir", home / "x", "--weights", "nothing"
  )
  assert "layer=3: the model has 2 layers" in _fails(
    capsys, "train", "--data", data, "--workdir", home / "y", "--weights", home / "tiny.gguf",
    "--tuning", "head", "--model.layer", 3,
  )
  assert "no such file" in _fails(capsys, "evaluate", "--workdir", home / "nothing")
