"""Runs of GPR on the command line: trained, resumed, and taken through every common room."""

import dataclasses
import itertools
import json
import re
import shutil

import jax
import numpy as np
import pytest
from fastapi.testclient import TestClient

from gr4ad_jax import api
from gr4ad_jax.config import ConfigError, override_all
from gr4ad_jax.data.engagements import SeenAds
from gr4ad_jax.data.examples import read_split
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.gpr.config import PRESETS
from gr4ad_jax.gpr.model import Gpr
from gr4ad_jax.gpr.run import RunFile, open_inputs, read_run, train_run
from gr4ad_jax.search.artifact import Artifact
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.held_out import eval_requests, group_requests
from gr4ad_jax.search.judge import judge_of
from gr4ad_jax.search.recommend import recommend_for_user
from gr4ad_jax.serving.config import ServingConfig
from gr4ad_jax.serving.server import build_app
from gr4ad_jax.serving.service import Service
from gr4ad_jax.training.metric_log import read_log
from tests.commands import run

TINY = {
  "stream.groups": 12, "model.predictions": 2, "model.thinking": 1, "train.num_steps": 60,
  "train.log_every": 10, "train.eval_every": 30, "train.eval_batches": 2,
  "train.checkpoint_every": 30, "train.data_parallel": 1,
}
WHOLE = SearchConfig(widths=(8, 32, 40), batch_size=4)  # every SID


def run_of(data, **settings) -> RunFile:
  config = override_all(PRESETS["gpr-tiny"], TINY | settings)
  return RunFile(str(data), str(data / "sids"), config)


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
  """From the command line."""
  folder = tmp_path_factory.mktemp("gpr") / "run"
  options = [word for name, value in TINY.items()
             for word in (f"--{name.replace('_', '-')}", str(value))]
  assert run("train", "--system", "gpr", "--preset", "gpr-tiny", "--data", tiny_data,
             "--workdir", folder, *options) == 0
  return folder


@pytest.fixture(scope="module")
def opened(trained):
  return dataclasses.replace(api.open_run(trained), search=WHOLE)


@pytest.fixture(scope="module")
def every_ad(opened):
  """An example -> log p(SID) and value of every ad, by teacher forcing instead of a search."""
  run_file = read_run(opened.folder)
  model = Gpr(run_file.config.model, open_inputs(run_file, opened.folder).model.vocabulary)
  said = jax.jit(lambda params, *batch: model.apply({"params": params}, *batch))
  codes_AL = opened.sids.codes_AL

  def of(example, ads=None):
    """Of some ads alone, all others have -inf; None = all can be had."""
    ads = np.arange(len(codes_AL)) if ads is None else ads
    target_BPNL = np.repeat(codes_AL[None, :, None], 2, axis=2)
    legal_BPNLU = np.zeros((*target_BPNL.shape, 1), np.uint32)
    for ad, level in itertools.product(range(len(codes_AL)), range(3)):
      same = (codes_AL[ads, :level] == codes_AL[ad, :level]).all(axis=-1)
      leads_on = np.unique(codes_AL[ads[same], level])
      legal_BPNLU[0, ad, :, level, 0] = sum(1 << int(code) for code in leads_on)
    group_BP = np.full(target_BPNL.shape[:2], 11, np.int32)
    found = said(opened.params, opened.contexts.context([example]), group_BP, target_BPNL,
                 legal_BPNLU)
    logp_A = np.asarray(found.logp_BPNL)[0, :, 0].sum(axis=-1)
    worth_A = model.vocabulary.value_mean + model.vocabulary.value_std * found.value_BPV[0, :, 3]
    return np.where(np.isin(np.arange(len(codes_AL)), ads), logp_A, -np.inf), np.asarray(worth_A)

  return of


def test_it_learns_and_says_what_it_is(trained, tiny_data):
  rows = read_log(trained)
  losses = [row["head_1_loss"] for row in rows if row["kind"] == "train"]
  assert losses[-1] < np.log(40) - 0.5  # what forty ads cost that are alike
  validation = [row for row in rows if row["kind"] == "validation"]
  assert [row["step"] for row in validation] == [30, 60]
  logged = {"loss", "head_1_loss", "head_2_loss", "head_1_weight", "balance_loss", "value_loss",
            "refining_loss"}
  assert logged <= validation[0].keys()
  assert sum(validation[0][f"head_{j}_weight"] for j in (1, 2)) == pytest.approx(1)
  assert json.loads((trained / "run.json").read_text())["system"] == "gpr"
  assert read_run(trained).config == run_of(tiny_data).config


def test_recommends_what_brute_force_finds(opened, every_ad):
  maker = ExampleMaker(opened.logs, opened.examples.config)
  ids = opened.logs.ads.ad_id
  for user in (7, 20):
    logp_A, worth_A = every_ad(maker.latest_context(user))
    found = recommend_for_user(opened, f"u{user}", 40)
    expected, worth = (dict(zip(ids, x.tolist(), strict=True)) for x in (logp_A, worth_A))
    assert len(found.ads) == 40
    for ad in found.ads:
      assert ad.logp == pytest.approx(expected[ad.ad_id], abs=1e-3)
      assert ad.expected_value == pytest.approx(max(worth[ad.ad_id], 1e-6), abs=5e-3)
    assert np.std(worth_A) > 0.05  # an ad's value is its own
    assert [ad.logp for ad in found.ads] == sorted((ad.logp for ad in found.ads), reverse=True)
    seen = SeenAds(opened.logs).before(user, np.inf)
    unseen = recommend_for_user(opened, f"u{user}", 40, exclude_seen=True)
    assert {ad.ad_id for ad in unseen.ads} == {*ids} - {*ids[seen]}
    # Probabilities are of what the request may get.
    left = np.setdiff1d(np.arange(40), seen)
    expected = dict(zip(ids, every_ad(maker.latest_context(user), left)[0], strict=True))
    for ad in unseen.ads:
      assert ad.logp == pytest.approx(expected[ad.ad_id], abs=1e-3)


def test_is_evaluated_reported_and_set_beside_others(trained, tiny_data, tmp_path, capsys):
  assert run("evaluate", "--workdir", trained) == 0
  assert "GPR" in capsys.readouterr().out
  metrics = json.loads((trained / "metrics.json").read_text())
  assert metrics["recall@10"] > metrics["baseline/popularity/recall@10"]
  assert metrics["invalid_sid_rate"] == 0
  about = json.loads((trained / "about.json").read_text())
  assert about["model"].startswith("GPR after multi-token prediction (stage 1)")
  assert run("report", "--workdir", trained) == 0
  page = (trained / "report.html").read_text()
  assert "GPR on synthetic test logs" in page and "Head 1 loss" in page
  # As a row beside a run of another system.
  other = api.train(tiny_data, tmp_path / "other", preset="tiny", settings={
    "train.num_steps": 2, "model.width": 32, "model.num_layers": 2, "model.num_lazy_layers": 1,
    "train.data_parallel": 1, "search.widths": (8, 16, 32),
  })
  beside = api.evaluate(other, baseline_runs=[trained])
  assert beside["baseline/gpr/recall@10"] == pytest.approx(metrics["recall@10"], abs=1e-6)


def test_a_search_judges_parameters_as_evaluation_does(opened):
  train = dataclasses.replace(opened.config.train, best_by="ndcg@50", rank_requests=10_000)
  judge = judge_of(
    train, WHOLE, data=opened, contexts=opened.contexts, generator=opened.generator,
    bin_means=opened.bin_means,
  )
  found = judge(opened.params)
  assert len(eval_requests(group_requests(read_split(opened.examples, "validation"))).user_R) > 20
  assert found["recall@50"] == 1 and 0.3 < found["ndcg@50"] < 1


def test_is_exported_and_read_without_the_package(opened, tmp_path):
  assert run("export", "--workdir", opened.folder, "--out", tmp_path / "artifact") == 0
  artifact = Artifact(tmp_path / "artifact")
  ads, scores = artifact.recommend(artifact.sample(), k=5)
  example = read_split(opened.examples, "test")
  sample = artifact.sample()
  found = api.open_run(opened.folder).recommender()(
    type(opened.contexts.context(example[:1]))(**sample), 5
  )
  assert ads == [opened.logs.ads.ad_id[found.ad_RK[0]].tolist()]
  np.testing.assert_allclose(scores[0], found.logp_RK[0], atol=1e-4)
  with pytest.raises(ValueError, match="takes no histories"):
    artifact.context([{"ad_id": "ad1"}])


def test_is_served_with_what_came_since_and_new_ads(opened, every_ad, tmp_path):
  config = ServingConfig(batch_sizes=(1,), beam_factors=(1.0,), segment_s=3600)
  service = Service(
    opened, config=config, store=tmp_path / "store", segments=tmp_path / "segments", clock="log"
  )
  now_s = int(opened.logs.events.time_s.max()) + 1
  with TestClient(build_app(service)) as client:
    def ask(**body) -> list[tuple[str, float]]:
      reply = client.post("/v1/recommend", json={"user_id": "u7", "k": 40, "time": now_s} | body)
      assert reply.status_code == 200, reply.text
      return [(ad["ad_id"], np.log(ad["probability"])) for ad in reply.json()["ads"]]

    before = ask()
    assert len(before) == 40
    clicks = [
      {"user_id": "u7", "ad_id": f"ad{ad}", "action": "click", "time": now_s - 60,
       "request_id": "live", "features": {"scene": "feed"}} for ad in (30, 31)
    ]
    assert client.post("/v1/events", json={"events": clicks}).status_code == 200
    after = ask()
    assert dict(after) != dict(before)
    # The click of a moment ago is a group of the stream: by hand, from the log and these events.
    past = ExampleMaker(opened.logs, opened.examples.config).past(7)
    feed = 1 + opened.examples.features.request["scene"].index("feed")
    late = dataclasses.replace(past, **{
      name: np.concatenate([getattr(past, name), np.array(values, getattr(past, name).dtype)])
      for name, values in {
        "ads": [30, 31], "ad_time_s": [now_s - 60] * 2, "ad_value": [0, 0], "ad_action": [1, 1],
        "ad_request": [-1, -1], "ad_request_s": [now_s - 60] * 2, "ad_feature": [[feed]] * 2,
      }.items()
    })
    maker = ExampleMaker(opened.logs, opened.examples.config)
    example = late.request(
      now_s + 1, config=opened.examples.config, feature_F=maker.feature(7, None), user=7
    )
    expected = dict(zip(opened.logs.ads.ad_id, every_ad(example)[0], strict=True))
    for ad, logp in after:
      assert logp == pytest.approx(expected[ad], abs=1e-3)
    fresh = {
      "ad_id": "fresh", "advertiser_id": "newcomer", "category": "food > snack",
      "text": "food snack product number 0",
    }
    assert client.post("/v1/ads", json={"ads": [fresh]}).status_code == 200
    assert [ad for ad, _ in ask(where=["advertiser_id=newcomer"])] == ["fresh"]


def test_a_killed_training_resumes_to_the_same_bits(tiny_data, tmp_path):
  short = {
    "train.num_steps": 6, "train.eval_every": 3, "train.checkpoint_every": 2,
    "train.log_every": 1, "model.dropout": 0.1,
  }
  straight = train_run(run_of(tiny_data, **short), tmp_path / "straight")
  shutil.copytree(tmp_path / "straight", tmp_path / "cut")
  for step in (tmp_path / "cut" / "checkpoints").iterdir():
    if step.name in ("4", "6"):
      shutil.rmtree(step)
  resumed = train_run(run_of(tiny_data, **short), tmp_path / "cut", resume=True)
  for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
    np.testing.assert_array_equal(a, b)
  losses = [
    [(row["step"], row["kind"], row["loss"]) for row in read_log(tmp_path / name)]
    for name in ("straight", "cut")
  ]
  assert losses[0] == losses[1] and len(losses[0]) == 8
  with pytest.raises(ConfigError, match="pass --resume"):
    train_run(run_of(tiny_data, **short), tmp_path / "cut")
  with pytest.raises(ConfigError, match=re.escape("config.train.num_steps: 6 -> 7")):
    train_run(run_of(tiny_data, **short | {"train.num_steps": 7}), tmp_path / "cut", resume=True)


def test_meshes_agree(tiny_data, tmp_path):
  """One device; eight: rows, layers and heads over two each."""
  losses = {}
  for name, (data, fsdp, tensor) in {
    "one": (1, 1, 1), "eight": (2, 2, 2),
  }.items():
    train_run(run_of(tiny_data, **{
      "train.num_steps": 3, "train.log_every": 1, "train.eval_every": 3, "train.eval_batches": 1,
      "train.checkpoint_every": 3, "train.data_parallel": data, "train.fsdp": fsdp,
      "train.tensor": tensor,
    }), tmp_path / name)
    losses[name] = [row["loss"] for row in read_log(tmp_path / name)]
    assert len(losses[name]) == 4
    assert losses[name] == pytest.approx(losses["one"], rel=2e-5)


@pytest.mark.parametrize(("words", "message"), [
  ([], "--data is missing"),
  (["--data", "{data}", "--model.num-heads", "3"], "model.num_heads=3: must divide"),
  (["--data", "{data}", "--stream.labels", "99"], "stream.labels=99: must not exceed"),
  (["--data", "{data}", "--search.widths", "8", "8"], "search.widths=(8, 8): the SIDs have 3"),
  (["--data", "{data}", "--train.table-learning-rate", "1"], "GPR has no table of ids"),
  (["--data", "{data}", "--train.batch-size", "4096"], "train.batch_size=4096: larger than"),
  (["--data", "{data}", "--preset", "small"], "--preset"),
])
def test_mistakes_are_told(tiny_data, tmp_path, capsys, words, message):
  argv = [word.format(data=tiny_data) for word in words]
  argv = argv if "--preset" in argv else ["--preset", "gpr-tiny", *argv]
  code = run("train", "--system", "gpr", "--workdir", tmp_path / "run",
             "--train.data-parallel", "1", *argv)
  out, err = capsys.readouterr()
  assert code == 2 and message in out + err and "Traceback" not in err


def test_another_systems_folder_is_refused(trained, tiny_data, tmp_path, capsys):
  sasrec = tmp_path / "sasrec"
  sasrec.mkdir()
  (sasrec / "run.json").write_text(json.dumps({"system": "sasrec"}))
  for system, folder, words in (
    ("gpr", sasrec, "holds a run of the system 'sasrec', not 'gpr'"),
    ("sasrec", trained, "holds a run of the system 'gpr', not 'sasrec'"),
  ):
    assert run("train", "--system", system, "--data", tiny_data, "--workdir", folder,
               "--resume") == 2
    assert words in capsys.readouterr().err
