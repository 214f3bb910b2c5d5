"""GRPO: rewards and log-probs by hand, groups by hand, lists of a head, runs of a tiny one."""

import dataclasses
import itertools
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.advertiser.config import (
  TUNINGS,
  GrpoConfig,
  GrpoSettings,
  ModelConfig,
  PrepareConfig,
)
from gr4ad_jax.advertiser.evaluate import evaluate_model
from gr4ad_jax.advertiser.grpo import (
  draw_lists,
  group_losses,
  group_metrics,
  head_grpo_task,
  list_log_probs,
  match_reward,
  names_of,
  rank_of,
)
from gr4ad_jax.advertiser.grpo_run import train_grpo
from gr4ad_jax.advertiser.head import HeadRow
from gr4ad_jax.advertiser.prepared import prepare
from gr4ad_jax.advertiser.run import GrpoRunFile, RunFile, open_run, read_run, train_run
from gr4ad_jax.config import ConfigError, to_json
from gr4ad_jax.training.metric_log import read_log
from tests.advertiser import support

of_lists = jax.jit(list_log_probs)


def test_rewards_of_a_list_are_those_of_the_paper():
  reward = match_reward(jnp.array([1, 2, 4, 5, 19, 20, 0]), 20)
  np.testing.assert_allclose(reward, [3.9, 3.8, 3.6, 1.5, 0.1, 0, 0], atol=1e-6)


def test_rewards_of_a_short_list_are_stretched_to_the_same_height():
  # Of five names: 0.4 (5 - i), and the bonus for the first alone.
  np.testing.assert_allclose(match_reward(jnp.arange(6), 5), [0, 3.6, 1.2, 0.8, 0.4, 0], atol=1e-6)
  np.testing.assert_allclose(match_reward(jnp.arange(2), 1), [0, 2.0], atol=1e-6)
  config = GrpoConfig()
  assert [names_of(config, num) for num in (2, 6, 59, 60, 1346)] == [1, 2, 19, 20, 20]


def test_a_label_that_is_not_listed_has_no_rank():
  name_BGK = jnp.array([[[4, 2, 7], [7, 4, 2]], [[1, 0, 3], [0, 1, 5]]])
  assert rank_of(jnp.array([2, 3]), name_BGK).tolist() == [[2, 3], [3, 0]]


def test_log_probs_of_lists_by_hand_and_over_all_lists():
  p_A = np.array([0.5, 0.3, 0.2])
  logp_BA = jnp.log(jnp.array([p_A]))
  # 0.3 of all, then 0.5 of the 0.7 that are left, then the only one.
  logp_BGK = of_lists(logp_BA, jnp.array([[[1, 0, 2], [2, 1, 0]]]))
  expected = np.log([[0.3, 0.5 / 0.7, 1], [0.2, 0.3 / 0.8, 1]])
  np.testing.assert_allclose(logp_BGK[0], expected, atol=1e-5)
  pairs = jnp.array([list(itertools.permutations(range(3), 2))])
  total = np.exp(of_lists(logp_BA + 7, pairs).sum(axis=-1)).sum()
  assert float(total) == pytest.approx(1, abs=1e-5)


def test_a_list_that_is_nearly_certain_has_finite_gradients():
  score_BA = jnp.array([[60.0, 0.0, -60.0, -60.0]])
  lists = jnp.array([[[0, 1], [3, 2]]])
  logp = of_lists(score_BA, lists)
  np.testing.assert_allclose(logp[0], [[0, 0], [-120, -120]], atol=1e-4)
  grad = jax.jit(jax.grad(lambda s: list_log_probs(s, lists).sum()))(score_BA)
  assert np.isfinite(grad).all()


def test_lists_are_drawn_as_often_as_they_are_probable():
  p_A = np.array([0.5, 0.3, 0.1, 0.1])
  config = GrpoConfig(group=4000, names=2)
  wide = jnp.concatenate([jnp.log(jnp.array([p_A])), jnp.full((1, 2), -1e9)], axis=1)
  name_BGK = np.asarray(jax.jit(draw_lists, static_argnums=2)(jax.random.key(0), wide, config))
  assert name_BGK.shape == (1, 4000, 2) and name_BGK.max() < 4
  first = np.bincount(name_BGK[0, :, 0], minlength=4) / 4000
  np.testing.assert_allclose(first, p_A, atol=0.03)
  assert (name_BGK[0, :, 0] != name_BGK[0, :, 1]).all()
  both = np.mean((name_BGK[0] == [1, 0]).all(axis=1))
  assert both == pytest.approx(0.3 * 0.5 / 0.7, abs=0.03)


def test_losses_of_a_group_by_hand():
  """Rewards 3 and 1: advantages 1 and -1. The second answer has one choice."""
  logp = jnp.log(jnp.array([[[0.5, 0.2], [0.4, 0.9]], [[0.5, 0.5], [0.5, 0.5]]]))
  ref = jnp.log(jnp.array([[[0.25, 0.2], [0.4, 0.1]], [[0.1, 0.1], [0.1, 0.1]]]))
  where = jnp.array([[[True, True], [True, False]], [[True, True], [True, True]]])
  reward = jnp.array([[3.0, 1.0], [2.0, 2.0]])

  @jax.jit
  def losses(logp):
    return group_losses(logp, ref, where, reward, kl_weight=0.1)

  found = losses(logp)
  kl = 0.5 + math.log(2) - 1  # q / p = 1/2 at one of two choices
  np.testing.assert_allclose(found.loss[0], [0.1 * kl / 2 - 1, 1], rtol=1e-4)
  # Equal rewards: nothing is learned, whatever the reference says.
  assert found.loss[1].tolist() == [0, 0] and found.where.tolist() == [[True, True], [False, False]]
  grad = np.asarray(jax.jit(jax.grad(lambda x: losses(x).loss.sum()))(logp))
  # d/dlogp: -A / T, and of the divergence kl_weight (1 - q / p) / T.
  np.testing.assert_allclose(grad[0], [[-0.5 + 0.1 * 0.5 / 2, -0.5], [1, 0]], rtol=1e-4)
  assert not grad[1].any()
  metrics = group_metrics(found, reward)
  assert [float(x) for x in metrics["equal_groups"]] == [1, 2]
  assert [float(x) for x in metrics["reward"]] == [8, 4] and float(metrics["loss"][1]) == 2


def test_validation_rewards_the_list_that_is_served():
  """Nine advertisers, lists of three: label second, first, absent."""
  params = {"kernel": jnp.zeros((2, 9)), "bias": jnp.arange(9.0), "own": jnp.zeros(2)}
  task = head_grpo_task(np.ones(9), 2, config=GrpoConfig(), supervised=params)
  batch = HeadRow(np.zeros((3, 2), np.float32), np.full((3, 4), -1, np.int32), np.array([7, 8, 0]))
  total, count = jax.jit(lambda p: task.loss(p, batch, None, p))(params)["loss"]
  # n = 3: 0.1 (3 - i) 20 / 3, and 2 for the first.
  assert float(total) == pytest.approx(-(2 / 3 + 4 / 3 + 2), rel=1e-5) and float(count) == 3


SMALL = {"log_every": 4, "eval_every": 8, "eval_batches": 2, "checkpoint_every": 4,
         "data_parallel": 1}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  folder = tmp_path_factory.mktemp("adv")
  support.write_home(folder)
  prepare(folder / "windows", folder / "data", PrepareConfig())
  config = TUNINGS["head"]
  config = dataclasses.replace(
    config, model=ModelConfig(max_tokens=64, layer=1, components=16),
    train=dataclasses.replace(config.train, **SMALL, num_steps=16, batch_size=16),
  )
  train_run(RunFile(str(folder / "data"), str(folder / "tiny.gguf"), config), folder / "head")
  return folder


def _settings(**train) -> GrpoSettings:
  start = GrpoSettings()
  train = SMALL | {"num_steps": 16, "batch_size": 16, "learning_rate": 0.05} | train
  return GrpoSettings(GrpoConfig(group=4), dataclasses.replace(start.train, **train))


@pytest.fixture(scope="module")
def grpo(home):
  return train_grpo(home / "head", home / "grpo", _settings())


def test_a_run_of_grpo_opens_like_any_other(home, grpo):
  run = read_run(home / "grpo")
  assert isinstance(run, GrpoRunFile) and run.start == str(home / "head")
  assert run.config.model == read_run(home / "head").config.model
  before, after = open_run(home / "head"), open_run(home / "grpo")
  assert before.version != after.version
  told = after.tell("test", range(30), 6)
  np.testing.assert_allclose(np.exp(told.logp_RK).sum(axis=1), 1, rtol=1e-4)
  assert not np.allclose(told.logp_RK, before.tell("test", range(30), 6).logp_RK)
  numbers = evaluate_model(after, "test", name="grpo", bootstrap=20)
  assert numbers["grpo/recall@20"] == 1  # of six advertisers
  # It reads no training history again.
  assert (home / "grpo/read/train.npz").read_bytes() == (home / "head/read/train.npz").read_bytes()


def test_readings_of_a_whole_split_are_kept_and_the_same(home, tmp_path):
  shutil.copytree(home / "head", tmp_path / "head")
  kept = tmp_path / "head" / "read" / "test.npz"
  kept.unlink(missing_ok=True)
  opened = open_run(tmp_path / "head")
  some = opened.tell("test", [3, 4], 6)
  assert not kept.exists()
  opened.tell("test", range(30), 6)
  assert kept.exists()
  again = opened.tell("test", [4, 3], 6)
  np.testing.assert_allclose(again.logp_RK[::-1], some.logp_RK, rtol=1e-5)


def test_a_killed_grpo_resumes_to_the_same_bits(home, grpo, tmp_path):
  shutil.copytree(home / "grpo", tmp_path / "cut")
  for step in (tmp_path / "cut" / "checkpoints").iterdir():
    if step.name.isdigit() and int(step.name) > 8:
      shutil.rmtree(step)
  resumed = train_grpo(home / "head", tmp_path / "cut", _settings(), resume=True)
  assert jax.tree.all(jax.tree.map(np.array_equal, resumed.params, grpo.params))


def test_grpo_earns_more_than_it_began_with(home, grpo):
  """The reward of lists that are drawn for training rows, before and after."""
  rewards = [row["reward"] for row in read_log(home / "grpo") if row["kind"] == "train"]
  assert rewards[-1] > rewards[0]


def test_grpo_begins_with_a_supervised_head(home, grpo, tmp_path):
  with pytest.raises(ConfigError, match="GRPO has made it; begin with the supervised run"):
    train_grpo(home / "grpo", tmp_path / "x", _settings())
  with pytest.raises(ConfigError, match="the run there has other settings"):
    train_grpo(home / "head", home / "grpo", _settings(num_steps=17), resume=True)
  with pytest.raises(ConfigError, match="the run there has other settings"):
    train_grpo(home / "head", home / "head", _settings(), resume=True)
  run = read_run(home / "head")
  with pytest.raises(ConfigError, match="`gr4ad advertiser grpo` goes on with the run"):
    train_run(run, home / "grpo", resume=True)
  (tmp_path / "lora").mkdir()
  (tmp_path / "lora" / "run.json").write_text(
    to_json(dataclasses.replace(run, config=TUNINGS["lora"]))
  )
  with pytest.raises(ConfigError, match="tuning='lora': GRPO tunes a head"):
    train_grpo(tmp_path / "lora", tmp_path / "x", _settings())
