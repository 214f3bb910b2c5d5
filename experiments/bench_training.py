"""Training throughput beside a PyTorch peer of the same size, and beside a matrix product.

    pip install -e '.[peers]'    # cornac, whose TIGER is the peer, and PyTorch
    python -m experiments.run bench_training

The preset "mini" (4.7 million parameters, four codebooks of 256), 64 requests a step, each with a
history of 20 ads and one target. Windows of whole steps (gradients, clipping, AdamW) take turns
with windows of a large matrix product; flop_share is the model's matrix-product FLOP/s over those.
TIGER is cornac's with its defaults (4 + 4 layers; 4.7 million parameters): 20 items of 4 codes as
80 tokens, 64 examples a step; its training loop runs once between two of ours. Without cornac its
number is NaN.

The input is measured by itself: examples/s that grain reads, decodes, looks up and pads (stored
requests of Complete Journey as in `make demo`, with the threads that training uses), beside
examples/s of the training step on such batches: of the preset "small", and of "demo", whose copy
path reads a shortlist of 512 ads with 22 numbers each.

Expected on two CPU cores with AVX-512 (docs/scaling.md): 597 examples/s beside TIGER's 55,
flop_share .59 (.56 to .61 between runs; .38 on a busy machine), 1.248 GFLOP an example of TIGER's
and .196 of ours, input 19 to 23 times what a step of "small" takes and 2.7 times one of "demo". Run
time there: six minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments._runs import prepared_journey, run_of, tokenized
from experiments._settings import with_overrides
from gr4ad_jax.cli.bench_decode import time_in_turns
from gr4ad_jax.config import override_all
from gr4ad_jax.data.pipeline import train_batches
from gr4ad_jax.gr4ad.batch import Batch, Context, Vocabulary, random_context, random_vocabulary
from gr4ad_jax.gr4ad.build import build_decoder
from gr4ad_jax.gr4ad.config import Config, preset
from gr4ad_jax.gr4ad.cost import num_params, train_flops
from gr4ad_jax.gr4ad.run import example_flops, open_inputs
from gr4ad_jax.gr4ad.vsl_task import vsl_task
from gr4ad_jax.machine.memory import keep_freed_memory
from gr4ad_jax.machine.peaks import matmul
from gr4ad_jax.machine.progress import console
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.training.mesh import training_mesh
from gr4ad_jax.training.train_step import compile_programs

INPUTS = ("small", "demo")  # presets whose input is measured


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change."""

  preset: str = "mini"
  codebook_sizes: tuple[int, ...] = (256, 256, 256, 256)
  history: int = 20
  """Ads in the context of a request."""
  targets: int = 1
  batch_size: int = 64
  steps: int = 5
  """Steps of a timed window."""
  repeats: int = 10
  """Timed windows."""
  peer_sessions: int = 150
  """Sessions of 21 items that the peer trains on: 20 examples each; 0 leaves it out."""
  input_batch_size: int = 64
  """Requests a step where the input is measured; 0 leaves it out."""


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """examples_per_second, targets_per_second, num_params, gflop_per_example, flop_share, peer_...

  Of the input, for each of INPUTS: PRESET/input_examples_per_second, /examples_per_second of a step
  and /gflop_per_example.
  """
  del size
  keep_freed_memory()  # as `gr4ad train` does
  settings = with_overrides(Settings(), overrides)
  config = override_all(
    preset(settings.preset), {"train.batch_size": settings.batch_size, "train.data_parallel": 1}
  )
  vocabulary = dataclasses.replace(
    random_vocabulary(settings.codebook_sizes), num_organic_buckets=1
  )
  flops = settings.batch_size * train_flops(
    config.model, vocabulary, targets=settings.targets,
    context_tokens=1 + len(vocabulary.feature_sizes) + settings.history,
  )
  window = _training_window(config, vocabulary, _random_batch(settings, vocabulary), settings.steps)
  multiply, matmul_flops = matmul(config.model.compute_dtype)
  per_window = max(1, round(settings.steps * flops / matmul_flops))

  def products() -> jax.Array:
    return [multiply() for _ in range(per_window)][-1]

  def measure() -> dict[str, np.ndarray]:
    console.print(f"ours, {settings.repeats} windows of {settings.steps} steps")
    return time_in_turns({"step": window, "matmul": products}, repeats=settings.repeats)

  seconds = [measure()]
  peer = _peer(settings)
  if not math.isnan(peer["peer_examples_per_second"]):
    seconds.append(measure())
  step_s = float(np.median([s["step"] for s in seconds])) / settings.steps
  rate = per_window * matmul_flops / float(np.median([s["matmul"] for s in seconds]))
  results = {
    "examples_per_second": settings.batch_size / step_s,
    "num_params": float(num_params(config.model, vocabulary)),
    "targets_per_second": settings.batch_size * settings.targets / step_s,
    "gflop_per_example": flops / settings.batch_size / 1e9,
    "flop_share": flops / step_s / rate,
    "matmul_gflops_per_second": rate / 1e9,
  }
  return results | peer | (_input(workdir, settings) if settings.input_batch_size else {})


def _random_batch(settings: Settings, vocabulary: Vocabulary) -> Batch:
  """Full histories of ads, no organic ones."""
  fixed = 1 + len(vocabulary.feature_sizes)
  context = random_context(vocabulary, settings.batch_size, fixed + 2 * settings.history)
  context = Context(**{
    name: rows[:, :0] if name.startswith("organic") else rows
    for name, rows in context.present().items()
  })
  rng = np.random.default_rng(1)
  shape = (settings.batch_size, settings.targets)
  codes = [rng.integers(0, size, shape, np.int32) for size in settings.codebook_sizes]
  return Batch(
    context, np.stack(codes, axis=-1), rng.integers(0, vocabulary.num_ecpm_bins, shape, np.int32),
    np.ones(shape, np.float32),
  )


def _training_window(
  config: Config, vocabulary: Vocabulary, batch: Batch, steps: int
) -> Callable[[], dict]:
  """Some steps that go on from where the last call ended; the host runs ahead, as in training."""
  mesh = training_mesh(config.train)
  task = vsl_task(build_decoder(config.model, vocabulary), config.loss)
  programs = compile_programs(task, config.train, mesh)
  state = [programs.init(jax.random.key(0))]
  on_device = programs.to_devices(batch)

  def window() -> dict:
    for _ in range(steps):
      state[0], metrics = programs.step(state[0], on_device)
    return metrics

  return window


def _peer(settings: Settings) -> dict[str, float]:
  """The training loop of cornac's TIGER on random sessions, once."""
  needed = ("cornac", "torch", "transformers")
  missing = [name for name in needed if not importlib.util.find_spec(name)]
  if missing or not settings.peer_sessions:
    console.print(f"peer: not measured ({', '.join(missing) or 'no sessions'})")
    return {f"peer_{name}": math.nan for name in (
      "examples_per_second", "gflop_per_example", "num_params"
    )}
  from cornac.data import FeatureModality
  from cornac.eval_methods import NextItemEvaluation
  from cornac.models import TIGER
  from torch.utils.flop_counter import FlopCounterMode

  class Timed(TIGER):
    counter = contextlib.nullcontext()

    def _fit_seq2seq(self, torch, val_set):
      start = time.perf_counter()
      with self.counter:
        super()._fit_seq2seq(torch, val_set)
      self.seconds = time.perf_counter() - start

  def fit(sessions: int, counter: contextlib.AbstractContextManager) -> tuple[Timed, int]:
    """A trained peer and how many examples it saw."""
    rng = np.random.default_rng(0)
    length, num_items = settings.history + 1, 2_000
    events = [
      (f"user{s}", f"session{s}", f"item{rng.integers(num_items)}", s * length + place)
      for s in range(sessions) for place in range(length)
    ]  # fmt: skip
    features = rng.standard_normal((num_items, 32)).astype(np.float32)
    split = NextItemEvaluation.from_splits(
      train_data=events, test_data=events[:length], fmt="USIT",
      item_feature=FeatureModality(features=features, ids=[f"item{n}" for n in range(num_items)]),
    )
    peer = Timed(
      tokenizer="rkmeans", n_epochs=1, batch_size=settings.batch_size, max_len=settings.history,
      device="cpu", seed=0,
    )
    peer.counter = counter
    peer.fit(split.train_set)
    return peer, sum(len(session) - 1 for session in split.train_set.sessions.values())

  console.print(f"peer, {20 * settings.peer_sessions} examples")
  peer, examples = fit(settings.peer_sessions, contextlib.nullcontext())
  # Counted apart, since counting takes time. The products of both passes, as ours are.
  counter = FlopCounterMode(display=False)
  _, counted = fit(settings.batch_size, counter)
  return {
    "peer_examples_per_second": examples / peer.seconds,
    "peer_gflop_per_example": counter.get_total_flops() / counted / 1e9,
    "peer_num_params": float(sum(p.numel() for p in peer.model.parameters())),
  }


def _input(workdir: Path, settings: Settings) -> dict[str, float]:
  """Input of stored requests, and steps on it: `small` reads no shortlist, `demo` does."""
  data = prepared_journey(workdir)
  sids = tokenized(data, workdir / "sids", TokenizerConfig())
  results = {}
  for name in INPUTS:
    config = override_all(
      preset(name), {"train.batch_size": settings.input_batch_size, "train.data_parallel": 1}
    )
    inputs = open_inputs(run_of(data, sids, config))
    batches = train_batches(
      inputs.examples.sources["train"], inputs.make_batch, batch_size=settings.input_batch_size,
      seed=0,
    )
    for _ in range(20):
      batch = next(batches)
    console.print(f"input of the preset {name}")
    count, start = 100, time.perf_counter()
    for _ in range(count):
      next(batches)
    input_rate = count * settings.input_batch_size / (time.perf_counter() - start)
    window = _training_window(config, inputs.vocabulary, batch, 1)
    console.print(f"step of the preset {name}")
    step_s = float(np.median(time_in_turns({"step": window}, repeats=5)["step"]))
    results |= {
      f"{name}/input_examples_per_second": input_rate,
      f"{name}/examples_per_second": settings.input_batch_size / step_s,
      f"{name}/gflop_per_example": example_flops(config.model, inputs) / 1e9,
    }
  return results


def table(results: Mapping[str, float]) -> str:
  """Throughput, then the input."""
  lines = [
    "| | parameters | GFLOP an example | examples/s | GFLOP/s | share of the matmul rate |",
    "|---|---:|---:|---:|---:|---:|", _row("ours", "", results)
    + f"{results['flop_share']:.0%} of {results['matmul_gflops_per_second']:,.0f} GFLOP/s |",
  ]
  if math.isnan(results["peer_examples_per_second"]):
    lines.append("| TIGER (cornac) | | | not measured: pip install -e '.[peers]' | | |")
  else:
    lines.append(_row("TIGER (cornac)", "peer_", results) + " |")
    times = results["examples_per_second"] / results["peer_examples_per_second"]
    work = results["gflop_per_example"] / results["peer_gflop_per_example"]
    lines += [
      "", f"At equal parameters, ours over TIGER: {times:.1f} times the examples, each {work:.2f} "
      f"times the work; per FLOP {times * work:.1f} times. An example has one target for both.",
    ]
  for name in INPUTS:
    if f"{name}/examples_per_second" in results:
      rate, step_rate = (
        results[f"{name}/{key}"] for key in ("input_examples_per_second", "examples_per_second")
      )
      lines += [
        "", f"Input of the preset {name}: {rate:,.0f} examples/s, {rate / step_rate:.1f} times "
        f"what a step takes ({step_rate:,.1f}).",
      ]
  return "\n".join(lines)


def _row(label: str, prefix: str, results: Mapping[str, float]) -> str:
  params, gflop, rate = (
    results[prefix + name] for name in ("num_params", "gflop_per_example", "examples_per_second")
  )
  return f"| {label} | {params / 1e6:.2f} M | {gflop:.3f} | {rate:,.0f} | {gflop * rate:,.0f} | "


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """None."""
  del results
  return {}
