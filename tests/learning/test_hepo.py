"""HEPO by the worked example of its reference, by hand and by invariance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.learning.hepo import (
  advantages,
  critic_losses,
  group_advantage,
  policy_losses,
  process_rewards,
  returns,
)

# L = 3, four candidates of R = 1.2, .4, .8, 0; the first one is worked out.
REWARD_BC = np.array([[1.2, 0.4, 0.8, 0.0]])
WHERE_BC = np.ones((1, 4), bool)
HOW = {"gamma": 0.99, "lam": 0.95, "eps": 0.0}


def of_first(x_L) -> np.ndarray:
  """The same numbers for all four."""
  return np.broadcast_to(np.array(x_L), (1, 4, len(x_L)))


def worked() -> dict[str, np.ndarray]:
  value_BCL = of_first([0.5, 0.6, 0.8])
  step_BCL = process_rewards(
    of_first([0.5, 0.1, 0.3]), of_first([0.2, 0.25, 0.1]), REWARD_BC, alpha=0.1
  )
  advantage_BCL = advantages(step_BCL, value_BCL, REWARD_BC, WHERE_BC, **HOW)
  return_BCL = returns(step_BCL, gamma=0.99)
  logp_BCL = np.log(of_first([1.3, 0.9, 1.0]))
  loss_BC = policy_losses(logp_BCL, 0 * logp_BCL, advantage_BCL, WHERE_BC, clip=0.2)
  critic_BC = critic_losses(value_BCL, return_BCL, WHERE_BC)
  return {
    "r": step_BCL[0, 0], "A": advantage_BCL[0, 0], "G": return_BCL[0, 0], "J": -loss_BC[0, 0],
    "critic": critic_BC[0, 0],
  }


def test_the_worked_example_to_six_digits():
  found = worked()
  np.testing.assert_allclose(found["r"], [0.03, 0, 1.2], atol=1e-6)
  np.testing.assert_allclose(found["A"], [0.304576, 0.192, 1.341641], atol=6e-7)
  np.testing.assert_allclose(found["G"], [1.20612, 1.188, 1.2], atol=6e-7)
  np.testing.assert_allclose(found["J"], 1.578671, atol=1e-6)
  np.testing.assert_allclose(found["critic"], 1.004349, atol=1e-6)


def test_the_loss_falls_where_a_good_candidate_gets_more_probable():
  """The gradient of the loss is -c_l A_l rho_l inside the clip, and 0 where the clip holds."""
  advantage_BCL = jnp.array([[[0.5, -2.0, 1.0]]])
  where_BC = jnp.ones((1, 1), bool)

  def loss(logp_BCL):
    return policy_losses(logp_BCL, jnp.zeros((1, 1, 3)), advantage_BCL, where_BC, clip=0.2).sum()

  slope_L = jax.grad(loss)(jnp.log(jnp.array([[[1.1, 1.5, 1.0]]])))[0, 0]
  np.testing.assert_allclose(slope_L, [-0.5 * 1.1 / 3, 2 * 1.5 * 2 / 3, -1.0], rtol=1e-5)
  # Far enough: better ones above 1 + eps_c, worse ones below 1 - eps_c get nothing any more.
  slope_L = jax.grad(loss)(jnp.log(jnp.array([[[1.3, 0.7, 1.3]]])))[0, 0]
  np.testing.assert_array_equal(slope_L, np.zeros(3))


@pytest.mark.parametrize("reward", [[3.0], [0.1, 0.1, 0.1], [1234.567] * 7])
def test_one_candidate_or_equal_rewards_give_no_advantage(reward):
  reward_BC = jnp.array([reward], jnp.float32)
  where_BC = jnp.ones(reward_BC.shape, bool)
  found = group_advantage(reward_BC, where_BC, eps=1e-6)
  np.testing.assert_array_equal(found, np.zeros_like(found))


def test_the_last_advantage_knows_neither_shift_nor_scale_of_rewards():
  reward_BC = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
  where_BC = np.ones((3, 6), bool)
  found = group_advantage(reward_BC, where_BC, eps=0.0)
  other = group_advantage(7 * reward_BC - 3, where_BC, eps=0.0)
  np.testing.assert_allclose(other, found, atol=1e-5)
  np.testing.assert_allclose(np.asarray(found).mean(axis=1), np.zeros(3), atol=1e-6)
  np.testing.assert_allclose(np.asarray(found).std(axis=1), np.ones(3), rtol=1e-5)


def test_values_returns_and_old_probabilities_take_no_gradient_from_the_policy():
  reward_BC = jnp.array([[1.0, 0.0]])
  where_BC = jnp.ones((1, 2), bool)

  def loss(value_BCL, old_BCL, step_BCL):
    advantage_BCL = advantages(step_BCL, value_BCL, reward_BC, where_BC, **HOW)
    return policy_losses(jnp.zeros((1, 2, 3)), old_BCL, advantage_BCL, where_BC, clip=0.2).sum()

  x_BCL = jnp.array(np.random.default_rng(1).random((1, 2, 3)))
  for slope in jax.grad(loss, argnums=(0, 1, 2))(x_BCL, x_BCL, x_BCL):
    np.testing.assert_array_equal(slope, np.zeros((1, 2, 3)))
  slope = jax.grad(lambda g: critic_losses(x_BCL, g, where_BC).sum())(x_BCL)
  np.testing.assert_array_equal(slope, np.zeros((1, 2, 3)))


def test_padding_costs_nothing_and_moves_no_other_candidate():
  """Whatever stands there."""
  rng = np.random.default_rng(2)
  logp_BCL, value_BCL, step_BCL = rng.normal(size=(3, 1, 4, 3)).astype(np.float32)
  reward_BC = np.array([[1.0, 3.0, 0.5, 9.0]], np.float32)
  where_BC = np.array([[True, True, True, False]])

  def total(logp_BCL, value_BCL, reward_BC, where_BC):
    advantage_BCL = advantages(step_BCL[:, : reward_BC.shape[1]], value_BCL, reward_BC, where_BC,
                               **HOW)
    return_BCL = returns(step_BCL[:, : reward_BC.shape[1]], gamma=0.99)
    policy_BC = policy_losses(logp_BCL, 0 * logp_BCL, advantage_BCL, where_BC, clip=0.2)
    return (policy_BC + critic_losses(value_BCL, return_BCL, where_BC)).sum()

  three = total(*(x[:, :3] for x in (logp_BCL, value_BCL, reward_BC, where_BC)))
  broken = [x.copy() for x in (logp_BCL, value_BCL, reward_BC)]
  for x in broken:
    x[:, 3] = np.nan
  found, slopes = jax.value_and_grad(total, argnums=(0, 1))(*broken, where_BC)
  np.testing.assert_allclose(found, three, rtol=1e-6)
  for slope in slopes:
    assert np.isfinite(slope).all() and not np.any(slope[:, 3])


def test_a_level_below_the_last_hears_of_the_reward_through_values_alone():
  value_BCL = of_first([0.5, 0.6, 0.8])
  found = []
  for reward_BC in (REWARD_BC, REWARD_BC[:, ::-1] * 5):
    step_BCL = process_rewards(value_BCL, 0 * value_BCL, reward_BC, alpha=0.1)
    found.append(advantages(step_BCL, value_BCL, reward_BC, WHERE_BC, **HOW))
  np.testing.assert_array_equal(found[0][..., :2], found[1][..., :2])
  assert np.abs(found[0][..., 2] - found[1][..., 2]).min() > 0
