"""Stages 2 and 3 in a small market: what candidates are, what is learned from them, resuming."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from gr4ad_jax import api
from gr4ad_jax.cli import demo_gpr
from gr4ad_jax.data import prepare
from gr4ad_jax.data.examples import read_split
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.data.splits import time_split
from gr4ad_jax.gpr.asked import TrainingRequests
from gr4ad_jax.gpr.candidates import (
  Candidates,
  FinalValue,
  fit_final_value,
  read_push,
  success_shares,
)
from gr4ad_jax.gpr.config import GuidedSearchConfig
from gr4ad_jax.gpr.generator import generator_of
from gr4ad_jax.gpr.run import open_inputs, read_run
from gr4ad_jax.market.log import market_logs
from gr4ad_jax.market.simulator import open_simulator, requests_of
from gr4ad_jax.market.world import MarketConfig, Requests, truth
from gr4ad_jax.market.worlds import build_market
from gr4ad_jax.ranker.reward import open_reward
from gr4ad_jax.search.artifact import Artifact
from gr4ad_jax.search.held_out import group_requests
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.tokenizer.stage import tokenize
from gr4ad_jax.training.metric_log import read_log
from tests.commands import run

MARKET = MarketConfig(
  world="synthetic", num_users=90, num_ads=60, num_advertisers=6, num_categories=4,
  num_contents=30, days=20,
)
SETTINGS = {
  "stream.groups": 6, "stream.labels": 4, "stream.bundle": 2, "model.width": 16,
  "model.predictions": 1, "model.thinking": 0, "model.refining": 0, "model.recursions": 1,
  "search.batch-size": 16, "search.widths": (6, 8, 8), "train.batch-size": 8,
  "train.log-every": 10, "train.eval-batches": 1, "train.data-parallel": 1,
}
FIRST = {
  "train.num-steps": 8, "train.eval-every": 8, "train.checkpoint-every": 4, "train.log-every": 1,
}
REWARD = {
  "train.num-steps": 2, "train.eval-every": 2, "train.checkpoint-every": 2, "model.width": 8,
}
POLICY = {
  "train.num-steps": 8, "train.eval-every": 8, "train.checkpoint-every": 2,
  "policy.candidates": 6, "policy.push-every": 4, "policy.passes": 2, "policy.lists-per-step": 8,
  "policy.critic-warmup": 2, "train.log-every": 2, "policy.rehearsal-share": 0.25,
}


def words(settings) -> list[str]:
  return [word for name, value in settings.items() for word in (
    f"--{name}", *(map(str, value) if isinstance(value, tuple) else (str(value),))
  )]


@pytest.fixture(scope="module")
def market(tmp_path_factory):
  """The market, and a folder with its log, its codes and its market.json."""
  folder = tmp_path_factory.mktemp("market") / "data"
  market = build_market(MARKET)
  logs = market_logs(market)
  prepare.write_prepared(logs, folder, time_split(logs, validation_days=3, test_days=3))
  (folder / "market.json").write_text(json.dumps(dataclasses.asdict(MARKET)))
  tokenize(folder, folder / "sids", TokenizerConfig(codebook_sizes=(6, 4, 8)))
  return market, folder


@pytest.fixture(scope="module")
def stages(market, tmp_path_factory):
  """A folder with runs of all stages, and the commands of the second and the third."""
  root, data = tmp_path_factory.mktemp("stages"), market[1]
  command = ("train", "--system", "gpr", "--preset", "gpr-tiny", *words(SETTINGS))
  assert run(*command, "--data", data, "--workdir", root / "mtp", *words(FIRST)) == 0
  second = (*command, *words(FIRST), "--start", root / "mtp", "--stage", "vaft",
            "--search.most-children", 3, "--search.least-children", 1)
  assert run(*second, "--workdir", root / "vaft") == 0
  assert run("reward", "--data", data, "--workdir", root / "reward", *words(REWARD)) == 0
  third = (*command, *words(POLICY), "--start", root / "vaft")
  hepo = (*third, "--stage", "hepo", "--market", data)
  assert run(*hepo, "--workdir", root / "hepo") == 0
  dpo = (*third, "--stage", "dpo", "--reward", root / "reward")
  assert run(*dpo, "--workdir", root / "dpo") == 0
  return root, second, hepo


def test_stage_2_goes_on_from_stage_1_and_resumes_to_the_same_bits(stages, tmp_path):
  root, second, _ = stages
  about = json.loads((root / "vaft" / "run.json").read_text())
  assert about["config"]["stage"] == "vaft" and about["start"] == str(root / "mtp")
  shutil.copytree(root / "vaft", tmp_path / "cut")
  shutil.rmtree(tmp_path / "cut" / "checkpoints" / "8")
  assert run(*second, "--workdir", tmp_path / "cut", "--resume") == 0
  before, straight, cut = (
    api.open_run(folder) for folder in (root / "mtp", root / "vaft", tmp_path / "cut")
  )
  jax.tree.map(np.testing.assert_array_equal, straight.params, cut.params)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.params, straight.params)
  assert 0 < max(jax.tree.leaves(moved)) < 0.01  # it begins where stage 1 ended
  rates = [row["learning_rate"] for row in read_log(root / "vaft") if row["kind"] == "train"]
  assert max(rates) <= 0.3 * 3e-3
  assert cut.model.startswith("GPR after value-aware fine-tuning")


def test_values_guide_the_beams_of_a_run_wherever_it_is_asked(stages, tmp_path):
  """Where they let all children live they change nothing; where they let one live, less is found.
  """
  folder = stages[0] / "vaft"
  guided = api.open_run(folder)
  context = guided.contexts.context(read_split(guided.examples, "test")[:16])
  model = open_inputs(read_run(folder), folder).model

  def ask(**search):
    search = GuidedSearchConfig(widths=(4, 8, 12), batch_size=16, **search)
    asked = dataclasses.replace(guided, generator=generator_of(model, search))
    return asked.recommender(search)(context, 12)

  plain = ask()
  jax.tree.map(np.testing.assert_array_equal, plain, ask(most_children=8, least_children=8))
  fewer = ask(most_children=1, least_children=1)
  assert (fewer.ad_RK >= 0).sum() < (plain.ad_RK >= 0).sum()
  assert run("export", "--workdir", folder, "--out", tmp_path / "artifact") == 0
  artifact = Artifact(tmp_path / "artifact")
  ads, _ = artifact.recommend(artifact.sample(), k=5)
  found = guided.recommender()(type(context)(**artifact.sample()), 5)
  assert ads == [guided.logs.ads.ad_id[found.ad_RK[0]].tolist()]


def test_the_market_prices_what_its_log_showed(market):
  truth_of, folder = market
  logs = market_logs(truth_of)
  users = ExampleMaker(logs, time_split(logs, validation_days=3, test_days=3))
  requests = TrainingRequests(users)
  contexts = [requests.context(int(at)) for at in requests.logged.number_N[:40]]
  assert all(users.split_R[c.request] == 0 for c in contexts)
  ad_RC = np.random.default_rng(0).integers(-1, 60, (40, 5)).astype(np.int32)
  found = open_simulator(folder, logs, users.vocabulary)(contexts, ad_RC)
  row = {int(r): at for at, r in enumerate(logs.events.request)}  # any event of the request
  scene = logs.events.features["scene"]
  asked = Requests(
    logs.users.user_id[[c.user for c in contexts]].astype(int),
    np.array([c.time_s for c in contexts]),
    np.array([["feed", "search", "detail"].index(scene[row[c.request]]) for c in contexts]),
  )
  expected = truth(truth_of, asked, np.where(ad_RC < 0, -1, logs.ads.ad_id[ad_RC].astype(int)))
  np.testing.assert_allclose(found.ecpm, expected.ecpm, rtol=1e-6)
  assert (found.ecpm[ad_RC >= 0] > 0).mean() > 0.5 and not found.ecpm[ad_RC < 0].any()


def test_a_users_successes_by_hand():
  """Of the ads 0, 0, 2, 1 (no SID), 2: at level 1 half code 3, half code 1."""
  codes_AL = np.array([[3, 0], [-1, -1], [1, 0]])
  found = success_shares(np.array([0, 0, 2, 1, 2]), codes_AL, 4)
  np.testing.assert_allclose(found, [[0, 0.5, 0, 0.5], [1, 0, 0, 0]])
  long = np.array([0] * 500 + [2] * 200)  # the latest 200 count
  np.testing.assert_allclose(success_shares(long, codes_AL, 4)[0], [0, 1, 0, 0])
  assert not success_shares(np.zeros(0, int), codes_AL, 4).any()


def test_final_values_by_hand():
  """(2000 + .1/2 x 1000 x (2 + .5)) / 1000 where eCPM is 2000 and rates are 2 and 1/2 the mean."""
  shape = {"request_R": np.zeros(1), "old_logp_RCL": 0, "liked_RCL": 0, "usual_RCL": 0}
  found = Candidates(
    code_RCL=np.array([[[1], [2], [-1]]]), ad_RC=np.array([[0, 1, -1]]),
    click_RC=np.array([[0.2, 0.0, 9.0]]), conversion_RC=np.array([[0.1, 0.3, 9.0]]),
    ecpm_RC=np.array([[2000.0, 0.0, 9e9]]), **shape,
  )
  value = fit_final_value(found, 0.1)
  assert (value.ecpm, value.click, value.conversion) == pytest.approx((1000, 0.1, 0.2))
  np.testing.assert_allclose(value(found)[0, :2], [2.125, 0.075], rtol=1e-6)
  assert (value.mean, value.std) == pytest.approx((1.1, 1.025))
  np.testing.assert_allclose(value.grades(value(found)[0, :2]), [5, 0], atol=1e-5)
  assert FinalValue(0.0, 1000, 0.1, 0.2)(found)[0, 0] == pytest.approx(2.0)


def test_candidates_are_what_the_pushs_own_search_finds(stages, market):
  """Those of push 0 by the parameters of stage 2: codes, log-probs, and shares counted by hand."""
  root = stages[0]
  found = read_push(root / "hepo", 0)
  assert len(found.request_R) == 4 * 8 / 2 == len(np.unique(found.request_R))
  inputs = open_inputs(read_run(root / "vaft"), root / "vaft")
  opened = dataclasses.replace(
    api.open_run(root / "vaft"), generator=generator_of(inputs.model)  # all children, as hepo's
  )
  requests = TrainingRequests(inputs.make_batch.users, rehearsal_share=0.25)
  contexts = [requests.context(int(at)) for at in found.request_R]
  assert [c.request < 0 for c in contexts] == [False] * 12 + [True] * 4  # a quarter is made up
  beams = opened.recommender().search(opened.contexts.context(contexts))
  np.testing.assert_array_equal(found.code_RCL, beams.code_BWL[:, :6])
  np.testing.assert_array_equal(found.old_logp_RCL, beams.level_logp_BWL[:, :6])
  codes_AL = opened.sids.codes_AL
  np.testing.assert_array_equal(codes_AL[found.ad_RC], found.code_RCL)
  priced = open_simulator(market[1], opened.logs, inputs.make_batch.users.vocabulary)(
    contexts, found.ad_RC
  )
  np.testing.assert_array_equal(found.ecpm_RC, priced.ecpm)
  for row, candidate in ((0, 0), (3, 5), (7, 2)):
    context, codes = contexts[row], found.code_RCL[row, candidate].tolist()
    ads = inputs.make_batch.users.past(context.user).until(context.time_s).ads
    for level in range(3):
      share = [np.mean([codes_AL[ad, level] == code for ad in ads]) if len(ads) else 0
               for code in range(8)]
      leads_on = {sid[level] for sid in codes_AL.tolist() if sid[:level] == codes[:level]}
      usual = np.mean([share[code] for code in leads_on])
      assert found.liked_RCL[row, candidate, level] == pytest.approx(share[codes[level]])
      assert found.usual_RCL[row, candidate, level] == pytest.approx(usual, abs=1e-6)
  later = read_push(root / "hepo", 1)
  assert not np.array_equal(later.request_R, found.request_R)


def test_the_policy_waits_for_its_critic_and_then_learns(stages):
  root = stages[0]
  rows = [row for row in read_log(root / "hepo") if row["kind"] == "train"]
  assert [row["step"] for row in rows] == [2, 4, 6, 8]
  # Up to rounding, probabilities are those of the search for as long as values learn alone.
  assert rows[0]["moved"] < 1e-4 < rows[1]["moved"]
  assert rows[0]["critic_loss"] > 0 and rows[0]["final_value"] > 0
  before, after = (api.open_run(root / name) for name in ("vaft", "hepo"))
  assert after.step == 8 and after.value_of == "impression"
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.params, after.params)
  assert max(jax.tree.leaves(moved["hte"])) > 10 * max(jax.tree.leaves(moved["ptd"])) > 0
  # Values are currency of an impression now, as the market pays it.
  value = json.loads((root / "hepo" / "candidates" / "scale.json").read_text())
  vocabulary = after.contexts.vocabulary
  assert (vocabulary.value_mean, vocabulary.value_std) == (value["mean"], value["std"])
  assert before.contexts.vocabulary.value_mean != value["mean"]


def test_the_demo_says_what_a_stage_earns(stages, market, monkeypatch):
  monkeypatch.setattr(demo_gpr, "JUDGED", 5)
  monkeypatch.setattr(demo_gpr, "SHOWN", 2)
  the_market, data = market
  opened = api.open_run(stages[0] / "hepo")
  judged = demo_gpr.judge(opened, data)
  groups = group_requests(read_split(opened.examples, "test"))
  chosen = [groups[at][0] for at in np.linspace(0, len(groups) - 1, 5).astype(int)]
  earned = []
  for example in chosen:  # each by itself, in the market's own numbers
    ads = opened.recommender()(opened.contexts.context([example]), 2).ad_RK
    number = opened.logs.ads.ad_id[ads].astype(int)
    asked = requests_of([example], opened.examples.features)
    user = opened.logs.users.user_id[asked.user_R].astype(int)
    earned.append(truth(the_market, asked._replace(user_R=user), number).ecpm.sum())
  assert judged["revenue"] == pytest.approx(np.mean(earned), rel=1e-5)
  assert 0 < judged["ndcg@50"] < judged["recall@50"] <= 1


def test_stages_of_the_demo_take_shares_of_its_steps():
  steps = {s: demo_gpr.stage_config(s, "cpu").train.num_steps for s in demo_gpr.STAGES}
  assert steps == {"mtp": 800, "vaft": 200, "hepo": 400}
  assert demo_gpr.stage_config("hepo", "tiny").learns_policy


def test_dpo_learns_at_once_from_the_same_candidates_at_a_reward_models_prices(stages):
  root = stages[0]
  mine, other = (read_push(root / name, 0) for name in ("dpo", "hepo"))
  for name in Candidates._fields[:6]:
    np.testing.assert_array_equal(getattr(mine, name), getattr(other, name))
  opened = api.open_run(root / "dpo")
  inputs = open_inputs(read_run(root / "dpo"), root / "dpo")
  requests = TrainingRequests(inputs.make_batch.users, rehearsal_share=0.25)
  contexts = [requests.context(int(at)) for at in mine.request_R]
  scores = open_reward(root / "reward")(contexts, mine.ad_RC)
  np.testing.assert_allclose(mine.ecpm_RC, scores.ecpm_RC, rtol=1e-4)
  assert opened.model.startswith("GPR after DPO")
  rows = [row for row in read_log(root / "dpo") if row["kind"] == "train"]
  assert rows[0]["policy_loss"] == pytest.approx(np.log(2), abs=0.05)  # of nearly equal margins
  waiting = [row for row in read_log(root / "hepo") if row["kind"] == "train"]
  assert rows[1]["moved"] > waiting[1]["moved"]


def test_stage_3_resumes_to_the_same_bits(stages, tmp_path):
  """Killed within a push; the next one's candidates are made again."""
  root, _, hepo = stages
  shutil.copytree(root / "hepo", tmp_path / "cut")
  for step in (tmp_path / "cut" / "checkpoints").iterdir():
    if step.name.isdigit() and int(step.name) > 2:
      shutil.rmtree(step)
  shutil.rmtree(tmp_path / "cut" / "candidates" / "0001")
  assert run(*hepo, "--workdir", tmp_path / "cut", "--resume") == 0
  straight, cut = (api.open_run(folder) for folder in (root / "hepo", tmp_path / "cut"))
  assert cut.step == 8
  jax.tree.map(np.testing.assert_array_equal, straight.params, cut.params)
  for mine, other in zip(read_push(root / "hepo", 1), read_push(tmp_path / "cut", 1), strict=True):
    np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(("options", "message"), [
  (["--stage", "hepo"], "needs --reward, a reward model, or --market"),
  (["--stage", "vaft", "--market", "{data}"], "prices no candidates"),
  (["--stage", "dpo", "--market", "{root}"], "holds no market.json"),
  (["--stage", "dpo", "--market", "{data}", "--start", "{root}/hepo"], "after which none begins"),
  (["--stage", "dpo", "--market", "{data}", "--policy.candidates", "9"], "last of search.widths"),
  (["--stage", "vaft", "--start", "None", "--data", "{data}"], "stage='vaft': needs --start"),
  (["--stage", "vaft", "--model.width", "32"], "was trained with another model"),
  (["--stage", "vaft", "--start", "{root}"], "{root}"),
])
def test_what_a_stage_cannot_begin_with_is_told(stages, market, tmp_path, capsys, options, message):
  root, data = stages[0], market[1]
  command = ("train", "--system", "gpr", "--preset", "gpr-tiny", *words(SETTINGS), *words(POLICY),
             "--start", root / "mtp", "--workdir", tmp_path / "new")
  assert run(*command, *(word.format(data=data, root=root) for word in options)) == 2
  assert message.format(root=root) in capsys.readouterr().err
  assert not (tmp_path / "new" / "run.json").exists()
