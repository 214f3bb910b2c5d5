"""Rivals by hand, the linear logit by brute force, and what cross-fitting takes out."""

import numpy as np
import pytest

from gr4ad_jax.advertiser.config import PrepareConfig
from gr4ad_jax.advertiser.evaluate import compare, evaluate_rivals
from gr4ad_jax.advertiser.histories import make_rows
from gr4ad_jax.advertiser.prepared import Prepared, open_advertisers, prepare
from gr4ad_jax.advertiser.rival_features import (
  FEATURES,
  NUM_FOLDS,
  Titles,
  count,
  cross_fitted,
  features,
)
from gr4ad_jax.advertiser.rivals import fit_logit, ranked, rivals
from gr4ad_jax.advertiser.two_tower import TowerRows, Towers, fit_towers, scores
from gr4ad_jax.config import ConfigError
from tests.advertiser import support


def _rows(*rows):
  return make_rows((user, 0, np.array(items, int), np.full(len(items), -1), target)
                   for user, items, target in rows)  # fmt: skip


def _data(streams, *, train=(), test=(), num_users=6):
  """Four items of the advertisers A, A, B, C."""
  streams = _rows(*((user, items, -1) for user, items in streams))
  advertiser_N = np.array([0, 0, 1, 2], np.int32)
  return Prepared(
    PrepareConfig(), np.array(["A", "B", "C"], object), advertiser_N,
    np.array(["saw", "drill", "nail", ""], object),
    np.array([f"u{n}" for n in range(num_users)], object), streams,
    {"train": _rows(*train), "validation": _rows((5, [3], 0)), "test": _rows(*test)}, {},
    {0: np.bincount(advertiser_N[streams.item_E], minlength=3)}, "by hand", "",
  )


STREAMS = [(0, [0, 1, 2]), (1, [0, 2]), (2, [3]), (3, [0, 3])]
ITEM_ND = np.array([[1, 0], [0, 1], [0.6, 0.8], [0, 0]], np.float32)
VECTORS = Titles(ITEM_ND, np.array([[0.5**0.5, 0.5**0.5], [0.6, 0.8], [0, 0]], np.float32))


def test_company_counts_users_once():
  counts = count(_data(STREAMS))
  # A: users 0, 1, 3; B: 0, 1; C: 2, 3. A and B share two users, A and C one.
  assert counts.count_A.tolist() == [3, 2, 2]
  ab, ac = 2 / 6**0.5, 1 / 6**0.5
  np.testing.assert_allclose(
    counts.cosine_AA.toarray(), [[0, ab, ac], [ab, 0, 0], [ac, 0, 0]], atol=1e-12
  )
  some = count(_data(STREAMS), np.array([False, True, True, True, True, True]))
  assert some.count_A.tolist() == [2, 1, 2]


def test_features_by_hand():
  data = _data(STREAMS)
  x_RAF = features(data, _rows((0, [0, 1, 2], -1), (1, [], -1)), count(data), VECTORS)
  of = {name: x_RAF[..., f] for f, name in enumerate(FEATURES)}
  popular = np.log1p([4, 2, 2])
  np.testing.assert_allclose(of["popularity"], [popular, popular], rtol=1e-6)
  assert of["bought"].tolist() == [[1, 1, 0], [0, 0, 0]]
  np.testing.assert_allclose(of["times"][0], np.log1p([2, 1, 0]), rtol=1e-6)
  assert of["recency"].tolist() == [[0.5, 1, 0], [0, 0, 0]]
  assert of["last"].tolist() == [[0, 1, 0], [0, 0, 0]]
  together = np.array([2 / 6**0.5, 2 / 6**0.5, 1 / 6**0.5])
  np.testing.assert_allclose(of["cooccurrence"][0], together, rtol=1e-6)
  np.testing.assert_allclose(of["company"][0], np.log1p(100 * together), rtol=1e-6)
  mean = 0.64 * ITEM_ND[0] + 0.8 * ITEM_ND[1] + ITEM_ND[2]
  mean /= np.linalg.norm(mean)
  np.testing.assert_allclose(of["title"][0], VECTORS.advertiser_AD @ mean, rtol=1e-5)
  np.testing.assert_allclose(of["nearest"][0], [0.5**0.5 * 1.4, 1, 0], rtol=1e-5)
  assert not of["title"][1].any() and not of["nearest"][1].any()


def test_a_training_row_does_not_see_its_own_user_in_the_counts():
  assert NUM_FOLDS == 5
  data = _data(STREAMS, train=[(0, [0], 1), (4, [0], 1)])
  x_RAF = cross_fitted(data, data.splits["train"], VECTORS)
  together_RA = x_RAF[..., FEATURES.index("cooccurrence")]
  # Without user 0: A by 1 and 3, B by 1, C by 2 and 3. User 4 has no stream.
  np.testing.assert_allclose(together_RA, [[0, 1 / 2**0.5, 1 / 2], [0, 2 / 6**0.5, 1 / 6**0.5]])
  popular_RA = x_RAF[..., FEATURES.index("popularity")]
  np.testing.assert_allclose(popular_RA, np.log1p([[4, 1, 2], [4, 1, 2]]), rtol=1e-6)


def test_the_logit_finds_the_probability_of_a_coin():
  x_RAF = np.zeros((8, 2, 1), np.float32)
  x_RAF[:, 0, 0] = 1
  logit = fit_logit(x_RAF, np.array([0, 0, 0, 0, 0, 0, 1, 1]))
  np.testing.assert_allclose(np.exp(logit(x_RAF[:1])), [[0.75, 0.25]], atol=1e-3)


def test_equal_scores_rank_by_number_and_missing_places_are_empty():
  assert ranked(np.array([[0.0, 2.0, 0.0, 2.0]]), 6).tolist() == [[1, 3, 0, 2, -1, -1]]


def test_history_ranks_before_popularity_by_hand():
  rows = [(0, [3, 1, 0, 2], 0), (4, [], 2)]
  data = _data([(0, [0, 3]), (5, [3])], train=[(0, [0], 2), (5, [3], 0)], test=rows)
  found = rivals(data, data.splits["test"]).score_RA
  lists = {name: ranked(score, 3).tolist() for name, score in found.items()}
  # A twice, then B, the last one; without a history popularity alone: C, then A.
  assert lists["frequency"] == [[0, 1, 2], [2, 0, 1]]
  assert lists["recency"] == [[1, 0, 2], [2, 0, 1]]
  assert lists["popularity"] == [[2, 0, 1], [2, 0, 1]]
  # A and C share one user of one and two: 1 / sqrt 2 each, and 1 for oneself.
  assert lists["cooccurrence"] == [[2, 0, 1], [2, 0, 1]]
  np.testing.assert_allclose(found["cooccurrence"][0], [1.7071, 1, 1.7071], atol=1e-4)


def test_scores_of_two_towers_by_hand():
  """Two advertisers. The last conversion weighs 1, the one before .8: 5/9 and 4/9."""
  towers = Towers(
    np.array([[9.0, 0.0], [0.0, 18.0]]), np.array([[9.0, 1.0], [0.0, 18.0]]),
    np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([0.5, 0.0]),
  )
  rows = TowerRows(
    np.array([[-1, 0, 1], [-1, -1, -1]]), np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([0, 0])
  )
  title_AD = np.array([[1.0, 0.0], [0.0, 1.0]])
  # Users: (4, 10) and (1, 2); advertisers: (10, 1) and (0, 20).
  np.testing.assert_allclose(
    scores(towers, rows, title_AD), [[50.5, 200], [12.5, 40]], rtol=1e-6
  )


def test_two_towers_learn_who_goes_with_whom():
  """Who converts with B goes on to C, who converts with C to A."""
  streams = [(n % 6, [2, 3] if n % 2 else [3, 0]) for n in range(1500)]
  data = _data(streams)
  score = fit_towers(data, VECTORS)
  asked = _rows((0, [2], -1), (1, [3], -1))
  assert ranked(score(asked), 1).tolist() == [[2], [0]]
  assert (score(asked) == fit_towers(data, VECTORS)(asked)).all()


def test_recalls_by_hand_told_apart_by_what_the_history_knows():
  data = _data([], test=[(0, [0], 0), (1, [0], 2), (1, [2], 1), (2, [], 1)])
  best, other = np.array([[0, 1, 2]] * 4), np.array([[1, 2, 0]] * 4)
  numbers = compare(data, data.splits["test"], {"best": best, "other": other}, bar="best",
                    bootstrap=20)
  assert (numbers["rows"], numbers["users"], numbers["new_share"]) == (4, 3, 0.5)
  assert numbers["best/recall@1"] == 0.25 and numbers["best/recall@5"] == 1
  assert numbers["best/known/recall@1"] == 0.5 and numbers["best/new/recall@1"] == 0
  assert numbers["other_minus_best/recall@1"] == 0.25
  assert numbers["other/new/recall@1"] == 0.5
  assert {"best/recall@1/ci_low", "other_minus_best/new/recall@20/ci_high"} <= numbers.keys()


def test_all_rivals_of_a_folder_of_windows(tmp_path):
  support.write_windows(tmp_path / "windows")
  prepare(tmp_path / "windows", tmp_path / "adv", PrepareConfig())
  data = open_advertisers(tmp_path / "adv")
  numbers = evaluate_rivals(data, "test", bootstrap=20)
  assert numbers["rows"] == (data.splits["test"].target_R >= 0).sum()
  assert numbers["linear/recall@20"] == 1  # of six advertisers
  with pytest.raises(ConfigError, match="split='now': no row of it has a label"):
    evaluate_rivals(data, "now")
