"""What time it is where the log is of the past."""

import time

import pytest

from gr4ad_jax.data.records import DAY_S
from gr4ad_jax.serving.clock import Clock


def test_a_replayed_clock_stands_and_goes_with_events_only_forwards():
  clock = Clock("replay", begin_s=1_000)
  assert clock.now_s == 1_000 and clock.most_ahead_s == 40 * DAY_S
  clock.reached(1_500)
  clock.reached(1_200)
  assert clock.now_s == 1_500


def test_a_clock_of_the_log_begins_there_and_runs_whatever_events_say():
  clock = Clock("log", begin_s=1_000)
  clock.reached(5_000)
  begin_s = clock.now_s
  time.sleep(0.01)
  assert begin_s == pytest.approx(1_000, abs=5) and clock.now_s > begin_s
  assert clock.most_ahead_s == DAY_S
