"""HSTU and OneRec as systems of their own: trained, judged, asked, exported, served."""

import json

import numpy as np
import pytest
from fastapi.testclient import TestClient

from gr4ad_jax import api
from gr4ad_jax.cli.sweep_config import Sweep
from gr4ad_jax.config import ConfigError
from gr4ad_jax.gpr.config import PRESETS
from gr4ad_jax.gpr.run import RunFile, open_inputs, read_run
from gr4ad_jax.search.artifact import Artifact
from gr4ad_jax.serving.config import ServingConfig
from gr4ad_jax.serving.server import build_app
from gr4ad_jax.serving.service import Service
from gr4ad_jax.training.metric_log import read_log
from tests.commands import run

TINY = {
  "stream.groups": 8, "model.width": 16, "train.num_steps": 40, "train.log_every": 10,
  "train.eval_every": 20, "train.eval_batches": 2, "train.checkpoint_every": 20,
  "train.data_parallel": 1, "search.widths": "8 32 40",
}


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
  """Folders of both, from the command line."""
  folders = {}
  for system in ("hstu", "onerec"):
    folders[system] = tmp_path_factory.mktemp(system) / "run"
    options = [word for name, value in TINY.items()
               for word in (f"--{name.replace('_', '-')}", *str(value).split())]
    assert run("train", "--system", system, "--preset", f"{system}-tiny", "--data", tiny_data,
               "--workdir", folders[system], *options) == 0
  return folders


@pytest.mark.parametrize("system", ["hstu", "onerec"])
def test_it_learns_and_names_itself(trained, system):
  losses = [row["loss"] for row in read_log(trained[system]) if row["kind"] == "train"]
  assert losses[-1] < np.log(40) - 0.2  # what forty ads cost that are alike
  assert json.loads((trained[system] / "run.json").read_text())["system"] == system


def test_every_label_of_training_has_a_row_of_its_own_where_a_row_is_encoded_for_one(trained):
  """As many as the rows of HSTU have together, each the ad of its row's last request."""
  inputs = [open_inputs(read_run(trained[system]), trained[system]).rows("train")
            for system in ("hstu", "onerec")]
  labels = [sum(int((row["group_P"] >= 0).sum()) for row in rows) for rows in inputs]
  assert labels == [len(inputs[1])] * 2
  assert all(row["group_P"].tolist() == [len(row["time_s_G"]) - 1] for row in inputs[1])


def test_one_is_judged_beside_the_other_and_reported(trained, capsys):
  assert run("evaluate", "--workdir", trained["hstu"], "--baseline-run", trained["onerec"]) == 0
  printed = capsys.readouterr().out
  assert "HSTU" in printed and "OneRec" in printed
  metrics = json.loads((trained["hstu"] / "metrics.json").read_text())
  for prefix in ("", "baseline/onerec/"):
    assert metrics[f"{prefix}recall@10"] > 0.3  # ten of forty ads by chance: 0.25
  assert run("report", "--workdir", trained["hstu"]) == 0
  page = (trained["hstu"] / "report.html").read_text()
  assert "HSTU: 1 causal layers of SiLU attention over the latest 8 requests" in page


def test_it_is_asked_exported_and_served(trained, tmp_path):
  opened = api.open_run(trained["onerec"])
  assert opened.model.startswith("An encoder-decoder as OneRec's: 1 layers")
  ads = api.recommend(opened, "u7", k=5).ad_id.tolist()
  assert len(set(ads)) == 5
  assert run("export", "--workdir", opened.folder, "--out", tmp_path / "artifact") == 0
  artifact = Artifact(tmp_path / "artifact")
  assert len(artifact.recommend(artifact.sample(), k=5)[0][0]) == 5
  config = ServingConfig(batch_sizes=(1,), beam_factors=(1.0,), segment_s=3600)
  service = Service(
    opened, config=config, store=tmp_path / "store", segments=tmp_path / "segments", clock="log"
  )
  with TestClient(build_app(service)) as client:
    now_s = int(opened.logs.events.time_s.max()) + 1
    reply = client.post("/v1/recommend", json={"user_id": "u7", "k": 5, "time": now_s}).json()
  assert [ad["ad_id"] for ad in reply["ads"]] == ads


def test_a_baseline_with_a_part_of_gpr_is_refused(tiny_data, tmp_path, capsys):
  code = run("train", "--system", "hstu", "--preset", "hstu-tiny", "--data", tiny_data,
             "--workdir", tmp_path / "run", "--model.thinking", "2")
  words = "model.thinking=2: is 0 in hstu; --system gpr takes any"
  assert code == 2 and words in capsys.readouterr().err
  with pytest.raises(ConfigError, match="model.attention='hybrid': is bidirectional in onerec"):
    RunFile("data", "sids", PRESETS["gpr-tiny"], "onerec")


def test_plans_and_sweeps_know_the_baselines(tmp_path, capsys):
  assert run("plan", "--system", "hstu", "--preset", "hstu-tiny", "--devices", "h100-1") == 0
  assert "hstu-tiny on h100-1" in capsys.readouterr().out
  assert run("plan", "--system", "hstu", "--preset", "gpr-tiny", "--devices", "h100-1") == 2
  assert "preset='gpr-tiny': did you mean 'hstu-tiny'?" in capsys.readouterr().err
  sweep = Sweep(tmp_path, tmp_path, ("model.width=16,32",), preset="onerec-tiny")
  assert sweep.system == "onerec"
  assert sweep.config_of({"model.width": "16"}).model.attention == "bidirectional"
