"""GPR's scaling: sizes, losses counted by hand, and one small family as a whole."""

import jax
import numpy as np
import pytest

from experiments import gpr_scaling
from experiments._scaling import fits
from gr4ad_jax import api
from gr4ad_jax.gpr.model import Gpr
from gr4ad_jax.gpr.run import open_inputs, read_run

TINY = {
  "gpr.stream.groups": "8", "gpr.stream.labels": "8", "gpr.model.num_layers": "1",
  "gpr.model.thinking": "0", "gpr.model.refining": "0", "gpr.model.recursions": "1",
  "gpr.model.predictions": "1", "gpr.train.batch_size": "8", "gpr.train.eval_batches": "1",
  "gpr.train.data_parallel": "1", "settings.widths": "8", "settings.seeds": "1",
  "settings.rows": "12", "settings.bootstrap": "5",
}


def test_a_law_that_holds_is_found_whoever_is_drawn():
  """Every user's loss is 2 + 5 N^-1/2, whatever the seed."""
  size_M = np.array([1e2, 4e2, 1e3, 1e4])
  loss_MSR = np.tile((2 + 5 * size_M**-0.5)[:, None, None], (1, 2, 6))
  found = fits(size_M, 2 * size_M, loss_MSR, np.array([0, 0, 1, 2, 2, 2]), bootstrap=4)
  assert found["exponent"] == pytest.approx(0.5, abs=1e-3)
  assert found["floor_ci_low"] == pytest.approx(2, abs=1e-2) == found["floor_ci_high"]
  assert found["predicted_loss_error"] < 1e-4


def test_parameters_are_counted_with_and_without_tables():
  params = {
    "tables": {"level_0": np.zeros((7, 2))}, "hsd": {"router": {"kernel": np.zeros((2, 3))}},
    "unified_input": {"user_features": np.zeros((4, 2)), "gap": np.zeros((5, 2))},
  }
  assert gpr_scaling.count_params(params) == (14 + 6 + 8 + 10, 6 + 10)


def test_a_family_is_trained_and_its_losses_are_those_of_every_label(
  tiny_data, tmp_path, monkeypatch
):
  monkeypatch.setattr(gpr_scaling, "prepared_market", lambda workdir, config: (None, tiny_data))
  monkeypatch.setattr(gpr_scaling, "tokenized", lambda data, sids, config: tiny_data / "sids")
  monkeypatch.setattr(gpr_scaling, "STEPS", {"cpu": 2})
  seen = {}

  def fits(free_M, num_M, loss_MSR, stream_R, *, bootstrap):
    seen["loss_R"], seen["stream_R"] = loss_MSR[0, 0], stream_R
    return {}

  monkeypatch.setattr(gpr_scaling, "fits", fits)
  results = gpr_scaling.run(tmp_path, size="cpu", overrides=TINY)
  folder = tmp_path / "width8" / "seed0"
  opened, run_file = api.open_run(folder), read_run(folder)
  assert run_file.config.train.learning_rate == pytest.approx(1.5e-3 * 8**0.5)
  assert results["size0/params"] == opened.num_params > results["size0/free_params"]
  inputs = open_inputs(run_file, folder)
  # Row by row, as the model says it.
  model = Gpr(run_file.config.model, inputs.model.vocabulary)
  say = jax.jit(lambda *batch: model.apply({"params": opened.params}, *batch).logp_BPNL)
  rows, expected = inputs.rows("test"), []
  for row in range(12):
    batch = inputs.make_batch([rows[row]])
    logp_PL = np.asarray(say(*batch[:4]))[0, :, 0]
    expected += [(row, -sum(logp_PL[at])) for at in np.flatnonzero(batch.group_BP[0] >= 0)]
  streams, losses = zip(*expected, strict=True)
  assert seen["stream_R"].tolist() == list(streams)
  np.testing.assert_allclose(seen["loss_R"], losses, rtol=1e-4)
  # Drawn of a family that the law fits.
  for row, size in enumerate((1e2, 1e3, 1e4)):
    results |= {f"size{row}/{name}": size for name in ("params", "free_params")}
    results |= {f"size{row}/loss": 2 + 5 * size**-0.5, f"size{row}/loss/seed0": 2.0}
  results |= dict.fromkeys((
    "exponent", "floor", "scale", "r2", "predicted_loss", "predicted_loss_error", "exponent_ci_low",
    "exponent_ci_high", "floor_ci_low", "floor_ci_high", "predicted_loss_error_ci_high",
    "exponent/all_params", "r2/all_params", "predicted_loss_error/all_params"), 0.5)
  assert "| 0.00 M | 0.000 M | 2.5000 |" in gpr_scaling.table(results)
  assert gpr_scaling.plots(results)
