"""The loop of small fits: told step by step, and gone on with where it was interrupted."""

import numpy as np
import pytest

from gr4ad_jax.training.resume import ResumeFile, Upkeep, run_fit


def fit(file=None, *, stop_at=None, name="sum", told=None, shown=None):
  """Sums the squares of 0 to 4; `stop_at` interrupts before that step."""

  def progress(steps, description, total, completed):
    if shown is not None:
      shown.append((description, total, completed))
    for step in steps:
      if step == stop_at:
        raise KeyboardInterrupt
      yield step

  resume = None if file is None else ResumeFile(file, "key", seconds_between_saves=0)
  state = run_fit(
    lambda state, batch: ({"sum": state["sum"] + batch}, {}),
    {"sum": np.zeros((), np.float32)},
    lambda step: np.float32(step**2),
    5,
    Upkeep(resume, progress, "sums", name, beside={"other": np.arange(3)}),
    after_step=None if told is None else lambda step, state: told.append((step, int(state["sum"]))),
  )
  return float(state["sum"])


def test_every_step_is_told_with_the_state_after_it():
  told = []
  assert fit(told=told) == 30
  assert told == [(1, 0), (2, 1), (3, 5), (4, 14), (5, 30)]


@pytest.mark.parametrize("stop_at", [0, 1, 4])
def test_an_interrupted_fit_goes_on_where_it_was(tmp_path, stop_at):
  file, told, shown = tmp_path / "state.npz", [], []
  with pytest.raises(KeyboardInterrupt):
    fit(file, stop_at=stop_at)
  if stop_at:
    np.testing.assert_array_equal(ResumeFile(file, "key").load()["other"], np.arange(3))
  assert fit(file, told=told, shown=shown) == 30
  assert [step for step, _ in told] == list(range(stop_at + 1, 6))
  assert shown == [("sums", 5, stop_at)]


def test_the_state_of_another_phase_is_not_taken(tmp_path):
  file, told = tmp_path / "state.npz", []
  with pytest.raises(KeyboardInterrupt):
    fit(file, stop_at=3)
  fit(file, name="later", told=told)
  assert len(told) == 5
