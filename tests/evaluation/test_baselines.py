"""Baselines: by hand, against plain loops, and blind to the future."""

import dataclasses
from collections import defaultdict

import numpy as np
import pytest

from gr4ad_jax.data.interactions import Interactions, count_pairs
from gr4ad_jax.evaluation.baseline_settings import (
  BaselineSettings,
  CooccurrenceSettings,
  OwnHistorySettings,
  PopularitySettings,
)
from gr4ad_jax.evaluation.baseline_tuning import tune_baselines
from gr4ad_jax.evaluation.baselines import cooccurrence, own_history, popularity, similar_ads
from gr4ad_jax.evaluation.counter import counter
from gr4ad_jax.evaluation.question import Question, end_s_of_users
from gr4ad_jax.evaluation.rivals import rank_all
from gr4ad_jax.search.ranking import EvalRequests, ranking_metrics, recall_per_request

DAY = 86_400
BASELINES = pytest.mark.parametrize(
  "baseline", [popularity, own_history, cooccurrence, counter]
)


def events(rows):
  """Interactions from (user, day, ad, is_ad) rows, sorted here."""
  user, day, ad, is_ad = np.array(sorted(rows, key=lambda row: row[:2])).T
  return Interactions(user.astype(np.int32), ad.astype(np.int32), day * DAY, is_ad.astype(bool))


def ask(rows):
  """Requests from (user, day, target) rows."""
  user, day, target = np.array(rows).T
  shape = (len(rows), 1)
  return EvalRequests(
    user, day * DAY, target[:, None], np.ones(shape, np.float32), np.ones(shape, bool)
  )


def answer(baseline, logs, requests, *, settings, **options):
  return baseline(Question(logs, requests, **options), settings)


def tune(logs, requests, *, horizon_s=None, **options):
  return tune_baselines(Question(logs, requests, **options), horizon_s=horizon_s)


def random_rows(seed, *, users=6, ads=7, days=20, count=120):
  rng = np.random.default_rng(seed)
  columns = [rng.integers(high, size=count) for high in (users, days, ads, 2)]
  return list(zip(*(column.tolist() for column in columns), strict=True))


def settings(**cooccurrence_changes):
  """Every option away from its neutral value."""
  rule = {"count_half_life_s": 9 * DAY, "history_half_life_s": 5 * DAY, "organic_weight": 0.25}
  return BaselineSettings(
    PopularitySettings(7 * DAY, 0.5),
    dataclasses.replace(CooccurrenceSettings(), **(rule | cooccurrence_changes)),
    OwnHistorySettings(6 * DAY, 0.25),
  )


def test_popularity_by_hand():
  logs = events(
    [(0, 0, 1, 1), (0, 8, 2, 1), (1, 0, 1, 1), (1, 9, 3, 0), (1, 9, 3, 0), (1, 10, 4, 1)]
  )
  requests = ask([(0, 12, 0), (1, 11, 0)])
  # At day 10: ad 1 twice at age 10, ad 2 once at age 2, ad 3 twice organic at age 1, ad 4 not yet.
  for half_life, weight, expected in [
    (None, 0.0, [1, 2, 0, 3, 4]),  # 2, 1, then none, by index
    (None, 1.0, [1, 3, 2, 0, 4]),  # 2, 2, 1
    (5 * DAY, 0.0, [2, 1, 0, 3, 4]),  # 2 ** -0.4 = .76 against 2 * .25
    (5 * DAY, 1.0, [3, 2, 1, 0, 4]),
  ]:
    rule = BaselineSettings(popularity=PopularitySettings(half_life, weight))
    ranked = answer(popularity, logs, requests, settings=rule, num_ads=5, k=6, train_end_s=10 * DAY)
    assert ranked.tolist() == [[*expected, -1]] * 2


def test_own_history_by_hand():
  logs = events([
    (0, 0, 1, 1), (0, 1, 1, 1), (0, 8, 2, 1), (0, 9, 3, 0), (0, 10, 4, 1),
    (1, 0, 0, 1), (1, 1, 4, 1), (1, 2, 4, 1),
  ])  # fmt: skip
  requests = ask([(0, 10, 0), (0, 11, 0), (2, 10, 0)])
  rule = BaselineSettings(
    PopularitySettings(None, 0.0), own_history=OwnHistorySettings(4 * DAY, 0.5)
  )
  ranked = answer(own_history, logs, requests, settings=rule, num_ads=6, k=6, train_end_s=5 * DAY)
  # Until day 5: ads 1 and 4 twice, ad 0 once. Before day 10: ad 1 has 2^-2.5 + 2^-2.25 = .39,
  # ad 2 has 2^-.5 = .71, ad 3 half of 2^-.25 = .42; the rest by popularity.
  assert ranked[0].tolist() == [2, 3, 1, 4, 0, 5]
  # Before day 11 the user also has ad 4, 2^-.25 = .84.
  assert ranked[1].tolist() == [4, 2, 3, 1, 0, 5]
  # A user without a past gets the popular ads.
  assert ranked[2].tolist() == [1, 4, 0, 2, 3, 5]


def test_cooccurrence_by_hand():
  # Three users take ad 1 a day after ad 0, one takes ad 2 instead, and comes back to ad 0.
  logs = events([
    (0, 0, 0, 1), (0, 1, 1, 1), (1, 0, 0, 1), (1, 1, 1, 1), (2, 0, 0, 1), (2, 1, 1, 1),
    (3, 0, 0, 1), (3, 1, 2, 1), (3, 2, 0, 1), (4, 5, 0, 1),
  ])  # fmt: skip
  rule = CooccurrenceSettings(
    window=1, backward_weight=0.0, powers=(1.0, 0.0), shrinkage=0.0, count_half_life_s=None,
    history_half_life_s=None, organic_weight=1.0,
  )  # fmt: skip
  lists = {}
  for window in (1, 2):
    ranked = answer(
      cooccurrence, logs, ask([(4, 6, 0)]), num_ads=4, k=4, train_end_s=5 * DAY,
      settings=BaselineSettings(cooccurrence=dataclasses.replace(rule, window=window)),
    )  # fmt: skip
    lists[window] = ranked[0].tolist()
  # After ad 0 came ad 1 three times and ad 2 once; ads 0 and 3 follow by popularity.
  assert lists[1] == [1, 2, 0, 3]
  # Two steps away ad 0 came back once, as often as ad 2, and is more popular.
  assert lists[2] == [1, 0, 2, 3]


def pairs_by_loop(rows, *, end, num_ads, half_life, organic_weight, window, backward_weight):
  baskets = defaultdict(lambda: defaultdict(lambda: defaultdict(float)))
  for user, day, ad, is_ad in rows:
    if day < end:
      basket = baskets[user][day]
      basket[ad] = max(basket[ad], 1.0 if is_ad else organic_weight)
  pairs, source, target = np.zeros((num_ads, num_ads)), np.zeros(num_ads), np.zeros(num_ads)
  for of_user in baskets.values():
    days = sorted(of_user)
    for at, day in enumerate(days):
      for ad, weight in of_user[day].items():
        source[ad] += 0.5 ** ((end - day) / half_life)
        target[ad] += weight * 0.5 ** ((end - day) / half_life)
      for other in range(max(0, at - window), min(len(days), at + window + 1)):
        factor = 0.5 ** ((end - max(day, days[other])) / half_life)
        factor *= backward_weight if other < at else 1
        for i in of_user[day]:
          for j, weight in of_user[days[other]].items():
            if other != at or i != j:
              pairs[i, j] += factor * weight
  return pairs, source, target


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("backward_weight", [0.0, 0.5])
def test_pairs_equal_plain_loops(seed, window, backward_weight):
  rows = random_rows(seed)
  rule = {"organic_weight": 0.3, "window": window, "backward_weight": backward_weight}
  counts = count_pairs(
    events(rows), num_ads=7, end_s_U=np.full(6, 15 * DAY), half_life_s=4 * DAY, **rule
  )
  pairs, source, target = pairs_by_loop(rows, end=15, num_ads=7, half_life=4, **rule)
  np.testing.assert_allclose(counts.pairs_AA.toarray(), pairs, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(counts.source_A, source, rtol=1e-5)
  np.testing.assert_allclose(counts.target_A, target, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_cooccurrence_equals_plain_loops(seed):
  rows = random_rows(seed)
  rule = settings(window=2, powers=(0.75, 0.5), neighbours=7)
  requests = ask([(user, day, 0) for user in range(6) for day in (15, 18)])
  pairs, source, target = pairs_by_loop(
    rows, end=15, num_ads=7, half_life=9, organic_weight=0.25, window=2, backward_weight=0.5
  )
  similar = pairs / np.outer((source + 1) ** 0.75, (target + 1) ** 0.5)
  ranked = answer(
    cooccurrence, events(rows), requests, settings=rule, num_ads=7, k=7, train_end_s=15 * DAY
  )
  for row, (user, now) in enumerate(zip(requests.user_R, requests.time_s_R // DAY, strict=True)):
    history = np.zeros(7)
    for of, day, ad, is_ad in rows:
      if of == user and day < now:
        history[ad] += (1 if is_ad else 0.25) * 0.5 ** ((now - day) / 5)
    score = history @ similar
    # Every list is in falling order of the score, whatever rounding makes of equal ones.
    assert sorted(ranked[row].tolist()) == list(range(7))
    assert np.diff(score[ranked[row]]).max() <= 1e-6


def test_only_the_closest_neighbours_are_kept():
  logs = events([(u, 0, 0, 1) for u in range(6)] + [(u, 1, 1 + u // 3, 1) for u in range(5)]
                + [(9, 3, 0, 1)])  # fmt: skip
  lists = {}
  for neighbours in (1, 2):
    rule = settings(window=1, backward_weight=0.0, powers=(1.0, 0.0), neighbours=neighbours)
    rule = dataclasses.replace(rule, popularity=PopularitySettings(None, 0.0))
    ranked = answer(
      cooccurrence, logs, ask([(9, 4, 0)]), settings=rule, num_ads=3, k=3, train_end_s=3 * DAY
    )
    lists[neighbours] = ranked[0].tolist()
  assert lists == {1: [1, 0, 2], 2: [1, 2, 0]}  # without a score ad 0 is more popular than ad 2


def test_counted_pairs_can_be_used_again():
  counts = count_pairs(
    events(random_rows(0)), num_ads=7, end_s_U=np.full(6, 15 * DAY), half_life_s=None,
    organic_weight=1.0, window=1, backward_weight=1.0,
  )  # fmt: skip
  rule = CooccurrenceSettings(neighbours=2)
  first, again = similar_ads(counts, rule).toarray(), similar_ads(counts, rule).toarray()
  np.testing.assert_array_equal(first, again)


@BASELINES
@pytest.mark.parametrize("seed", range(3))
def test_the_future_changes_nothing(baseline, seed):
  """Events at or after a request's time, its own basket included, never enter its list."""
  rows = random_rows(seed)
  requests = ask([(user, 14, 0) for user in range(6)])
  options = {"settings": settings(), "num_ads": 7, "k": 7, "train_end_s": 14 * DAY}
  before = answer(baseline, events(rows), requests, **options)
  past = [row for row in rows if row[1] < 14]
  future = [(user, day + 3, 6 - ad, 1) for user, day, ad, _ in rows if day >= 14]
  at_once = [(user, 14, 3, 1) for user in range(6)]
  for other in (past, past + future, past + at_once):
    np.testing.assert_array_equal(answer(baseline, events(other), requests, **options), before)


@BASELINES
@pytest.mark.parametrize("seed", range(3))
def test_after_train_end_only_the_own_history_counts(baseline, seed):
  rows = random_rows(seed)
  requests = ask([(0, 18, 0), (1, 19, 0)])
  options = {"settings": settings(), "num_ads": 7, "k": 7, "train_end_s": 12 * DAY}
  before = answer(baseline, events(rows), requests, **options)
  others = [row if row[0] < 2 or row[1] < 12 else (*row[:2], 6 - row[2], 1) for row in rows]
  np.testing.assert_array_equal(answer(baseline, events(others), requests, **options), before)


@BASELINES
def test_lists_do_not_depend_on_the_other_requests(baseline):
  logs = events(random_rows(5))
  requests = ask([(user, 15 + user % 3, 0) for user in range(6)])
  options = {"settings": settings(), "num_ads": 7, "k": 4, "train_end_s": 14 * DAY}
  together = answer(baseline, logs, requests, **options)
  for row in range(6):
    alone = ask([(row, 15 + row % 3, 0)])
    np.testing.assert_array_equal(answer(baseline, logs, alone, **options)[0], together[row])


def test_leave_one_out_ends_at_the_own_request():
  logs = events([(0, 0, 1, 1), (0, 4, 2, 1), (1, 9, 3, 1), (2, 8, 4, 1)])
  requests = ask([(0, 4, 2), (1, 9, 3)])
  assert (end_s_of_users(logs, requests, None) // DAY).tolist() == [4, 9, 9]
  # Ad 2 and ad 3 are held out; ad 4 belongs to a user without a request, and counts.
  rule = BaselineSettings(popularity=PopularitySettings(None, 0.0))
  ranked = answer(popularity, logs, requests, settings=rule, num_ads=5, k=2, train_end_s=None)
  assert ranked.tolist() == [[1, 4], [1, 4]]
  per_user = np.array([4, 9, 0]) * DAY
  ranked = answer(popularity, logs, requests, settings=rule, num_ads=5, k=2, train_end_s=per_user)
  assert ranked.tolist() == [[1, 0], [1, 0]]


def test_rank_all_names_its_lists():
  logs, requests = events(random_rows(0)), ask([(0, 15, 0)])
  options = {"settings": settings(), "num_ads": 7, "k": 5, "train_end_s": 15 * DAY}
  lists = answer(rank_all, logs, requests, **options)
  assert list(lists) == [
    "popularity", "cooccurrence", "own_history", "counter", "rule", "trending"
  ]
  for baseline in (popularity, cooccurrence, own_history):
    ranked = answer(baseline, logs, requests, **options)
    np.testing.assert_array_equal(lists[baseline.__name__], ranked)


@BASELINES
def test_bad_input(baseline):
  logs, requests = events([(0, 0, 3, 1)]), ask([(0, 5, 0)])
  options = {"settings": BaselineSettings(), "k": 2}
  with pytest.raises(ValueError, match="the catalogue has 3 ads"):
    answer(baseline, logs, requests, num_ads=3, train_end_s=5 * DAY, **options)
  with pytest.raises(ValueError, match="request 0 is earlier than train_end_s"):
    answer(baseline, logs, requests, num_ads=4, train_end_s=5 * DAY + 1, **options)
  with pytest.raises(ValueError, match="0 entries for 1 users"):
    answer(baseline, logs, requests, num_ads=4, train_end_s=np.zeros(0), **options)


@pytest.mark.parametrize(
  "change, rule",
  [
    ({"ad_E": np.zeros(3, int)}, "ad_E has shape"),
    ({"ad_E": np.array([0, -1])}, "must not be negative"),
    ({"user_E": np.array([1, 0])}, "event 1 is out of order"),
    ({"time_s_E": np.array([5, 4])}, "event 1 is out of order"),
  ],
)
def test_bad_interactions(change, rule):
  good = {name: np.zeros(2, int) for name in ("user_E", "ad_E", "time_s_E", "is_ad_E")}
  with pytest.raises(ValueError, match=rule):
    Interactions(**(good | change))


def drifting_market():
  """What sells changes every ten days; users keep to two ads of their own, bought organically too.

  Returns rows of 90 days and requests of days 80 to 89.
  """
  rng = np.random.default_rng(0)
  rows, requests = [], []
  for user in range(40):
    for day in range(int(rng.integers(3)), 90, 3):
      ad = 20 + 2 * user + int(rng.integers(2)) if rng.random() < 0.5 else day // 10
      rows.append((user, day, ad, 1))
      rows.append((user, day, int(rng.integers(10, 20)), 0))
      if day >= 80:
        requests.append((user, day, ad))
  return rows, ask(requests)


def test_tuning_finds_what_helps():
  rows, requests = drifting_market()
  options = {"num_ads": 100, "k": 5, "train_end_s": 80 * DAY}
  tuned = tune(events(rows), requests, horizon_s=4 * DAY, **options)
  assert tuned.popularity.half_life_s < 10 * DAY  # not None: what sells changes
  # Organic events never become targets here, and popularity learns it.
  assert tuned.popularity.organic_weight == 0
  before = answer(rank_all, events(rows), requests, settings=BaselineSettings(), **options)
  after = answer(rank_all, events(rows), requests, settings=tuned, **options)
  for name in ("cooccurrence", "own_history", "rule", "trending"):
    recall = [recall_per_request(lists[name], requests, k=5).mean() for lists in (before, after)]
    assert recall[1] >= recall[0], name


def test_tuning_sees_nothing_after_validation():
  rows, requests = drifting_market()
  options = {"num_ads": 100, "k": 5, "train_end_s": 80 * DAY, "horizon_s": 9 * DAY}
  future = [(user, 100 + ad % 10, ad, 1) for user, _, ad, _ in rows[::2]]
  assert tune(events(rows + future), requests, **options) == tune(
    events(rows), requests, **options
  )


def test_tuning_of_a_short_log():
  # No period before the validation requests is long enough; they alone decide.
  logs = events(random_rows(0))
  tuned = tune(logs, ask([(0, 17, 3), (1, 18, 2)]), num_ads=7, k=2, train_end_s=16 * DAY)
  assert tuned.popularity.half_life_s is not None
  with pytest.raises(ValueError, match="horizon_s = -5"):
    tune(logs, ask([(0, 17, 3)]), num_ads=7, k=2, train_end_s=16 * DAY, horizon_s=-5)


def test_tuning_of_leave_one_out_does_not_age_counts():
  rows, requests = drifting_market()
  last = {int(user): row for row, user in enumerate(requests.user_R)}
  rows_of = np.array(list(last.values()))
  requests = ask(np.stack([
    requests.user_R[rows_of], requests.time_s_R[rows_of] // DAY, requests.target_RC[rows_of, 0]
  ]).T)  # fmt: skip
  tuned = tune(events(rows), requests, num_ads=100, k=5, train_end_s=None)
  assert tuned.popularity.half_life_s is None
  assert tuned.cooccurrence.count_half_life_s is None
  # No time is real: nothing trends, and the rule is own history.
  assert tuned.trending is None and tuned.rule.trending_weight == 0
  assert tuned.rule.own_history == tuned.own_history


def test_floor_of_amazon_beauty(shared_data):
  """The benchmark's co-occurrence floor, recall@10 .0651 in its own twenty lines of Python."""
  parquet = pytest.importorskip("pyarrow.parquet")
  table = parquet.read_table(shared_data / "amazon_beauty" / "interactions.parquet")
  user, position, item = (table[c].to_numpy() for c in ("user_id", "position", "item_id"))
  time_s = position.astype(np.int64)
  logs = Interactions(user, item, time_s, np.ones(len(user), bool))
  last = np.flatnonzero(np.append(np.diff(user) != 0, True))
  shape = (len(last), 1)
  requests = EvalRequests(
    user[last], time_s[last], item[last, None], np.ones(shape), np.ones(shape, bool)
  )
  rule = CooccurrenceSettings(
    window=1, backward_weight=0.5, powers=(0.0, 0.5), shrinkage=1.0, count_half_life_s=None,
    history_half_life_s=1.0, organic_weight=1.0,
  )  # fmt: skip
  ranked = answer(
    cooccurrence, logs, requests, num_ads=12_101, k=10, train_end_s=time_s[last - 1],
    settings=BaselineSettings(PopularitySettings(None), rule),
  )  # fmt: skip
  metrics = ranking_metrics(
    ranked, requests, advertiser_A=np.zeros(12_101, int), ks=(10,), bootstrap=1
  )
  assert metrics["recall@10"] == pytest.approx(0.0651, abs=0.002)
