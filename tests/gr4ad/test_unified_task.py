"""One step over logged samples and lists, with a decoder whose log-probs are a table."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.gr4ad.batch import Batch
from gr4ad_jax.gr4ad.config import LossConfig, PreferenceConfig
from gr4ad_jax.gr4ad.decoder import TargetLogProbs
from gr4ad_jax.gr4ad.supervised import vsl_loss
from gr4ad_jax.gr4ad.unified import unified_weights
from gr4ad_jax.gr4ad.unified_task import ListBatch, UnifiedBatch, unified_task
from gr4ad_jax.gr4ad.vsl_task import vsl_task
from gr4ad_jax.learning import preference
from gr4ad_jax.learning.preference import Lists

LOSS = LossConfig(ecpm_weight=0.5, mtp_weight=0.3)


def apply(variables, context, target_BCL, *, deterministic, rngs=None, code_means=False):
  """Codes are independent of everything: log p = log softmax of a row of `table` per level."""
  del context, deterministic, rngs, code_means
  table_LV = jax.nn.log_softmax(variables["params"]["table"], axis=-1)
  levels = jnp.arange(table_LV.shape[0])
  sid_BCL = table_LV[levels, jnp.maximum(target_BCL, 0)]
  bins_V = jax.nn.log_softmax(variables["params"]["bins"])
  return TargetLogProbs(
    sid_BCL, jnp.broadcast_to(bins_V, (*target_BCL.shape[:2], len(bins_V))), 0.5 * sid_BCL
  )


class Fake(NamedTuple):
  apply: Callable


DECODER = Fake(apply)
PARAMS = {
  "table": jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32),
  "bins": jnp.float32([0.1, -0.2, 0.5]),
}
LOGGED = Batch(
  None, np.array([[[1, 2], [0, 3]], [[2, 2], [-1, -1]]]), np.array([[0, 2], [1, -1]]),
  np.float32([[1, 0.5], [2, 0]]),
)
CODES = np.array([[[1, 2], [0, 0], [3, 1]], [[2, 3], [1, 1], [-1, -1]]])
ROWS = ListBatch(
  None, CODES,
  Lists(
    np.float32([[4, 0, 1], [2, 3, 0]]), np.zeros((2, 3, 2), np.float32), np.zeros((2, 3), bool),
    np.array([[True] * 3, [True, True, False]]),
  ),
  np.array([[2, 0, 1], [0, 1, -1]]), np.float32([[1.5, 0, 0], [0, 2, 0]]),
)


def loss_of(method, **changes):
  config = PreferenceConfig(method=method, beta=0.7, weight=3.0, base_weight=1.5,
                            max_rl_weight=0.8, **changes)
  metrics = unified_task(DECODER, LOSS, config).loss(PARAMS, UnifiedBatch(LOGGED, ROWS), None)
  return metrics, float(metrics["loss"][0] / metrics["loss"][1])


def mean_of_lists(loss, where):
  """Of the lists that have any row, the mean over lists of the mean over rows, by hand."""
  loss, where = np.asarray(loss), np.asarray(where)
  if loss.ndim == 1:
    return float(loss[where].mean())
  return float(np.mean([row[on].mean() for row, on in zip(loss, where, strict=True) if on.any()]))


def logged_sum():
  """Sum of w (L_SID + .5 L_eCPM + .3 L_MTP) over the three logged targets, and 3, by hand."""
  def logp(x):
    return np.asarray(x) - np.log(np.exp(x).sum(-1, keepdims=True))

  (one, two), bins = logp(PARAMS["table"]), logp(PARAMS["bins"])
  total = 0.0
  for weight, first, second, value in ((1, 1, 2, 0), (0.5, 0, 3, 2), (2, 2, 2, 1)):
    mtp = 0.5 * two[second]  # of levels 2 to L
    total -= weight * (one[first] + two[second] + 0.5 * bins[value] + 0.3 * mtp)
  return total, 3.0


def test_the_loss_of_logged_samples_is_their_weighted_sum_over_their_number():
  """Eq. 15: the weights have mean 1 over training, so that they do not divide a batch."""
  metrics = vsl_task(DECODER, LOSS).loss(PARAMS, LOGGED, None)
  total, count = logged_sum()
  assert (float(metrics["loss"][0]), float(metrics["loss"][1])) == (pytest.approx(total), count)
  assert float(metrics["ecpm_loss"][1]) == 3
  without = LOGGED._replace(ecpm_bin_BC=np.array([[0, -1], [1, -1]]))
  assert float(vsl_task(DECODER, LOSS).loss(PARAMS, without, None)["ecpm_loss"][1]) == 2


def test_none_and_validation_see_logged_samples_alone():
  total, count = logged_sum()
  assert loss_of("none")[1] == pytest.approx(total / count)
  task = unified_task(DECODER, LOSS, PreferenceConfig(method="uvr"))
  metrics = task.loss(PARAMS, LOGGED, None)
  assert float(metrics["loss"][0]) == pytest.approx(total) and "list_loss" not in metrics


@pytest.mark.parametrize("method, loss", [
  ("rspo", lambda lp: preference.rspo_loss(lp, ROWS.lists, beta=0.7, delta=1.0)),
  ("s_dpo", lambda lp: preference.softmax_dpo_loss(lp, ROWS.lists, beta=0.7, delta=1.0)),
  ("grpo", lambda lp: preference.grpo_loss(lp, ROWS.lists, delta=1.0)),
  # All losers are drawn, as there are fewer than four.
  ("dpo", lambda lp: preference.dpo_loss(lp, ROWS.lists, jax.random.key(7), beta=0.7, delta=1.0)),
])
def test_list_losses_join_with_one_weight(method, loss):
  total, count = logged_sum()
  lp = apply({"params": PARAMS}, None, CODES, deterministic=True, rngs=None).sid_BCL
  rows = loss(lp)
  expected = total / count + 3.0 * mean_of_lists(rows.loss, rows.where)
  assert loss_of(method)[1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("vsl_on", ["engaged", "all"])
def test_uvr_by_its_equation(vsl_on):
  """Sum over logged samples and list candidates, each with the weights of (20) and (21)."""
  total, count = logged_sum()
  out = apply({"params": PARAMS}, None, CODES, deterministic=True, rngs=None)
  weights = unified_weights(
    out.sid_BCL.sum(-1), ROWS.lists.reward_BC, ROWS.lists.where_BC, base_weight=1.5,
    max_rl_weight=0.8,
  )
  rspo = preference.rspo_loss(out.sid_BCL, ROWS.lists, beta=0.7, delta=1.0)
  total *= 1.5
  for b in range(2):
    for c in range(3):
      learned = ROWS.lists.where_BC[b, c] and (vsl_on == "all" or ROWS.weight_BC[b, c] > 0)
      if learned:
        terms = vsl_loss(
          *(x[b : b + 1, c : c + 1] for x in out[:3]),
          ecpm_bin_BC=ROWS.ecpm_bin_BC[b : b + 1, c : c + 1],
          where_BC=np.ones((1, 1), bool), config=LOSS,
        )
        own = ROWS.weight_BC[b, c] if vsl_on == "engaged" else 1.0
        total += float(terms.total_BC[0, 0]) * float(weights.vsl_BC[b, c]) * float(own)
        count += 1
  metrics, got = loss_of("uvr", vsl_on=vsl_on)
  assert got == pytest.approx(
    total / count + mean_of_lists(weights.rl_BC * rspo.loss, rspo.where), rel=1e-5
  )
  assert float(metrics["misalignment"][1]) == 5


def weights_by_hand(logp_BC):
  """(19) to (21) of the two lists, whose rewards are (4, 0, 1) and (2, 3): w_VSL, w_RL."""
  vsl, rl = np.zeros((2, 3)), np.zeros((2, 3))
  for b, (count, reward_ranks) in enumerate(((3, (1, 3, 2)), (2, (2, 1)))):
    for c, reward_rank in enumerate(reward_ranks):
      rank = 1 + sum(logp_BC[b, other] > logp_BC[b, c] for other in range(count))
      apart = abs(rank - reward_rank) / (count - 1)
      vsl[b, c] = 1.5 * (1 + float(ROWS.lists.reward_BC[b, c])) ** apart
      rl[b, c] = 1.5 * 0.8 * (1 - apart)
  return vsl, rl


def test_uvr_follows_the_gradient_of_its_losses_with_the_weights_held():
  """The weights say how much a candidate teaches; nothing is to be gained by changing them."""
  task = unified_task(DECODER, LOSS, PreferenceConfig(
    method="uvr", beta=0.7, base_weight=1.5, max_rl_weight=0.8
  ))
  logp = apply({"params": PARAMS}, None, CODES, deterministic=True, rngs=None).sid_BCL.sum(-1)
  vsl_BC, rl_BC = weights_by_hand(np.asarray(logp))

  def mean(params):
    total, count = task.loss(params, UnifiedBatch(LOGGED, ROWS), None)["loss"]
    return total / count

  def expected(params):
    logged = vsl_task(DECODER, LOSS).loss(params, LOGGED, None)["loss"][0]
    out = apply({"params": params}, None, CODES, deterministic=True, rngs=None)
    terms = vsl_loss(*out, ecpm_bin_BC=ROWS.ecpm_bin_BC, where_BC=ROWS.lists.where_BC, config=LOSS)
    rows = preference.rspo_loss(out.sid_BCL, ROWS.lists, beta=0.7, delta=3.0)
    # Anchors with a worse candidate: the first and third of one list, the second of the other.
    preferred = (rl_BC * rows.loss).sum(-1) / np.array([2, 1])
    engaged = (vsl_BC * ROWS.weight_BC * terms.total_BC).sum()
    return (1.5 * logged + engaged) / (3 + 2) + preferred.mean()

  (value, grad), (wanted, wanted_grad) = (
    jax.value_and_grad(f)(PARAMS) for f in (mean, expected)
  )
  assert float(value) == pytest.approx(float(wanted), rel=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grad, wanted_grad)


@pytest.mark.parametrize("delta", [0.2, 3.0])
@pytest.mark.parametrize("method, loss", [
  ("rspo", lambda lp, lists, delta: preference.rspo_loss(lp, lists, beta=0.7, delta=delta)),
  ("s_dpo", lambda lp, lists, delta: preference.softmax_dpo_loss(lp, lists, beta=0.7, delta=delta)),
  ("grpo", lambda lp, lists, delta: preference.grpo_loss(lp, lists, delta=delta)),
])
def test_references_and_their_gate_reach_the_loss(method, loss, delta):
  """References that lie .4 below and .6 above what the model says, twice that over two levels."""
  lp = apply({"params": PARAMS}, None, CODES, deterministic=True, rngs=None).sid_BCL
  moved = np.float32([[0.4, -0.6, 0.4], [-0.6, 0.4, 9.0]])
  lists = ROWS.lists._replace(
    ref_logp_BCL=np.asarray(lp - moved[..., None]), has_ref_BC=np.ones((2, 3), bool)
  )
  config = PreferenceConfig(method=method, beta=0.7, weight=3.0, delta=delta)
  batch = UnifiedBatch(LOGGED, ROWS._replace(lists=lists))
  metrics = unified_task(DECODER, LOSS, config).loss(PARAMS, batch, None)
  rows, (total, count) = loss(lp, lists, delta), logged_sum()
  expected = total / count + 3.0 * mean_of_lists(rows.loss, rows.where)
  assert float(metrics["loss"][0] / metrics["loss"][1]) == pytest.approx(expected, rel=1e-5)
  # Of the five candidates that are none of padding.
  assert float(metrics["moved"][0]) == pytest.approx(2 * (3 * 0.4 + 2 * 0.6), rel=1e-4)
  assert float(metrics["moved"][1]) == 5


@pytest.mark.parametrize("method", ["dpo", "s_dpo", "grpo", "rspo", "uvr"])
def test_lists_without_a_pair_leave_finite_gradients(method):
  equal = dataclasses.replace(PreferenceConfig(method=method))
  lists = ROWS.lists._replace(reward_BC=np.ones((2, 3), np.float32))
  batch = UnifiedBatch(LOGGED, ROWS._replace(lists=lists, weight_BC=np.zeros((2, 3), np.float32)))
  task = unified_task(DECODER, LOSS, equal)

  def mean(params, key):
    total, count = task.loss(params, batch, key)["loss"]
    return total / count

  value, grad = jax.value_and_grad(mean)(PARAMS, jax.random.key(0))
  logged, logged_grad = jax.value_and_grad(
    lambda p: (lambda m: m[0] / m[1])(vsl_task(DECODER, LOSS).loss(p, LOGGED, None)["loss"])
  )(PARAMS)
  assert float(value) == pytest.approx(float(logged), rel=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grad, logged_grad)


@pytest.mark.parametrize("method", ["dpo", "s_dpo", "grpo", "rspo", "uvr"])
def test_lists_that_teach_nothing_have_a_list_loss_of_zero(method):
  lists = ROWS.lists._replace(reward_BC=np.zeros((2, 3), np.float32))
  task = unified_task(DECODER, LOSS, PreferenceConfig(method=method))
  batch = UnifiedBatch(LOGGED, ROWS._replace(lists=lists))
  total, count = task.loss(PARAMS, batch, jax.random.key(0))["list_loss"]
  assert float(total) == 0 and float(count) > 0


@pytest.mark.parametrize("method", ["none", "rspo", "uvr"])
def test_logged_samples_have_the_same_loss_with_lists_and_without(method):
  """So that training, which has lists, is held against validation, which has none."""
  task = unified_task(DECODER, LOSS, PreferenceConfig(method=method, weight=7.0))
  trained = task.loss(PARAMS, UnifiedBatch(LOGGED, ROWS), jax.random.key(0))["logged_loss"]
  judged = task.loss(PARAMS, LOGGED, None)
  assert tuple(map(float, trained)) == pytest.approx(logged_sum())
  assert tuple(map(float, judged["logged_loss"])) == tuple(map(float, judged["loss"]))


def test_what_is_watched():
  metrics, _ = loss_of("rspo")
  lp = apply({"params": PARAMS}, None, CODES, deterministic=True, rngs=None).sid_BCL.sum(-1)
  assert float(metrics["best_logp"][0]) == pytest.approx(float(lp[0, 0] + lp[1, 1]), rel=1e-5)
  assert float(metrics["best_logp"][1]) == 2
  assert float(metrics["moved"][1]) == 0  # no references
