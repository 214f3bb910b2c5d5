"""The table of parts: what is compared with what, and that rows change what their names say."""

import dataclasses

import numpy as np
import pytest

from experiments import parts
from experiments._runs import Lists
from gr4ad_jax.config import ConfigError, override_all
from gr4ad_jax.gr4ad.config import preset
from gr4ad_jax.search.ranking import EvalRequests

# Two users; ads 1 and 2 are sought, of which 2 is new to the second user.
REQUESTS = EvalRequests(
  np.array([0, 1], np.int32), np.zeros(2, np.int64), np.array([[1, -1], [1, 2]], np.int32),
  np.array([[3, 0], [1, 1]], np.float32), np.array([[False, False], [False, True]]),
)


def lists(all_RK, prospecting_RK):
  return Lists(np.array(all_RK, np.int32), np.array(prospecting_RK, np.int32))


def test_a_row_less_the_first_one_by_hand():
  """Recall: the first row finds 1 and 1/2, the other 0 and 1; in prospecting 0 and 1 of one."""
  found = {
    "as it is": lists([[1, 7], [1, 7]], [[-1, -1], [7, 8]]),
    "other": lists([[7, 8], [2, 1]], [[-1, -1], [2, 7]]),
  }
  results = parts.compared(found, REQUESTS, depth=2, bootstrap=20)
  assert results["as it is/recall@2"] == pytest.approx(0.75)
  assert results["other/recall@2"] == pytest.approx(0.5)
  assert results["difference/other/recall@2"] == pytest.approx(-0.25)
  # Of the values 3, 1 and 1 the first row finds 3 + 1, the other 1 + 1.
  assert results["difference/other/value_recall@2"] == pytest.approx((2 - 4) / 5)
  # The user without a new target does not count.
  assert results["as it is/prospecting/recall@2"] == 0
  assert results["difference/other/prospecting/recall@2"] == pytest.approx(1)
  assert results["difference/as it is/recall@2/ci_high"] == 0


def test_without_new_targets_there_is_no_prospecting():
  old = dataclasses.replace(REQUESTS, new_RC=np.zeros((2, 2), bool))
  found = {"as it is": lists([[1, 7], [1, 7]], [[-1, -1], [-1, -1]])}
  results = parts.compared(found, old, depth=2, bootstrap=20)
  assert results and not any("prospecting" in name for name in results)


@pytest.mark.parametrize("name", parts.ROWS)
def test_each_row_differs_from_the_preset_and_from_the_others(name):
  config = preset(name)
  rows = [override_all(config, changes) for changes in parts.ROWS[name].values()]
  assert rows[0] == config
  assert len({repr(row) for row in rows}) == len(rows)
  assert len({parts._folder_name(row) for row in parts.ROWS[name]}) == len(rows)


def test_unknown_rows_and_presets_are_told_with_what_there_is():
  with pytest.raises(ConfigError, match="no copy path"):
    parts.settings_and_config({"settings.rows": "no copy pat"})
  with pytest.raises(ConfigError, match="amazon-beauty"):
    parts.settings_and_config({"settings.preset": "amazon-beuty"})


def test_the_whole_way_with_two_rows(tiny_data, tmp_path):
  """Rows are trained from the preset with --set's changes, and kept."""
  overrides = {
    "settings.data": str(tiny_data), "settings.steps": "2", "settings.validations": "1",
    "settings.requests": "12", "settings.bootstrap": "5", "settings.rows": "no copy path",
    "model.width": "16", "model.num_heads": "2", "model.num_layers": "2",
    "model.num_lazy_layers": "1", "train.batch_size": "8", "search.widths": "8,16,50",
  }
  results = parts.run(tmp_path, size="cpu", overrides=overrides)
  assert results["as it is/speed"] == 1 and results["no copy path/speed"] > 0
  assert results["no copy path/minutes"] > 0
  assert "| no copy path | " in parts.table(results)
  assert parts.plots(results)
  before = (tmp_path / "no-copy-path" / "lists-validation.npz").stat().st_mtime_ns
  again = parts.run(tmp_path, size="cpu", overrides=overrides)
  assert (tmp_path / "no-copy-path" / "lists-validation.npz").stat().st_mtime_ns == before
  assert again["no copy path/recall@50"] == results["no copy path/recall@50"]
