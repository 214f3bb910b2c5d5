"""A run that was given thoughts, through every room: later stages, resumed, served, exported."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient

from gr4ad_jax import api
from gr4ad_jax.config import ConfigError, override_all
from gr4ad_jax.data.examples import read_split
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.gpr.config import PRESETS
from gr4ad_jax.gpr.run import RunFile, read_run, train_run
from gr4ad_jax.search.artifact import Artifact
from gr4ad_jax.search.generator import named_arrays
from gr4ad_jax.serving.config import ServingConfig
from gr4ad_jax.serving.server import build_app
from gr4ad_jax.serving.service import Service
from tests.commands import run

TINY = {
  "stream.groups": 12, "model.recursions": 1, "model.thinking": 0, "model.refining": 0,
  "model.predictions": 1, "train.num_steps": 4, "train.log_every": 1, "train.eval_every": 2,
  "train.eval_batches": 1, "train.checkpoint_every": 2, "train.data_parallel": 1,
  "search.widths": (8, 16, 16), "search.batch_size": 4,
}
DAY = 86_400


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  """Weekly thoughts of users u0 to u29, and of somebody whom the log does not have."""
  rows = [
    (f"u{user}", 1_500_000_000 + DAY * day, f"likes {('tea', 'soap', 'bread')[user % 3]} {day}")
    for user in range(30) for day in range(0, 71, 7)
  ] + [("nobody", 1_500_000_000, "likes nothing")]
  path = tmp_path_factory.mktemp("thoughts") / "thoughts.parquet"
  pd.DataFrame(rows, columns=["user_id", "timestamp", "text"]).to_parquet(path)
  return path


def words(**settings) -> list[str]:
  return [word for name, value in settings.items() for word in (
    f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, tuple) else [str(value)])
  )]


@pytest.fixture(scope="module")
def trained(tiny_data, file, tmp_path_factory):
  """From the command line; the file is gone afterwards."""
  folder = tmp_path_factory.mktemp("run") / "run"
  copy = shutil.copy(file, folder.parent / "thoughts.parquet")
  assert run("train", "--system", "gpr", "--preset", "gpr-tiny", "--data", tiny_data, "--workdir",
             folder, "--thoughts", copy, *words(**TINY)) == 0
  (folder.parent / "thoughts.parquet").unlink()
  return folder


@pytest.fixture(scope="module")
def opened(trained):
  return api.open_run(trained)


@pytest.fixture(scope="module")
def asked(opened):
  """(examples, thoughts) -> log p of the ads that the run's search finds, by id."""
  recommender, ids = opened.recommender(), opened.logs.ads.ad_id

  def of(examples, thoughts=opened.contexts.thoughts) -> list[dict[str, float]]:
    contexts = dataclasses.replace(opened.contexts, thoughts=thoughts)
    found = recommender(contexts.context(examples), 10)
    return [dict(zip(ids[ads].tolist(), logp.tolist(), strict=True))
            for ads, logp in zip(found.ad_RK, found.logp_RK, strict=True)]

  return of


def test_a_run_says_that_it_has_thoughts_and_keeps_them(trained, opened):
  there = json.loads((trained / "run.json").read_text())
  assert there["thoughts"].endswith("thoughts.parquet")
  assert there["config"]["stream"]["thoughts"] == 8
  assert len(opened.contexts.thoughts.user_N) == 30 * 11
  assert "told up to 8 thoughts" in opened.model
  about = json.loads((trained / "thoughts" / "thoughts.json").read_text())
  assert about == {"thoughts": 330, "size": 256}


def test_users_are_recommended_by_what_was_thought_of_them_before(opened, asked):
  """u3 has thoughts, u40 has none; later ones say nothing."""
  maker, thoughts = ExampleMaker(opened.logs, opened.examples.config), opened.contexts.thoughts
  examples = [maker.latest_context(user) for user in (3, 40)]
  late = thoughts._replace(time_s_N=np.full_like(thoughts.time_s_N, examples[0].time_s))
  told, untold = asked(examples), asked(examples, late)
  assert told[0] != untold[0] and told[1] == untold[1]


def test_servers_know_what_is_thought_of_users(opened, asked, tmp_path):
  config = ServingConfig(batch_sizes=(1,), beam_factors=(1.0,), segment_s=3600)
  service = Service(
    opened, config=config, store=tmp_path / "store", segments=tmp_path / "segments", clock="log"
  )
  now_s = int(opened.logs.events.time_s.max()) + 1
  maker = ExampleMaker(opened.logs, opened.examples.config)
  example = maker.past(3).request(
    now_s + 1, config=opened.examples.config, feature_F=maker.feature(3, None), user=3
  )
  with TestClient(build_app(service)) as client:
    replies = [
      client.post("/v1/recommend", json={"user_id": user, "k": 10, "time": now_s})
      for user in ("u3", "stranger")
    ]
  assert [reply.status_code for reply in replies] == [200, 200]
  found = {ad["ad_id"]: np.log(ad["probability"]) for ad in replies[0].json()["ads"]}
  assert found == pytest.approx(asked([example])[0], abs=1e-4)


def test_is_exported_with_what_is_thought_of_a_user(opened, asked, tmp_path):
  assert run("export", "--workdir", opened.folder, "--out", tmp_path / "artifact") == 0
  artifact = Artifact(tmp_path / "artifact")
  examples = [e for e in read_split(opened.examples, "test") if e.user < 30][:2]
  context = opened.contexts.context(examples)
  assert context.thoughts.end_BG[:, -1].tolist() == [8, 8]
  arrays = named_arrays(context)
  ads, scores = artifact.recommend(arrays, k=10)
  for row, expected in enumerate(asked(examples)):
    found = dict(zip(ads[row], scores[row], strict=True))
    assert found == pytest.approx(expected, abs=1e-4)
  arrays["thoughts/embedding_BXE"] = arrays["thoughts/embedding_BXE"] * np.nan
  with pytest.raises(ValueError, match="thoughts/embedding_BXE holds float32, needs finite"):
    artifact.recommend(arrays, k=10)


def run_of(data, **settings) -> RunFile:
  config = override_all(PRESETS["gpr-tiny"], TINY | settings)
  return RunFile(str(data), str(data / "sids"), config)


def test_a_later_stage_takes_the_thoughts_of_the_run_it_begins_with_and_resumes_to_the_same_bits(
  trained, tiny_data, tmp_path
):
  later = dataclasses.replace(run_of(tiny_data, stage="vaft"), start=str(trained))
  straight = train_run(later, tmp_path / "straight")
  there = read_run(tmp_path / "straight")
  assert there.config.stream.thoughts == 8 and there.thoughts == read_run(trained).thoughts
  shutil.copytree(tmp_path / "straight", tmp_path / "cut")
  shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
  resumed = train_run(later, tmp_path / "cut", resume=True)
  for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
    np.testing.assert_array_equal(a, b)
  with pytest.raises(ConfigError, match="goes without --start: a run has the thoughts of"):
    train_run(dataclasses.replace(later, thoughts="more.parquet"), tmp_path / "more")


def test_what_cannot_be_is_told_in_a_line(tiny_data, trained, file, tmp_path, capsys):
  for argv, message in (
    (["--stream.thoughts", "3"], "stream.thoughts=3: needs --thoughts, a file of them"),
    (["--system", "hstu", "--preset", "hstu-tiny", "--thoughts", file], "--system gpr takes them"),
    (["--thoughts", tmp_path / "none.parquet"], "none.parquet: not readable as parquet"),
  ):
    system = [] if "--system" in argv else ["--system", "gpr", "--preset", "gpr-tiny"]
    code = run("train", *system, "--data", tiny_data, "--workdir", tmp_path / "run", *argv)
    out, err = capsys.readouterr()
    assert code == 2 and message in " ".join((out + err).split()) and "Traceback" not in err
  lost = shutil.copytree(trained, tmp_path / "lost")
  shutil.rmtree(lost / "thoughts")
  with pytest.raises(ConfigError, match="the run's thoughts cannot be read"):
    api.open_run(lost)
