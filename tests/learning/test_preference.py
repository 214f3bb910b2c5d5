"""Preference losses against hand calculations, the paper's identities, and the edges."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.gr4ad.unified import unified_weights
from gr4ad_jax.learning import preference
from gr4ad_jax.learning.preference import Lists, fit_reward_scale

rspo_loss = jax.jit(preference.rspo_loss)
LOSSES = {
  "rspo": lambda lp, lists: rspo_loss(lp, lists, beta=1.0, delta=1.0),
  "dpo": lambda lp, lists: preference.dpo_loss(
    lp, lists, jax.random.key(0), beta=1.0, delta=1.0
  ),
  "s_dpo": lambda lp, lists: preference.softmax_dpo_loss(lp, lists, beta=1.0, delta=1.0),
  "grpo": lambda lp, lists: preference.grpo_loss(lp, lists, delta=1.0),
}
LOSSES = {name: jax.jit(loss) for name, loss in LOSSES.items()}
GRADIENTS = {
  name: jax.jit(jax.value_and_grad(lambda lp, lists, loss=loss: loss(lp, lists).loss.sum()))
  for name, loss in LOSSES.items()
}


def lists_of(reward, ref=None, *, where=None, has_ref=None, levels=2) -> Lists:
  """One list, or several of one size; the reference is split evenly over the levels."""
  reward_BC = np.atleast_2d(np.asarray(reward, np.float32))
  ref_BC = np.zeros_like(reward_BC) if ref is None else np.atleast_2d(np.float32(ref))
  given = (ref is not None) if has_ref is None else has_ref
  has_ref_BC = np.broadcast_to(np.atleast_2d(given), reward_BC.shape)
  where_BC = np.broadcast_to(True if where is None else np.atleast_2d(where), reward_BC.shape)
  return Lists(reward_BC, np.repeat(ref_BC[..., None], levels, -1) / levels, has_ref_BC, where_BC)


def tokens(logp, levels=2) -> np.ndarray:
  logp_BC = np.atleast_2d(np.asarray(logp, np.float32))
  return np.repeat(logp_BC[..., None], levels, -1) / levels


def test_rspo_on_two_candidates_by_hand():
  # v = (1, 0): gains (1, 0), ideal DCG 1, G = (1, 0). Neighbours: 1/log2(2) - 1/log2(3).
  weight = 1 - 1 / np.log2(3)
  got = rspo_loss(tokens([-1.0, -0.5]), lists_of([1, 0]), beta=2.0, delta=1.0)
  np.testing.assert_allclose(got.loss, [[np.log2(1 + weight * np.exp(2 * 0.5)), 0]], rtol=1e-5)
  assert got.where.tolist() == [[True, False]]


def test_rspo_on_three_candidates_by_hand():
  # Ranks by the model: c0 third, c1 first, c2 second. v = (2, 1, 0), gains (3, 1, 0),
  # ideal DCG = 3 + 1/log2(3).
  lp = np.array([-3.0, -1.0, -2.0])
  ideal = 3 + 1 / np.log2(3)
  near, far = 1 - 1 / np.log2(3), 1 / np.log2(3) - 1 / np.log2(4)
  first = far * (3 - 1) / ideal * np.exp(-1 + 3) + near * 3 / ideal * np.exp(-2 + 3)
  second = near * 1 / ideal * np.exp(-2 + 1)
  got = rspo_loss(tokens(lp), lists_of([2, 1, 0]), beta=1.0, delta=1.0)
  np.testing.assert_allclose(
    got.loss, [[np.log2(1 + first), np.log2(1 + second), 0]], rtol=1e-5
  )


def test_a_close_reference_is_subtracted_and_a_far_or_missing_one_is_not():
  lp, near, far = [-1.0, -2.0], [-1.4, -2.2], [-4.0, -2.0]
  weight = 1 - 1 / np.log2(3)

  def loss(**kwargs):
    return float(rspo_loss(tokens(lp), lists_of([1, 0], **kwargs), beta=1.0, delta=1.0).loss[0, 0])

  assert loss(ref=near) == pytest.approx(np.log2(1 + weight * np.exp(0.2 - 0.4)), rel=1e-5)
  plain = pytest.approx(np.log2(1 + weight * np.exp(-1.0)), rel=1e-5)
  assert loss(ref=far) == plain  # mean |log ratio| 1.5
  assert loss(ref=[2.0, -2.0]) == plain  # as far, and less probable than it was: -3 and 0
  assert loss(ref=near, has_ref=[True, False]) == plain
  assert loss() == plain


def test_a_reference_that_counts_decides_over_ranks_and_scores_by_hand():
  # Log-ratios (-.6, .8, 0): all gates are open. By them c1 is first, c2 second, c0 third; by p
  # alone it would be c0, c1, c2. Gains (3, 1, 0).
  lp, ratio = np.array([-1.0, -2.0, -3.0]), np.array([-0.6, 0.8, 0.0])
  ideal = 3 + 1 / np.log2(3)
  near, far = 1 - 1 / np.log2(3), 1 / np.log2(3) - 1 / np.log2(4)
  first = far * (3 - 1) / ideal * np.exp(0.8 + 0.6) + near * 3 / ideal * np.exp(0 + 0.6)
  second = near * 1 / ideal * np.exp(0 - 0.8)
  got = rspo_loss(tokens(lp), lists_of([2, 1, 0], ref=lp - ratio), beta=1.0, delta=1.0)
  np.testing.assert_allclose(
    got.loss, [[np.log2(1 + first), np.log2(1 + second), 0]], rtol=1e-5
  )


def test_an_anchor_sees_ranks_and_scores_by_its_own_gate_alone():
  # Log-ratios (.1, .6, -9): the set of c0 has moved by .35, that of c2 by 3.2. So c0 compares
  # ratios, and c2 compares p, by which the order is c0, c1, c2, although those two are close.
  lp, ratio = np.array([-1.0, -2.0, -3.5]), np.array([0.1, 0.6, -9.0])
  ideal = 3 + 1 / np.log2(3)  # v = (1, 0, 2), gains (1, 0, 3)
  near, far = 1 - 1 / np.log2(3), 1 / np.log2(3) - 1 / np.log2(4)
  first = near * 1 / ideal * np.exp(0.6 - 0.1)
  third = far * (3 - 1) / ideal * np.exp(-1 + 3.5) + near * 3 / ideal * np.exp(-2 + 3.5)
  got = rspo_loss(tokens(lp), lists_of([1, 0, 2], ref=lp - ratio), beta=1.0, delta=1.0)
  np.testing.assert_allclose(got.loss, [[np.log2(1 + first), 0, np.log2(1 + third)]], rtol=1e-5)


def test_each_anchor_has_a_gate_of_its_own():
  # Moved by (0.1, 0.1, 5): the anchor of rank 1 meets the one that moved far, rank 2 does not.
  lp = np.float32([[-1, -2, -3]])
  lists = lists_of([1, 0, 2], ref=lp - [[0.1, 0.1, 5]])
  worse = np.array([[[0, 1, 0], [0, 0, 0], [1, 1, 0]]], bool)
  gate = preference.reference_gate(lp, lists, worse, delta=1.0)
  assert gate.tolist() == [[True, True, False]]


def test_two_candidates_relate_to_dpo():
  lp, lists = tokens([-1.0, -0.3]), lists_of([1, 0], ref=[-1.2, -0.9])
  dpo, softmax = LOSSES["dpo"](lp, lists).loss[0], LOSSES["s_dpo"](lp, lists).loss[0]
  margin = (-1.0 + 1.2) - (-0.3 + 0.9)
  assert float(dpo) == pytest.approx(np.log1p(np.exp(-margin)), rel=1e-5)
  assert float(softmax) == pytest.approx(float(dpo), rel=1e-5)


def test_softmax_dpo_by_hand_on_three():
  got = LOSSES["s_dpo"](tokens([-1.0, -2.0, -0.5]), lists_of([5, 1, 0])).loss
  inner = np.exp(-2 + 1) + np.exp(-0.5 + 1)
  assert float(got[0]) == pytest.approx(np.log1p(inner), rel=1e-5)


def test_of_equally_good_candidates_the_one_that_the_model_likes_least_wins():
  # c0 and c1 are best, c1 less probable: its lead over c2 is -3 + 2.
  lp, lists = tokens([-1.0, -3.0, -2.0]), lists_of([2, 2, 0])
  for name in ("s_dpo", "dpo"):
    assert float(LOSSES[name](lp, lists).loss[0]) == pytest.approx(np.log1p(np.exp(1)), rel=1e-5)


def test_the_gate_of_the_best_candidate_counts_for_all_it_is_compared_with():
  # The winner has moved by 3, its set by 1.5: no reference counts, not even the loser's close one.
  lp, lists = tokens([-1.0, -2.0]), lists_of([1, 0], ref=[-4.0, -2.0])
  for name in ("s_dpo", "dpo"):
    assert float(LOSSES[name](lp, lists).loss[0]) == pytest.approx(np.log1p(np.exp(-1)), rel=1e-5)


def test_dpo_is_the_mean_over_the_losers_drawn():
  lp, lists = tokens([-1.0, -2.0, -3.0, -4.0]), lists_of([3, 2, 1, 0])
  expected = np.log1p(np.exp(-np.array([1.0, 2.0, 3.0]))).mean()
  assert float(LOSSES["dpo"](lp, lists).loss[0]) == pytest.approx(expected, rel=1e-5)


def test_dpo_draws_the_losers_it_was_asked_for():
  lp, lists = tokens([-1.0, -2.0, -3.0, -4.0]), lists_of([3, 2, 1, 0])
  margins = np.array([1.0, 2.0, 3.0])
  single = {
    round(float(preference.dpo_loss(lp, lists, jax.random.key(seed), beta=1.0, delta=1.0,
                                    num_losers=1).loss[0]), 4)
    for seed in range(40)
  }
  assert single == {round(float(x), 4) for x in np.log1p(np.exp(-margins))}


def test_grpo_by_hand():
  # Ratios e^.1 and e^-.5; advantages 1 and -1. The second is clipped at .8: min(-.61, -.8) = -.8.
  lp, ref = np.array([-1.0, -2.0]), np.array([-1.1, -1.5])
  lists = lists_of([3, 1], ref=ref, levels=1)
  got = preference.grpo_loss(tokens(lp, 1), lists, delta=1.0, kl_weight=0.1).loss
  kl = np.exp(ref - lp) - (ref - lp) - 1
  expected = [-np.exp(0.1) + 0.1 * kl[0], 0.8 + 0.1 * kl[1]]
  np.testing.assert_allclose(got, [expected], rtol=1e-4)


def test_grpo_without_a_close_reference_has_no_divergence_term():
  # Both have moved by 3: ratios e^3, advantages 1 and -1: min(20.1, 1.2) and min(-20.1, -1.2).
  lists = lists_of([3, 1], ref=[-4.0, -5.0], levels=1)
  got = preference.grpo_loss(tokens([-1.0, -2.0], 1), lists, delta=1.0, kl_weight=0.1).loss
  np.testing.assert_allclose(got, [[-1.2, np.exp(3)]], rtol=1e-4)


@hypothesis.given(
  st.lists(st.floats(-6, 0), min_size=5, max_size=5, unique=True), st.integers(0, 10_000)
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_the_bound_of_theorem_a1_where_the_weights_sum_below_one(logp, seed):
  """Weighted misorderings <= weighted pairwise logistic losses <= RSPO, for the model's ranks."""
  lp = np.array(logp)
  v = np.random.default_rng(seed).permutation(len(lp)).astype(np.float32)
  lists = lists_of(v)
  rank_BCC = np.broadcast_to(preference.ranks(jnp.float32(lp)[None], jnp.ones((1, len(lp)), bool)),
                             (1, len(lp), len(lp)))
  weight = np.array(preference.ndcg_weights(rank_BCC, lists.reward_BC, lists.where_BC))[0]
  worse = v[None] < v[:, None]
  hypothesis.assume((np.where(worse, weight, 0).sum(axis=1) <= 1).all())
  loss = float(rspo_loss(tokens(lp), lists, beta=1.0, delta=1.0).loss.sum())
  pairwise = np.where(worse, weight * np.log2(1 + np.exp(lp[None] - lp[:, None])), 0).sum()
  misordered = np.where(worse & (lp[None] > lp[:, None]), weight, 0).sum()
  assert misordered <= pairwise + 1e-5
  assert pairwise <= loss + 1e-4


@pytest.mark.parametrize("name", ["rspo", "s_dpo", "grpo"])
def test_the_order_of_the_list_does_not_matter(name):
  rng = np.random.default_rng(0)
  lp, ref, v = rng.normal(-3, 1, 6), rng.normal(-3, 0.3, 6), rng.integers(0, 4, 6)
  lp[3] = lp[1]  # equal scores, too
  order = rng.permutation(6)
  whole = LOSSES[name](tokens(lp), lists_of(v, ref=ref)).loss
  turned = LOSSES[name](tokens(lp[order]), lists_of(v[order], ref=ref[order])).loss
  expected = np.asarray(whole)[:, order] if whole.ndim == 2 else whole
  np.testing.assert_allclose(turned, expected, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_nothing(name):
  lp, ref, v = [-1.0, -2.5, -2.0], [-1.1, -2.0, -2.2], [2.0, 0.0, 1.0]
  padded = lists_of(v + [5.0, 0.5], ref=ref + [0.0, 0.0], where=[True] * 3 + [False] * 2)
  a = LOSSES[name](tokens(lp), lists_of(v, ref=ref))
  b = LOSSES[name](tokens(lp + [0.0, -9.0]), padded)
  assert float(a.loss.sum()) == pytest.approx(float(b.loss.sum()), rel=1e-5)
  assert int(a.where.sum()) == int(b.where.sum())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reward, where", [
  ([1.0, 1.0, 1.0], None),
  ([3.0, 1.0, 2.0], [True, False, False]),
  ([3.0, 1.0, 2.0], [False, False, False]),
  ([np.nan, np.nan, 1.0], None),
  ([0.0, 0.0, 0.0], None),
])
def test_lists_without_a_pair_cost_nothing(name, reward, where):
  lists = lists_of(reward, ref=[-1.0, -2.0, -3.0], where=where)
  value, grad = GRADIENTS[name](tokens([-1.0, -2.0, -3.0]), lists)
  assert float(value) == 0
  assert not np.asarray(grad).any()


@pytest.mark.parametrize("name", LOSSES)
def test_a_reward_that_is_not_a_number_takes_its_candidate_out(name):
  without = LOSSES[name](tokens([-1.0, -2.0]), lists_of([1, 0], ref=[-1.1, -2.1]))
  with_nan = LOSSES[name](
    tokens([-1.0, -2.0, -0.1]), lists_of([1, 0, np.nan], ref=[-1.1, -2.1, -0.5])
  )
  assert float(with_nan.loss.sum()) == pytest.approx(float(without.loss.sum()), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e5])
def test_gradients_stay_finite(name, scale):
  lists = lists_of(np.array([5.0, 0, 2.5, 5.0]), ref=np.array([-1, -2, -3, -4]) * scale)
  _, grad = GRADIENTS[name](tokens(np.array([-4.0, -1, -3, -2]) * scale), lists)
  assert np.isfinite(np.asarray(grad)).all()


def test_rspo_in_extreme_rewards():
  for reward in ([60.0, 0, 1], [1e-8, 0, 0.5], [100.0, 99.0, 0]):
    _, grad = GRADIENTS["rspo"](tokens([-2.0, -1.0, -3.0]), lists_of(reward))
    assert np.isfinite(np.asarray(grad)).all()


def test_a_step_along_the_gradient_puts_the_rewarded_candidate_first():
  lp = jnp.asarray(tokens([-3.0, -1.0, -2.0]))
  lists = lists_of([5, 0, 1])
  for name in LOSSES:
    moved = lp
    for _ in range(400):
      moved = moved - 0.05 * GRADIENTS[name](moved, lists)[1]
      if name == "grpo":  # p_old is the model itself: no clip holds it
        moved = jnp.maximum(moved, -50)
    assert int(jnp.argmax(moved.sum(-1))) == 0, name


def test_reward_scale():
  scale = fit_reward_scale(np.expm1(np.linspace(0, 1, 101)))
  np.testing.assert_allclose(scale(np.expm1([0.01, 0.5, 0.99, 3.0])), [0, 2.5, 5, 5], atol=1e-3)
  assert np.isnan(scale(np.array([np.nan]))).all()
  with pytest.raises(ValueError, match="finite"):
    fit_reward_scale(np.array([np.nan]))
  with pytest.raises(ValueError, match="negative"):
    fit_reward_scale(np.array([1.0, -2.0]))


def test_unified_weights_by_hand():
  # Model order c1, c0, c2; reward order c0, c2, c1: apart (1, 2, 1) of n - 1 = 2.
  got = unified_weights(
    jnp.float32([[-2, -1, -3]]), jnp.float32([[4, 0, 1]]), jnp.ones((1, 3), bool),
    base_weight=2.0, max_rl_weight=0.5,
  )
  np.testing.assert_allclose(got.misalignment_BC, [[0.5, 1, 0.5]])
  np.testing.assert_allclose(got.vsl_BC, [[2 * 5**0.5, 2, 2 * 2**0.5]], rtol=1e-6)
  np.testing.assert_allclose(got.rl_BC, [[0.5, 0, 0.5]])


def test_unified_weights_of_a_list_of_one_and_of_ties():
  got = unified_weights(
    jnp.float32([[-2, -1]]), jnp.float32([[4, 7]]), jnp.array([[True, False]]),
    base_weight=1.0, max_rl_weight=1.0,
  )
  assert got.vsl_BC.tolist() == [[1, 0]] and got.rl_BC.tolist() == [[0, 0]]
  tied = unified_weights(
    jnp.float32([[-1, -2]]), jnp.float32([[3, 3]]), jnp.ones((1, 2), bool),
    base_weight=1.0, max_rl_weight=1.0,
  )
  np.testing.assert_allclose(tied.misalignment_BC, [[0.5, 0.5]])


def test_ranks_by_brute_force():
  rows = list(itertools.product([0.0, 1.0, 2.0], repeat=3))
  got = np.asarray(preference.ranks(jnp.float32(rows), jnp.ones((len(rows), 3), bool)))
  for row, values in zip(got, rows, strict=True):
    for rank, x in zip(row, values, strict=True):
      places = [k + 1 for k, y in enumerate(sorted(values, reverse=True)) if y == x]
      assert rank == np.mean(places)
