"""A learner among damaged segments, useless parameters and half-written files."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pandas as pd
import pytest
from flax import serialization

from gr4ad_jax.config import ConfigError
from gr4ad_jax.data import prepare
from gr4ad_jax.data.segments import append_segment
from gr4ad_jax.data.splits import time_split
from gr4ad_jax.evaluation.evaluate import evaluate
from gr4ad_jax.gr4ad import online as online_module
from gr4ad_jax.gr4ad.config import CandidateConfig, OnlineConfig, PreferenceConfig, preset
from gr4ad_jax.gr4ad.online import learn_online
from gr4ad_jax.gr4ad.run import RunFile, open_run
from gr4ad_jax.gr4ad.train_run import train_run
from gr4ad_jax.machine import lock
from gr4ad_jax.market.log import market_logs, simulate_day
from gr4ad_jax.market.policy import Cascade, build_shelves
from gr4ad_jax.market.world import MarketConfig
from gr4ad_jax.market.worlds import build_market
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.tokenizer.stage import tokenize
from gr4ad_jax.training.metric_log import read_log
from gr4ad_jax.training.published import latest, published_steps
from gr4ad_jax.training.train_loop import DivergedError
from tests.commands import run as gr4ad

MARKET = MarketConfig(
  world="synthetic", num_users=80, num_ads=60, num_advertisers=6, num_categories=4,
  num_contents=30, days=12, sessions_per_day=0.8, click_rate=0.15, conversion_rate=0.3,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """A trained run in run/, and two days after its log in days/."""
  folder = tmp_path_factory.mktemp("market")
  market = build_market(MARKET)
  logs = market_logs(market)
  limits = {"max_ad_history": 8, "max_organic_history": 8, "num_trending": 4}
  cut = dataclasses.replace(time_split(logs, validation_days=2, test_days=2), **limits)
  prepare.write_prepared(logs, folder / "data", cut)
  tokenize(folder / "data", folder / "sids", TokenizerConfig(codebook_sizes=(8, 8, 16)))
  base = preset("tiny")
  config = dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, width=32, num_layers=2, num_lazy_layers=1),
    train=dataclasses.replace(base.train, num_steps=6, batch_size=16, eval_every=6,
                              eval_batches=1, checkpoint_every=6, data_parallel=1),
    search=dataclasses.replace(base.search, widths=(6, 8, 10), batch_size=16),
  )
  train_run(RunFile(str(folder / "data"), str(folder / "sids"), config), folder / "run")
  (folder / "days").mkdir()
  shelves = build_shelves(market)
  for day in (12, 13):
    frame = simulate_day(market, day, Cascade(market, shelves), shelves=shelves)
    frame.to_parquet(folder / "days" / f"day-{day}.parquet", write_page_checksum=True)
  return folder


@pytest.fixture(autouse=True)
def wide(monkeypatch):
  monkeypatch.setenv("COLUMNS", "1000")  # one line each


def learn(world, segments, out, **online):
  return learn_online(
    world / "run", segments, out, config=OnlineConfig(**{"publish_every": 2} | online),
    preference=PreferenceConfig(), candidates=CandidateConfig(),
  )


def copy_days(world, folder, *days):
  folder.mkdir(exist_ok=True)
  for day in days or (12, 13):
    shutil.copy(world / "days" / f"day-{day}.parquet", folder)
  return folder


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
  """The parameters after both days."""
  return learn(world, world / "days", tmp_path_factory.mktemp("whole") / "out").params


def test_what_cannot_be_learned_from_is_set_aside_and_the_good_ones_go_on(
  world, whole, tmp_path, capsys
):
  segments = copy_days(world, tmp_path / "segments")
  good = (segments / "day-13.parquet").read_bytes()
  flipped = bytearray(good)
  flipped[len(good) // 4] ^= 1  # in the data, which nothing but a checksum tells
  for name, content in (
    ("a-empty.parquet", b""), ("b-cut.parquet", good[: len(good) // 2]),
    ("c-flipped.parquet", bytes(flipped)), ("d-text.csv.gz", b"no archive"),
    ("day-12b-columns.csv", b"user,when\n1,2\n"), ("day-12c-none.csv", b"user_id,time,ad_id\n"),
    ("day-12d-binary.csv", bytes(range(256))),
  ):
    (segments / name).write_bytes(content)
  (segments / "day-14-folder.parquet").mkdir()
  state = learn(world, segments, tmp_path / "out")
  jax.tree.map(np.testing.assert_array_equal, state.params, whole)
  rows = read_log(tmp_path / "out")
  assert [row["quarantined"] for row in rows] == [4, 7]
  told = capsys.readouterr().err
  quarantine = json.loads((tmp_path / "out" / "quarantine.json").read_text())
  assert len(quarantine) == 8 and all(row["why"] for row in quarantine.values())
  assert all(f"{segments / name}: in quarantine (" in told for name in quarantine)
  assert all((segments / name).exists() for name in quarantine)

  # One of them is written again, as it should have been; a learned one is another one now.
  (segments / "b-cut.parquet").write_bytes(good)
  (segments / "day-12.parquet").write_bytes(good)
  again = learn(world, segments, tmp_path / "out")
  assert again.step > state.step
  told = capsys.readouterr().err
  assert "b-cut.parquet: " in told and "in quarantine" not in told  # the others are told once
  assert f"{segments / 'day-12.parquet'}: has changed since it was learned from" in told
  assert len(json.loads((tmp_path / "out" / "quarantine.json").read_text())) == 7
  # One that can no longer be read does not keep a learner from going on.
  (segments / "day-12.parquet").write_bytes(b"")
  assert learn(world, segments, tmp_path / "out").step == again.step
  assert "day-12.parquet: cannot be read any more" in capsys.readouterr().err


def finite(folder):
  """Whether the published parameters are numbers."""
  pointer = latest(folder)
  data = (folder / pointer["file"]).read_bytes()
  return all(np.isfinite(x).all() for x in jax.tree.leaves(serialization.msgpack_restore(data)))


@pytest.mark.parametrize("share", ["1e30", "1e3"])
def test_useless_parameters_are_never_published(world, tmp_path, capsys, share):
  """Not finite; and finite, but far worse than those before."""
  command = ("online", "--workdir", world / "run", "--segments", world / "days", "--out",
             tmp_path / "out", "--publish-every", 3, "--learning-rate-share", share)
  assert gr4ad(*command) == 1
  line = capsys.readouterr().err.splitlines()[-1]
  assert "day-12.parquet" in line and "published is step 0" in line and "learning-rate" in line
  published = tmp_path / "out" / "published"
  assert latest(published)["step"] == 0 and published_steps(published) == [0] and finite(published)
  if share == "1e30":
    assert gr4ad(*command) == 1  # a start after it is not stuck in another way


def test_a_segment_that_spoils_the_parameters_is_taken_back(world, whole, tmp_path, monkeypatch):
  real, spoiling = online_module.run_steps, [True]

  def run_steps(step_fn, state, batches, **options):
    def spoiled(state, batch):
      state, metrics = step_fn(state, batch)
      if spoiling and int(state.step) == 5:  # the one after a publication of the second day
        state = state._replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
      return state, metrics

    return real(spoiled, state, batches, **options)

  monkeypatch.setattr(online_module, "run_steps", run_steps)
  with pytest.raises(DivergedError, match=r"day-13.*is not finite"):
    learn(world, world / "days", tmp_path / "out")
  published = tmp_path / "out" / "published"
  first = read_log(tmp_path / "out")[0]["step"]
  pointer = latest(published)
  assert pointer["step"] <= first and pointer["went_back_from"] == "day-13.parquet"
  assert published_steps(published)[-1] == pointer["step"] and finite(published)
  spoiling.clear()  # the file was another one, say
  again = learn(world, world / "days", tmp_path / "out")
  jax.tree.map(np.testing.assert_array_equal, whole, again.params)


def test_half_a_pointer_is_mended_two_learners_are_kept_apart_and_none_is_scored(
  world, tmp_path, capsys
):
  segments, out = copy_days(world, tmp_path / "segments", 12), tmp_path / "out"
  learn(world, segments, out)
  (out / "published" / "latest.json").write_text('{"step": 2, "file": "par')
  with lock.held(out, "a learner"), pytest.raises(ConfigError, match="a learner .* is at work"):
    learn(world, segments, out)
  state = learn(world, segments, out)
  assert latest(out / "published")["step"] == int(state.step)
  assert "anew" in capsys.readouterr().err
  # Its parameters have learned from days that lie behind the test split.
  with pytest.raises(ConfigError, match=r"out: .*learned from the segments.*loss_before"):
    evaluate(open_run(out))
  assert open_run(world / "run").unscorable == ""
  run = json.loads((world / "run" / "run.json").read_text())
  shutil.copytree(world / "run", tmp_path / "later")
  (tmp_path / "later" / "run.json").write_text(json.dumps(run | {"start": str(out)}))
  with pytest.raises(ConfigError, match="later: .*learned from the segments"):
    evaluate(open_run(tmp_path / "later"))


def test_a_stray_row_of_the_future_is_left_out_and_wipes_no_history(tiny_logs, tmp_path):
  now = 1_507_000_000
  rows = pd.DataFrame({
    "user_id": ["u1", "u1", "u1", "u2"], "request_id": ["r1", "r1", "r1", "r2"],
    "time": [now, 4_070_908_800, now + 5, now + 86_000], "ad_id": ["ad1", "ad2", "ad3", "ad4"],
    "action": "click",
  })
  rows.to_parquet(tmp_path / "stray.parquet")
  rows[rows["time"] < 4e9].to_parquet(tmp_path / "clean.parquet")
  rows[rows["time"] > 4e9].to_csv(tmp_path / "only.csv", index=False)
  stray, clean, only = (
    append_segment(tiny_logs, tmp_path / name, keep_days=60, now_s=now)
    for name in ("stray.parquet", "clean.parquet", "only.csv")
  )
  assert len(clean.logs.events.user) > 500 and not clean.left_out
  for column in ("user", "time_s", "ad", "request"):
    np.testing.assert_array_equal(
      getattr(stray.logs.events, column), getattr(clean.logs.events, column)
    )
  assert list(stray.left_out.values()) == [1] and "ahead of the present" in str(stray.left_out)
  assert list(only.left_out.values()) == [1] and not only.new_R.any()
  assert len(only.logs.events.user) == len(tiny_logs.events.user)
