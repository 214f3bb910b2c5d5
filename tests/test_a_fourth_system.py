"""A system of its own in sixty lines, taken through every common room without a change to any.

A bigram over codes: the latest ad's first code says what the first code will be, each code the one
after it.
"""

import dataclasses
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fastapi.testclient import TestClient

from gr4ad_jax.catalog.prepared import open_prepared
from gr4ad_jax.data.engagements import SeenAds
from gr4ad_jax.data.examples import read_split
from gr4ad_jax.data.pipeline import look_up, pad, train_batches, validation_batches, with_rows
from gr4ad_jax.data.records import Action
from gr4ad_jax.evaluation import evaluate as evaluation
from gr4ad_jax.evaluation import rivals
from gr4ad_jax.machine.peaks import Device
from gr4ad_jax.search.artifact import Artifact
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.export import export_run
from gr4ad_jax.search.generator import Generator
from gr4ad_jax.search.held_out import eval_requests, group_requests
from gr4ad_jax.search.judge import Judge
from gr4ad_jax.search.opened import Opened
from gr4ad_jax.search.ranking import prospecting_metrics, ranking_metrics
from gr4ad_jax.search.recommend import recommend_for_user
from gr4ad_jax.serving.config import ServingConfig
from gr4ad_jax.serving.server import build_app
from gr4ad_jax.serving.service import Service
from gr4ad_jax.training.config import TrainConfig
from gr4ad_jax.training.plan import plan_run
from gr4ad_jax.training.task import Task
from gr4ad_jax.training.train_loop import read_params, train

TRAIN = TrainConfig(num_steps=30, batch_size=16, learning_rate=0.1, eval_every=15, eval_batches=2,
                    checkpoint_every=15, log_every=10, data_parallel=1)
SEARCH = SearchConfig(widths=(8, 12, 16), batch_size=4)
WHOLE = SearchConfig(widths=(8, 32, 16), batch_size=4)  # every prefix, and then the best 16 SIDs


class Context(NamedTuple):
  met_BTL: np.ndarray  # int32 SIDs of the latest ads, -1 = none


class Batch(NamedTuple):
  context: Context
  target_BL: np.ndarray


@dataclasses.dataclass(frozen=True)
class Maker:
  codes_AL: np.ndarray

  def context(self, examples, *, user_ids=None):
    return Context(look_up(self.codes_AL, pad([e.ad_T[:3] for e in examples], 3)))

  def with_ads(self, row_N, ads, code_NL):
    return Maker(with_rows(self.codes_AL, row_N, code_NL))

  def with_trending(self, trending):
    return self

  def __call__(self, examples):
    return Batch(self.context(examples), self.codes_AL[[e.target_C[0] for e in examples]])


def bigram_task(sizes) -> Task:
  def init(key):
    return {"table_LVV": jnp.zeros((len(sizes), max(sizes) + 1, max(sizes)))}

  def loss(params, batch, key):
    logp_LVV = jax.nn.log_softmax(params["table_LVV"], axis=-1)
    before = [batch.context.met_BTL[:, 0, 0], *batch.target_BL.T]
    logp_B = sum(logp_LVV[level, before[level] + 1, code_B]
                 for level, code_B in enumerate(batch.target_BL.T))
    return {"loss": (-logp_B.sum(), jnp.float32(len(logp_B)))}

  return Task(init, loss)


def bigram_generator(sizes) -> Generator:
  def row(params, level, code):
    return jax.nn.log_softmax(params["table_LVV"], axis=-1)[level, code + 1]

  def start(params, context, may_get):
    latest_B1 = context.met_BTL[:, :1, 0]
    return None, jnp.zeros_like(latest_B1), row(params, 0, latest_B1)

  def step(params, shared, state, code_BW, level):
    if isinstance(level, int) and level == len(sizes):  # one value bucket
      return state, jnp.zeros((*code_BW.shape, 1))
    return state, row(params, level, code_BW)

  return Generator(
    start=start, step=step, codebook_sizes=sizes, history=("met_BTL",),
    at_precision=lambda precision: (bigram_generator(sizes), lambda params: params),
    encode=lambda params, context: row(params, 0, context.met_BTL[:, 0, 0]),
  )


@pytest.fixture(scope="module")
def opened(tiny_data, tmp_path_factory) -> Opened:
  """A trained bigram."""
  folder = tmp_path_factory.mktemp("bigram") / "run"
  data = open_prepared(str(tiny_data), str(tiny_data / "sids"))
  maker, task = Maker(data.sids.codes_AL), bigram_task(data.sids.codebook_sizes)
  split = data.examples.sources
  train(
    task, TRAIN, batches=train_batches(split["train"], maker, batch_size=16, seed=0),
    validation=validation_batches(split["validation"], maker, batch_size=16, most=2),
    folder=folder,
  )
  params, step = read_params(task, TRAIN, folder)
  return Opened(
    **vars(data), system="bigram", model="Two tables.", folder=folder, data=tiny_data,
    config=SEARCH, search=SEARCH, contexts=maker,
    bin_means=(1.0,), generator=bigram_generator(data.sids.codebook_sizes),
    read_params=lambda: read_params(task, TRAIN, folder), params=params, step=step,
  )


def seen_ads(opened: Opened, user: str, before_s: float = np.inf) -> set[str]:
  """Ads that a user clicked or bought before, or met as a content, event by event."""
  logs, events, seen = opened.logs, opened.logs.events, set()
  for row in np.flatnonzero(logs.users.user_id[events.user] == user):
    ad, engaged = events.ad[row], events.action[row] >= Action.CLICK
    if ad < 0:
      ad, engaged = logs.contents.ad[events.content[row]], True
    if ad >= 0 and engaged and events.time_s[row] < before_s:
      seen.add(logs.ads.ad_id[ad])
  return seen


def best_ads(opened: Opened, user: str, k: int) -> list[str]:
  """By brute force over the catalogue, with numpy alone."""
  logs, codes_AL = opened.logs, opened.sids.codes_AL
  table_LVV = np.asarray(opened.params["table_LVV"], np.float64)
  logp_LVV = table_LVV - np.log(np.exp(table_LVV).sum(axis=-1, keepdims=True))
  events, row = logs.events, logs.users.user_id.tolist().index(user)
  latest = events.ad[(events.user == row) & (events.ad >= 0)][-1]
  before = [np.full(len(codes_AL), codes_AL[latest, 0]), *codes_AL.T]
  score_A = sum(logp_LVV[level, before[level] + 1, code_A]
                for level, code_A in enumerate(codes_AL.T))
  return logs.ads.ad_id[np.argsort(-score_A, kind="stable")][:k].tolist()


def test_training_learns_and_keeps_the_best_step(opened):
  rows = [json.loads(row) for row in (opened.folder / "train_log.jsonl").read_text().splitlines()]
  judged = [row["loss"] for row in rows if row["kind"] == "validation"]
  assert len(judged) == 2 and judged[1] < judged[0] < 3 * np.log(8)
  assert opened.step == 30


def test_recommends_what_brute_force_finds(opened):
  found = recommend_for_user(opened, "u7", 5)
  assert [ad.ad_id for ad in found.ads] == best_ads(opened, "u7", 5)


def test_leaves_out_what_a_user_has_seen_and_fills_up(opened):
  """Sixteen of the forty ads are found, whatever was seen: none of the beams goes to seen ads."""
  opened = dataclasses.replace(opened, search=WHOLE)
  for user in ("u7", "u8", "u9"):
    seen = seen_ads(opened, user)
    left = [ad for ad in best_ads(opened, user, 40) if ad not in seen]
    found = recommend_for_user(opened, user, 12, exclude_seen=True).ads
    assert [ad.ad_id for ad in found] == left[:12] and len(seen & {*best_ads(opened, user, 12)}) > 3
    brand = [ad for ad in left if int(ad[2:]) % 8 == 3]
    found = recommend_for_user(
      opened, user, 12, exclude_seen=True, where=["advertiser_id=brand3"]
    ).ads
    assert [ad.ad_id for ad in found] == brand
  always = dataclasses.replace(
    opened, search=dataclasses.replace(WHOLE, exclude_seen=True)
  )
  assert [ad.ad_id for ad in recommend_for_user(always, "u9", 12).ads] == left[:12]
  found = recommend_for_user(always, "u9", 12, exclude_seen=False).ads
  assert [ad.ad_id for ad in found] == best_ads(opened, "u9", 12)


def test_prospecting_is_judged_by_lists_without_what_was_seen(opened):
  opened = dataclasses.replace(opened, search=WHOLE)
  groups = group_requests(read_split(opened.examples, "test"))
  ranked_RK = evaluation.prospecting_lists(opened.recommender(), opened, groups)
  users, num_new = opened.logs.users.user_id, 0
  for group, ad_K in zip(groups, ranked_RK, strict=True):
    seen = seen_ads(opened, users[group[0].user], group[0].time_s)
    targets = opened.logs.ads.ad_id[np.concatenate([e.target_C for e in group])]
    new = np.concatenate([e.new_C for e in group])
    assert [target not in seen for target in targets] == new.tolist()
    found = {*opened.logs.ads.ad_id[ad_K[ad_K >= 0]]}
    # Sixteen SIDs, each of one ad or more, where so many ads are left.
    assert not found & seen and len(found) >= (min(16, 40 - len(seen)) if new.any() else 0)
    assert new.any() or not found
    num_new += new.any()
  assert 0 < num_new < len(groups)
  metrics = prospecting_metrics(
    ranked_RK, eval_requests(groups), advertiser_A=np.arange(40), bootstrap=10
  )
  assert metrics["prospecting/recall@50"] > 0.6  # sixteen of the two dozen that are new
  assert {f"prospecting/{name}" for name in (
    "recall@10", "recall@50", "recall@50/ci_low", "value_recall@50/ci_high", "ndcg@10",
  )} < metrics.keys()
  assert not {name for name in metrics if not name.startswith("prospecting/")}


def test_is_evaluated_beside_the_baselines(opened, monkeypatch):
  asked, tune, rank = [], rivals.tune_baselines, rivals.rank_all

  def watched(function):
    def call(question, *args, **how):
      asked.append(question)
      return function(question, *args, **how)

    return call

  monkeypatch.setattr(rivals, "tune_baselines", watched(tune))
  monkeypatch.setattr(rivals, "rank_all", watched(rank))
  metrics = evaluation.evaluate(opened, bootstrap=20)
  # Baselines are tuned on validation requests, judged on test requests, and count events over all
  # users up to where training ends; once for all targets, once without what was seen.
  cut = opened.examples.config
  assert [question.without_seen for question in asked] == [False, False, True, True]
  for question in asked[::2]:
    tuned = question.requests.time_s_R
    assert (tuned >= cut.validation_start_s).all() and (tuned < cut.test_start_s).all()
  for question in asked[1::2]:
    assert (question.requests.time_s_R >= cut.test_start_s).all()
  assert {question.train_end_s for question in asked} == {cut.validation_start_s}
  for name in ("popularity", "cooccurrence", "own_history", "counter", "rule", "trending"):
    new = metrics[f"baseline/{name}/prospecting/recall@50"]
    difference = metrics["prospecting/recall@50"] - new
    found = metrics[f"difference/{name}/prospecting/recall@50"]
    assert found == pytest.approx(difference, abs=1e-9)
    difference = metrics["recall@50"] - metrics[f"baseline/{name}/recall@50"]
    assert metrics[f"difference/{name}/recall@50"] == pytest.approx(difference, abs=1e-9)
    assert difference < 0  # lists of sixteen SIDs against all forty ads
  assert metrics["prospecting/recall@50"] > metrics["new/recall@50"]
  assert metrics["invalid_sid_rate"] == 0 and metrics["num_params"] == 3 * 9 * 8
  assert metrics["recall@10"] > 10 / 40  # better than any ten of the forty ads
  assert {"baseline/popularity/recall@10", "baseline/own_history/recall@10"} <= metrics.keys()
  assert json.loads((opened.folder / "about.json").read_text())["model"] == "Two tables."


def test_its_searches_judge_parameters_of_a_training(opened):
  """By all targets and, without what users had seen, by new ones; as evaluation measures both."""
  groups = group_requests(read_split(opened.examples, "validation"))
  recommender, requests = opened.recommender(), eval_requests(groups)
  all_RK = evaluation.search_split(recommender, opened.contexts, groups, SEARCH)
  unseen_RK = evaluation.prospecting_lists(recommender, opened, groups)
  for seen, list_RK, measure, prefix in (
    (None, all_RK.recommendations.ad_RK, ranking_metrics, ""),
    (SeenAds(opened.logs), unseen_RK, prospecting_metrics, "prospecting/"),
  ):
    expected = measure(list_RK, requests, advertiser_A=np.zeros(40), bootstrap=1)
    judge = Judge(
      lambda params: dataclasses.replace(opened, params=params).recommender(), opened.contexts,
      groups, batch_size=4, seen=seen,
    )
    blank = judge(jax.tree.map(jnp.zeros_like, opened.params))
    found = judge(opened.params)
    assert found == pytest.approx({name: expected[prefix + name] for name in found}, abs=1e-9)
    assert found.keys() == {"recall@50", "ndcg@50", "value_recall@50"}
    assert blank["ndcg@50"] != found["ndcg@50"] > 0


def test_is_exported_and_read_without_the_package(opened, tmp_path):
  export_run(opened, tmp_path / "artifact")
  artifact = Artifact(tmp_path / "artifact")
  with np.load(tmp_path / "artifact" / "sample.npz") as sample:
    ads, _ = artifact.recommend(dict(sample), k=5)
    expected = opened.recommender()(Context(sample["met_BTL"]), 5).ad_RK[0]
  assert ads == [opened.logs.ads.ad_id[expected].tolist()]


def test_is_served_with_conditions_and_new_ads(opened, tmp_path):
  config = ServingConfig(batch_sizes=(1,), beam_factors=(1.0,), segment_s=3600)
  service = Service(
    opened, config=config, store=tmp_path / "store", segments=tmp_path / "segments", clock="log"
  )
  with TestClient(build_app(service)) as client:
    def ask(**body) -> list[str]:
      reply = client.post("/v1/recommend", json={"user_id": "u7", "k": 5} | body)
      return [ad["ad_id"] for ad in reply.json()["ads"]]

    assert ask() == best_ads(opened, "u7", 5)
    seen = seen_ads(opened, "u7")
    unseen = [ad for ad in best_ads(opened, "u7", 40) if ad not in seen]
    assert ask(exclude_seen=True) == unseen[:5] != ask()
    brand = [ad for ad in best_ads(opened, "u7", 40) if int(ad[2:]) % 8 == 3]
    assert ask(where=["advertiser_id=brand3"]) == brand
    like_ad0 = {
      "ad_id": "fresh", "advertiser_id": "newcomer", "category": "food > snack",
      "text": "food snack product number 0",
    }
    assert client.post("/v1/ads", json={"ads": [like_ad0]}).status_code == 200
    assert ask(where=["advertiser_id=newcomer"]) == ["fresh"]


def test_is_planned(opened):
  maker, example = Maker(opened.sids.codes_AL), opened.examples.sources["test"]
  one = validation_batches(example, maker, batch_size=1, most=1)[0]
  device = Device(1e12, 1e9, float("inf"))
  config = dataclasses.replace(TRAIN, data_parallel=0)
  plan = plan_run(bigram_task(opened.sids.codebook_sizes), config, one, example_flops=100,
                  device=device, num_devices=4)
  assert plan.num_params == 3 * 9 * 8 and plan.flops_per_step == 1600
