"""Requests that stage 3 asks about: which are made up, when, and what they know."""

import numpy as np

from gr4ad_jax.catalog.prepared import open_prepared
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.data.splits import SPLITS
from gr4ad_jax.gpr.asked import Logged, TrainingRequests, rehearsals_of

HOUR, DAY = 3_600, 86_400


def logged_of(*requests: tuple[int, int]) -> Logged:
  """Of (user, time) pairs, whose events stand in the same order."""
  user_N, time_s_N = np.array(requests).T
  number_N = np.arange(len(requests))
  return Logged(number_N, 100 + number_N, user_N, time_s_N)


def test_busy_users_are_asked_every_two_hours_of_the_peak_and_others_more_rarely():
  """Six users; the busiest have four requests, which is also the quantile of .8. Hours 0 to 10 and
  23 have requests, half of all hours have none. A user of two is asked half as often."""
  mornings = [(0, DAY * day + HOUR * at) for day, at in ((0, 0), (1, 1), (2, 2), (3, 3))]
  others = [(1, 4 * HOUR), (1, 5 * HOUR), (2, 6 * HOUR), (3, 7 * HOUR), (3, 8 * HOUR),
            (3, 9 * HOUR), (3, 10 * HOUR), (4, 10 * HOUR), (4, DAY), (4, 2 * DAY), (4, 3 * DAY)]
  last = (5, 4 * DAY - 1)  # the log ends with a day; its user has none before
  found = rehearsals_of(logged_of(*mornings, *others, last), seed=0)
  assert found.time_s_M.min() >= 3 * DAY and found.time_s_M.max() < 4 * DAY

  def stops(user: int) -> np.ndarray:
    return np.sort(found.time_s_M[found.user_M == user])

  for user, rarer in ((0, 1), (3, 1), (4, 1), (1, 2), (2, 4)):
    at = stops(user)
    peak = (at[:-1] % DAY < 11 * HOUR) | (at[:-1] % DAY >= 23 * HOUR)
    np.testing.assert_array_equal(np.diff(at), np.where(peak, 2 * HOUR, 4 * HOUR) * rarer)
    assert at[0] - 3 * DAY < 2 * HOUR * rarer and at[-1] + 4 * HOUR * rarer >= 4 * DAY
  assert len(stops(0)) in (8, 9, 10) and len(stops(2)) in (2, 3)
  assert not len(stops(5))


def test_a_rehearsal_has_the_features_of_one_of_the_latest_twenty_requests_before_it():
  times = [(0, HOUR * at) for at in range(30)] + [(0, 3 * DAY + HOUR * at) for at in range(24)]
  logged = logged_of(*times)
  found = rehearsals_of(logged, seed=1)
  ages = []
  for time_s, row in zip(found.time_s_M, found.row_M, strict=True):
    before = [at for at, (_, asked_s) in enumerate(times) if asked_s < time_s]
    assert row - 100 in before[-20:]
    ages.append(len(before) - 1 - (row - 100))
  assert max(ages) > 5


def test_a_rehearsal_knows_what_came_before_it_and_no_more(tiny_data):
  data = open_prepared(str(tiny_data), str(tiny_data / "sids"))
  users = ExampleMaker(data.logs, data.examples.config, vocabulary=data.examples.features)
  plain = TrainingRequests(users)
  requests = TrainingRequests(users, rehearsal_share=0.3)
  rng = np.random.default_rng
  drawn = requests.draw(rng(0), 40)
  first = len(users.first_s_R)
  assert len(drawn) == 40 == len(np.unique(drawn)) and (drawn >= first).sum() == 12
  learned = np.flatnonzero(users.split_R == SPLITS.index("train"))
  assert np.isin(drawn[drawn < first], learned).all()
  end_s = users.first_s_R[requests.logged.number_N].max()
  for number in drawn[drawn >= first].tolist():
    context = requests.context(number)
    assert end_s - DAY < context.time_s <= end_s and context.request == -1
    past = users.past(context.user)
    before = past.ad_time_s < context.time_s
    assert context.past_value == past.ad_value[before].sum()
    asked = requests.logged.user_N == context.user
    earlier = requests.logged.row_N[asked & (requests.logged.time_s_N < context.time_s)]
    assert any((context.feature_F == users.feature(context.user, row)).all() for row in earlier)
  without = plain.draw(rng(0), 40)
  np.testing.assert_array_equal(
    without, np.sort(rng(0).permutation(plain.logged.number_N)[:40])
  )
