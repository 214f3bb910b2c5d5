"""Runs of a tiny model: training, resume, evaluation, the daily batch."""

import dataclasses
import shutil

import jax
import numpy as np
import pandas as pd
import pytest

from gr4ad_jax.advertiser.config import TUNINGS, LoraConfig, ModelConfig, PrepareConfig
from gr4ad_jax.advertiser.evaluate import dense, evaluate_model
from gr4ad_jax.advertiser.name_search import Told
from gr4ad_jax.advertiser.predict import predict
from gr4ad_jax.advertiser.prepared import open_advertisers, prepare
from gr4ad_jax.advertiser.run import RunFile, open_run, open_weights, train_run
from gr4ad_jax.advertiser.texts import Speller, batch_maker, pack
from gr4ad_jax.advertiser.tuning import name_task
from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine.sharding import build_mesh
from gr4ad_jax.training.metric_log import read_log
from gr4ad_jax.training.train_step import compile_programs
from tests.advertiser import support

SMALL = {"log_every": 4, "eval_every": 8, "eval_batches": 2, "checkpoint_every": 4,
         "data_parallel": 1}  # fmt: skip


def _config(tuning: str, **train):
  config = TUNINGS[tuning]
  return dataclasses.replace(
    config, model=ModelConfig(max_tokens=64, layer=1, components=16), lora=LoraConfig(rank=4),
    train=dataclasses.replace(config.train, **(SMALL | train)),
  )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  folder = tmp_path_factory.mktemp("adv")
  support.write_home(folder)
  prepare(folder / "windows", folder / "data", PrepareConfig())
  return folder


@pytest.fixture(scope="module")
def lora(home):
  run = RunFile(str(home / "data"), str(home / "tiny.gguf"),
                _config("lora", num_steps=16, batch_size=4, learning_rate=1e-2))
  state = train_run(run, home / "lora")
  return run, state


@pytest.fixture(scope="module")
def head(home):
  run = RunFile(str(home / "data"), str(home / "tiny.gguf"),
                _config("head", num_steps=100, batch_size=16, learning_rate=3e-2))
  return run, train_run(run, home / "head")


def test_adapters_learn_and_a_checkpoint_holds_nothing_else(lora, home):
  _, state = lora
  assert sorted(state.params["layers"]) == ["query", "value"] and len(state.params) == 1
  assert all(x.shape[0] == 2 and 4 in x.shape for x in jax.tree.leaves(state.params))
  log = [row["loss"] for row in read_log(home / "lora") if row["kind"] == "validation"]
  assert log[-1] < log[0]


@pytest.mark.parametrize("tuning", ["lora", "head"])
def test_a_killed_training_resumes_to_the_same_bits(tuning, home, lora, head, tmp_path):
  run, state = {"lora": lora, "head": head}[tuning]
  shutil.copytree(home / tuning, tmp_path / "cut")
  for step in (tmp_path / "cut" / "checkpoints").iterdir():
    if step.name.isdigit() and int(step.name) > run.config.train.num_steps // 2:
      shutil.rmtree(step)
  resumed = train_run(run, tmp_path / "cut", resume=True)
  assert jax.tree.all(jax.tree.map(np.array_equal, resumed.params, state.params))


def test_a_run_is_not_gone_on_with_by_other_settings(home, lora):
  other = dataclasses.replace(lora[0], config=_config("lora", num_steps=20, batch_size=4))
  with pytest.raises(ConfigError, match="the run there has other settings"):
    train_run(other, home / "lora", resume=True)


def test_a_step_is_the_same_on_any_mesh(home, lora):
  config, model = lora[0].config, support.tiny_model()
  rows = pack(Speller(open_advertisers(home / "data"), model, max_tokens=64).training(), 64)[:4]
  batch = batch_maker(rows, 64)(rows)
  losses = []
  for shape in ({"data_parallel": 1}, {"data_parallel": 2, "fsdp": 2}):
    programs = compile_programs(name_task(model, config), config.train, build_mesh(**shape))
    state = programs.init(jax.random.key(0))
    metrics = programs.loss(state.params, programs.to_devices(batch))
    losses.append(float(metrics["loss"][0]) / float(metrics["loss"][1]))
  assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("tuning", ["lora", "head"])
def test_a_run_is_evaluated_beside_all_rivals(tuning, home, lora, head):
  opened = open_run(home / tuning)
  numbers = evaluate_model(opened, "test", name=tuning, combine=True, bootstrap=20)
  told = opened.tell("test", range(30), 20)
  target = opened.data.splits["test"].target_R
  assert numbers[f"{tuning}/recall@1"] == np.mean(told.advertiser_RK[:, 0] == target)
  # Each tells all six names, whose probabilities add up to one.
  np.testing.assert_allclose(np.exp(told.logp_RK).sum(axis=1), 1, rtol=1e-4)
  assert numbers[f"{tuning}/recall@20"] == 1
  assert {f"{tuning}_minus_linear/recall@5", f"{tuning}_linear/recall@1", "noise_linear/recall@1",
          f"{tuning}_linear_minus_noise_linear/recall@5/ci_low"} <= numbers.keys()
  with pytest.raises(ConfigError, match="combine: is fitted on the validation split"):
    evaluate_model(opened, "validation", name=tuning, combine=True)


def test_a_head_finds_what_users_keep_to(home, head):
  numbers = evaluate_model(open_run(home / "head"), "test", name="head", bootstrap=20)
  # Each user keeps to two of six brands.
  assert numbers["head/recall@1"] > 0.35
  assert numbers["head/recall@5"] == 1


def test_some_rows_are_drawn_once_for_all(home):
  opened = open_weights(home / "data", str(home / "tiny.gguf"), _config("full"))
  numbers = evaluate_model(opened, "test", name="zero_shot", rows=10, bootstrap=20)
  assert numbers["rows"] == 10 and "zero_shot/recall@5" in numbers
  with pytest.raises(ConfigError, match="must be 'full' where nothing is tuned"):
    open_weights(home / "data", str(home / "tiny.gguf"), _config("lora"))


def test_names_that_are_not_told_have_the_least_probability_of_their_row():
  told = Told(np.array([[2, 0], [1, -1]]), np.array([[-1.0, -2.0], [0.0, -np.inf]]))
  assert dense(told, 3).tolist() == [[-2, -2, -1], [0, 0, 0]]


def _frame(folder) -> pd.DataFrame:
  return pd.concat([pd.read_parquet(file) for file in sorted(folder.glob("part-*.parquet"))])


def test_the_daily_batch_computes_what_is_not_known(home, head, tmp_path, capsys):
  out, opened = tmp_path / "predictions.parquet", open_run(home / "head")
  how = {"most": 3, "shard_users": 8}
  assert predict(opened, out, **how) == (30, 30, 4, 0)
  first = _frame(out)
  assert len(first) == 90 and first["rank"].tolist() == [1, 2, 3] * 30
  told = opened.tell("now", [5], 3)
  mine = first[first["user_id"] == opened.data.user_id_U[opened.data.splits["now"].user_R[5]]]
  assert mine["advertiser"].tolist() == opened.data.name_A[told.advertiser_RK[0]].tolist()
  np.testing.assert_allclose(mine["logp"], told.logp_RK[0], rtol=1e-4)
  # Nothing has changed; then a shard is gone, and one is damaged.
  assert predict(opened, out, **how) == (30, 0, 4, 4)
  (out / "part-00001.parquet").unlink()
  (out / "part-00003.parquet").write_bytes(b"PAR1 and nothing more")
  assert predict(opened, out, **how) == (30, 14, 4, 2)
  assert "part-00003.parquet: cannot be read" in capsys.readouterr().err
  pd.testing.assert_frame_equal(_frame(out), first)


def test_users_whose_history_is_as_it_was_keep_their_answer(home, head, tmp_path):
  out, opened = tmp_path / "predictions.parquet", open_run(home / "head")
  predict(opened, out, most=2, shard_users=8)
  now = opened.data.splits["now"]
  item_E = now.item_E.copy()
  item_E[now.history(9)] = item_E[now.history(9)][::-1]  # user 9 has another history now
  assert (item_E != now.item_E).any()
  splits = opened.data.splits | {"now": dataclasses.replace(now, item_E=item_E)}
  opened.data.splits.update(splits)
  assert predict(opened, out, most=2, shard_users=8) == (30, 1, 4, 3)


def test_a_file_in_the_place_of_predictions_is_refused(home, head, tmp_path):
  (tmp_path / "x.parquet").write_text("")
  with pytest.raises(ConfigError, match="is a file; predictions are a folder of shards"):
    predict(open_run(home / "head"), tmp_path / "x.parquet")
