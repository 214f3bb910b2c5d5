"""Swing pairs: scores by hand and by brute force, which pairs are kept, and what counts."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr4ad_jax.data.tables import build_logs
from gr4ad_jax.embedding.cooccurrence import swing_pairs, training_interactions


def swing(*users, **options):
  """Pairs of a log in which user u meets the items users[u], in this order."""
  user_E = np.repeat(np.arange(len(users)), [len(items) for items in users]).astype(np.int32)
  item_E = np.array([item for items in users for item in items], np.int32)
  return swing_pairs(user_E, item_E, **{"num_items": 10} | options)


def as_dict(pairs):
  cells = zip(pairs.item_P.tolist(), pairs.neighbour_P.tolist(), strict=True)
  return dict(zip(cells, pairs.score_P.tolist(), strict=True))


def brute_force(users, *, alpha, max_items=None):
  """The definition, pair of users by pair of users."""
  kept = []
  for items in users:
    latest = list(dict.fromkeys(reversed(items)))  # distinct, last met first
    kept.append(set(latest[:max_items]))
  scores = {}
  for one, other in itertools.permutations(kept, 2):
    common = one & other
    for pair in itertools.permutations(common, 2):
      scores[pair] = scores.get(pair, 0) + 1 / (alpha + len(common))
  return scores


def test_scores_by_hand():
  # Users 0 and 1 share 0, 1, 2; each shares 0, 1 with user 2. Ordered pairs of users, alpha = 1:
  # (0, 1) gets 2 / 4 + 2 * 2 / 3, (0, 2) and (1, 2) get 2 / 4.
  pairs = swing([0, 1, 2], [2, 1, 0, 5], [1, 0, 7])
  close = 2 / 4 + 4 / 3
  assert pairs.item_P.tolist() == [0, 0, 1, 1, 2, 2]
  assert pairs.neighbour_P.tolist() == [1, 2, 0, 2, 0, 1]
  np.testing.assert_allclose(pairs.score_P, [close, 0.5, close, 0.5, 0.5, 0.5], rtol=1e-6)
  assert [column.dtype for column in vars(pairs).values()] == [np.int32, np.int32, np.float32]


def test_a_larger_alpha_brings_the_pairs_of_alike_and_unlike_users_together():
  users = ([0, 1, 2, 3], [0, 1, 2, 3], [8, 9], [8, 9])
  for alpha in (0.0, 1.0, 5.0):
    scores = as_dict(swing(*users, alpha=alpha))
    np.testing.assert_allclose(scores[0, 1] / scores[8, 9], (alpha + 2) / (alpha + 4), rtol=1e-6)


def test_users_who_share_one_item_say_nothing_and_neither_does_a_user_alone():
  assert not len(swing([0, 1], [0, 2], [3, 4, 5], [6], []).item_P)
  assert not len(swing([]).item_P)


def test_repeats_count_once():
  once = swing([0, 1], [0, 1, 2])
  again = swing([0, 1, 0, 0, 1], [0, 1, 2, 1])
  assert as_dict(once) == as_dict(again)


def test_user_numbers_may_be_any_and_users_may_be_interleaved():
  pairs = swing_pairs(
    np.array([7, 10**12, 7, 10**12]), np.array([3, 3, 4, 4]), num_items=5
  )
  np.testing.assert_allclose(list(as_dict(pairs).values()), [2 / 3] * 2, rtol=1e-6)
  assert list(as_dict(pairs)) == [(3, 4), (4, 3)]


def test_the_cap_on_a_users_items_keeps_those_met_last():
  # Of user 0, item 0 is met last of all and 1 before it, so that 2 goes.
  users = ([0, 2, 1, 0], [0, 1, 2])
  assert as_dict(swing(*users, max_items_per_user=3)).keys() == as_dict(swing(*users)).keys()
  capped = as_dict(swing(*users, [0, 1], [1, 2], max_items_per_user=2))
  # User 0 has {1, 0} left, user 1 {1, 2}.
  np.testing.assert_allclose([capped[0, 1], capped[1, 2]], [2 / 3, 2 / 3], rtol=1e-6)
  assert (0, 2) not in capped


def test_the_best_neighbours_are_kept_and_ties_go_to_the_lower_number():
  users = ([0, 1, 2, 3], [0, 1, 2, 3], [0, 3], [0, 3])
  pairs = swing(*users, max_neighbours=2)
  assert pairs.item_P.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
  assert pairs.neighbour_P.tolist() == [3, 1, 0, 2, 0, 1, 0, 1]


GRAPHS = st.integers(2, 9).flatmap(
  lambda num_items: st.tuples(
    st.just(num_items),
    st.lists(st.lists(st.integers(0, num_items - 1), max_size=12), min_size=1, max_size=9),
  )
)


@settings(max_examples=200, deadline=None)
@given(
  graph=GRAPHS,
  alpha=st.sampled_from([0.0, 0.5, 1.0, 20.0]),
  max_items=st.none() | st.integers(1, 6),
  max_neighbours=st.none() | st.integers(1, 5),
  block_entries=st.sampled_from([1, 3, 10, 2**20]),
)
def test_scores_are_those_of_the_definition(
  graph, alpha, max_items, max_neighbours, block_entries
):
  num_items, users = graph
  expected = brute_force(users, alpha=alpha, max_items=max_items)
  pairs = swing(
    *users, num_items=num_items, alpha=alpha, max_items_per_user=max_items,
    max_neighbours=max_neighbours, block_entries=block_entries,
  )
  found = as_dict(pairs)
  assert len(found) == len(pairs.item_P)  # no pair twice
  np.testing.assert_allclose(
    list(found.values()), [expected[pair] for pair in found], rtol=1e-6
  )
  order = sorted(found, key=lambda pair: (pair[0], -found[pair], pair[1]))
  assert list(found) == order
  for item in range(num_items):
    kept = [score for pair, score in found.items() if pair[0] == item]
    left = [score for pair, score in expected.items() if pair[0] == item and pair not in found]
    total = len(kept) + len(left)
    assert len(kept) == (total if max_neighbours is None else min(max_neighbours, total))
    assert not left or max(left) <= min(kept) * (1 + 1e-6)


def test_neither_the_names_of_users_nor_the_size_of_blocks_matter():
  rng = np.random.default_rng(0)
  user_E, item_E = rng.integers(0, 40, 600), rng.integers(0, 50, 600)
  renamed_U = rng.permutation(40)
  options = {"num_items": 50, "max_neighbours": 7}
  expected = swing_pairs(user_E, item_E, **options)
  for other in (
    swing_pairs(renamed_U[user_E], item_E, **options),
    swing_pairs(user_E, item_E, block_entries=64, **options),
  ):
    np.testing.assert_array_equal(other.item_P, expected.item_P)
    np.testing.assert_array_equal(other.neighbour_P, expected.neighbour_P)
    np.testing.assert_allclose(other.score_P, expected.score_P, rtol=1e-6)


def test_progress_counts_every_block():
  seen = []

  def progress(blocks, description, total):
    for block in blocks:
      yield block
      seen.append((description, total))

  rng = np.random.default_rng(0)
  swing_pairs(
    rng.integers(0, 20, 200), rng.integers(0, 30, 200), num_items=30, block_entries=50,
    progress=progress,
  )
  assert len(seen) > 1
  assert seen == [("swing pairs", len(seen))] * len(seen)


BAD_INPUTS = {
  "item_E: shape": {"item_E": np.array([0, 1, 2])},
  "item_E: dtype float64": {"item_E": np.array([0.0, 1.0])},
  "user_E: -1": {"user_E": np.array([-1, 0])},
  "item_E: 2, must be below num_items = 2": {"item_E": np.array([0, 2])},
  "num_items: 0": {"num_items": 0},
  "alpha: -1": {"alpha": -1},
  "alpha: nan": {"alpha": np.nan},
  "max_items_per_user: 0": {"max_items_per_user": 0},
  "max_neighbours: 0": {"max_neighbours": 0},
  "block_entries: 0": {"block_entries": 0},
}


@pytest.mark.parametrize("message, change", BAD_INPUTS.items(), ids=BAD_INPUTS.keys())
def test_arguments_out_of_range_are_refused(message, change):
  given = {"user_E": np.array([0, 1]), "item_E": np.array([0, 1]), "num_items": 2} | change
  with pytest.raises(ValueError, match=message):
    swing_pairs(given.pop("user_E"), given.pop("item_E"), **given)


def logs_of(rows, contents=None):
  """Rows (user, time, ad, content, action) over the ads a, b."""
  ads = pd.DataFrame({"ad_id": ["a", "b"], "advertiser_id": 1, "category": "x", "text": "y"})
  events = pd.DataFrame(rows, columns=["user_id", "time", "ad_id", "content_id", "action"])
  return build_logs(ads=ads, events=events, contents=contents, source="test", currency="EUR")


def test_clicks_conversions_and_organic_events_of_a_promoted_product_are_interactions():
  contents = pd.DataFrame({
    "content_id": ["p", "q"], "ad_id": ["b", None], "category": "x", "text": "y"
  })
  logs = logs_of(
    [
      ("u", 5, "a", None, "click"),
      ("u", 1, None, "p", "impression"),  # organic: whatever the action
      ("u", 2, None, "q", "conversion"),  # promotes nothing
      ("u", 3, "b", None, "impression"),
      ("v", 4, "b", None, "conversion"),
    ],
    contents,
  )
  user_E, ad_E = training_interactions(logs)
  assert user_E.tolist() == [0, 0, 1] and ad_E.tolist() == [1, 0, 1]
  user_E, ad_E = training_interactions(logs, logs.events.time_s < 5)
  assert user_E.tolist() == [0, 1] and ad_E.tolist() == [1, 1]
  assert user_E.dtype == ad_E.dtype == np.int32


def test_logs_without_contents_have_interactions_too():
  logs = logs_of([("u", 1, "a", None, "click"), ("u", 2, "b", None, "click")])
  assert training_interactions(logs)[1].tolist() == [0, 1]


def test_pairs_of_a_log_of_two_tastes_lie_within_a_taste(tiny_logs):
  pairs = swing_pairs(
    *training_interactions(tiny_logs), num_items=len(tiny_logs.ads.ad_id), max_neighbours=5
  )
  assert set(pairs.item_P.tolist()) == set(range(40))
  category_A = tiny_logs.ads.category
  same_P = category_A[pairs.item_P] == category_A[pairs.neighbour_P]
  assert same_P.mean() > 0.5  # a quarter by chance


def test_amazon_beauty_scores_are_those_of_the_definition(shared_data):
  interactions = pd.read_parquet(shared_data / "amazon_beauty" / "interactions.parquet")
  user_E = interactions["user_id"].to_numpy()
  items, item_E = np.unique(interactions["item_id"], return_inverse=True)
  pairs = swing_pairs(user_E, item_E, num_items=len(items))
  assert len(items) == 12_101
  assert len(pairs.item_P) == 120_684
  assert len(np.unique(pairs.item_P)) == 9_558  # the others share no two users with any item
  found, of_user = as_dict(pairs), interactions.assign(item=item_E).groupby("user_id")["item"]
  items_of_user = {user: set(items) for user, items in of_user}
  for pair in list(found)[::12_000]:
    both = [items for items in items_of_user.values() if items.issuperset(pair)]
    score = sum(1 / (1 + len(one & other)) for one, other in itertools.permutations(both, 2))
    np.testing.assert_allclose(found[pair], score, rtol=1e-6)
