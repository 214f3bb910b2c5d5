"""`gr4ad reward`, `gr4ad candidates` and `gr4ad online`."""

from __future__ import annotations

from gr4ad_jax.cli import tables
from gr4ad_jax.cli.options import Flat
from gr4ad_jax.gr4ad.config import CandidateConfig, OnlineConfig, PreferenceConfig
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.memory import keep_freed_memory
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.ranker.config import REWARD_TRAINING, RewardConfig
from gr4ad_jax.training.config import TrainConfig


def reward(
  *,
  data: Place,
  workdir: Place,
  resume: bool = False,
  model: RewardConfig,
  train: TrainConfig = REWARD_TRAINING,
) -> None:
  """Impressions -> a calibrated model of clicks and conversions: eCPM of any ad for any request.

  Args:
    data: Folder that `prepare` wrote; its events need impressions.
    workdir: Folder of the reward model.
    resume: Continue the one in WORKDIR (with the same settings).
  """
  from gr4ad_jax.ranker.reward import RewardRun, train_reward

  run = RewardRun(storage.absolute(data), model, train)
  metrics = train_reward(run, workdir, resume=resume)
  title = f"reward model on the test split, written to {workdir}/metrics.json"
  tables.print_numbers(metrics, title=title)


def candidates(
  *,
  workdir: Place,
  reward: Place,
  out: Place,
  overwrite: bool = False,
  data: Place | None = None,
  config: Flat[CandidateConfig],
) -> None:
  """A trained run and a reward model -> candidate lists for `train --lists`.

  Args:
    workdir: Folder of a trained run.
    reward: Folder of a trained reward model.
    out: Folder to write.
    overwrite: Replace lists in --out.
    data: Where the data of both lie now, if they have moved.
  """
  from gr4ad_jax.gr4ad.candidates import write_candidates

  numbers = write_candidates(workdir, reward, out, config=config, overwrite=overwrite, data=data)
  tables.print_numbers(numbers, title=f"candidate lists in {out}")


# Nine parameters: they are the options of the command.
def online(
  *,
  workdir: Place,
  segments: Place,
  out: Place,
  reward: Place | None = None,
  follow: float | None = None,
  data: Place | None = None,
  config: Flat[OnlineConfig],
  preference: PreferenceConfig,
  candidates: CandidateConfig,
) -> None:
  """A trained run goes on learning from log segments and publishes parameters as it goes.

  Args:
    workdir: Folder of the trained run to start from.
    segments: Folder of segments: events tables (.parquet, .csv) whose names sort by time. Move
      files in when they are complete; one that cannot be read is put into quarantine and those
      behind it go on. In a bucket those of now are read; it is not followed.
    out: Folder of the learner, itself a run for recommend, serve and export; one that is there
      goes on.
    reward: Folder of a reward model; without one, logged samples alone are learned from.
    follow: Seconds between looks for new segments, until stopped; default: end after the last one.
    data: Where the data of the run and the reward model lie now, if they have moved.
  """
  from gr4ad_jax.gr4ad.online import learn_online

  keep_freed_memory()
  state = learn_online(
    workdir, segments, out, config=config, preference=preference, candidates=candidates,
    reward=reward, follow_s=follow, data=data,
  )
  tables.console.print(f"learned {int(state.step):,} steps in {out}")
