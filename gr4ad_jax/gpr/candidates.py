"""What stage 3 learns from: the SIDs that the present parameters find, priced, in one file a push.

    WORKDIR/candidates/scale.json            what rewards are measured by, from the first push
    WORKDIR/candidates/PUSH/candidates.npz   those of each push

A push is made again, to the same bits, from the parameters of its step and the run's seed. Letters
as in `batch.py`, and `R` requests, `C` candidates of each. Source: GPR 3.3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from gr4ad_jax.catalog.ad_index import AdIndex
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.sequences import Example
from gr4ad_jax.gpr.asked import TrainingRequests
from gr4ad_jax.gpr.batch import Context
from gr4ad_jax.gpr.batch_maker import BatchMaker
from gr4ad_jax.gpr.config import Config
from gr4ad_jax.learning.preference import RewardScale, fit_reward_scale
from gr4ad_jax.machine import atomic, storage
from gr4ad_jax.machine.progress import track
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.search.recommender import Recommender

MOST_SUCCESSES = 200  # latest ads that the user clicked or bought, of which P_l is made


class Pricer(Protocol):
  """Ads in the context of each request -> click rate, conversion rate, eCPM, float32 [R, C]."""

  def __call__(
    self, contexts: Sequence[Example], ad_RC: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


class Candidates(NamedTuple):
  """Of R requests, the most probable first; code -1 where fewer were found."""

  request_R: np.ndarray  # int64, numbers of `TrainingRequests`
  code_RCL: np.ndarray  # int32
  ad_RC: np.ndarray  # int32, the first ad of each SID, which is what is priced
  old_logp_RCL: np.ndarray  # float32, log pi_old(z_l) among the codes that lead on
  liked_RCL: np.ndarray  # float32, P_l(z_l), share of the user's successes with this code
  usual_RCL: np.ndarray  # float32, mean of P_l over the codes that lead on
  click_RC: np.ndarray  # float32
  conversion_RC: np.ndarray  # float32
  ecpm_RC: np.ndarray  # float32


@dataclasses.dataclass(frozen=True)
class FinalValue:
  """What a candidate is worth to stage 3, by the candidates of the first push.

      R = (eCPM + 1/2 sum_i alpha target_i mean(eCPM) / mean(target_i)) / 1000,  targets pCTR, pCVR

  Attributes:
    alpha: of both targets.
    ecpm, click, conversion: means.
    mean, std: of R, currency of one impression.
    low, high: of `RewardScale`, for pairs of better and worse ones.

  Source: GPR 3.3, eq. 5.
  """

  alpha: float
  ecpm: float
  click: float
  conversion: float
  mean: float = 0.0
  std: float = 1.0
  low: float = 0.0
  high: float = 1.0

  def __call__(self, found: Candidates) -> np.ndarray:
    """R, float32 [R, C]."""
    beside = sum(
      self.alpha * rate_RC * (self.ecpm / max(mean, 1e-9))
      for rate_RC, mean in ((found.click_RC, self.click), (found.conversion_RC, self.conversion))
    )
    return ((found.ecpm_RC + beside / 2) / 1000).astype(np.float32)

  @property
  def grades(self) -> RewardScale:
    """R -> a small graded reward."""
    return RewardScale(self.low, self.high)


def fit_final_value(found: Candidates, alpha: float) -> FinalValue:
  """Means, deviation and quantiles of candidates; raises ConfigError where all are worth nothing.
  """
  there_RC = found.code_RCL[..., 0] >= 0
  means = [float(x[there_RC].mean(dtype=np.float64)) for x in (
    found.ecpm_RC, found.click_RC, found.conversion_RC
  )]
  if means[0] <= 0:
    raise ConfigError("policy: no candidate of the first push has an expected value above 0")
  value = FinalValue(alpha, *means)
  reward_N = value(found)[there_RC].astype(np.float64)
  return dataclasses.replace(
    value, mean=float(reward_N.mean()), std=float(reward_N.std()) or 1.0,
    **fit_reward_scale(reward_N)._asdict(),
  )


def success_shares(ads: np.ndarray, codes_AL: np.ndarray, num_codes: int) -> np.ndarray:
  """P_l(t), float32 [L, V]: the share of a user's latest successes that have code t at level l.

  Args:
    ads: that the user clicked or bought, in time order; without any all shares are 0.
    codes_AL: int32 SIDs, -1 = none.
    num_codes: V.
  """
  code_NL = codes_AL[ads[-MOST_SUCCESSES:]]
  code_NL = code_NL[code_NL[:, 0] >= 0]
  share_LV = np.zeros((codes_AL.shape[1], num_codes), np.float32)
  for level, code_N in enumerate(code_NL.T):
    share_LV[level] = np.bincount(code_N, minlength=num_codes) / max(len(code_N), 1)
  return share_LV


def make_candidates(
  recommender: Recommender, pricer: Pricer, requests: TrainingRequests, *, make_batch: BatchMaker,
  index: AdIndex, config: Config, push: int,
) -> Candidates:
  """Draws requests of a push, and searches and prices them.

  Args:
    recommender: the search with the parameters of the push.
    pricer: the simulator or the reward model.
    requests: to draw from.
    make_batch: contexts, and which codes lead on.
    index: SIDs and their ads.
    config: of the run.
    push: number of the push.
  """
  policy, size = config.policy, config.search.batch_size
  rng = np.random.default_rng([config.train.seed, push])
  wanted = -(-policy.push_every * policy.lists_per_step // policy.passes)
  request_R = requests.draw(rng, wanted)
  first_ad_S, parts = index.ads_A[index.ads_start[:-1]], []
  starts = range(0, len(request_R), size)
  for at in track(starts, f"candidates of push {push}, batches", len(starts)):
    contexts = [requests.context(int(number)) for number in request_R[at : at + size]]
    found = recommender.search(make_batch.context(contexts))
    sid_RC = found.sid_BW[:, : policy.candidates]
    ad_RC = np.where(sid_RC < 0, -1, first_ad_S[np.maximum(sid_RC, 0)])
    num = sid_RC.shape[1]
    old_RCL = np.where(sid_RC[..., None] < 0, 0, found.level_logp_BWL[:, :num])
    shares = np.stack([
      success_shares(make_batch.users.past(c.user).until(c.time_s).ads, make_batch.codes_AL,
                     max(make_batch.codebook_sizes)) for c in contexts
    ])
    priced = pricer(contexts, ad_RC.astype(np.int32))
    parts.append(Candidates(
      request_R[at : at + size], found.code_BWL[:, :num], ad_RC.astype(np.int32),
      old_RCL.astype(np.float32), *_liked(shares, found.code_BWL[:, :num], ad_RC, make_batch),
      *(x.astype(np.float32) for x in priced),
    ))
  return Candidates(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _liked(
  share_RLV: np.ndarray, code_RCL: np.ndarray, ad_RC: np.ndarray, make_batch: BatchMaker
) -> tuple[np.ndarray, np.ndarray]:
  """P_l(z_l) and the mean of P_l over the codes that lead on, float32 [R, C, L]; 0 at padding."""
  there_RC1 = (ad_RC >= 0)[..., None]
  words_RCLU = make_batch.legal.of(ad_RC).astype("<u4")
  legal_RCLV = np.unpackbits(words_RCLU.view(np.uint8), axis=-1, bitorder="little")
  legal_RCLV = legal_RCLV[..., : share_RLV.shape[-1]].astype(np.float32)
  usual_RCL = np.einsum("RCLV,RLV->RCL", legal_RCLV, share_RLV)
  usual_RCL /= np.maximum(legal_RCLV.sum(axis=-1), 1)
  code_RLC = np.maximum(code_RCL, 0).transpose(0, 2, 1)
  liked_RCL = np.take_along_axis(share_RLV, code_RLC, axis=2).transpose(0, 2, 1)
  return tuple(np.where(there_RC1, x, 0).astype(np.float32) for x in (liked_RCL, usual_RCL))


def push_folder(workdir: Place, push: int) -> Place:
  """Where the candidates of a push lie."""
  return workdir / "candidates" / f"{push:04d}"


def write_push(found: Candidates, workdir: Place, push: int) -> None:
  """Stores the candidates of a push; they are there whole or not at all."""
  with storage.new_folder(push_folder(workdir, push)) as copy:
    with atomic.new_file(copy.path / "candidates.npz") as file:
      np.savez_compressed(file, **found._asdict())


def read_push(workdir: Place, push: int) -> Candidates | None:
  """The candidates of a push; None where there are none yet."""
  file = storage.fetch(push_folder(workdir, push)) / "candidates.npz"
  if not file.exists():
    return None
  with np.load(file) as arrays:
    return Candidates(**arrays)


class CandidateBatch(NamedTuple):
  """Lists of B requests, C candidates each."""

  context: Context
  code_BCL: np.ndarray  # int32, -1 = padding
  legal_BCLU: np.ndarray  # uint32 bitmaps, as in `batch.Batch`
  old_logp_BCL: np.ndarray  # float32
  liked_BCL: np.ndarray  # float32
  usual_BCL: np.ndarray  # float32
  reward_BC: np.ndarray  # float32, R, currency of one impression
  grade_BC: np.ndarray  # float32, R in steps of `RewardScale`


@dataclasses.dataclass(frozen=True)
class ListBatches:
  """The lists of a push by the number of a step, each as often as there are passes."""

  found: Candidates
  value: FinalValue
  make_batch: BatchMaker
  requests: TrainingRequests
  config: Config
  push: int

  def __call__(self, step: int) -> CandidateBatch:
    """The lists of a step, counted from 0 over the whole training."""
    policy = self.config.policy
    first = (step - self.push * policy.push_every) * policy.lists_per_step
    num = len(self.found.request_R)
    rows = [self._row(at // num, at % num) for at in range(first, first + policy.lists_per_step)]
    found = Candidates(*(x[rows] for x in self.found))
    reward_BC = self.value(found)
    return CandidateBatch(
      self.make_batch.context([self.requests.context(int(at)) for at in found.request_R]),
      found.code_RCL, self.make_batch.legal.of(found.ad_RC), found.old_logp_RCL, found.liked_RCL,
      found.usual_RCL, reward_BC, self.value.grades(reward_BC),
    )

  def _row(self, turn: int, place: int) -> int:
    """Each pass has an order of its own."""
    seed = [self.config.train.seed, self.push, 1 + turn]
    return int(np.random.default_rng(seed).permutation(len(self.found.request_R))[place])
