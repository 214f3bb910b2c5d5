"""The refining token: its schedule, what denoising gives, and that no label gets into it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.config import ConfigError
from gr4ad_jax.gpr.config import ModelConfig
from gr4ad_jax.gpr.model import Gpr, init_params
from gr4ad_jax.gpr.refining import Refiner, denoise, request_noise, schedule, unit_rms
from tests.gpr.support import SMALL, VOCABULARY, random_batch, shaken


def test_the_schedule_of_ten_steps():
  """As the cosine's published form gives it; the last step is cut at 0.999."""
  expected = [1, 0.97209, 0.89871, 0.78691, 0.64748, 0.49384, 0.34081, 0.20312, 0.09405, 0.02409,
              0.0000241]
  np.testing.assert_allclose(schedule(10), expected, atol=6e-6, rtol=2e-3)
  f = [math.cos((t / 4 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(5)]
  np.testing.assert_allclose(schedule(4)[1:4], [f[t] / f[0] for t in (1, 2, 3)], rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_denoiser_that_knows_the_noise_gives_the_target_back(steps):
  """Up to the clip: what lies beyond three deviations comes back as three."""
  rng = np.random.default_rng(0)
  target, noise = (jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32) for _ in range(2))
  target = target.at[0, 0, 0].set(4.5)
  kept_T = schedule(steps)

  def exact(x, step):
    return (x - kept_T[step] ** 0.5 * target) / (1 - kept_T[step]) ** 0.5

  found = denoise(exact, noise, steps)
  np.testing.assert_allclose(found, jnp.clip(target, -3, 3), atol=2e-3)


def test_two_steps_by_hand():
  """With a denoiser that says a half: x_2 -> x_1 -> x_0."""
  kept_T = schedule(2)
  x = 0.7
  for t in (2, 1):
    x0 = min(max((x - math.sqrt(1 - kept_T[t]) * 0.5) / math.sqrt(kept_T[t]), -3), 3)
    held = (x - math.sqrt(kept_T[t]) * x0) / math.sqrt(1 - kept_T[t])
    x = math.sqrt(kept_T[t - 1]) * x0 + math.sqrt(1 - kept_T[t - 1]) * held
  found = denoise(lambda x, step: 0.5 * jnp.ones_like(x), jnp.array([0.7]), 2)
  np.testing.assert_allclose(found, [x0], rtol=1e-4)
  assert x == pytest.approx(x0)  # abar_0 = 1


def test_noise_belongs_to_the_request_wherever_it_stands():
  rng = np.random.default_rng(0)
  number_BPF = rng.integers(-1, 50, (3, 4, 5)).astype(np.int32)
  noise_BPD = np.asarray(request_noise(jnp.asarray(number_BPF), 64))
  alone_11D = request_noise(jnp.asarray(number_BPF[1:2, 2:3]), 64)
  np.testing.assert_array_equal(alone_11D[0, 0], noise_BPD[1, 2])
  rows_ND = noise_BPD.reshape(12, 64)
  assert len(np.unique(rows_ND[:, 0])) == 12
  assert abs(rows_ND.mean()) < 0.1 and abs(rows_ND.std() - 1) < 0.1
  swapped = number_BPF[1:2, 2:3, ::-1].copy()
  assert not np.array_equal(request_noise(jnp.asarray(swapped), 64)[0, 0], noise_BPD[1, 2])


@pytest.fixture(scope="module")
def small():
  model = Gpr(dataclasses.replace(SMALL, refining=3), VOCABULARY)
  return model, shaken(model)


def test_the_loss_by_hand(small):
  """Step and noise are drawn; the error is that of the noise that was put in."""
  refiner, rng = Refiner(small[0].config), np.random.default_rng(3)
  params = {"params": small[1]["refiner"]}
  target_BPD, thought_BPD = (
    jnp.asarray(rng.normal(size=(2, 4, 16)), jnp.float32) for _ in range(2)
  )
  key = jax.random.key(7)
  found_BP = refiner.apply(params, target_BPD, thought_BPD, key, method="loss")
  step_key, noise_key = jax.random.split(key)
  step_BP = np.asarray(jax.random.randint(step_key, (2, 4), 1, 4))
  noise_BPD = np.asarray(jax.random.normal(noise_key, (2, 4, 16)))
  assert len(np.unique(step_BP)) > 1
  x0_BPD = np.asarray(target_BPD) / np.sqrt((np.asarray(target_BPD) ** 2).mean(-1, keepdims=True))
  kept_BP1 = schedule(3)[step_BP][..., None]
  x_BPD = np.sqrt(kept_BP1) * x0_BPD + np.sqrt(1 - kept_BP1) * noise_BPD
  said_BPD = refiner.apply(
    params, jnp.asarray(x_BPD, jnp.float32), jnp.asarray(step_BP), thought_BPD, method="noise_in"
  )
  expected_BP = ((noise_BPD - np.asarray(said_BPD)) ** 2).mean(axis=-1)
  np.testing.assert_allclose(found_BP, expected_BP, rtol=1e-3)
  np.testing.assert_allclose(jnp.mean(unit_rms(target_BPD) ** 2, axis=-1), np.ones((2, 4)),
                             rtol=1e-4)


def test_before_training_nothing_is_added_to_the_beginning():
  model = Gpr(dataclasses.replace(SMALL, refining=2), VOCABULARY)
  start = init_params(model, jax.random.key(0))
  assert not np.any(start["refiner"]["into_bos"])
  without = Gpr(dataclasses.replace(SMALL, refining=0), VOCABULARY)
  batch = random_batch()
  tree = {name: x for name, x in start.items() if name != "refiner"}
  np.testing.assert_array_equal(
    model.apply({"params": start}, *batch[:4]).logp_BPNL,
    without.apply({"params": tree}, *batch[:4]).logp_BPNL,
  )


def test_codes_do_not_teach_the_denoiser_and_the_denoiser_does_not_teach_the_tables(small):
  """Codes learn what to make of the token alone; L_diff reaches thinking tokens through C."""
  model, params = small
  batch = random_batch()

  def slopes(of):
    def total(params):
      found = model.apply({"params": params}, *batch[:4])
      return jnp.sum(getattr(found, of))

    return jax.jit(jax.grad(total))(params)

  codes, error = slopes("logp_BPNL"), slopes("refining_BP")
  for name, tree in codes["refiner"].items():
    for slope in jax.tree.leaves(tree):
      assert np.any(slope != 0) == (name == "into_bos"), name
  assert np.any(error["ptd"]["start"] != 0) and np.any(error["refiner"]["out"]["kernel"] != 0)
  assert not np.any(error["refiner"]["into_bos"] != 0) and not np.any(error["head_logit"] != 0)
  assert not np.any(error["ptd"]["bos"] != 0)


def test_no_label_reaches_its_first_code_through_the_token(small):
  """All labels changed: the first code's probabilities stay, and the token is read."""
  model, params = small
  ask = jax.jit(lambda params, *batch: model.apply({"params": params}, *batch).logp_BPNL)
  batch = random_batch()
  expected = np.asarray(ask(params, *batch[:4]))
  changed = batch.target_BPNL.copy()
  changed[..., 1:] = (changed[..., 1:] + 1) % np.array([5, 6])
  found = np.asarray(ask(params, *batch._replace(target_BPNL=changed)[:4]))
  np.testing.assert_array_equal(found[..., 0], expected[..., 0])
  silent = params | {"refiner": params["refiner"] | {"into_bos": jnp.zeros((16, 16))}}
  assert np.abs(np.asarray(ask(silent, *batch[:4])) - expected).min() > 0


def test_it_is_made_of_thinking_tokens():
  with pytest.raises(ConfigError, match=r"model\.refining=10: must be 0 where model\.thinking is"):
    ModelConfig(thinking=0)
