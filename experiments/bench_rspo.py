"""What RSPO's loss costs beside the step that gives its log-probabilities.

    python -m experiments.run bench_rspo

Candidate lists of random SIDs. One call is the loss and its gradient with respect to the
log-probabilities of all lists; the other the forward and backward pass of the decoder over a
micro-batch of them, whose time counts once for every micro-batch (gradient accumulation). Both take
turns. The decoder is the smallest preset, beside which the share is largest.

Expected on two CPU cores (docs/value.md): rspo_ms 54, step_ms 15,100, rspo_share .004. Run time
there: three minutes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments._settings import with_overrides
from gr4ad_jax.cli.bench_decode import time_in_turns
from gr4ad_jax.gr4ad.batch import random_context, random_vocabulary
from gr4ad_jax.gr4ad.build import build_decoder, init_params
from gr4ad_jax.gr4ad.config import preset
from gr4ad_jax.learning.preference import Lists, rspo_loss
from gr4ad_jax.machine.progress import track


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change."""

  lists: int = 4_096
  candidates: int = 32
  micro: int = 64
  """Lists of a micro-batch."""
  preset: str = "tiny"
  context_tokens: int = 96
  repeats: int = 5


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """rspo_ms, step_ms (of all lists) and their ratio, rspo_share."""
  del workdir, size
  settings = with_overrides(Settings(), overrides)
  rng = np.random.default_rng(0)
  vocabulary = random_vocabulary((64, 32, 16))
  decoder = build_decoder(preset(settings.preset).model, vocabulary)
  params = init_params(decoder, jax.random.key(0))
  context = random_context(vocabulary, settings.micro, settings.context_tokens)
  code_BCL = np.stack(
    [rng.integers(0, v, (settings.micro, settings.candidates)) for v in (64, 32, 16)], axis=-1
  )

  @jax.jit
  def step(params, context, code_BCL):
    def loss(params):
      log_probs = decoder.apply({"params": params}, context, code_BCL, deterministic=True)
      return jnp.sum(log_probs.sid_BCL)

    return jax.grad(loss)(params)

  shape = (settings.lists, settings.candidates)
  ref_BCL = rng.normal(-2, 1, (*shape, 3)).astype(np.float32)
  logp_BCL = (ref_BCL + rng.normal(0, 0.3, ref_BCL.shape)).astype(np.float32)
  lists = Lists(
    rng.uniform(0, 5, shape).astype(np.float32), ref_BCL, np.ones(shape, bool), np.ones(shape, bool)
  )

  @jax.jit
  def rspo(logp_BCL, lists):
    def loss(logp_BCL):
      return jnp.sum(rspo_loss(logp_BCL, lists, beta=1.0, delta=3.0).loss)

    return jax.value_and_grad(loss)(logp_BCL)

  given = jax.device_put((params, context, code_BCL, logp_BCL, lists))
  seconds = time_in_turns(
    {"step": lambda: step(*given[:3]), "rspo": lambda: rspo(*given[3:])},
    repeats=settings.repeats, progress=track,
  )
  whole = float(np.median(seconds["step"])) * settings.lists / settings.micro
  loss = float(np.median(seconds["rspo"]))
  return {"rspo_ms": 1e3 * loss, "step_ms": 1e3 * whole, "rspo_share": loss / whole}


def table(results: Mapping[str, float]) -> str:
  """One line."""
  return (
    "| RSPO loss and gradient | step | share |\n|---:|---:|---:|\n"
    f"| {results['rspo_ms']:,.0f} ms | {results['step_ms']:,.0f} ms | "
    f"{results['rspo_share']:.1%} |"
  )


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """None."""
  del results
  return {}
