"""VSL on numbers a reader can redo."""

import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.gr4ad.batch import Batch
from gr4ad_jax.gr4ad.config import LossConfig
from gr4ad_jax.gr4ad.decoder import TargetLogProbs
from gr4ad_jax.gr4ad.supervised import vsl_loss
from gr4ad_jax.gr4ad.vsl_task import vsl_task

CONFIG = LossConfig(ecpm_weight=0.5, mtp_weight=0.25)


def test_by_hand():
  sid = jnp.log(jnp.array([[[0.5, 0.25, 0.5]]]))  # -log: (1 + 2 + 1) log 2
  ecpm = jnp.log(jnp.array([[[0.75, 0.25]]]))  # the target bucket 1 costs 2 log 2
  mtp = jnp.log(jnp.array([[[0.01, 0.5, 0.125]]]))  # level 1 is left out: (1 + 3) log 2
  terms = vsl_loss(
    sid, ecpm, mtp, ecpm_bin_BC=jnp.array([[1]]), where_BC=jnp.array([[True]]), config=CONFIG
  )
  log2 = np.log(2)
  np.testing.assert_allclose(terms.sid_BC, [[4 * log2]], rtol=1e-6)
  np.testing.assert_allclose(terms.ecpm_BC, [[2 * log2]], rtol=1e-6)
  np.testing.assert_allclose(terms.mtp_BC, [[4 * log2]], rtol=1e-6)
  np.testing.assert_allclose(terms.total_BC, [[(4 + 0.5 * 2 + 0.25 * 4) * log2]], rtol=1e-6)


def test_an_item_scorers_loss_is_added():
  terms = vsl_loss(
    jnp.zeros((1, 2, 3)), jnp.zeros((1, 2, 1)), None, None, jnp.log(jnp.array([[0.25, 0.5]])),
    ecpm_bin_BC=jnp.zeros((1, 2), int), where_BC=jnp.array([[True, False]]),
    config=LossConfig(item_weight=0.75),
  )
  np.testing.assert_allclose(terms.item_BC, [[2 * np.log(2), 0]], rtol=1e-6)
  np.testing.assert_allclose(terms.total_BC, [[0.75 * 2 * np.log(2), 0]], rtol=1e-6)


def test_smoothing_by_hand():
  """Four codes a level: the target's share is 0.8 + 0.2 / 4, that of each other code 0.2 / 4."""
  p_LV = np.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]])
  share_LV = np.full((2, 4), 0.05) + np.array([[0.8, 0, 0, 0], [0, 0, 0, 0.8]])
  expected = -(share_LV * np.log(p_LV)).sum()
  terms = vsl_loss(
    jnp.log(jnp.array([[[0.5, 0.4]] * 2])), jnp.zeros((1, 2, 1)), None,
    jnp.log(p_LV).mean(axis=1)[None, None].repeat(2, axis=1), ecpm_bin_BC=jnp.zeros((1, 2), int),
    where_BC=jnp.array([[True, False]]), config=LossConfig(label_smoothing=0.2),
  )
  np.testing.assert_allclose(terms.total_BC, [[expected, 0]], rtol=1e-6)
  np.testing.assert_allclose(terms.sid_BC, [[-np.log(0.5 * 0.4), 0]], rtol=1e-6)


def test_smoothing_is_of_training_alone():
  sizes = []

  class Decoder:
    def apply(self, variables, context, target_BCL, **how):
      sizes.append(how.get("code_means", False))
      means = jnp.full((1, 1, 2), -9.0) if sizes[-1] else None
      return TargetLogProbs(jnp.full((1, 1, 2), -1.0), jnp.zeros((1, 1, 1)), None, means)

  batch = Batch(None, jnp.zeros((1, 1, 2), int), jnp.zeros((1, 1), int), jnp.ones((1, 1)))
  loss = vsl_task(Decoder(), LossConfig(label_smoothing=0.5)).loss
  found = {key: loss({}, batch, key) for key in (None, "dropout")}
  assert [float(found[key]["loss"][0]) for key in (None, "dropout")] == [2, (2 + 18) / 2]
  assert [float(found[key]["sid_loss"][0]) for key in (None, "dropout")] == [2, 2]


def test_missing_ecpm_drops_only_that_term():
  sid, ecpm = jnp.full((1, 1, 3), -1.0), jnp.log(jnp.array([[[0.5, 0.5]]]))
  terms = vsl_loss(
    sid, ecpm, None, ecpm_bin_BC=jnp.array([[-1]]), where_BC=jnp.array([[True]]), config=CONFIG
  )
  assert (float(terms.ecpm_BC[0, 0]), float(terms.total_BC[0, 0])) == (0.0, 3.0)


def test_masked_row_costs_nothing_and_has_no_gradient():
  where_BC = jnp.array([[True, False]])

  def total(sid, ecpm, mtp):
    return vsl_loss(
      sid, ecpm, mtp, ecpm_bin_BC=jnp.array([[0, 0]]), where_BC=where_BC, config=CONFIG
    ).total_BC.sum()

  args = (jnp.full((1, 2, 3), -1e30), jnp.full((1, 2, 4), -1.0), jnp.full((1, 2, 3), -2.0))
  grads = jax.grad(total, argnums=(0, 1, 2))(*args)
  for grad in grads:
    assert np.isfinite(grad).all() and (grad[:, 1] == 0).all() and (grad[:, 0] != 0).any()
