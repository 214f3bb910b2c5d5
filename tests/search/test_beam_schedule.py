"""Beams by load: base at peak, wider while traffic leaves room, narrower in overload."""

import pytest

from gr4ad_jax.search.beam_schedule import ArrivalRate, TrafficAwareBeams, scaled_widths

# (factor, requests of a call) -> seconds; base capacity 100 requests a second.
CALL_S = {(0.5, 1): 0.006, (1.0, 1): 0.01, (1.6, 1): 0.016,
          (0.5, 4): 0.024, (1.0, 4): 0.04, (1.6, 4): 0.064}  # fmt: skip


def beams(**options) -> TrafficAwareBeams:
  return TrafficAwareBeams(CALL_S, **options)


def settled(chooser, rate, *, queue_share=0.0, start_s=0.0):
  """The factor after ten seconds at one rate."""
  for tick in range(100):
    chooser.choose(start_s + tick / 10, rate=rate, queue_share=queue_share)
  return chooser.factor


def test_widths_of_the_reference():
  assert scaled_widths((128, 256, 512), 1.6, widen_last=True) == (208, 408, 816)
  assert scaled_widths((128, 256, 512), 1.0, widen_last=True) == (128, 256, 512)
  assert scaled_widths((128, 256, 512), 1.6, widen_last=False) == (208, 408, 512)
  assert scaled_widths((128, 256, 500), 0.5, widen_last=False) == (64, 128, 248)
  assert scaled_widths((4, 8, 12), 0.5, widen_last=True) == (2, 4, 6)
  assert scaled_widths((1, 1), 0.1, widen_last=True) == (1, 1)


@pytest.mark.parametrize("rate, factor", [(0, 1.6), (25, 1.6), (50, 1.0), (60, 1.0), (95, 1.0)])
def test_factor_by_rate(rate, factor):
  """Full width up to 30 % of the capacity, base from 60 %; 50 % asks for 1.2: not there."""
  assert settled(beams(), rate) == factor


def test_never_below_base_at_peak_unless_overloaded():
  chooser = beams()
  assert settled(chooser, 500, queue_share=0.2) == 1.0
  assert settled(chooser, 500, queue_share=0.6, start_s=10) == 0.5
  # It stays narrow until the queue is well below what brought it about ...
  assert settled(chooser, 500, queue_share=0.4, start_s=20) == 0.5
  # ... and then comes back.
  assert settled(chooser, 500, queue_share=0.1, start_s=30) == 1.0


def test_narrows_at_once_and_widens_after_a_while():
  chooser = beams(dwell_s=2.0)
  assert settled(chooser, 10) == 1.6
  assert chooser.choose(10.0, rate=70, queue_share=0) == 1.0
  assert chooser.choose(11.9, rate=10, queue_share=0) == 1.0
  assert chooser.choose(12.1, rate=10, queue_share=0) == 1.6


def test_does_not_flap_at_a_threshold():
  """A rate that wavers by 5 % about the point where 1.6 just fits."""
  chooser, changes, before = beams(dwell_s=0.0), 0, None
  for tick in range(200):
    factor = chooser.choose(tick / 10, rate=30 * (1.03 if tick % 2 else 0.98), queue_share=0)
    changes += before is not None and factor != before
    before = factor
  assert changes <= 1


def test_a_call_that_has_waited_is_served_in_time():
  """Of 60 ms: 1.6 for four takes 64, for one 16; the schedule itself stays."""
  chooser = beams(target_s=0.06)
  assert settled(chooser, 10) == 1.6
  assert chooser.choose(11, rate=10, size=4) == 1.0
  assert chooser.choose(11, rate=10, size=1) == 1.6
  assert chooser.choose(11, rate=10, size=1, waited_s=0.05) == 1.0
  assert chooser.factor == 1.6
  # Too late for any: base widths, not fewer.
  assert chooser.choose(11, rate=10, size=4, waited_s=1.0) == 1.0


def test_who_comes_during_a_wide_call_is_answered_in_time():
  """1.6 takes 16 ms and base 10: into 20 ms do not fit both if one comes in the first 6 of 16."""
  assert settled(beams(target_s=0.027), 10) == 1.6
  assert settled(beams(target_s=0.020), 10) == 1.0  # 6 of a hundred would be late
  assert settled(beams(target_s=0.020), 1.5) == 1.6  # 0.9 of a hundred


def test_calls_side_by_side_let_nobody_wait():
  """As above, but who comes begins at once, and both take a quarter longer."""
  assert settled(beams(target_s=0.022), 10) == 1.0
  two = {"at_once": 2, "together": 1.25}
  assert settled(beams(target_s=0.022, **two), 10) == 1.6
  assert settled(beams(target_s=0.018, **two), 10) == 1.0  # 16 ms would become 20
  assert beams(**two).capacity == pytest.approx(160)
  chooser = beams(target_s=0.018, **two)
  assert settled(chooser, 0.1) == 1.6
  assert chooser.choose(20.0, rate=0.1, beside=True) == 1.0
  chooser.observe(1.0, 1, 0.0125, beside=True)  # as expected
  assert chooser.capacity == pytest.approx(160)


def test_a_slower_machine_has_less_room():
  chooser = beams()
  assert settled(chooser, 20) == 1.6 and chooser.capacity == pytest.approx(100)
  for _ in range(200):
    chooser.observe(1.6, 4, 0.128)
  assert chooser.capacity == pytest.approx(50, rel=0.01)
  assert chooser.choose(20.0, rate=20) == 1.0  # 40 % of what is left asks for 1.4: not there


def test_calls_that_vary_leave_less_room_than_steady_ones():
  """16 ms fit into 20 where all calls take 1.1 times as long, not where half take 0.8 and 1.4."""
  steady, varying = beams(target_s=0.02), beams(target_s=0.02)
  for _ in range(200):
    steady.observe(1.6, 1, 1.1 * 0.016)
    for ratio in (0.8, 1.4):
      varying.observe(1.6, 1, ratio * 0.016)
  assert varying.capacity == pytest.approx(steady.capacity, rel=0.03)
  for chooser, expected in ((steady, 1.6), (varying, 1.0)):
    settled(chooser, 0.1)
    assert chooser.choose(20.0, rate=0.1) == expected


@pytest.mark.parametrize("stalls, expected", [(10.0, 1.6), (3.0, 1.0)])
def test_narrower_beams_only_where_they_help(stalls, expected):
  """One call of twenty stalls: for longer than 45 ms at any widths, or at 1.6 (16 ms) alone."""
  chooser = beams(target_s=0.045)
  for number in range(300):
    chooser.observe(1.6, 1, 0.016 * (stalls if number % 20 == 0 else 1.0))
  assert settled(chooser, 1.0) == expected
  assert chooser.choose(20.0, rate=1.0) == expected
  for _ in range(300):
    chooser.observe(1.0, 1, 0.01)
  assert settled(chooser, 1.0, start_s=30.0) == 1.6  # the stalls are over


def test_a_pause_costs_wide_calls_no_more_seconds_than_others():
  """One call of ten takes 8 ms more: 18 instead of 10 at base, 24 instead of 16 at 1.6, not 29."""
  chooser = beams(target_s=0.026)
  for number in range(300):
    chooser.observe(1.0, 1, 0.018 if number % 10 == 0 else 0.01)
  assert settled(chooser, 0.1) == 1.6


def test_arrival_rate():
  rate = ArrivalRate(seconds=5.0)
  assert rate(0.0) == 0
  for tick in range(1000):
    rate.add(tick / 50)
  assert rate(20.0) == pytest.approx(50, rel=0.05)
  assert rate(40.0) < 1.5


def test_calls_may_be_of_several_requests_at_the_least():
  """A single request is filled up to the smallest batch, and takes as long."""
  chooser = TrafficAwareBeams({(1.0, 4): 0.04, (1.6, 4): 0.064, (1.0, 8): 0.07, (1.6, 8): 0.1})
  assert chooser.capacity == pytest.approx(8 / 0.07)
  assert settled(chooser, 2) == 1.6  # of the time 2 x 0.064 is filled
  assert settled(chooser, 30) == 1.0
