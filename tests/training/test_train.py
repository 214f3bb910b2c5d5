"""Training: meshes agree, a killed run resumes to the same bits, divergence stops with advice."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gr4ad_jax.config import ConfigError, to_json
from gr4ad_jax.data.examples import read_split
from gr4ad_jax.evaluation.evaluate import search_split
from gr4ad_jax.gr4ad import train_run as run_module
from gr4ad_jax.gr4ad.config import Config, ModelConfig
from gr4ad_jax.gr4ad.run import RunFile, load_params, open_inputs, open_run, read_run
from gr4ad_jax.gr4ad.train_run import train_run
from gr4ad_jax.search import searcher
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.held_out import eval_requests, group_requests, sample_requests
from gr4ad_jax.search.ranking import ranking_metrics
from gr4ad_jax.tokenizer import semantic_id
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.tokenizer.stage import tokenize
from gr4ad_jax.training.checkpoint import CheckpointError, Checkpoints
from gr4ad_jax.training.config import TrainConfig
from gr4ad_jax.training.metric_log import read_log
from gr4ad_jax.training.preemption import PreemptedError, Preemption
from gr4ad_jax.training.profiling import parse_steps
from gr4ad_jax.training.train_loop import DivergedError, kept_step
from tests.commands import run as main_exit

CONFIG = Config(
  model=ModelConfig(
    width=32, num_heads=2, num_layers=2, num_lazy_layers=1, copy_path=True, dropout=0.1,
    item_scorer=True, item_width=16, history_length=8,
  ),
  train=TrainConfig(
    num_steps=14, batch_size=16, learning_rate=3e-3, log_every=1, eval_every=7, eval_batches=2,
    checkpoint_every=4, data_parallel=1, ema=0.5,
  ),
  search=SearchConfig(widths=(8, 16, 32)),
)


def run_of(tiny_data: Path, **train) -> RunFile:
  config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **train))
  return RunFile(str(tiny_data), str(tiny_data / "sids"), config)


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
  """A run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  return train_run(run_of(tiny_data), workdir, profile=range(3, 5)), workdir


def assert_same_bits(a, b) -> None:
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def interrupted(run: RunFile, workdir: Path, at_step: int, kind: signal.Signals):
  """A process that trains and gets a signal after `at_step`; its exit code and error output.

  From that step on it waits a second after each, so that the signal never comes too late.
  """
  script = (
    "from pathlib import Path\n"
    "from gr4ad_jax.config import from_dict\n"
    "from gr4ad_jax.gr4ad.run import RunFile\n"
    "from gr4ad_jax.gr4ad.train_run import train_run\n"
    "from gr4ad_jax.training.metric_log import MetricLog\n"
    "import json, sys, time\n"
    "write = MetricLog.write\n"
    "def slow(log, step, kind, values):\n"
    "  write(log, step, kind, values)\n"
    "  time.sleep(step >= int(sys.argv[3]))\n"
    "MetricLog.write = slow\n"
    "train_run(from_dict(RunFile, json.loads(sys.argv[1])), Path(sys.argv[2]))\n"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", script, json.dumps(dataclasses.asdict(run)), str(workdir),
     str(at_step)],
    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    cwd=Path(__file__).resolve().parents[2], env=os.environ,
  )
  deadline = time.monotonic() + 600
  while not any(row["step"] >= at_step for row in read_log(workdir)):
    assert time.monotonic() < deadline, "the run is too slow to be killed"
    if process.poll() is not None:
      pytest.fail(f"the run ended by itself: {process.stderr.read()[-2000:]}")
    time.sleep(0.002)
  process.send_signal(kind)
  errors = process.communicate()[1]
  return process.returncode, errors


@pytest.mark.parametrize(("at_step", "kind"), [(9, signal.SIGKILL), (2, signal.SIGTERM)])
def test_a_stopped_run_resumes_to_the_same_bits(finished, tiny_data, tmp_path, at_step, kind):
  """SIGKILL lands between steps or inside a checkpoint; after SIGTERM the present step is kept."""
  workdir, run = tmp_path / "run", run_of(tiny_data)
  code, errors = interrupted(run, workdir, at_step, kind)
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    kept = checkpoints.latest_step
  assert kept is None or kept < 14
  if kind == signal.SIGTERM:
    assert f"PreemptedError: asked to stop: step {kept} is saved" in errors and code == 1
    assert kept == read_log(workdir)[-1]["step"]
  state = train_run(run, workdir, resume=True)
  assert_same_bits(state, finished[0])
  # The log reads as if nothing had happened: the same steps, each once, with the same losses.
  rows, expected = read_log(workdir), read_log(finished[1])
  assert [(r["step"], r["kind"], r["loss"]) for r in rows] == [
    (r["step"], r["kind"], r["loss"]) for r in expected
  ]


def test_finished_run_is_kept_and_best_checkpoint_is_readable(finished, tiny_data):
  state, workdir = finished
  assert_same_bits(train_run(run_of(tiny_data), workdir, resume=True), state)
  steps = {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()}
  losses = {r["step"]: r["loss"] for r in read_log(workdir) if r["kind"] == "validation"}
  best = min(losses, key=losses.get)
  assert 14 in steps and best in steps and len(steps) <= 3
  run = run_of(tiny_data)
  _, params, step = load_params(run, workdir, open_inputs(run).vocabulary)
  assert step == best
  if best == 14:
    assert_same_bits(params, state.ema)
  assert list((workdir / "tb").glob("events*"))


def test_a_search_validates_as_evaluation_does_and_changes_no_bit(
  finished, tiny_data, tmp_path, monkeypatch, capsys
):
  programs, compiled = [], searcher.compile_search
  monkeypatch.setattr(
    searcher, "compile_search", lambda *args: programs.append(compiled(*args)) or programs[-1]
  )
  jax.clear_caches()  # of searches that other tests have compiled
  workdir = tmp_path / "run"
  run = run_of(tiny_data, best_by="recall@50", rank_requests=10_000, eval_every=4)
  assert_same_bits(train_run(run, workdir), finished[0])
  assert [program._cache_size() for program in programs] == [1]  # by all four validations
  rows = [row for row in read_log(workdir) if row["kind"] == "validation"]
  best = max(rows, key=lambda row: (row["recall@50"], row["step"]))
  assert len(rows) == 4
  assert f"best by recall@50: step {best['step']} ({best['recall@50']:.4f})" in (
    capsys.readouterr().err
  )
  opened = open_run(workdir)
  assert opened.step == best["step"]
  groups = group_requests(read_split(opened.examples, "validation"))
  found = search_split(opened.recommender(), opened.contexts, groups, opened.search)
  expected = ranking_metrics(
    found.recommendations.ad_RK, eval_requests(groups), bootstrap=1,
    advertiser_A=np.zeros(len(opened.logs.ads.ad_id)),
  )
  for name in ("recall@50", "ndcg@50", "value_recall@50"):
    assert 0 < best[name] < 1 and best[name] == pytest.approx(expected[name], abs=1e-9)
  sample = sample_requests(opened.examples, "validation", most=7)
  assert len(sample) == 7 and all(request in groups_of(groups) for request in groups_of(sample))


def groups_of(groups) -> list[tuple]:
  return [(g[0].request, sorted(ad for e in g for ad in e.target_C.tolist())) for g in groups]


@pytest.fixture
def moved(finished, tiny_data, tmp_path):
  """The finished run and its data elsewhere, to be changed."""
  data, workdir = tmp_path / "data", tmp_path / "run"
  shutil.copytree(tiny_data, data)
  shutil.copytree(finished[1], workdir)
  run = dataclasses.replace(read_run(workdir), data=str(data), sids=str(data / "sids"))
  (workdir / "run.json").write_text(to_json(run))
  return data, workdir


def test_tokenizing_anew_leaves_a_trained_run_as_it_is(moved, finished):
  data, workdir = moved
  before = semantic_id.load(data / "sids")
  config = TokenizerConfig(codebook_sizes=(8, 4, 8), seed=1)
  made = tokenize(data, data / "sids", config, overwrite=True)
  assert (made.sids.codes_AL != before.codes_AL).any()
  np.testing.assert_array_equal(open_run(workdir).sids.codes_AL, before.codes_AL)
  run = dataclasses.replace(read_run(workdir), fingerprint="")  # as the command line gives it
  assert_same_bits(train_run(run, workdir, resume=True), finished[0])


def test_a_run_without_codes_of_its_own_needs_those_it_was_trained_on(moved):
  """As runs of earlier versions are."""
  data, workdir = moved
  shutil.rmtree(workdir / "codes")
  assert open_run(workdir).sids.codebook_sizes == (8, 4, 8)
  sids = semantic_id.load(data / "sids")
  semantic_id.save(dataclasses.replace(sids, codes_AL=sids.codes_AL[::-1]), data / "sids")
  with pytest.raises(ConfigError, match="semantic IDs have changed since the run was trained"):
    open_run(workdir)


def test_steps_are_traced_and_their_speed_is_logged(finished):
  """Beside the other tests this shows that tracing changes nothing."""
  (trace,) = (finished[1] / "profile").rglob("*.xplane.pb")
  names = {
    event.name
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
    for line in plane.lines for event in line.events
  }
  assert any("train_step" in name for name in names)
  rows = [row for row in read_log(finished[1]) if row["kind"] == "train"]
  assert all(0 < row["mfu"] < 1 and row["examples_per_second"] > 0 for row in rows[1:])
  assert [parse_steps("10:20")[0], parse_steps("10:20")[-1]] == [10, 20]
  for text in ("10", "0:5", "7:6", "a:b"):
    with pytest.raises(ConfigError, match="FIRST"):
      parse_steps(text)


def test_a_damaged_newest_checkpoint_is_set_aside(finished, tiny_data, tmp_path, capsys):
  state, source = finished
  workdir = tmp_path / "run"
  shutil.copytree(source, workdir)
  steps = workdir / "checkpoints"
  oldest = min(int(p.name) for p in steps.iterdir() if p.name.isdigit())
  largest = max((steps / "14").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
  os.truncate(largest, largest.stat().st_size // 2)
  assert_same_bits(train_run(run_of(tiny_data), workdir, resume=True), state)
  assert (steps / "14.damaged").is_dir() and (steps / "14").is_dir()
  assert "cannot be read, set aside; going on from step" in capsys.readouterr().err
  for step in steps.iterdir():
    for file in step.rglob("manifest.ocdbt"):
      os.truncate(file, 10)
  with pytest.raises(ConfigError, match=f"none of the steps .*{oldest}.* can be read"):
    train_run(run_of(tiny_data), workdir, resume=True)


def _cut(step: Path) -> None:
  for file in (step / "state" / "d").iterdir():
    os.truncate(file, 100)


def _without_arrays(step: Path) -> None:
  shutil.rmtree(step / "state")


def _with_noise(step: Path) -> None:
  for file in step.rglob("*"):
    if file.is_file():
      file.write_bytes(b"\xff{" * (file.stat().st_size // 2))


@pytest.mark.parametrize("damage", [_cut, _without_arrays, _with_noise])
def test_a_run_opens_with_another_checkpoint_where_one_is_damaged(
  finished, tiny_data, tmp_path, capfd, damage
):
  workdir, run = tmp_path / "run", run_of(tiny_data)
  shutil.copytree(finished[1], workdir)
  vocabulary = open_inputs(run).vocabulary
  _, _, best = load_params(run, workdir, vocabulary)
  damage(workdir / "checkpoints" / str(best))
  before = {p.name for p in (workdir / "checkpoints").iterdir()}
  capfd.readouterr()
  _, _, other = load_params(run, workdir, vocabulary)
  assert other == max(int(name) for name in before if name.isdigit() and int(name) != best)
  (said,) = capfd.readouterr().err.splitlines()
  assert str(workdir / "checkpoints" / str(best)) in said and "cannot be read" in said
  assert {p.name for p in (workdir / "checkpoints").iterdir()} == before  # it may be in use
  for step in before - {str(best)}:
    damage(workdir / "checkpoints" / step)
  with pytest.raises(ConfigError, match=r"none of the steps .* can be read") as error:
    load_params(run, workdir, vocabulary)
  assert len(str(error.value)) < 1000


def test_a_step_whose_loss_is_damaged_is_gone_on_from(finished, tiny_data, tmp_path):
  """Its arrays are whole."""
  workdir = tmp_path / "run"
  shutil.copytree(finished[1], workdir)
  (workdir / "checkpoints" / "14" / "metrics" / "metrics").write_text('{"loss"')
  assert_same_bits(train_run(run_of(tiny_data), workdir, resume=True), finished[0])


@pytest.fixture
def ctrl_c():
  """What Python does at Ctrl-C: a job that a shell started in the background ignores it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield signal.default_int_handler
  signal.signal(signal.SIGINT, before)


def test_ctrl_c_asks_as_sigterm_does_and_twice_means_at_once(ctrl_c):
  for kind, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
    with Preemption() as preemption:
      assert not preemption.reached(1)
      signal.raise_signal(kind)  # os.kill may reach another thread, and that a moment later
      assert preemption.reached(2)
      assert PreemptedError("saved", preemption.asked).exit_code == code
      if kind == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt):
          signal.raise_signal(kind)
  assert signal.getsignal(signal.SIGINT) is ctrl_c


def test_a_full_disk_is_said_and_the_last_good_checkpoint_stays(finished, tmp_path):
  """A limit on the size of files stands in for the full disk."""
  state = finished[0]
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  with pytest.raises(CheckpointError, match="last good step is 14. Is the disk full"):
    with Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(state, data_iterator={}, validation=None)
      checkpoints.wait()
      try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        checkpoints.save(state._replace(step=state.step + 1), data_iterator={},
                         validation=None)
        checkpoints.wait()
      finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step == 14


def test_a_run_learns_from_training_requests_and_is_validated_on_others(
  tiny_data, tmp_path, monkeypatch
):
  sources, examples = {}, open_inputs(run_of(tiny_data)).examples

  class Seen(Exception):
    pass

  def see(name, function):
    def call(source, *args, **how):
      sources[name] = {record["request"] for record in source}
      if name == "validated":
        raise Seen
      return function(source, *args, **how)

    return call

  monkeypatch.setattr(run_module, "batch_dataset", see("learned", run_module.batch_dataset))
  monkeypatch.setattr(run_module, "validation_batches", see("validated", None))
  with pytest.raises(Seen):
    train_run(run_of(tiny_data), tmp_path / "run")
  for name, split in (("learned", "train"), ("validated", "validation")):
    assert sources[name] == {e.request for e in read_split(examples, split)}


def test_a_refit_learns_from_validation_requests_too_and_only_test_judges_it(
  finished, tiny_data, tmp_path, monkeypatch, capsys
):
  learned, batches = [], run_module.batch_dataset

  def see(source, *args, **how):
    learned.extend(record["request"] for record in source)
    return batches(source, *args, **how)

  monkeypatch.setattr(run_module, "batch_dataset", see)
  workdir, tuned = tmp_path / "run", finished[1]
  assert main_exit("train", "--refit", tuned, "--workdir", workdir) == 0
  opened = open_run(workdir)
  sizes = [len(opened.examples.sources[split]) for split in ("train", "validation")]
  assert len(learned) == sum(sizes)
  assert set(learned) == {
    e.request for split in ("train", "validation") for e in read_split(opened.examples, split)
  }
  rows = read_log(workdir)
  assert {row["kind"] for row in rows} == {"train"}
  assert opened.step == rows[-1]["step"] == round(kept_step(tuned) * sum(sizes) / sizes[0])
  assert read_run(workdir).config.model == CONFIG.model and opened.held_out == ("test",)
  capsys.readouterr()
  assert main_exit("evaluate", "--workdir", workdir, "--split", "validation") == 2
  assert "has learned from the validation split; --split test judges it" in capsys.readouterr().err
  for options, words in (
    (("--refit", workdir), "has learned from more than training requests"),
    (("--refit", tuned, "--train.num-steps", 3), "settings, --sids, --start and --lists are those"),
    ((), "--data is missing"),
  ):
    assert main_exit("train", *options, "--workdir", tmp_path / "new") == 2
    assert words in capsys.readouterr().err
  with pytest.raises(ConfigError, match="has learned from the requests that would validate"):
    started = dataclasses.replace(run_of(tiny_data), start=str(workdir))
    train_run(started, tmp_path / "new")


def test_training_loss_falls(finished):
  losses = [r["loss"] for r in read_log(finished[1]) if r["kind"] == "train"]
  assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:2])


def test_a_taken_folder_or_other_settings_are_refused(finished, tiny_data):
  with pytest.raises(ConfigError, match="--resume"):
    train_run(run_of(tiny_data), finished[1])
  with pytest.raises(ConfigError, match=f"num_steps: 14 -> 20.*--start {finished[1]} with"):
    train_run(run_of(tiny_data, num_steps=20), finished[1], resume=True)
  with pytest.raises(ConfigError, match="learning_rate: 0.003 -> 0.1"):
    train_run(run_of(tiny_data, learning_rate=0.1), finished[1], resume=True)
  with pytest.raises(ConfigError, match="devices"):
    train_run(run_of(tiny_data, batch_size=15, data_parallel=2), finished[1].parent / "new")


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tiny_data, tmp_path):
  run = run_of(tiny_data, learning_rate=1e4, clip_norm=1e9, warmup_share=0.9, checkpoint_every=1)
  with pytest.raises(DivergedError, match="learning_rate"):
    train_run(run, tmp_path / "run")
  with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
    latest = checkpoints.latest_step
  if latest is not None:
    assert all(
      np.isfinite(r["loss"]) for r in read_log(tmp_path / "run") if r["step"] <= latest
    )
