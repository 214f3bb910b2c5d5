"""Trending ads, the rule of two terms, and lists without what was seen, by hand."""

import numpy as np
import pytest

from gr4ad_jax.data.interactions import Interactions, trending_shares
from gr4ad_jax.evaluation.baseline_settings import (
  BaselineSettings,
  OwnHistorySettings,
  PopularitySettings,
  RuleSettings,
  TrendingSettings,
)
from gr4ad_jax.evaluation.baseline_tuning import tune_baselines
from gr4ad_jax.evaluation.question import Question
from gr4ad_jax.evaluation.rivals import BASELINES, rank_all
from gr4ad_jax.evaluation.rule import rule, trending
from gr4ad_jax.search.ranking import EvalRequests, only_new, prospecting_metrics

DAY = 86_400
# (user, day, ad, is_ad): ad 0 was everybody's, ad 1 is today's, ad 2 is user 0's own, ad 3 sells
# without being promoted.
ROWS = [
  (0, 0, 0, 1), (1, 0, 0, 1), (2, 0, 0, 1), (3, 0, 0, 1),
  (1, 2, 1, 1), (2, 2, 1, 1),
  (0, 1, 2, 1), (3, 2, 3, 0), (0, 3, 1, 1),
]  # fmt: skip


def events(rows):
  """Interactions from (user, day, ad, is_ad) rows; days may be fractions."""
  user, day, ad, is_ad = np.array(sorted(rows, key=lambda row: row[:2])).T
  time_s = (day * DAY).astype(np.int64)
  return Interactions(user.astype(np.int32), ad.astype(np.int32), time_s, is_ad.astype(bool))


def ask(rows, *, new=True):
  """Requests from (user, day, target) rows."""
  user, day, target = np.array(rows).T
  shape = (len(rows), 1)
  return EvalRequests(
    user.astype(np.int32), (day * DAY).astype(np.int64), target[:, None].astype(np.int32),
    np.ones(shape, np.float32), np.full(shape, new),
  )


def question(rows=ROWS, requests=None, **options):
  requests = ask([(0, 3.5, 1)]) if requests is None else requests
  options = {"num_ads": 5, "k": 5, "train_end_s": 2 * DAY} | options
  return Question(events(rows), requests, **options)


def test_shares_by_hand():
  share_DA, row_R = trending_shares(
    events(ROWS), time_s_R=np.array([3.5, 1, 3, 0.2]) * DAY, num_ads=5, half_life_days=1.0
  )
  assert row_R.tolist() == [3, 1, 2, 0]
  # At first there are four of ad 0; ad 2 comes within the hour of day 1. On day 3: ad 0 four times
  # 2^-3, ad 2 once 2^-2, ad 1 twice 2^-1; not that of this very hour, and nothing organic. Half a
  # day later that counts too, as much as both of the day before.
  np.testing.assert_allclose(share_DA[:2], [[1, 0, 0, 0, 0]] * 2)
  np.testing.assert_allclose(share_DA[2], np.array([0.5, 1, 0.25, 0, 0]) / 1.75, rtol=1e-6)
  np.testing.assert_allclose(share_DA[3], np.array([0.5, 2, 0.25, 0, 0]) / 2.75, rtol=1e-6)


def test_trending_by_hand():
  for half_life, expected in ((1.0, [1, 0, 2, 3, 4]), (28.0, [0, 1, 2, 3, 4])):
    settings = BaselineSettings(
      PopularitySettings(None, 1.0), trending=TrendingSettings(half_life)
    )
    # Ads 3 and 4 have no share; by day 2, where training ends, neither was met.
    assert trending(question(), settings).tolist() == [expected]
  with pytest.raises(ValueError, match="settings.trending is None"):
    trending(question(), BaselineSettings(trending=None))


def test_rule_by_hand():
  asked = question(k=3)
  own = OwnHistorySettings(half_life_s=1.25 * DAY, organic_weight=1.0)
  # User 0 at day 3.5: ad 0 at age 3.5 counts 2^-2.8 = .144, ad 2 at 2.5 counts 2^-2 = .25, ad 1 at
  # .5 counts 2^-.4 = .758. Shares then, half-life 1: .182, .091 and .727 (test above).
  for weight, expected in ((0.0, [1, 2, 0]), (1.0, [1, 2, 0]), (2.0, [1, 0, 2])):
    # .144 + .182 < .25 + .091, but .144 + .364 > .25 + .182.
    settings = RuleSettings(own, TrendingSettings(1.0), trending_weight=weight)
    assert rule(asked, BaselineSettings(rule=settings)).tolist() == [expected]


@pytest.mark.parametrize("baseline", [rule, trending])
def test_nothing_of_the_request_s_own_hour_or_later_trends(baseline):
  rows = [row for row in ROWS if row[0] != 0]
  requests = ask([(0, 2.5, 1)])
  past = [row for row in rows if row[1] < 2.5]
  later = [(user, 2.51, 4, 1) for user in range(1, 4)] + [(1, 7, 3, 1)]
  lists = [
    baseline(question(past + more, requests, train_end_s=DAY), BaselineSettings()).tolist()
    for more in ([], later)
  ]
  assert lists[0] == lists[1]


def test_lists_without_what_was_seen():
  # User 0 has had ads 0, 1, 2; user 3 ads 0 and, without promotion, 3.
  asked = question(requests=ask([(0, 3.5, 3), (3, 3.5, 1), (4, 3.5, 1)]), without_seen=True)
  lists = rank_all(asked, BaselineSettings())
  assert list(lists) == [baseline.__name__ for baseline in BASELINES]
  for name, ranked_RK in lists.items():
    assert sorted(ranked_RK[0].tolist()) == [-1, -1, -1, 3, 4], name
    assert sorted(ranked_RK[1].tolist()) == [-1, -1, 1, 2, 4], name
    assert sorted(ranked_RK[2].tolist()) == [0, 1, 2, 3, 4], name
    assert (ranked_RK[0, 2:] == -1).all() and (ranked_RK[1, 3:] == -1).all()
  assert lists["trending"][1].tolist() == [1, 2, 4, -1, -1]


def test_a_seen_ad_makes_room_for_the_next_one():
  asked = question(requests=ask([(3, 3.5, 1)]), without_seen=True, k=2)
  assert trending(asked, BaselineSettings()).tolist() == [[1, 2]]


def test_prospecting_counts_new_targets_alone():
  requests = EvalRequests(
    np.array([0, 1, 2]), np.zeros(3, np.int64), np.array([[0, 1], [2, -1], [3, 0]]),
    np.array([[1, 3], [5, 0], [2, 2]], np.float32),
    np.array([[False, True], [False, True], [True, True]]),
  )
  metrics = prospecting_metrics(
    np.array([[1, 4], [2, 0], [0, 1]]), requests, advertiser_A=np.arange(5), ks=(2,), bootstrap=50
  )
  # Request 0 asks for ad 1 and finds it, request 1 for nothing, request 2 finds one of two.
  assert metrics["prospecting/recall@2"] == pytest.approx(0.75)
  assert metrics["prospecting/value_recall@2"] == pytest.approx(5 / 7)
  assert metrics["prospecting/recall@2/ci_low"] <= 0.75 <= metrics["prospecting/recall@2/ci_high"]
  assert all(name.startswith("prospecting/") for name in metrics)
  kept = only_new(requests)
  assert kept.user_R.tolist() == [0, 2] and kept.target_RC.tolist() == [[-1, 1], [3, 0]]
  nothing = ask([(0, 0, 0)], new=False)
  assert prospecting_metrics(np.zeros((1, 1), int), nothing, advertiser_A=np.arange(1)) == {}


def fashions():
  """Each day has an ad of its own, which half of the users take; all keep to an ad of theirs."""
  rows, requests = [], []
  for day in range(40):
    for user in range(10):
      if user % 2:
        rows.append((user, day, day // 4, 1))
      elif (day + user) % 3 == 0:
        rows.append((user, day, 10 + user, 1))
      if day >= 30:
        requests.append((user, day, day // 4 if user % 2 else 10 + user))
  return rows, ask(requests)


def test_the_rule_s_weights_are_chosen():
  rows, requests = fashions()
  # Lists of one: odd users want what is in fashion, even users what they have always had.
  asked = question(rows, requests, num_ads=20, k=1, train_end_s=30 * DAY)
  tuned = tune_baselines(asked)
  assert tuned.trending == TrendingSettings(0.25) and tuned.rule.trending_weight > 0
  lists = rank_all(asked, tuned)
  found = {name: (list_RK == requests.target_RC).mean() for name, list_RK in lists.items()}
  assert found["rule"] > max(found["own_history"], found["trending"]) + 0.1


def test_tuning_for_new_targets_sees_no_others():
  rows, requests = fashions()
  # What was met before is no target, as the lists cannot hold it.
  new_RC = np.array([[day % 4 == 2 and user % 2 == 1] for user, day in zip(
    requests.user_R, requests.time_s_R // DAY, strict=True)])  # fmt: skip
  marked = EvalRequests(
    requests.user_R, requests.time_s_R, requests.target_RC, requests.value_RC, new_RC
  )
  options = {"num_ads": 20, "k": 1, "train_end_s": 30 * DAY, "without_seen": True}
  other = EvalRequests(
    requests.user_R, requests.time_s_R, np.where(new_RC, requests.target_RC, 19),
    requests.value_RC, new_RC,
  )
  tuned = [tune_baselines(question(rows, asked, **options)) for asked in (marked, other)]
  assert tuned[0] == tuned[1]
  nothing = EvalRequests(
    requests.user_R, requests.time_s_R, requests.target_RC, requests.value_RC,
    np.zeros_like(new_RC),
  )
  with pytest.raises(ValueError, match="EvalRequests holds no request"):
    tune_baselines(question(rows, nothing, **options))
