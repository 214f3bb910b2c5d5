"""Lists of candidates: what the present model would recommend, explored a little, and judged.

For each request a wide beam gives the model's best, a random part of the rest of the beam, and a
few SIDs sampled at a higher temperature; the reward model prices all of them. With `shown`, the
list that the logging system showed follows as a list of its own, without reference. Source: paper
4.1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gr4ad_jax.catalog.run_data import with_data
from gr4ad_jax.config import ConfigError, require
from gr4ad_jax.data.impressions import Impressions, read_impressions
from gr4ad_jax.data.list_records import LIST_FOLDERS, CandidateList, write_lists
from gr4ad_jax.data.sequences import ExampleMaker
from gr4ad_jax.gr4ad.build import Decoder
from gr4ad_jax.gr4ad.config import CandidateConfig
from gr4ad_jax.gr4ad.generator import generator_of
from gr4ad_jax.gr4ad.run import Inputs, load_params, open_inputs, read_run
from gr4ad_jax.learning.preference import RewardScale, fit_reward_scale
from gr4ad_jax.machine import digests, storage
from gr4ad_jax.machine.progress import console, track
from gr4ad_jax.machine.storage import Place, write_json
from gr4ad_jax.ranker.reward import RewardScorer, open_reward
from gr4ad_jax.search.beam_search import Beams, Sampling
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.recommender import Recommender

IDLE_SHARE = 0.1  # of the lists may teach nothing before that is said


def choose_requests(impressions: Impressions, config: CandidateConfig) -> np.ndarray:
  """Rows of the requests that lists are made for, in their order.

  All requests of the users with the largest past value, as many as `top_users_share` of the
  requests, and `uniform_share` of the others; thinned out evenly to `max_lists`.
  """
  rng = np.random.default_rng(config.seed)
  value_R = np.array([context.past_value for context in impressions.contexts])
  place_R = np.empty(len(value_R), np.int64)
  place_R[np.lexsort((rng.random(len(value_R)), -value_R))] = np.arange(len(value_R))
  chosen_R = place_R < config.top_users_share * len(value_R)
  chosen_R |= rng.random(len(value_R)) < config.uniform_share
  rows = np.flatnonzero(chosen_R)
  if len(rows) > config.max_lists:
    rows = np.sort(rng.choice(rows, config.max_lists, replace=False))
  return rows


def wide_recommender(
  decoder: Decoder, params: Any, inputs: Inputs, search: SearchConfig
) -> Recommender:
  """What makes candidates: the policy by probability alone."""
  return Recommender(
    generator_of(decoder), params, index=inputs.index,
    config=dataclasses.replace(search, value_exponent=0.0),
    bin_means=inputs.scale.bin_means,
  )


def make_lists(
  generator: Recommender,
  inputs: Inputs,
  scorer: RewardScorer,
  impressions: Impressions,
  *,
  search: SearchConfig,
  config: CandidateConfig,
) -> Iterator[CandidateList]:
  """Lists of the chosen requests: the model's candidates, and what was shown.

  Args:
    generator: the present policy, from `wide_recommender`.
    inputs: of its run.
    scorer: prices the candidates.
    impressions: requests with what they showed.
    search: of serving; its beams are widened.
    config: how lists are made up.
  """
  widths = tuple(math.ceil(config.width_factor * w) for w in search.widths)
  rng, key = np.random.default_rng([config.seed, 1]), jax.random.key(config.seed)
  rows = choose_requests(impressions, config)
  size = search.batch_size
  starts = range(0, len(rows), size)
  for step, at in enumerate(track(starts, "candidate lists, batches", len(starts))):
    part = rows[at : at + size]
    contexts = [impressions.contexts[row] for row in part]
    context = inputs.make_batch.context(contexts)
    likely = generator.search(context, widths=widths)
    sampled = None
    if config.sampled:
      sampled = generator.search(
        context, widths=widths,
        sampling=Sampling(jax.random.fold_in(key, step), config.temperature),
      )
    ad_RC, logp_RCL = _pick(likely, sampled, inputs, config, rng)
    ecpm_RC = scorer(contexts, ad_RC).ecpm_RC
    shown_RC, action_RC = impressions.shown_RC[part], impressions.action_RC[part]
    shown_ecpm_RC = scorer(contexts, shown_RC).ecpm_RC if config.shown else None
    for r, row in enumerate(contexts):
      there = ad_RC[r] >= 0
      done = dict(zip(shown_RC[r].tolist(), action_RC[r].tolist(), strict=True))
      yield CandidateList(
        row, ad_RC[r, there], ecpm_RC[r, there], logp_RCL[r, there], there[there],
        np.array([done.get(ad, -1) for ad in ad_RC[r, there].tolist()], np.int8),
      )
      if config.shown:
        yield _shown_list(row, shown_RC[r], shown_ecpm_RC[r], action_RC[r], inputs)


def _pick(
  likely: Beams,
  sampled: Beams | None,
  inputs: Inputs,
  config: CandidateConfig,
  rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
  """Ads [R, C] and log-probs per level [R, C, L]: top, random rest, sampled; distinct SIDs."""
  num_rows, levels = likely.sid_BW.shape[0], likely.level_logp_BWL.shape[-1]
  ad_RC = np.full((num_rows, config.size), -1, np.int32)
  logp_RCL = np.zeros((num_rows, config.size, levels), np.float32)
  first_ad_S = inputs.index.ads_A[inputs.index.ads_start[:-1]]
  for r in range(num_rows):
    found = np.flatnonzero(likely.sid_BW[r] >= 0)
    rest = rng.permutation(found[config.top :])[: config.rest]
    picked = [(likely, np.append(found[: config.top], rest))]
    if sampled is not None:
      known = likely.sid_BW[r, picked[0][1]]
      drawn = np.flatnonzero((sampled.sid_BW[r] >= 0) & ~np.isin(sampled.sid_BW[r], known))
      picked.append((sampled, drawn[: config.sampled]))
    sid = np.concatenate([beams.sid_BW[r, places] for beams, places in picked])
    logp = np.concatenate([beams.level_logp_BWL[r, places] for beams, places in picked])
    ad_RC[r, : len(sid)], logp_RCL[r, : len(sid)] = first_ad_S[sid], logp
  return ad_RC, logp_RCL


def _shown_list(context, ad_C, ecpm_C, action_C, inputs: Inputs) -> CandidateList:
  """What the logging system showed; of ads with one SID that of the largest eCPM."""
  rows = np.flatnonzero(ad_C >= 0)
  rows = rows[np.argsort(-ecpm_C[rows], kind="stable")]
  _, first = np.unique(inputs.index.sid_of_ad_A[ad_C[rows]], return_index=True)
  rows = rows[np.sort(first)]
  levels = inputs.sids.codes_AL.shape[1]
  return CandidateList(
    context, ad_C[rows], ecpm_C[rows], np.zeros((len(rows), levels), np.float32),
    np.zeros(len(rows), bool), action_C[rows],
  )


def teaches(ecpm_C: np.ndarray, scale: RewardScale) -> bool:
  """Whether any of a list's candidates is better than another one, in the reward's steps."""
  reward_C = scale(ecpm_C[np.isfinite(ecpm_C)])
  return len(np.unique(reward_C)) > 1


def require_same_data(inputs: Inputs, scorer: RewardScorer, reward: Place) -> None:
  """Raises ConfigError where a reward model was trained on other data than a run."""
  if not inputs.fingerprint.startswith(f"{scorer.fingerprint}-"):
    raise ConfigError(f"{reward}: was trained on other logs or examples than the run; train one on "
                      "the run's data with `gr4ad reward`")


def write_candidates(
  workdir: Place,
  reward: Place,
  out: Place,
  *,
  config: CandidateConfig,
  overwrite: bool = False,
  data: Place | None = None,
) -> dict[str, float]:
  """Lists for a trained run, written to `out`.

  Args:
    workdir: a trained run.
    reward: a trained reward model.
    out: folder to write; lists.json there says that it is complete.
    config: how lists are made up.
    overwrite: replace lists that are there.
    data: where the data of both lie now; None = where they lay.

  Returns:
    Counts, and quantiles of the eCPM.

  Raises:
    ConfigError: no run, no reward model or one of other data, no request is chosen, or `out` holds
      lists already, or something else.
    LogError: the logs hold no impressions.
  """
  storage.require_replaceable(
    out, "candidate lists", markers=("lists.json",), parts=LIST_FOLDERS, overwrite=overwrite
  )
  run = with_data(read_run(workdir), workdir, data)
  inputs, scorer = open_inputs(run, workdir), open_reward(reward, data=data)
  require_same_data(inputs, scorer, reward)
  decoder, params, step = load_params(run, workdir, inputs.vocabulary)
  maker = ExampleMaker(inputs.logs, inputs.examples.config)
  impressions = read_impressions(maker, "train")
  require(len(choose_requests(impressions, config)) > 0, "candidates.top_users_share",
          config.top_users_share, f"chooses none of {len(impressions.contexts)} requests")
  ecpm: list[np.ndarray] = []

  def watched() -> Iterator[CandidateList]:
    for row in make_lists(
      wide_recommender(decoder, params, inputs, run.config.search), inputs, scorer, impressions,
      search=run.config.search, config=config,
    ):
      ecpm.append(row.ecpm_C)
      yield row

  # The scale needs all of them, so it is written after the records.
  with storage.new_folder(out) as copy:
    count = write_lists(watched(), copy.path)
    scale = fit_reward_scale(np.concatenate(ecpm))
    idle = sum(not teaches(row, scale) for row in ecpm)
    about = {
      "lists": count, "idle_lists": idle, "run": storage.absolute(workdir), "step": step,
      "reward": storage.absolute(reward), "fingerprint": inputs.fingerprint,
      "size": max(config.size, impressions.shown_RC.shape[1]), "reward_scale": list(scale),
      "config": dataclasses.asdict(config), "digests": digests.of_files(
        copy.path, copy.path.glob("*/*/*.array_record*")
      ),
    }
    write_json(copy.path / "lists.json", about)
  if idle > IDLE_SHARE * count:
    console.print(
      f"{out}: {idle:,} of {count:,} lists hold no two ads of different expected value, and teach "
      "nothing; are all bids, or the values of all conversions, 0 or the same?",
    )
  quantiles = np.quantile(np.concatenate(ecpm), (0.1, 0.5, 0.9))
  return {
    "lists": count, "lists that teach nothing": idle, "candidates": int(sum(map(len, ecpm))),
    **{f"eCPM, {q}% quantile": float(x) for q, x in zip((10, 50, 90), quantiles, strict=True)},
  }
