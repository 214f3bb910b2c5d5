"""Neighbours of a history: counted anew by hand, and without what a request must not know."""

import collections
import dataclasses

import numpy as np
import pytest

from gr4ad_jax.data.examples import ExampleSet, training_events
from gr4ad_jax.data.neighbours import (
  ALIKE,
  LEAD,
  NUMBERS,
  UNIT_K,
  from_arrays,
  neighbour_numbers,
  neighbours,
  to_arrays,
)
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.data.splits import SequenceConfig
from gr4ad_jax.data.transitions import Transitions, content_terms

CONFIG = SequenceConfig(split="leave_one_out", num_trending=0)
EXAMPLES = ExampleSet(CONFIG, None, {}, {}, *[None] * 7)


def counted(logs, through="train"):
  return Transitions(logs, training_events(logs, EXAMPLES, through=through))


def requests(logs, split=0):
  maker = ExampleMaker(logs, CONFIG)
  return [e for user in (3, 8, 40) for e in maker.user_examples(user, split)]


def recount(logs, example, end_split):
  """All numbers [K, A] from the baskets of every user; those of the example's end before it."""
  events, num_ads = logs.events, len(logs.ads.ad_id)
  baskets = collections.defaultdict(dict)  # of the requests before the one that ends learning
  for user in range(len(logs.users.user_id)):
    rows = np.flatnonzero((events.user == user) & (events.ad >= 0))
    times = np.unique(events.time_s[rows])  # a request is of one time in these logs
    for row in rows:
      time_s = events.time_s[row]
      if time_s < times[end_split] and (user != example.user or time_s < example.time_s):
        baskets[user].setdefault(time_s, set()).add(events.ad[row])
  pairs_AA = np.zeros((num_ads, num_ads))
  for mine in baskets.values():
    in_order = [mine[time_s] for time_s in sorted(mine)]
    for a, first in enumerate(in_order):
      for b, then in enumerate(in_order[a : a + 6]):
        for i in first:
          for j in then:
            pairs_AA[i, j] += 0.7 ** (b - 1) if b else i != j
  weight_A = np.zeros(num_ads)
  weight_A[example.ad_T[:10]] = 0.6 ** np.arange(len(example.ad_T[:10]))
  chance_AA = pairs_AA / np.maximum(pairs_AA.sum(1, keepdims=True), 1e-9)
  followed_A, before_A = weight_A @ pairs_AA, pairs_AA @ weight_A
  content_AN = content_terms(logs.ads).toarray()
  return np.stack([
    followed_A, before_A, followed_A @ chance_AA, before_A @ chance_AA,
    weight_A @ content_AN @ content_AN.T, pairs_AA[example.ad_T[0]],
    (weight_A / (pairs_AA.sum(1) + 1)) @ pairs_AA, pairs_AA.sum(0),
  ])


@pytest.mark.parametrize("split, through, end", [
  (0, "train", -2), (1, "train", -2), (0, "validation", -1), (1, "validation", -1),
  (2, "validation", -1),
])
def test_numbers_are_a_recount_without_what_the_user_did_from_then_on(
  tiny_logs, split, through, end
):
  """In training, where the user's later engagements are counted, and where none of them are."""
  transitions = counted(tiny_logs, through)
  for example in [e for e in requests(tiny_logs, split) if len(e.ad_T)][::5]:
    own = transitions.own_pairs(example.user, example.time_s)
    assert bool(len(own.first_P)) == (split == 0 or split < 2 and through == "validation")
    number_KA = neighbour_numbers(transitions.table, example.ad_T, own)
    np.testing.assert_allclose(number_KA, recount(tiny_logs, example, end), atol=2e-4, rtol=1e-5)


def test_the_ad_to_be_found_does_not_stand_in_the_input(tiny_logs):
  """Whatever a training request's user engaged with then, its neighbours and numbers stay."""
  events, changed = tiny_logs.events, 0
  before = counted(tiny_logs)
  for example in [e for e in requests(tiny_logs) if len(e.ad_T)][3::9]:
    then_E = (events.user == example.user) & (events.time_s >= example.time_s) & (events.ad >= 0)
    other_E = np.where(then_E, (events.ad + 17) % 40, events.ad).astype(events.ad.dtype)
    after = counted(dataclasses.replace(
      tiny_logs, events=dataclasses.replace(events, ad=other_E)
    ))
    changed += (after.table.target_A != before.table.target_A).any()
    for was, now in zip(before.of(example, most=20), after.of(example, most=20), strict=True):
      np.testing.assert_array_equal(was, now)
  assert changed > 2


def test_neighbours_are_the_best_by_the_rule_and_never_met():
  """Ad 2 followed 3 times; ad 1 followed what followed; ad 3 is alike, half known; ad 0 is met."""
  number_KA = np.zeros((len(NUMBERS), 5))
  number_KA[:, 0] = 100
  number_KA[0, 2], number_KA[2, 1], number_KA[ALIKE, 3] = 3, 4, 2  # 3, .6 * 4, .6 * 2 * 5 / 10
  number_KA[LEAD, 3], number_KA[LEAD, 4] = 5, 20
  ad_N, number_XK = neighbours(number_KA, np.array([0, 7]), 6)  # ad 7 came later
  assert ad_N.tolist() == [2, 1, 3, 4, -1, -1] and number_XK.shape == (2 + 6, len(NUMBERS))
  value_XK = np.expm1(number_XK / 1024) / UNIT_K
  np.testing.assert_allclose(value_XK[2, 0], 3, rtol=2e-3)
  np.testing.assert_allclose(value_XK[4, [ALIKE, LEAD]], [2, 5], rtol=2e-3)
  assert (number_XK[1] == 0).all() and (number_XK[0] > 0).all()
  assert neighbours(number_KA, np.array([0]), 2)[0].tolist() == [2, 1]


def test_a_history_of_unknown_ads_has_the_ads_that_most_came_to(tiny_logs):
  transitions = counted(tiny_logs)
  number_KA = neighbour_numbers(transitions.table, np.array([40, 41]))
  ad_N, _ = neighbours(number_KA, np.zeros(0, np.int64), 5)
  lead_A = transitions.table.target_A
  np.testing.assert_allclose(np.sort(lead_A)[::-1][:5], lead_A[ad_N])


def test_a_table_goes_through_arrays(tiny_logs):
  table = counted(tiny_logs).table
  latest_T = np.array([3, 17, 25])
  np.testing.assert_array_equal(
    neighbour_numbers(from_arrays(to_arrays(table)), latest_T), neighbour_numbers(table, latest_T)
  )
