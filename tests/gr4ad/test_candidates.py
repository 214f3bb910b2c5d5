"""Candidate lists of a trained run, on disk, in training and online; the DLRM cascade beside it."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pandas as pd
import pytest

from gr4ad_jax.config import ConfigError
from gr4ad_jax.data import prepare
from gr4ad_jax.data.impressions import Impressions, read_impressions
from gr4ad_jax.data.list_records import CandidateList, open_lists, to_list, write_lists
from gr4ad_jax.data.log_folder import read_logs
from gr4ad_jax.data.segments import append_segment
from gr4ad_jax.data.sequences import Example, ExampleMaker
from gr4ad_jax.data.splits import time_split
from gr4ad_jax.data.validation import LogError
from gr4ad_jax.gr4ad import candidates, publisher
from gr4ad_jax.gr4ad.candidates import choose_requests, teaches, write_candidates
from gr4ad_jax.gr4ad.config import CandidateConfig, OnlineConfig, PreferenceConfig, preset
from gr4ad_jax.gr4ad.list_batches import ListBatchMaker
from gr4ad_jax.gr4ad.online import learn_online
from gr4ad_jax.gr4ad.run import RunFile, load_params, open_inputs, read_run
from gr4ad_jax.gr4ad.train_run import train_run
from gr4ad_jax.learning.preference import RewardScale
from gr4ad_jax.market.log import market_logs, simulate_day
from gr4ad_jax.market.policy import Cascade, build_shelves
from gr4ad_jax.market.world import MarketConfig
from gr4ad_jax.market.worlds import build_market
from gr4ad_jax.ranker.cascade import train_retrieval
from gr4ad_jax.ranker.reward import RewardRun, open_reward, train_reward
from gr4ad_jax.ranker.two_tower import nearest_ads
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.tokenizer.stage import tokenize
from gr4ad_jax.training import train_loop
from gr4ad_jax.training.checkpoint import Checkpoints
from gr4ad_jax.training.metric_log import MetricLog, read_log
from gr4ad_jax.training.published import latest, published_steps

MARKET = MarketConfig(
  world="synthetic", num_users=150, num_ads=60, num_advertisers=6, num_categories=4,
  num_contents=30, days=20, sessions_per_day=0.8, click_rate=0.15, conversion_rate=0.3,
)
NONE, SMALL = np.zeros(0, np.int32), np.zeros(0, np.uint8)
CONTEXT = Example(
  4, 2, 0, 1_700_000_000, 7.5, np.array([1, 2], np.int32), NONE, SMALL, SMALL, NONE, SMALL, SMALL,
  NONE, np.zeros((0, 8), np.float16), NONE, np.zeros(0, np.int8), np.zeros(0, np.float32),
  np.zeros(0, np.float32), np.zeros(0, bool),
)
LISTS = CandidateConfig(top=4, rest=4, sampled=3, max_lists=60, shown=True)


def tiny(**train):
  base = preset("tiny")
  return dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, width=32, num_layers=2, num_lazy_layers=1),
    train=dataclasses.replace(base.train, **{
      "num_steps": 12, "batch_size": 16, "eval_every": 12, "checkpoint_every": 6,
      "data_parallel": 1, **train,
    }),
    search=dataclasses.replace(base.search, widths=(6, 8, 10), batch_size=16),
    preference=PreferenceConfig(lists_per_step=4),
  )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """A market's log with semantic IDs, a reward model and a trained run; folders by name."""
  folder = tmp_path_factory.mktemp("market")
  logs = market_logs(build_market(MARKET))
  limits = {"max_ad_history": 8, "max_organic_history": 8, "num_trending": 4}
  cut = dataclasses.replace(time_split(logs, validation_days=3, test_days=3), **limits)
  prepare.write_prepared(logs, folder / "data", cut)
  tokenize(folder / "data", folder / "sids", TokenizerConfig(codebook_sizes=(8, 8, 16)))
  reward = RewardRun(str(folder / "data"))
  train = dataclasses.replace(reward.train, num_steps=20, eval_every=20, checkpoint_every=20,
                              batch_size=64, data_parallel=1)
  train_reward(dataclasses.replace(reward, train=train), folder / "reward")
  train_run(RunFile(str(folder / "data"), str(folder / "sids"), tiny()), folder / "run")
  write_candidates(folder / "run", folder / "reward", folder / "lists", config=LISTS)
  return folder


@pytest.fixture(scope="module")
def lists(world):
  return [to_list(record) for record in open_lists(world / "lists")]


def test_references_are_the_log_probabilities_of_teacher_forcing(world, lists):
  run = read_run(world / "run")
  inputs = open_inputs(run)
  decoder, params, _ = load_params(run, world / "run", inputs.vocabulary)
  own = [row for row in lists if row.has_ref_C.any()][:8]
  make = ListBatchMaker(inputs.make_batch, RewardScale(0, 1), LISTS.size)
  batch = make(own)
  found = jax.jit(lambda c, t: decoder.apply({"params": params}, c, t).sid_BCL)(
    batch.context, batch.code_BCL
  )
  where = batch.lists.where_BC
  np.testing.assert_allclose(
    np.asarray(found)[where], batch.lists.ref_logp_BCL[where], atol=2e-4
  )


def test_lists_hold_distinct_sids_priced_by_the_reward_model(world, lists):
  inputs = open_inputs(read_run(world / "run"))
  scorer = open_reward(world / "reward")
  for row in lists[:30]:
    assert len(np.unique(inputs.index.sid_of_ad_A[row.ad_C])) == len(row.ad_C) <= LISTS.size
    ecpm = scorer([row.context], row.ad_C[None]).ecpm_RC[0]
    np.testing.assert_allclose(row.ecpm_C, ecpm, rtol=1e-4)


def test_half_of_the_lists_are_what_was_shown(world, lists):
  """In their request's order; no reference, and the deepest action of each ad."""
  inputs = open_inputs(read_run(world / "run"))
  events = inputs.logs.events
  # Of training requests alone: the others are what a run is judged by.
  assert max(row.context.time_s for row in lists) < inputs.examples.config.validation_start_s
  shown = [row for row in lists if not row.has_ref_C.any()]
  own = {row.context.request: row for row in lists if row.has_ref_C.any()}
  assert len(shown) == len(own) == len(lists) // 2
  engaged = 0
  for row in shown:
    rows = (events.request == row.context.request) & (events.ad >= 0)
    deepest = dict(zip(events.ad[rows].tolist(), events.action[rows].tolist(), strict=True))
    assert {a: int(x) for a, x in zip(row.ad_C, row.action_C, strict=True)}.items() <= (
      deepest.items()
    )
    mine = own[row.context.request]
    for ad, action in zip(mine.ad_C.tolist(), mine.action_C.tolist(), strict=True):
      assert action == deepest.get(ad, -1)
    engaged += (row.action_C >= 1).sum()
  assert engaged > 0


def test_requests_of_valuable_users_are_chosen_first():
  contexts = [dataclasses.replace(CONTEXT, past_value=float(v)) for v in range(100)]
  rows = Impressions(contexts, np.zeros((100, 1), np.int32), np.zeros((100, 1), np.int8))
  config = CandidateConfig(top_users_share=0.3, uniform_share=0.0)
  assert choose_requests(rows, config).tolist() == list(range(70, 100))
  some = choose_requests(rows, dataclasses.replace(config, uniform_share=0.5))
  assert set(range(70, 100)) < set(some.tolist()) and 15 < (some < 70).sum() < 55
  assert len(choose_requests(rows, dataclasses.replace(config, max_lists=7))) == 7


def test_lists_survive_the_disk(tmp_path):
  row = CandidateList(
    CONTEXT, np.array([3, 1], np.int32), np.array([2.5, np.nan], np.float32),
    np.array([[-1, -2, -0.5], [0, 0, 0]], np.float32), np.array([True, False]),
    np.array([2, -1], np.int8),
  )
  assert write_lists(iter([row, row]), tmp_path / "l") == 2
  with pytest.raises(LogError, match="gr4ad candidates"):
    open_lists(tmp_path / "l")  # not complete without lists.json
  (tmp_path / "l" / "lists.json").write_text("{}")
  back = to_list(open_lists(tmp_path / "l")[1])
  for name in CandidateList._fields[1:]:
    np.testing.assert_array_equal(getattr(back, name), getattr(row, name))
  np.testing.assert_array_equal(back.context.feature_F, CONTEXT.feature_F)
  assert back.context.past_value == CONTEXT.past_value


def test_a_batch_pads_and_takes_out_what_has_no_price(world, lists):
  inputs = open_inputs(read_run(world / "run"))
  row = lists[0]._replace(ecpm_C=np.where(np.arange(len(lists[0].ad_C)) == 1, np.nan, 3.0))
  make = ListBatchMaker(inputs.make_batch, RewardScale(0.0, float(np.log1p(6))), 14)
  batch = make([row])
  size = len(row.ad_C)
  expected = (np.arange(14) < size) & (np.arange(14) != 1)
  assert batch.lists.where_BC[0].tolist() == expected.tolist()
  np.testing.assert_allclose(
    batch.lists.reward_BC[0][expected], 5 * np.log1p(3) / np.log1p(6), rtol=1e-5
  )
  assert (batch.code_BCL[0, size:] == -1).all()
  engaged = np.pad(row.action_C >= 1, (0, 14 - size))
  assert ((batch.weight_BC[0] > 0) == engaged).all()


def test_training_on_lists_starts_from_a_run_and_resumes_exactly(world, tmp_path):
  run = RunFile(str(world / "data"), str(world / "sids"), tiny(seed=3), str(world / "run"),
                str(world / "lists"))
  whole = train_run(run, tmp_path / "whole")
  with pytest.MonkeyPatch.context() as patch:
    class Stop(Exception):
      pass

    real = train_loop.MetricLog.write

    def write(self, step, kind, values):
      real(self, step, kind, values)
      if step == 12:
        raise Stop

    patch.setattr(train_loop.MetricLog, "write", write)
    with pytest.raises(Stop):
      train_run(run, tmp_path / "cut")
  again = train_run(run, tmp_path / "cut", resume=True)
  jax.tree.map(np.testing.assert_array_equal, whole.params, again.params)
  rows = read_log(tmp_path / "whole")
  assert np.isfinite([row["list_loss"] for row in rows if row["kind"] == "train"]).all()
  assert "list_loss" not in next(row for row in rows if row["kind"] == "validation")
  # Lists trade the validation loss, which knows logged samples alone, for value: the last
  # parameters count, however bad it is. So they do of a run that goes on learning.
  with Checkpoints(tmp_path / "whole" / "checkpoints") as checkpoints:
    checkpoints.save(
      whole._replace(step=whole.step + 1), data_iterator={}, validation={"loss": 1e9}
    )
  read = read_run(tmp_path / "whole")
  vocabulary = open_inputs(read).vocabulary
  steps = {
    kind: load_params(dataclasses.replace(read, **how), tmp_path / "whole", vocabulary)[2]
    for kind, how in (
      ("lists", {}), ("segments", {"lists": "", "segments": "s"}), ("logged", {"lists": ""})
    )
  }
  assert steps == {"lists": 13, "segments": 13, "logged": 12}


def test_lists_without_any_value_are_told_of(world, tmp_path, capsys):
  """All bids are 0: every candidate is worth the same, and no list has anything to prefer."""
  few = dataclasses.replace(LISTS, max_lists=4)
  capsys.readouterr()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(candidates, "open_reward", without_bids)
    numbers = write_candidates(world / "run", world / "reward", tmp_path / "lists", config=few)
  assert numbers["lists that teach nothing"] == numbers["lists"] == 8
  told = " ".join(capsys.readouterr().err.split())
  assert "8 of 8 lists hold no two ads of different expected value, and teach nothing" in told
  assert json.loads((tmp_path / "lists" / "lists.json").read_text())["idle_lists"] == 8


def without_bids(place, **kw):
  scorer = open_reward(place, **kw)
  return dataclasses.replace(scorer, bid_A=np.zeros_like(scorer.bid_A))


def test_a_list_teaches_where_one_candidate_is_better_in_the_reward_s_steps():
  scale = RewardScale(0.0, float(np.log1p(7)))
  assert teaches(np.float32([0, 7]), scale) and teaches(np.float32([np.nan, 1, 3]), scale)
  for idle in ([], [3], [2, 2], [np.nan, 3], [8, 90]):  # above the scale all are worth 5
    assert not teaches(np.float32(idle), scale)


def test_mistakes_are_named(world, tmp_path):
  with pytest.raises(ConfigError, match="--overwrite"):
    write_candidates(world / "run", world / "reward", world / "lists", config=LISTS)
  wider = dataclasses.replace(tiny().model, width=64)
  other = RunFile(
    str(world / "data"), str(world / "sids"), dataclasses.replace(tiny(), model=wider),
    str(world / "run"),
  )
  with pytest.raises(ConfigError, match="another model"):
    train_run(other, tmp_path / "a")
  tokenize(
    world / "data", tmp_path / "sids", TokenizerConfig(codebook_sizes=(8, 4, 32))
  )
  moved = RunFile(str(world / "data"), str(tmp_path / "sids"), tiny(), lists=str(world / "lists"))
  with pytest.raises(ConfigError, match="other SIDs"):
    train_run(moved, tmp_path / "b")
  with pytest.raises(ConfigError, match="holds other files"):
    write_candidates(world / "run", world / "reward", world / "data", config=LISTS)
  none = dataclasses.replace(LISTS, top_users_share=0.0, uniform_share=0.0)
  with pytest.raises(ConfigError, match="top_users_share=0.0: chooses none of"):
    write_candidates(world / "run", world / "reward", tmp_path / "c", config=none)


def test_models_and_lists_of_other_data_are_refused(world, tmp_path):
  """Its ads are numbered by the logs: a reward model would price one ad as another."""
  shutil.copytree(world / "reward", tmp_path / "reward")
  file = tmp_path / "reward" / "reward.json"
  trained = json.loads(file.read_text())
  file.write_text(json.dumps(trained | {"fingerprint": "another"}))
  with pytest.raises(ConfigError, match="have changed since the model was trained"):
    open_reward(tmp_path / "reward")
  file.write_text(json.dumps({k: x for k, x in trained.items() if k != "fingerprint"}))
  scorer = open_reward(tmp_path / "reward")  # of an earlier version
  inputs = open_inputs(read_run(world / "run"), world / "run")
  candidates.require_same_data(inputs, scorer, tmp_path / "reward")
  with pytest.raises(ConfigError, match="was trained on other logs or examples than the run"):
    candidates.require_same_data(
      inputs, dataclasses.replace(scorer, fingerprint="another"), tmp_path / "reward"
    )
  shutil.copytree(world / "lists", tmp_path / "lists")
  (record,) = (tmp_path / "lists").glob("*/*/*.array_record*")
  record.write_bytes(record.read_bytes()[:-1])
  run = RunFile(str(world / "data"), str(world / "sids"), tiny(), lists=str(tmp_path / "lists"))
  with pytest.raises(ConfigError, match=f"{record.name}: has .*`gr4ad candidates` again"):
    train_run(run, tmp_path / "run")


def test_retrieval_finds_clicked_ads_better_than_chance(world, tmp_path):
  run = RewardRun(str(world / "data"))
  train = dataclasses.replace(run.train, num_steps=150, eval_every=150, checkpoint_every=150,
                              batch_size=64, data_parallel=1)
  run = dataclasses.replace(run, train=train)
  retrieval = train_retrieval(run, tmp_path / "two")
  np.testing.assert_allclose(np.linalg.norm(retrieval.ad_AD, axis=1), 1, rtol=1e-3)
  inputs = open_inputs(read_run(world / "run"))
  rows = read_impressions(ExampleMaker(inputs.logs, inputs.examples.config), "test")
  clicked = (rows.action_RC >= 1).any(axis=1)
  contexts = [rows.contexts[r] for r in np.flatnonzero(clicked)]
  found, score = retrieval(contexts, 12)
  assert (np.diff(score, axis=1) <= 1e-6).all() and np.abs(score).max() <= 10.01  # 10 x a cosine
  hits = [
    bool(set(ads) & set(shown[action >= 1]))
    for ads, shown, action in zip(found, rows.shown_RC[clicked], rows.action_RC[clicked],
                                  strict=True)
  ]
  assert np.mean(hits) > 1.5 * 12 / MARKET.num_ads
  with pytest.raises(ConfigError, match="other settings"):
    train_retrieval(dataclasses.replace(run, data=run.data + "x"), tmp_path / "two")


def test_nearest_ads_by_brute_force():
  rng = np.random.default_rng(0)
  user, ads = rng.normal(size=(5, 4)), rng.normal(size=(20, 4))
  np.testing.assert_array_equal(nearest_ads(user, ads, 6), np.argsort(-user @ ads.T)[:, :6])
  assert nearest_ads(user, ads, 50).shape == (5, 20)


@pytest.fixture(scope="module")
def segments(world):
  """The three days after the log, a file each."""
  folder = world / "segments"
  folder.mkdir()
  market = build_market(MARKET)
  shelves = build_shelves(market)
  for day in range(20, 23):
    frame = simulate_day(market, day, Cascade(market, shelves), shelves=shelves)
    frame.to_parquet(folder / f"day-{day}.parquet")
  return folder


def online(world, segments, out, **changes):
  settings = {
    "config": OnlineConfig(publish_every=2, keep_days=30), "candidates": LISTS,
    "preference": PreferenceConfig(lists_per_step=4), "reward": world / "reward", **changes,
  }
  return learn_online(world / "run", segments, out, **settings)


def test_a_segment_joins_the_logs_as_if_it_had_been_there(world, segments):
  """Against the log of all days built at once: the same contexts, targets and impressions."""
  logs = read_logs(world / "data" / "logs")
  joined = append_segment(logs, segments / "day-20.parquet")
  whole = market_logs(build_market(MARKET))
  frame = pd.read_parquet(segments / "day-20.parquet")
  assert joined.new_R.sum() == len(joined.new_R) - logs.events.request.max() - 1
  assert len(joined.logs.events.user) == len(whole.events.user) + len(frame)
  events = joined.logs.events
  order = np.lexsort((events.time_s, events.user))
  np.testing.assert_array_equal(order, np.arange(len(order)))
  config = open_inputs(read_run(world / "run")).examples.config
  start_s = float(frame["time"].min())
  cut = dataclasses.replace(config, validation_start_s=start_s, test_start_s=start_s + 43_200)
  by_time = ExampleMaker(joined.logs, cut)
  by_segment = ExampleMaker(
    joined.logs, config, split_R=np.where(joined.new_R, 0, -1).astype(np.int8),
    vocabulary=by_time.vocabulary,
  )
  for user in range(len(joined.logs.users.user_id)):
    expected = [*by_time.user_examples(user, 1), *by_time.user_examples(user, 2)]
    found = list(by_segment.user_examples(user, 0))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
      for field in dataclasses.fields(Example):
        if field.name != "split":
          np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


def test_new_users_join_and_rows_of_unknown_ads_are_left_out(world, tmp_path):
  logs = read_logs(world / "data" / "logs")
  now = int(logs.events.time_s.max())
  frame = pd.DataFrame({
    "user_id": ["stranger", "stranger", logs.users.user_id[3]], "time": [now, now + 5, now + 9],
    "ad_id": [logs.ads.ad_id[0], "no such ad", logs.ads.ad_id[1]], "action": "click",
  })
  frame.to_csv(tmp_path / "a.csv", index=False)
  joined = append_segment(logs, tmp_path / "a.csv")
  assert joined.logs.users.user_id[-1] == "stranger" and joined.new_R.sum() == 2
  assert sum(joined.left_out.values()) == 1
  assert all(column_U[-1] == "" for column_U in joined.logs.users.features.values())
  short = append_segment(logs, tmp_path / "a.csv", keep_days=2)
  assert short.logs.events.time_s.min() >= now + 9 - 2 * 86400 and short.new_R.sum() == 2
  (tmp_path / "b.csv").write_text("user_id,time\n1,2\n")
  with pytest.raises(LogError, match="ad_id"):
    append_segment(logs, tmp_path / "b.csv")


def test_online_learning_survives_being_killed(world, segments, tmp_path):
  """Killed three times in a row, at different moments: the same bits at the end."""
  whole = online(world, segments, tmp_path / "whole")
  rows = read_log(tmp_path / "whole")
  assert [row["segment"] for row in rows] == [0, 1, 2]
  assert all(row["examples"] > 0 and row["lists"] > 0 for row in rows)
  assert rows[-1]["step"] == sum(math.ceil(row["examples"] / 16) for row in rows)
  published = published_steps(tmp_path / "whole" / "published")
  assert latest(tmp_path / "whole" / "published")["step"] == published[-1]
  assert published[-1] % 2 == 0 and rows[-1]["step"] - published[-1] < 2

  class Killed(Exception):
    pass

  # In the second segment while it publishes; then before it saves; then when it has saved.
  for place, good in (("publish", 2), ("save", 0), ("write", 0)):
    owner = {"publish": publisher, "save": Checkpoints, "write": MetricLog}[place]
    calls, real = [], getattr(owner, place)

    def dies(*args, real=real, calls=calls, good=good, **kwargs):
      calls.append(1)
      if len(calls) > good:
        raise Killed
      return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(owner, place, dies)
      with pytest.raises(Killed):
        online(world, segments, tmp_path / "killed")
  again = online(world, segments, tmp_path / "killed")
  jax.tree.map(np.testing.assert_array_equal, whole.params, again.params)
  assert online(world, segments, tmp_path / "whole").step == whole.step  # nothing is left to learn
  run = read_run(tmp_path / "whole")
  params = load_params(run, tmp_path / "whole", open_inputs(run).vocabulary)[1]
  jax.tree.map(np.testing.assert_array_equal, params, whole.params)


def test_online_learning_without_a_reward_model_and_its_mistakes(world, segments, tmp_path):
  one = tmp_path / "segments"
  one.mkdir()
  shutil.copy(segments / "day-21.parquet", one / "a.parquet")
  online(world, one, tmp_path / "out", reward=None)
  shutil.copy(segments / "day-22.parquet", one / "b.parquet")
  (one / ".c.parquet").write_text("half written")
  state = online(world, one, tmp_path / "out", reward=None)
  rows = read_log(tmp_path / "out")
  # Judged before it is learned from, at a constant share of the run's rate.
  assert all(row["loss_after"] < row["loss_before"] for row in rows)
  learns, learned = (read_run(folder).config.train for folder in (tmp_path / "out", world / "run"))
  assert learns.learning_rate == pytest.approx(0.1 * learned.learning_rate)
  assert (learns.warmup_share, learns.final_learning_rate_share) == (0, 1)
  assert [row["segment"] for row in rows] == [0, 1] and rows[-1]["step"] == int(state.step)
  assert rows[0]["lists"] == 0 and rows[0]["moved"] < rows[1]["moved"]
  with pytest.raises(ConfigError, match="other settings"):
    online(world, one, tmp_path / "out")
  with pytest.raises(ConfigError, match="no such folder"):
    online(world, tmp_path / "nothing", tmp_path / "new")
  with pytest.raises(ConfigError, match="nothing is published"):
    latest(tmp_path)
