"""Trending ads by hand; no request sees its own day."""

import dataclasses

import numpy as np

from gr4ad_jax.data.records import DAY_S, Action
from gr4ad_jax.data.trending import (
  LiveTrending,
  build_trending,
  load_trending,
  save_trending,
  share_bucket,
)


def test_shares_decay_and_leave_out_the_day_itself(tiny_logs):
  trending = build_trending(tiny_logs)
  events = tiny_logs.events
  ads = events.ad >= 0
  day_E = events.time_s[ads] // 86400
  for row in (1, 17, len(trending.ad_DN) - 1):
    age = trending.first_day + row - 1 - day_E
    weight = np.where(age >= 0, 0.5 ** (np.maximum(age, 0) / 3.0), 0)
    score_A = np.bincount(events.ad[ads], weights=weight, minlength=40)
    kept = trending.ad_DN[row][trending.ad_DN[row] >= 0]
    assert set(kept.tolist()) == set(np.flatnonzero(score_A).tolist())
    assert (np.diff(score_A[kept]) <= 1e-9).all()
    np.testing.assert_array_equal(
      trending.bucket_of(row, np.arange(40)),
      np.where(score_A > 0, share_bucket(score_A / score_A.sum()), 0),
    )
    shares = trending.shares(row)
    for place, half_life in enumerate((1.5, 7, 28)):
      weight = np.where(age >= 0, 0.5 ** (np.maximum(age, 0) / half_life), 0)
      score_A = np.bincount(events.ad[ads], weights=weight, minlength=40)
      np.testing.assert_allclose(
        shares.share_NH[:, place], score_A[shares.ad_N] / score_A.sum(), rtol=1e-5
      )


def test_the_future_does_not_leak(tiny_logs):
  events = tiny_logs.events
  cut_s = int(np.median(events.time_s)) // 86400 * 86400
  past = events.time_s < cut_s
  shorter = dataclasses.replace(tiny_logs, events=dataclasses.replace(
    events, features={}, **{
      f.name: getattr(events, f.name)[past] for f in dataclasses.fields(events)
      if f.name != "features"
    }))
  a, b = build_trending(shorter), build_trending(tiny_logs)
  rows = len(a.ad_DN)
  np.testing.assert_array_equal(a.ad_DN, b.ad_DN[:rows])
  np.testing.assert_array_equal(a.bucket_DN, b.bucket_DN[:rows])
  np.testing.assert_array_equal(a.share_DNH, b.share_DNH[:rows])


def test_a_request_sees_the_row_of_its_own_day(tiny_logs):
  """Which knows the days before; a row later would give the day itself away."""
  trending = build_trending(tiny_logs)
  begin_s = trending.first_day * DAY_S
  times = np.array([begin_s, begin_s + 3 * DAY_S - 1, begin_s + 3 * DAY_S])
  assert trending.rows(times).tolist() == [0, 2, 3]


def test_times_outside_the_log_take_the_nearest_day(tiny_logs, tmp_path):
  trending = build_trending(tiny_logs)
  save_trending(trending, tmp_path / "t.npz")
  again = load_trending(tmp_path / "t.npz")
  np.testing.assert_array_equal(again.ad_DN, trending.ad_DN)
  np.testing.assert_array_equal(again.share_DNH, trending.share_DNH)
  last = len(trending.ad_DN) - 1
  assert again.rows(np.array([0, 10**12])).tolist() == [0, last]
  assert share_bucket(np.array([0, 2.0**-16, 0.5, 1])).tolist() == [0, 0, 30, 31]


def test_live_shares_are_those_of_a_log_that_has_grown(tiny_logs):
  """The log's first days, and the rest day by day as it comes, against the whole log at once."""
  events = tiny_logs.events
  whole = build_trending(tiny_logs)
  cut_s = (whole.first_day + len(whole.ad_DN) // 2) * DAY_S
  first = events.time_s < cut_s
  short = dataclasses.replace(tiny_logs, events=dataclasses.replace(
    events, features={}, **{
      f.name: getattr(events, f.name)[first] for f in dataclasses.fields(events)
      if f.name != "features"
    }))
  live = LiveTrending(short)
  order = np.argsort(events.time_s, kind="stable")
  for row in order[events.time_s[order] >= cut_s]:
    if events.ad[row] >= 0 and events.action[row] >= Action.CLICK:
      live.at(events.time_s[row])
      live.add(events.ad[row : row + 1])
  grown = live.at(events.time_s.max() + DAY_S)
  assert grown.first_day == whole.first_day
  np.testing.assert_array_equal(grown.bucket_DN, whole.bucket_DN)
  np.testing.assert_array_equal(grown.ad_DN, whole.ad_DN)
  np.testing.assert_allclose(grown.share_DNH, whole.share_DNH, rtol=1e-6)


def test_live_shares_know_ads_that_came_later(tiny_logs):
  live, new = LiveTrending(tiny_logs), len(tiny_logs.ads.ad_id)
  now_s = tiny_logs.events.time_s.max()
  live.at(now_s)
  live.add(np.array([new] * 10_000 + [-1]))
  assert live.at(now_s + DAY_S * 2).ad_DN[-1, 0] == new
