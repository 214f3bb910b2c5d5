"""SASRec: its histories, its two losses by hand and by many draws, its ranking by brute force."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.catalog.prepared import open_logs
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.engagements import SeenAds
from gr4ad_jax.data.examples import read_split
from gr4ad_jax.data.records import Action
from gr4ad_jax.sequential.batch import HistoryMaker
from gr4ad_jax.sequential.config import SasrecConfig, SasrecModel, TwoTowerConfig
from gr4ad_jax.sequential.ranker import Ranker
from gr4ad_jax.sequential.sasrec import Draws, sampled_softmax_loss, softmax_loss
from gr4ad_jax.sequential.system import sasrec, two_tower

MODEL = SasrecModel(width=8, num_heads=2, max_history=6, dropout=0.0)


@pytest.fixture(scope="module")
def data(tiny_data):
  return open_logs(tiny_data)


@pytest.fixture(scope="module")
def examples(data):
  return read_split(data.examples, "test")


def test_full_softmax_by_hand():
  score_BA = jnp.log(jnp.array([[1.0, 2.0, 5.0], [1.0, 1.0, 2.0]]))
  loss_BC = softmax_loss(score_BA, jnp.array([[2, 0], [1, -1]]))
  expected = [[np.log(8 / 5), np.log(8 / 1)], [np.log(4 / 1), 0]]
  np.testing.assert_allclose(loss_BC, expected, rtol=1e-6)


def test_sampled_softmax_by_hand():
  """Scores e^s of 3 for the target; of 5, drawn twice at a rate of 4, and of itself, not counted.
  """
  loss_BC = sampled_softmax_loss(
    jnp.log(jnp.array([[3.0]])), jnp.log(jnp.array([[5.0, 5.0, 3.0]])),
    target_BC=jnp.array([[1]]), drawn_N=jnp.array([0, 0, 1]),
    log_rate_N=jnp.log(jnp.array([4.0, 4.0, 0.1])),
  )
  np.testing.assert_allclose(loss_BC, [[np.log((3 + 5 / 4 + 5 / 4) / 3)]], rtol=1e-6)


def test_draws_come_as_often_as_they_say():
  share_A = np.array([0.7, 0.2, 0.1, 0.0])
  draws = Draws(share_A, 8)
  drawn_XN = jax.vmap(draws)(jax.random.split(jax.random.key(0), 4000))
  found_A = np.bincount(np.asarray(drawn_XN).ravel(), minlength=4) / 4000
  np.testing.assert_allclose(found_A, 4 * share_A + 4 / 4, rtol=0.05)
  np.testing.assert_allclose(np.exp(draws.log_rate_A), 4 * share_A + 4 / 4, rtol=1e-5)


def test_the_sampled_sum_has_no_bias_and_its_gradient_nears_the_full_one():
  """exp(loss) is the sum over ads, divided by what the target adds to it."""
  rng = np.random.default_rng(0)
  score_A = jnp.asarray(rng.normal(size=12), jnp.float32)
  share_A, target_BC = rng.dirichlet(np.ones(12)), jnp.array([[4, 7]])

  def sampled(score_A, key, draws):
    drawn_N = draws(key)
    return sampled_softmax_loss(
      score_A[target_BC], score_A[drawn_N][None], target_BC=target_BC, drawn_N=drawn_N,
      log_rate_N=jnp.asarray(draws.log_rate_A)[drawn_N],
    )

  full_BC = softmax_loss(score_A[None], target_BC)
  keys, few = jax.random.split(jax.random.key(1), 20_000), Draws(share_A, 4)
  loss_XBC = jax.vmap(lambda key: sampled(score_A, key, few))(keys)
  np.testing.assert_allclose(np.exp(loss_XBC).mean(axis=0), np.exp(full_BC), rtol=0.02)
  many = Draws(share_A, 4096)
  found_A = jax.grad(lambda s: sampled(s, keys[0], many).sum())(score_A)
  full_A = jax.grad(lambda s: softmax_loss(s[None], target_BC).sum())(score_A)
  np.testing.assert_allclose(found_A, full_A, atol=0.03)
  assert np.abs(full_A).max() > 0.3


def test_a_history_stands_in_order_with_the_newest_ad_last():
  example = dataclasses.make_dataclass("Example", [
    "ad_T", "ad_age_T", "organic_O", "organic_age_O", "target_C",
  ])
  one = example(
    np.array([5, 3]), np.array([1, 4]), np.array([2, 0, 1]), np.array([1, 3, 6]), np.array([4])
  )
  content_ad_O = np.array([-1, 7, 6])  # content 0 is no ad's product
  batch = HistoryMaker(5, 2, content_ad_O)([one])
  assert batch.ad_BT.tolist() == [[-1, 7, 3, 6, 5]]
  assert batch.target_BC.tolist() == [[4, -1]]
  assert HistoryMaker(2, 2, content_ad_O)([one]).ad_BT.tolist() == [[6, 5]]


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_a_request_itself_did_stands_in_no_history(data, split):
  """By brute force: only products met strictly before; the newest place is a latest one."""
  logs, events = data.logs, data.logs.events
  make_batch = HistoryMaker(20, 4, logs.contents.ad)
  met_again = 0
  for example in read_split(data.examples, split)[::7]:
    mine = (events.user == example.user) & (events.time_s < example.time_s)
    mine &= (events.action >= Action.CLICK) | (events.content >= 0)
    ad_E = np.where(events.ad >= 0, events.ad, logs.contents.ad[events.content])
    met = {*ad_E[mine & (ad_E >= 0)].tolist()}
    ad_T = make_batch([example]).ad_BT[0]
    assert {*ad_T[ad_T >= 0].tolist()} <= met
    met_again += len(met & {*example.target_C.tolist()})
    latest = events.time_s[mine & (events.ad >= 0)].max(initial=0)
    if latest and ad_T[-1] not in logs.contents.ad:
      assert ad_T[-1] in events.ad[mine & (events.time_s == latest)]
  assert met_again > 10  # so that it could be told


def test_the_order_counts_and_targets_do_not(data, examples):
  system = sasrec(SasrecConfig(MODEL), data)
  params = system.task.init(jax.random.key(0))
  batch = system.make_batch(examples[:4])
  score_BA = system.scores(params, batch)
  other = batch._replace(target_BC=np.zeros_like(batch.target_BC))
  np.testing.assert_array_equal(system.scores(params, other), score_BA)
  assert (batch.ad_BT >= 0).all()  # so that turned histories have their padding where it was
  turned = batch._replace(ad_BT=batch.ad_BT[:, ::-1])
  assert np.abs(system.scores(params, turned) - score_BA).max() > 1e-3


@pytest.mark.parametrize("make", [
  lambda data: sasrec(SasrecConfig(MODEL), data),
  lambda data: two_tower(TwoTowerConfig(), data),
], ids=["sasrec", "two_tower"])
def test_lists_are_those_of_brute_force(data, examples, make):
  system, seen = make(data), SeenAds(data.logs)
  params = system.task.init(jax.random.key(1))
  ranker = Ranker(system)
  all_RK = ranker(params, examples, 5)
  unseen_RK = ranker(params, examples, 50, seen=seen)
  score_RA = np.asarray(system.scores(params, system.make_batch(examples)))
  assert len({*map(tuple, all_RK.tolist())}) > 5
  for row, example in enumerate(examples):
    order = np.argsort(-score_RA[row], kind="stable")
    np.testing.assert_array_equal(score_RA[row, all_RK[row]], score_RA[row, order[:5]])
    left = set(range(40)) - {*seen.before(example.user, example.time_s).tolist()}
    found = unseen_RK[row][unseen_RK[row] >= 0]
    assert {*found.tolist()} == left and (unseen_RK[row][len(left):] == -1).all()
    assert (np.diff(score_RA[row, found]) <= 1e-6).all()


@pytest.mark.parametrize("change", [
  {"width": 0}, {"num_heads": 3}, {"dropout": 1.0}, {"negatives": 3}, {"filter_share": 2.0},
])
def test_settings_that_cannot_work_are_named(change):
  with pytest.raises(ConfigError, match=f"model.{next(iter(change))}="):
    SasrecModel(**change)

