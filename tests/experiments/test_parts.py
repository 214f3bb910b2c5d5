"""The table of parts: what is compared with what, and that rows change what their names say."""

import dataclasses

import numpy as np
import pytest

from experiments import parts
from experiments._runs import Lists, split_groups
from gr4ad_jax.catalog.prepared import open_logs
from gr4ad_jax.config import ConfigError, override_all
from gr4ad_jax.gr4ad.config import preset
from gr4ad_jax.search.held_out import eval_requests
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


@pytest.mark.parametrize("name", parts.ROWS)
def test_each_row_can_be_named_on_a_command_line(name):
  for row in parts.ROWS[name]:
    settings, _ = parts.settings_and_config({"settings.preset": name, "settings.rows": row})
    assert settings.rows == (row,)


def test_unknown_rows_and_presets_are_told_with_what_there_is():
  with pytest.raises(ConfigError, match="no copy path"):
    parts.settings_and_config({"settings.rows": "no copy pat"})
  with pytest.raises(ConfigError, match="amazon-beauty"):
    parts.settings_and_config({"settings.preset": "amazon-beuty"})


def test_rows_are_trained_alike_but_for_what_they_change(tiny_data, tmp_path, monkeypatch):
  """The row without a copy path finds nothing; the first row finds all, at half the speed."""
  requests = eval_requests(split_groups(open_logs(tiny_data).examples, "validation", 12))
  best_RK = np.full((12, 50), -1, np.int32)
  best_RK[:, : requests.target_RC.shape[1]] = requests.target_RC
  trained = {}

  def train_run(run, folder, *, resume):
    assert resume and run.sids == str(tiny_data / "sids")
    trained[folder.name] = run.config

  def found_lists(folder, split, *, limit):
    assert (split, limit) == ("validation", 12)
    found_RK = best_RK if folder.name == "as-it-is" else np.full_like(best_RK, -1)
    return lists(found_RK, found_RK)

  monkeypatch.setattr(parts, "train_run", train_run)
  monkeypatch.setattr(parts, "found_lists", found_lists)
  monkeypatch.setattr(parts, "read_log", lambda folder: [
    {"step": 50, "examples_per_second": 640.0, "kind": "train"}
  ])
  monkeypatch.setattr(parts, "_speed", lambda folder, names: {
    f"{name}/speed": float(1 + at) for at, name in enumerate(names)
  })
  results = parts.run(tmp_path, size="cpu", overrides={
    "settings.data": str(tiny_data), "settings.steps": "20", "settings.requests": "12",
    "settings.bootstrap": "5", "settings.rows": "no copy path", "train.seed": "7",
  })
  first, other = trained["as-it-is"], trained["no-copy-path"]
  assert first.train == other.train and first.loss == other.loss and first.train.seed == 7
  assert (first.train.num_steps, first.train.eval_every) == (20, 5)
  assert first.model == dataclasses.replace(other.model, copy_path=True)
  assert results["difference/no copy path/recall@50"] == -1
  assert results["no copy path/minutes"] == pytest.approx(50 * 64 / 640 / 60)
  page = parts.table(results)
  assert "| as it is | 1.0000 |" in page
  assert "| no copy path | 0.0000: -1.0000 (-1.0000 to -1.0000) |" in page and "| x 2.00 |" in page
  assert parts.plots(results)
