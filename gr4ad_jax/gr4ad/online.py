"""Learning that goes on: log segments -> mini-batches of VSL and list learning -> parameters.

    OUT/run.json                 the run; `evaluate`, `recommend` and `export` read OUT like any run
    OUT/checkpoints/             one per segment, with the names of all segments that are in it
    OUT/published/               parameters every `publish_every` steps (training/published.py)
    OUT/train_log.jsonl, tb/     rows of kind "segment"

Every segment is first judged, then learned from: the loss before learning is that of the policy
which would have served it. A segment counts as learned from when the checkpoint after it is
complete. A learner that is killed at any moment starts again at the first segment that no
checkpoint holds, so none is lost and none is in the parameters twice; and since batches, lists and
dropout follow from the seed and the segments before, it ends with the same bits. Source: paper 4.1;
reference section 7.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gr4ad_jax import config as config_lib
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.impressions import MAX_SHOWN, read_impressions
from gr4ad_jax.data.list_records import CandidateList
from gr4ad_jax.data.pipeline import hash_ids
from gr4ad_jax.data.records import Action, Logs
from gr4ad_jax.data.segments import Appended, append_segment, segment_files
from gr4ad_jax.data.sequences import Example, ExampleMaker
from gr4ad_jax.data.trending import build_trending
from gr4ad_jax.gr4ad.batch import Batch
from gr4ad_jax.gr4ad.batch_maker import BatchMaker
from gr4ad_jax.gr4ad.candidates import make_lists, wide_recommender
from gr4ad_jax.gr4ad.config import CandidateConfig, OnlineConfig, PreferenceConfig
from gr4ad_jax.gr4ad.list_batches import list_batch_maker
from gr4ad_jax.gr4ad.run import Inputs, load_params, open_inputs, read_run
from gr4ad_jax.gr4ad.unified_task import UnifiedBatch, unified_task
from gr4ad_jax.gr4ad.vsl_task import vsl_task
from gr4ad_jax.learning.preference import RewardScale, fit_reward_scale
from gr4ad_jax.machine import atomic, sharding, storage
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.ranker.reward import RewardScorer, open_reward
from gr4ad_jax.search.recommender import Recommender
from gr4ad_jax.training.checkpoint import Checkpoints
from gr4ad_jax.training.mesh import check_rows, training_mesh
from gr4ad_jax.training.metric_log import MeanMetrics, MetricLog
from gr4ad_jax.training.published import forget_before, publish, read_published
from gr4ad_jax.training.task import Task
from gr4ad_jax.training.train_loop import DivergedError, mean_loss
from gr4ad_jax.training.train_step import (
  TrainState,
  abstract_state,
  begin_with,
  compile_init,
  compile_loss,
  compile_train_step,
)


@dataclasses.dataclass(frozen=True)
class OnlineFile:
  """What online.json holds: what decides over the result beside run.json."""

  online: OnlineConfig
  candidates: CandidateConfig
  reward: str


class _Segment(NamedTuple):
  """What is learned from one segment."""

  examples: list[Example]
  lists: list[CandidateList]
  make_batch: BatchMaker  # with what is trending by then


def learn_online(
  workdir: Place,
  segments: Place,
  out: Place,
  *,
  config: OnlineConfig,
  preference: PreferenceConfig,
  candidates: CandidateConfig,
  reward: Place | None = None,
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
    follow_s: seconds between looks for new segments; None = return when none is left.
    before_segment: called with (name, parameters, logs with the segment) before each is learned
      from: to judge the policy that would have answered it.

  Raises:
    ConfigError: `out` belongs to other settings, or a folder is missing.
    LogError: a segment cannot be read; the ones before it are kept.
  """
  if follow_s is not None and isinstance(segments, storage.Url):
    raise ConfigError(f"{segments}: a bucket is not followed; start again when segments have come")
  folder = storage.fetch(segments)
  if not folder.is_dir():
    raise ConfigError(f"{segments}: no such folder of segments")
  with storage.working_copy(out) as copy:
    learner = _Learner(workdir, segments, copy.path, config, preference, candidates, reward)
    with Checkpoints(out / "checkpoints") as checkpoints:
      state = learner.begin(checkpoints)
      copy.push()
      log = MetricLog(copy.path, first_step=int(state.step))
      try:
        while True:
          waiting = [p for p in segment_files(folder) if p.name not in learner.done]
          if waiting:
            state = learner.learn(state, waiting, checkpoints, log, before_segment)
            copy.push()
          elif follow_s is None:
            return state
          else:
            time.sleep(follow_s)
      finally:
        log.close()


class _Learner:
  """The run, its logs as they grow, and what is compiled once."""

  def __init__(self, workdir, segments, out, config, preference, candidates, reward):
    start = read_run(workdir)
    train = start.config.train
    train = dataclasses.replace(
      train, learning_rate=config.learning_rate_share * train.learning_rate, warmup_share=0.0,
      final_learning_rate_share=1.0, seed=config.seed,
    )
    if not reward:
      preference = dataclasses.replace(preference, method="none")
    with_lists = preference.method != "none"
    self.run = dataclasses.replace(
      start, config=dataclasses.replace(start.config, train=train, preference=preference),
      start=storage.absolute(workdir), lists="", segments=storage.absolute(segments),
    )
    self.config, self.candidates, self.out = config, candidates, out
    self.file = OnlineFile(config, candidates, storage.absolute(reward) if reward else "")
    self.inputs: Inputs = open_inputs(self.run)
    self.logs: Logs = self.inputs.logs
    self.scorer: RewardScorer | None = open_reward(reward) if with_lists else None
    decoder, params, _ = load_params(start, workdir, self.inputs.vocabulary)
    self.start_params = jax.tree.map(np.asarray, params)
    self.task: Task = (
      unified_task(decoder, self.run.config.loss, preference) if with_lists
      else vsl_task(decoder, self.run.config.loss)
    )
    self.mesh = training_mesh(train)
    if with_lists:
      rows = preference.lists_per_step
      check_rows(self.mesh, train, "preference.lists_per_step", rows)
    self.abstract = abstract_state(self.task, train, self.mesh)
    self.step_fn = compile_train_step(self.task, train, self.mesh, self.abstract)
    self.loss_fn = compile_loss(self.task, self.mesh, self.abstract)
    self.to_devices = sharding.global_batch(self.mesh)
    self.generator: Recommender | None = None
    if with_lists:
      self.generator = wide_recommender(
        decoder, self.start_params, self.inputs, self.run.config.search
      )
    self.reward_scale: RewardScale | None = None
    self.done: list[str] = []
    self.known_A = np.bincount(
      self.logs.events.ad[self.logs.events.ad >= 0], minlength=len(self.logs.ads.ad_id)
    ) > 0

  def begin(self, checkpoints: Checkpoints) -> TrainState:
    """The state after the last complete checkpoint, or step 0; the logs as they were then."""
    if (self.out / "run.json").exists():
      if different := config_lib.differences(read_run(self.out), self.run):
        raise ConfigError(f"{self.out}: learns with other settings ({', '.join(different)})")
      if config_lib.read_json(OnlineFile, self.out / "online.json") != self.file:
        raise ConfigError(f"{self.out}: learns with other settings, see online.json there")
    else:
      atomic.write_text(self.out / "online.json", config_lib.to_json(self.file))
      atomic.write_text(self.out / "run.json", config_lib.to_json(self.run))
    restored = checkpoints.restore_newest(self.abstract)
    if restored is None:
      state = compile_init(self.task, self.run.config.train, self.abstract)(
        jax.random.key(self.config.seed)
      )
      publish(self.out / "published", 0, self.start_params, {"segments": 0})
      return begin_with(state, self.start_params)
    state, about = restored
    self.done = list(about["segments"])
    if about["reward_scale"]:
      self.reward_scale = RewardScale(*about["reward_scale"])
    folder = storage.fetch(storage.place(self.run.segments))
    for name in self.done:
      if (folder / name).exists():
        self.logs = append_segment(self.logs, folder / name, keep_days=self.config.keep_days).logs
      else:
        console.print(f"{folder / name}: gone; histories lack it, the parameters do not")
    return state

  def learn(
    self, state: TrainState, waiting: Sequence[Path], checkpoints: Checkpoints, log: MetricLog,
    before_segment: Callable[[str, Any, Logs], None] | None,
  ) -> TrainState:
    """Judges the next segment, learns from it, keeps and publishes."""
    file = waiting[0]
    started = time.time()
    appended = append_segment(self.logs, file, keep_days=self.config.keep_days)
    if before_segment:
      before_segment(file.name, state.params, appended.logs)
    segment = self._read(appended, state)
    number, first_step = len(self.done), int(state.step)
    judged = self._judged(segment)
    before = self._loss(state.params, judged)
    total, step = MeanMetrics(), first_step
    for step, batch in enumerate(self._batches(segment, number), first_step + 1):
      state, metrics = self.step_fn(state, self.to_devices(batch))
      total.add(metrics)
      if step % self.config.publish_every == 0:
        self._publish(step, state.params, file.name, appended.logs)
    means = total.means()
    if not all(math.isfinite(means.get(name, 0.0)) for name in ("loss", "grad_norm")):
      raise DivergedError(
        f"{file}: the loss is no longer finite; what is kept is that of step {first_step}"
      )
    after = self._loss(state.params, judged)
    self.done.append(file.name)
    self.logs = appended.logs
    if step > first_step:
      checkpoints.save(
        state, validation_loss=None,
        data_iterator={
          "segments": self.done, "reward_scale": list(self.reward_scale or ()),
        },
      )
      checkpoints.wait()
      forget_before(self.out / "published", step)
    ads = np.concatenate([e.target_C for e in segment.examples] or [np.zeros(0, np.int32)])
    row = {
      "segment": number, "examples": len(segment.examples), "lists": len(segment.lists),
      "left_out": sum(appended.left_out.values()), "waiting": len(waiting) - 1,
      "loss_before": before, "loss_after": after,
      "new_ads": float(np.mean(~self.known_A[ads])) if len(ads) else float("nan"),
      "moved": _distance(state.params, self.start_params),
      "age_s": started - int(self.logs.events.time_s.max()),
      "seconds": time.time() - started,
      **{f"train_{name}": value for name, value in means.items()},
    }
    log.write(step, "segment", row)
    console.print(
      f"{file.name}: {len(segment.examples):,} samples, {len(segment.lists):,} lists, "
      f"step {step:,}; loss {before:.3f} -> {after:.3f}; {row['seconds']:.0f} s, "
      f"{row['waiting']} waiting"
    )
    if appended.left_out:
      console.print(f"{file.name}: rows left out: {json.dumps(appended.left_out)}")
    return state

  def _read(self, appended: Appended, state: TrainState) -> _Segment:
    """Samples and candidate lists of a segment's requests."""
    split_R = np.where(appended.new_R, 0, -1).astype(np.int8)
    examples = self.inputs.examples
    maker = ExampleMaker(
      appended.logs, examples.config, split_R=split_R, vocabulary=examples.features
    )
    events = appended.logs.events
    users = np.unique(events.user[appended.new_R[events.request]]).tolist()
    samples = [example for user in users for example in maker.user_examples(user, 0)]
    make_batch = self.inputs.make_batch
    if make_batch.user_hash_U is not None:  # users may be new
      make_batch = dataclasses.replace(
        make_batch, user_hash_U=hash_ids(appended.logs.users.user_id)
      )
    if make_batch.trending is not None:
      make_batch = dataclasses.replace(make_batch, trending=build_trending(appended.logs))
    lists: list[CandidateList] = []
    if self.scorer and samples and _has_views(appended):
      params = read_published(
        self.out / "published", self.start_params, step=int(state.step)
      )
      per_step = self.run.config.preference.lists_per_step
      most = self._steps(len(samples)) * per_step // (1 + self.candidates.shown)
      config = dataclasses.replace(
        self.candidates, max_lists=max(1, min(self.candidates.max_lists, most)),
        seed=self.config.seed + len(self.done),
      )
      lists = list(make_lists(
        self.generator.with_params(params),
        dataclasses.replace(self.inputs, make_batch=make_batch), self.scorer,
        read_impressions(maker, "train"), search=self.run.config.search, config=config,
      ))
      if self.reward_scale is None and lists:
        self.reward_scale = fit_reward_scale(np.concatenate([row.ecpm_C for row in lists]))
    return _Segment(samples, lists, make_batch)

  def _steps(self, num_samples: int) -> int:
    return self.config.passes * math.ceil(num_samples / self.run.config.train.batch_size)

  def _batches(self, segment: _Segment, number: int) -> Iterator[Any]:
    """Every sample `passes` times; lists in turn, as many a step as configured."""
    size, per_step = self.run.config.train.batch_size, self.run.config.preference.lists_per_step
    rng = np.random.default_rng([self.config.seed, number])
    order = _endless(len(segment.lists), rng)
    make_lists_batch = list_batch_maker(
      segment.make_batch, self.run.config.preference, self.reward_scale,
      max(self.candidates.size, MAX_SHOWN),
    )
    for _ in range(self.config.passes):
      shuffled = rng.permutation(len(segment.examples))
      for at in range(0, len(shuffled), size):
        rows = [segment.examples[i] for i in shuffled[at : at + size]]
        logged = segment.make_batch(_filled(rows, size))
        if not self.scorer:
          yield logged
          continue
        chosen = [_no_list(rows[0], logged)] * per_step
        if segment.lists:
          chosen = [segment.lists[next(order)] for _ in range(per_step)]
        yield UnifiedBatch(logged, make_lists_batch(chosen))

  def _judged(self, segment: _Segment) -> list[Batch]:
    """At most 20 batches of the segment's samples, evenly spread."""
    size, rows = self.run.config.train.batch_size, segment.examples
    picked = np.linspace(0, len(rows) - 1, min(len(rows), 20 * size)).astype(int)
    return [
      segment.make_batch(_filled([rows[i] for i in picked[at : at + size]], size))
      for at in range(0, len(picked), size)
    ]

  def _loss(self, params: Any, batches: Sequence[Batch]) -> float:
    return mean_loss(self.loss_fn, params, batches, self.to_devices).get("loss", float("nan"))

  def _publish(self, step: int, params: Any, name: str, logs: Logs) -> None:
    publish(self.out / "published", step, params, {
      "segments": len(self.done), "learning_from": name,
      "newest_event_s": int(logs.events.time_s.max()), "published_s": int(time.time()),
    })


def _filled(rows: list[Example], size: int) -> list[Example]:
  """As many rows as a batch has; those added have no target and weigh nothing."""
  first = rows[0]
  empty = dataclasses.replace(
    first, target_C=first.target_C[:0], action_C=first.action_C[:0], value_C=first.value_C[:0],
    ecpm_C=first.ecpm_C[:0], new_C=first.new_C[:0],
  )
  return rows + [empty] * (size - len(rows))


def _no_list(context: Example, batch: Batch) -> CandidateList:
  levels, nothing = batch.target_BCL.shape[-1], np.zeros(0, np.float32)
  return CandidateList(
    context, nothing.astype(np.int32), nothing, np.zeros((0, levels), np.float32),
    nothing.astype(bool), nothing.astype(np.int8),
  )


def _has_views(appended: Appended) -> bool:
  """Whether the segment tells what was shown and not clicked."""
  events = appended.logs.events
  views_E = (events.ad >= 0) & (events.action == Action.IMPRESSION)
  return bool((views_E & appended.new_R[events.request]).any())


def _endless(count: int, rng: np.random.Generator) -> Iterator[int]:
  while count:
    yield from rng.permutation(count).tolist()


def _distance(params: Any, start: Any) -> float:
  """|params - start| / |start|."""
  pairs = zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=True)
  squares = [(float(((a - b) ** 2).sum()), float((b**2).sum())) for a, b in pairs]
  moved, size = map(sum, zip(*squares, strict=True))
  return math.sqrt(moved / max(size, 1e-30))
