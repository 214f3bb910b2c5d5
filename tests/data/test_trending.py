"""Trending ads by hand; no request sees its own hour."""

import dataclasses

import numpy as np
import pytest

from gr4ad_jax.data.records import Action
from gr4ad_jax.data.trending import (
  LiveTrending,
  build_trending,
  load_trending,
  save_trending,
  share_bucket,
)
from gr4ad_jax.data.validation import LogError


def test_shares_decay_and_leave_out_the_hour_itself(tiny_logs):
  trending = build_trending(tiny_logs)
  events = tiny_logs.events
  ads = events.ad >= 0
  ad_E, hour_E = events.ad[ads], events.time_s[ads] // 3600
  last = len(trending.ad_DN) - 1
  for row in (1, 17, last // 2, last):
    hour = int(trending.table.first_period) + row
    age_E = hour - hour_E

    def share(weight_E, age_E=age_E):
      score_A = np.bincount(ad_E, np.where(age_E > 0, weight_E, 0), 40)
      return score_A / max(score_A.sum(), 1e-9)

    share_A, kept = share(0.5 ** (age_E / 72)), trending.listed(row)
    assert set(kept.tolist()) == set(np.flatnonzero(share_A).tolist())
    assert (np.diff(share_A[kept]) <= 1e-9).all()
    np.testing.assert_array_equal(
      trending.bucket_of(row, np.arange(40)), np.where(share_A > 0, share_bucket(share_A), 0),
    )
    monday_E, monday = (hour_E - 96) // 168, (hour - 96) // 168
    expected_HA = [
      *(share(0.5 ** (age_E / 24 / days)) for days in (0.125, 0.5, 1.5, 7, 28)),
      share(hour_E // 24 == hour // 24), share(monday_E == monday),
    ]
    np.testing.assert_allclose(
      trending.shares(row, np.arange(40)).T, expected_HA, rtol=1e-5, atol=1e-7
    )


def earlier(logs, cut_s):
  """The logs up to a time."""
  events = logs.events
  past = events.time_s < cut_s
  return dataclasses.replace(logs, events=dataclasses.replace(
    events, features={}, **{
      f.name: getattr(events, f.name)[past] for f in dataclasses.fields(events)
      if f.name != "features"
    }))


def assert_same_rows(a, b):
  """a and the first rows of b."""
  rows, known = len(a.ad_DN), np.arange(40)
  np.testing.assert_array_equal(a.ad_DN, b.ad_DN[:rows])
  np.testing.assert_array_equal(a.bucket_DN, b.bucket_DN[:rows])
  for row in range(rows):
    np.testing.assert_allclose(a.shares(row, known), b.shares(row, known), rtol=1e-5, atol=1e-9)


def test_the_future_does_not_leak(tiny_logs):
  cut_s = int(np.median(tiny_logs.events.time_s)) // 3600 * 3600
  assert_same_rows(build_trending(earlier(tiny_logs, cut_s)), build_trending(tiny_logs))


def test_a_request_sees_the_row_of_its_own_hour(tiny_logs):
  """Which knows the hours before; a row later would give the hour itself away."""
  trending = build_trending(tiny_logs)
  begin_s = int(trending.table.first_period) * 3600
  times = np.array([begin_s, begin_s + 3 * 3600 - 1, begin_s + 3 * 3600])
  assert trending.rows(times).tolist() == [0, 2, 3]


def test_times_outside_the_log_take_the_nearest_hour(tiny_logs, tmp_path):
  trending = build_trending(tiny_logs)
  save_trending(trending, tmp_path / "t.npz")
  again = load_trending(tmp_path / "t.npz")
  assert_same_rows(trending, again)
  last = len(trending.ad_DN) - 1
  assert again.rows(np.array([0, 10**12])).tolist() == [0, last]
  assert share_bucket(np.array([0, 2.0**-16, 0.5, 1])).tolist() == [0, 0, 30, 31]


def test_shares_of_an_earlier_version_say_how_to_make_them_again(tmp_path):
  np.savez(tmp_path / "t.npz", first_day=17_000)
  with pytest.raises(LogError, match="an earlier version prepared it.*prepare --overwrite"):
    load_trending(tmp_path / "t.npz")


def test_live_shares_are_those_of_a_log_that_has_grown(tiny_logs):
  """The log's first days, and the rest hour by hour as it comes, against the whole log at once."""
  events = tiny_logs.events
  whole = build_trending(tiny_logs)
  cut_s = (int(whole.table.first_period) + len(whole.ad_DN) // 2) * 3600
  live = LiveTrending(earlier(tiny_logs, cut_s))
  order = np.argsort(events.time_s, kind="stable")
  for row in order[events.time_s[order] >= cut_s]:
    if events.ad[row] >= 0 and events.action[row] >= Action.CLICK:
      live.at(events.time_s[row])
      live.add(events.ad[row : row + 1])
  grown = live.at(events.time_s.max() + 3600)
  assert grown.table.first_period == whole.table.first_period
  assert_same_rows(grown, whole)


def test_after_years_of_silence_shares_are_as_if_every_hour_had_been_asked_for(tiny_logs):
  last_s = int(tiny_logs.events.time_s.max())
  jumped, stepped = LiveTrending(tiny_logs), LiveTrending(tiny_logs)
  for live in (jumped, stepped):
    live.at(last_s)
    live.add(np.array([3, 3, 5]))  # the log's last hour has these, too
  for day in range(50, 130, 40):
    steps = stepped.at(last_s + day * 86_400)
  first = jumped.at(last_s + 90 * 86_400)
  assert len(first.ad_DN) == 1 < len(steps.ad_DN)
  live_ads = np.arange(40)

  def both_agree(jump, step):
    assert jump.listed(-1).tolist() == step.listed(-1).tolist()
    assert jump.bucket_DN[-1].tolist() == step.bucket_DN[-1].tolist()
    shares = [x.shares(len(x.ad_DN) - 1, live_ads) for x in (jump, step)]
    assert np.allclose(*shares, rtol=1e-5) and shares[0].max() > 0.01

  both_agree(first, steps)
  for live in (jumped, stepped):
    live.add(np.array([7]))
  now_s = last_s + 90 * 86_400 + 7200
  both_agree(jumped.at(now_s), stepped.at(now_s))
  decades = LiveTrending(tiny_logs).at(last_s + 30 * 365 * 86_400)
  assert len(decades.ad_DN) == 1 and np.isfinite(decades.shares(0, live_ads)).all()


def test_live_shares_know_ads_that_came_later(tiny_logs):
  live, new = LiveTrending(tiny_logs), len(tiny_logs.ads.ad_id)
  now_s = tiny_logs.events.time_s.max()
  live.at(now_s)
  live.add(np.array([new] * 10_000 + [-1]))
  assert live.at(now_s + 3600 * 2).ad_DN[-1, 0] == new
