"""Learning that goes on: log segments -> mini-batches of VSL and list learning -> parameters.

    OUT/run.json                 the run; `recommend`, `serve` and `export` read OUT like any run
    OUT/checkpoints/             one per segment, with the names of all segments that are in it
    OUT/published/               parameters every `publish_every` steps (training/published.py)
    OUT/quarantine.json          segments that cannot be read (segment_queue.py)
    OUT/train_log.jsonl, tb/     rows of kind "segment"

Every segment is first judged, then learned from: the loss before learning is that of the policy
which would have served it. A segment counts as learned from when the checkpoint after it is
complete. A learner that is killed at any moment starts again at the first segment that no
checkpoint holds, so none is lost and none is in the parameters twice; and since batches, lists and
dropout follow from the seed and the segments before, it ends with the same bits.

Parameters are judged before they are published and before a segment counts: they must be finite,
near those before, and no worse than twice the loss from before the segment. Else the learner points
its readers back to the parameters from before the segment, keeps the checkpoint there, and ends.

Source: GR4AD (arXiv 2602.22732) 4.1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gr4ad_jax import config as config_lib
from gr4ad_jax.catalog.run_data import keep_codes, with_data
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.impressions import MAX_SHOWN, read_impressions
from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.segments import Appended, append_segment
from gr4ad_jax.gr4ad.candidates import make_lists, require_same_data, wide_recommender
from gr4ad_jax.gr4ad.config import CandidateConfig, OnlineConfig, PreferenceConfig
from gr4ad_jax.gr4ad.list_batches import ListBatchMaker
from gr4ad_jax.gr4ad.publisher import Publisher
from gr4ad_jax.gr4ad.run import Inputs, load_params, open_inputs, read_run
from gr4ad_jax.gr4ad.segment_batches import Segment, judged_batches, open_segment, step_batches
from gr4ad_jax.gr4ad.segment_queue import Learned, SegmentQueue
from gr4ad_jax.gr4ad.unified_task import unified_task
from gr4ad_jax.gr4ad.vsl_task import vsl_task
from gr4ad_jax.learning.preference import RewardScale, fit_reward_scale
from gr4ad_jax.machine import atomic, lock, storage
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.ranker.reward import RewardScorer, open_reward
from gr4ad_jax.search.recommender import Recommender
from gr4ad_jax.training.checkpoint import Checkpoints
from gr4ad_jax.training.mesh import check_rows, training_mesh
from gr4ad_jax.training.metric_log import MeanMetrics, MetricLog
from gr4ad_jax.training.steps import run_steps
from gr4ad_jax.training.task import Metrics
from gr4ad_jax.training.train_loop import begin, mean_loss, not_finite
from gr4ad_jax.training.train_step import TrainState, compile_programs


@dataclasses.dataclass(frozen=True)
class OnlineFile:
  """What online.json holds: what decides over the result beside run.json."""

  online: OnlineConfig
  candidates: CandidateConfig
  reward: str


# Ten parameters: four folders, and what `gr4ad online` lets its user choose.
def learn_online(
  workdir: Place,
  segments: Place,
  out: Place,
  *,
  config: OnlineConfig,
  preference: PreferenceConfig,
  candidates: CandidateConfig,
  reward: Place | None = None,
  data: Place | None = None,
  follow_s: float | None = None,
  before_segment: Callable[[str, Any, Logs], None] | None = None,
) -> TrainState:
  """Learns from every segment that `out` has not learned from yet.

  Args:
    workdir: the trained run to go on from.
    segments: folder of log segments; more may appear while this runs.
    out: folder of the learner; one that is there goes on. A bucket gets the files after every
      segment.
    config: rate, publication, memory.
    preference: how lists are learned from; method "none" = logged samples alone.
    candidates: how lists are made; their number per segment is also bounded by the steps.
    reward: folder of a reward model; None = logged samples alone.
    data: where the data of both lie now; None = where they lay.
    follow_s: seconds between looks for new segments; None = return when none is left.
    before_segment: called with (name, parameters, logs with the segment) before each is learned
      from: to judge the policy that would have answered it.

  Raises:
    ConfigError: `out` belongs to other settings, another process works there, or a folder is
      missing.
    DivergedError: a segment makes the parameters useless; those before it are kept.
  """
  if follow_s is not None and isinstance(segments, storage.Url):
    raise ConfigError(f"{segments}: a bucket is not followed; start again when segments have come")
  folder = storage.fetch(segments)
  if not folder.is_dir():
    raise ConfigError(f"{segments}: no such folder of segments")
  with lock.held(out, "a learner"), storage.working_copy(out) as copy:
    learner = _Learner(workdir, segments, copy.path, config, preference, candidates, reward, data)
    with Checkpoints(out / "checkpoints") as checkpoints:
      state = learner.begin(checkpoints)
      copy.push()
      with contextlib.closing(MetricLog(copy.path, first_step=int(state.step))) as log:
        while True:
          waiting = learner.queue.waiting()
          if waiting:
            started = time.time()
            segment = learner.next_segment(waiting[0])
            if segment is None:
              copy.push()
              continue
            if before_segment:
              before_segment(segment.file.name, state.params, segment.appended.logs)
            segment = learner.add_lists(segment, state)
            state, row = learner.learn(state, segment)
            learner.keep(state, segment, checkpoints)
            row |= {
              "waiting": len(waiting) - 1, "quarantined": len(learner.queue.quarantine),
              "age_s": started - segment.newest_s, "seconds": time.time() - started,
            }
            log.write(int(state.step), "segment", row)
            _tell(segment, int(state.step), row)
            copy.push()
          elif follow_s is None:
            return state
          else:
            time.sleep(follow_s)


class _Learner:
  """The run, its logs as they grow, and what is compiled once."""

  def __init__(self, workdir, segments, out, config, preference, candidates, reward, data):
    start = with_data(read_run(workdir), workdir, data)
    train = start.config.train
    train = dataclasses.replace(
      train, learning_rate=config.learning_rate_share * train.learning_rate, warmup_share=0.0,
      final_learning_rate_share=1.0, seed=config.seed, ema=0.0,
    )
    if not reward:
      preference = dataclasses.replace(preference, method="none")
    with_lists = preference.method != "none"
    self.run = dataclasses.replace(
      start, config=dataclasses.replace(start.config, train=train, preference=preference),
      start=storage.absolute(workdir), lists="", lists_fingerprint="",
      segments=storage.absolute(segments),
    )
    self.config, self.candidates, self.out = config, candidates, out
    self.file = OnlineFile(config, candidates, storage.absolute(reward) if reward else "")
    self.inputs: Inputs = open_inputs(self.run, workdir)
    self.logs: Logs = self.inputs.logs
    self.scorer: RewardScorer | None = open_reward(reward, data=data) if with_lists else None
    if self.scorer:
      require_same_data(self.inputs, self.scorer, reward)
    decoder, params, _ = load_params(start, workdir, self.inputs.vocabulary)
    self.start_params = jax.tree.map(np.asarray, params)
    task = (
      unified_task(decoder, self.run.config.loss, preference) if with_lists
      else vsl_task(decoder, self.run.config.loss)
    )
    mesh = training_mesh(train)
    if with_lists:
      check_rows(mesh, train, "preference.lists_per_step", preference.lists_per_step)
    self.programs = compile_programs(task, train, mesh)
    self.generator: Recommender | None = None
    if with_lists:
      self.generator = wide_recommender(
        decoder, self.start_params, self.inputs, start.config.search
      )
    self.reward_scale: RewardScale | None = None
    self.queue = SegmentQueue(storage.fetch(segments), out)
    self.publisher = Publisher(out / "published", self.start_params, start=workdir)
    self.known_A = np.bincount(
      self.logs.events.ad[self.logs.events.ad >= 0], minlength=len(self.logs.ads.ad_id)
    ) > 0

  def begin(self, checkpoints: Checkpoints) -> TrainState:
    """The state after the last complete checkpoint, or step 0; the logs as they were then."""
    atomic.sweep(self.out)
    if (self.out / "run.json").exists():
      there = dataclasses.replace(read_run(self.out), data=self.run.data, sids=self.run.sids)
      if different := config_lib.differences(there, self.run):
        raise ConfigError(f"{self.out}: learns with other settings ({', '.join(different)})")
      if config_lib.read_json(OnlineFile, self.out / "online.json") != self.file:
        raise ConfigError(f"{self.out}: learns with other settings, see online.json there")
    else:
      keep_codes(self.inputs.sids, self.out)
      atomic.write_text(self.out / "online.json", config_lib.to_json(self.file))
      atomic.write_text(self.out / "run.json", config_lib.to_json(self.run))
    state, learned = begin(
      self.programs, checkpoints, seed=self.config.seed, start_params=self.start_params
    )
    if learned is None:
      self.publisher.begin()
      return state
    self.queue.restore(learned)
    if learned["reward_scale"]:
      self.reward_scale = RewardScale(*learned["reward_scale"])
    self.publisher.go_on(state, segments=len(self.queue.learned), owner=self.out)
    self.queue.waiting()  # tells of those that have changed
    folder = storage.fetch(storage.place(self.run.segments))
    for name, row in self.queue.learned.items():
      try:
        self.logs = self._appended(folder / name, row.read_s).logs
      except Exception as error:  # whatever a damaged file gives
        why = f"cannot be read any more ({error})" if (folder / name).exists() else "gone"
        console.print(f"{folder / name}: {why}; histories lack it, the parameters do not")
    return state

  def _appended(self, file: Path, read_s: float | None) -> Appended:
    """The logs with a segment, as it was when it was read first."""
    return append_segment(self.logs, file, keep_days=self.config.keep_days, now_s=read_s)

  def next_segment(self, file: Path) -> Segment | None:
    """A segment behind the logs, with its samples; None where it has to be left out, and is."""
    read_s, sha256 = time.time(), self.queue.checksum(file)
    try:
      appended = self._appended(file, read_s)
      segment = open_segment(file, len(self.queue.learned), appended, self.inputs)
    except MemoryError:  # the machine is at fault
      raise
    except Exception as error:  # whatever a damaged file gives
      self.queue.set_aside(file, sha256, error)
      return None
    return segment._replace(learned=Learned(sha256, read_s))

  def add_lists(self, segment: Segment, state: TrainState) -> Segment:
    """The segment with candidate lists of its requests, where it tells what was shown."""
    if not (self.scorer and segment.examples and segment.has_views):
      return segment
    # The lists of a segment come from parameters that are published, so that a learner which is
    # killed while it learns makes the same ones again.
    params = self.publisher.known_by(state)
    steps = self.config.passes * math.ceil(len(segment.examples) / self.run.config.train.batch_size)
    # More lists than the steps take would be made in vain.
    most = steps * self.run.config.preference.lists_per_step // (1 + self.candidates.shown)
    config = dataclasses.replace(
      self.candidates, max_lists=max(1, min(self.candidates.max_lists, most)),
      seed=self.config.seed + segment.number,
    )
    lists = list(make_lists(
      self.generator.with_params(params),
      dataclasses.replace(self.inputs, make_batch=segment.make_batch), self.scorer,
      read_impressions(segment.maker, "train"), search=self.run.config.search, config=config,
    ))
    if self.reward_scale is None and lists:
      self.reward_scale = fit_reward_scale(np.concatenate([row.ecpm_C for row in lists]))
    return segment._replace(lists=lists)

  def learn(self, state: TrainState, segment: Segment) -> tuple[TrainState, dict[str, float]]:
    """Learns from a segment and publishes on the way; the state, and what the log tells of it."""
    first_step = int(state.step)
    judged = judged_batches(segment, self.run.config.train.batch_size)
    before = mean_loss(self.programs, state.params, judged)
    first_before = mean_loss(self.programs, state.params, judged[:1])
    self.publisher.begin_segment(first_step)
    total = MeanMetrics()

    def after_step(step: int, state: TrainState, metrics: Metrics) -> None:
      total.add(metrics)
      if step % self.config.publish_every == 0:
        now = mean_loss(self.programs, state.params, judged[:1])
        self.publisher.publish(state, segment, (first_before, now))

    state = run_steps(
      self.programs.step, state, map(self.programs.to_devices, self._batches(segment)),
      after_step=after_step, first_step=first_step,
    )
    means = total.means()
    after = mean_loss(self.programs, state.params, judged)
    self.publisher.require_good(state, segment, (before, after))
    if name := not_finite(means):
      raise self.publisher.diverged(segment, f"{name} is {means[name]}")
    ads = np.concatenate([e.target_C for e in segment.examples] or [np.zeros(0, np.int32)])
    return state, {
      "segment": segment.number, "examples": len(segment.examples), "lists": len(segment.lists),
      "left_out": sum(segment.appended.left_out.values()),
      "loss_before": before.get("loss", math.nan), "loss_after": after.get("loss", math.nan),
      "new_ads": float(np.mean(~self.known_A[ads])) if len(ads) else math.nan,
      "moved": _distance(state.params, self.start_params),
      **{f"train_{name}": value for name, value in means.items()},
    }

  def keep(self, state: TrainState, segment: Segment, checkpoints: Checkpoints) -> None:
    """A segment counts as learned from once the checkpoint after it is complete."""
    self.queue.add(segment.file, segment.learned)
    self.logs, step = segment.appended.logs, int(state.step)
    if step > (checkpoints.latest_step or 0):
      learned = self.queue.record() | {"reward_scale": list(self.reward_scale or ())}
      checkpoints.save(state, validation=None, data_iterator=learned)
      checkpoints.wait()
      self.publisher.kept(state)

  def _batches(self, segment: Segment) -> Iterator[Any]:
    config = self.run.config
    scale = None if config.preference.reward_range == "list" else self.reward_scale
    make_lists = ListBatchMaker(segment.make_batch, scale, max(self.candidates.size, MAX_SHOWN))
    return step_batches(
      segment, make_lists if self.scorer else None, seed=self.config.seed,
      size=config.train.batch_size, passes=self.config.passes,
      lists_per_step=config.preference.lists_per_step,
    )


def _tell(segment: Segment, step: int, row: dict[str, float]) -> None:
  name, left_out = segment.file.name, segment.appended.left_out
  console.print(
    f"{name}: {len(segment.examples):,} samples, {len(segment.lists):,} lists, step {step:,}; "
    f"loss {row['loss_before']:.3f} -> {row['loss_after']:.3f}; {row['seconds']:.0f} s, "
    f"{row['waiting']} waiting"
  )
  if left_out:
    console.print(f"{name}: rows left out: {json.dumps(left_out)}")


def _distance(params: Any, start: Any) -> float:
  """|params - start| / |start|."""
  pairs = zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=True)
  squares = [(float(((a - b) ** 2).sum()), float((b**2).sum())) for a, b in pairs]
  moved, size = map(sum, zip(*squares, strict=True))
  return math.sqrt(moved / max(size, 1e-30))
