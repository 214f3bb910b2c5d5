"""Boosted trees: they learn, look into no future, and are absent where LightGBM is."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from gr4ad_jax.data.examples import open_examples, read_split
from gr4ad_jax.data.interactions import Interactions
from gr4ad_jax.data.tables import ad_table
from gr4ad_jax.data.tastes import Tastes
from gr4ad_jax.evaluation import rivals
from gr4ad_jax.evaluation.baseline_settings import BaselineSettings
from gr4ad_jax.evaluation.question import Question
from gr4ad_jax.search.held_out import eval_requests, group_requests
from gr4ad_jax.search.ranking import EvalRequests, recall_per_request

trees = pytest.importorskip("gr4ad_jax.evaluation.trees")
pytest.importorskip("lightgbm")

DAY = 86_400


def market(seed=0, *, users=40, days=60, ads=30):
  """Users come back to an ad of theirs after exactly a week, and never before.

  Returns interactions, requests of days 30 to 39, 40 to 49 and 50 to 59, and the catalogue.
  """
  rng = np.random.default_rng(seed)
  rows, requests = [], [[], [], []]
  for user in range(users):
    for day in range(user % 3, days, 3):
      mine = (day // 7 + user) % ads if day % 2 else int(rng.integers(ads))
      rows.append((user, day, mine))
      if day >= 30:
        requests[(day - 30) // 10].append((user, day, mine))
  user, day, ad = np.array(sorted(rows)).T
  logs = Interactions(user.astype(np.int32), ad.astype(np.int32), day * DAY, np.ones(len(ad), bool))

  def ask(rows):
    user, day, target = np.array(rows).T
    shape = (len(rows), 1)
    return EvalRequests(
      user.astype(np.int32), day * DAY, target[:, None].astype(np.int32),
      np.ones(shape, np.float32), np.arange(len(rows))[:, None] % 2 == 0,
    )

  frame = pd.DataFrame({
    "ad_id": [f"ad{n}" for n in range(ads)], "advertiser_id": [f"a{n % 5}" for n in range(ads)],
    "category": "x > y", "text": "", "price": np.arange(ads) + 1.0,
  })
  return logs, [ask(part) for part in requests], ad_table(frame, "ads", {})


@pytest.mark.parametrize("without_seen", [False, True])
def test_nothing_later_than_a_request_changes_its_list(without_seen):
  logs, (training, validation, test), ads = market()
  first = test.rows(test.time_s_R < 51 * DAY)
  lists = []
  for change in (False, True):
    ad_E = np.where(logs.time_s_E >= 51 * DAY, 3, logs.ad_E) if change else logs.ad_E
    changed = dataclasses.replace(logs, ad_E=ad_E.astype(np.int32))
    asked = Question(changed, first, 30, 10, 40 * DAY, without_seen=without_seen)
    lists.append(trees.trees(asked, training, validation, ads))
  np.testing.assert_array_equal(*lists)
  if without_seen:
    for user, time_s, ranked_K in zip(first.user_R, first.time_s_R, lists[0], strict=True):
      seen = logs.ad_E[(logs.user_E == user) & (logs.time_s_E < time_s)]
      assert not np.isin(ranked_K[ranked_K >= 0], seen).any()
      assert (ranked_K >= 0).sum() == min(10, 30 - len(np.unique(seen)))


def test_trees_learn_what_no_single_rule_says(tiny_data, tiny_logs):
  """Above every single rule on logs whose users keep to two categories of four."""
  examples = open_examples(tiny_data / "examples")
  training, validation, test = (
    eval_requests(group_requests(read_split(examples, split)))
    for split in ("train", "validation", "test")
  )
  start_s = examples.config.validation_start_s
  asked = Question(Interactions.of(tiny_logs), test, 40, 5, start_s)
  ranked_RK = trees.trees(asked, training, validation, tiny_logs.ads)
  found = recall_per_request(ranked_RK, test, k=5).mean()
  others = rivals.rank_all(asked, BaselineSettings())
  for name in ("popularity", "trending"):
    assert found > recall_per_request(others[name], test, k=5).mean() + 0.05, name
  assert len(np.unique(ranked_RK[0])) == 5


def test_likeness_is_one_more_feature_from_the_past_of_the_request():
  """Of user and ads by hand: with vectors along two axes the cosine is 1 or 0."""
  logs, (training, *_), ads = market()
  vector_AE = np.eye(2)[np.arange(30) % 2]
  tastes = Tastes(
    np.array([0]), vector_AE[None].astype(np.float16), np.ones((1, 30), np.float32)
  )
  asked = Question(logs, training.rows(np.array([0, 5])), 30, 10, 40 * DAY)
  ((_, ad_RN, plain),) = trees._candidates(asked, trees.group_ads(ads), None)
  ((_, same_RN, feature),) = trees._candidates(asked, trees.group_ads(ads), tastes)
  np.testing.assert_array_equal(ad_RN, same_RN)
  np.testing.assert_array_equal(plain, feature[:, :-1])
  half_life_s = trees._HISTORIES[trees._WIDE].half_life_s
  for user, time_s, ad_N, found_N in zip(
    asked.requests.user_R, asked.requests.time_s_R, ad_RN, feature[:, -1].reshape(ad_RN.shape),
    strict=True,
  ):
    past = (logs.user_E == user) & (logs.time_s_E < time_s)
    count_A = np.bincount(
      logs.ad_E[past], 0.5 ** ((time_s - logs.time_s_E[past]) / half_life_s), 30
    )
    user_E = np.log1p(count_A) @ vector_AE
    np.testing.assert_allclose(
      found_N, (vector_AE @ user_E / np.linalg.norm(user_E))[ad_N], atol=2e-3
    )


def test_trees_learn_from_training_requests(tiny_data):
  examples = open_examples(tiny_data / "examples")
  training = rivals.training_of_trees(examples)
  assert training is not None and len(training.time_s_R) == examples.counts["train"]["requests"]
  assert training.time_s_R.max() < examples.config.validation_start_s


def test_without_lightgbm_there_is_no_row_and_a_line_says_so(tiny_data, monkeypatch, capsys):
  monkeypatch.setattr(rivals, "trees_are_installed", lambda: False)
  assert rivals.training_of_trees(open_examples(tiny_data / "examples")) is None
  assert "no boosted trees; they need LightGBM, pip install" in capsys.readouterr().err
