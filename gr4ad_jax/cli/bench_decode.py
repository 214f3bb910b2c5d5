"""How fast beam search decodes: `gr4ad bench decode`.

Programs are compiled and run before the clock starts; every call is waited for; programs that are
compared take turns, so that a busy moment of the machine meets all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.catalog.legal_prefixes import PrefixTree, build_prefix_tree
from gr4ad_jax.cli.bench_config import DecodeConfig
from gr4ad_jax.gr4ad.batch import Vocabulary, random_context, random_vocabulary
from gr4ad_jax.gr4ad.build import build_decoder, init_params, start_fn, step_fn
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.gr4ad.cost import decode_flops
from gr4ad_jax.machine.peaks import matmul
from gr4ad_jax.search.beam_search import Beams, compile_search


class DecodeProgram(NamedTuple):
  """One compiled search with its arguments."""

  search: Callable[..., Beams]
  args: tuple[Any, ...]
  flops: int  # of one call, matrix products only
  compile_s: float
  memory_bytes: int  # arguments, results and what lies between


@dataclasses.dataclass(frozen=True)
class Timing:
  """What one program takes."""

  p50_ms: float
  p90_ms: float
  p99_ms: float
  requests_per_s: float  # batch / median
  flop_share: float  # achieved FLOP/s over those of a matrix product
  compile_s: float
  memory_mb: float


def random_sids(codebook_sizes: Sequence[int], count: int, *, seed: int = 0) -> np.ndarray:
  """int32 [<= count, L] distinct SIDs, sorted.

  Raises:
    ValueError: fewer than one SID asked for.
  """
  if count < 1:
    raise ValueError(f"num_sids={count}: must be at least 1")
  rng = np.random.default_rng(seed)
  codes = [rng.integers(0, size, count, np.int32) for size in codebook_sizes]
  return np.unique(np.stack(codes, axis=1), axis=0)


def compile_decode(
  config: ModelConfig,
  vocabulary: Vocabulary,
  tree: PrefixTree,
  *,
  batch: int,
  widths: Sequence[int],
  context_tokens: int,
  with_value: bool,
  seed: int = 0,
) -> DecodeProgram:
  """A search with fresh parameters and a random context; what it costs does not depend on them."""
  decoder = build_decoder(config, vocabulary)
  params = init_params(decoder, jax.random.key(seed))
  context = random_context(
    vocabulary, batch, context_tokens, shortlist=(config.copied_ads, config.copied_numbers),
    seed=seed,
  )
  search = compile_search(start_fn(decoder), step_fn(decoder), tree, tuple(widths))
  args = (params, *jax.device_put((context, tree.arrays)))
  if with_value:
    args += (jnp.arange(vocabulary.num_ecpm_bins, dtype=jnp.float32),)
  start = time.perf_counter()
  compiled = search.lower(*args).compile()
  compile_s = time.perf_counter() - start
  memory = compiled.memory_analysis()
  flops = batch * decode_flops(
    config, vocabulary, context_tokens=context_tokens, widths=widths, with_value=with_value
  )
  num_bytes = (
    memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  )
  return DecodeProgram(compiled, args, flops, compile_s, num_bytes)


def time_in_turns(
  programs: Mapping[str, Callable[[], Any]], *, repeats: int, progress: Callable | None = None
) -> dict[str, np.ndarray]:
  """Seconds of `repeats` calls of each program.

  Each timed call follows one of the same program that does not count, so that none pays for memory
  that the one before it has given back.
  """
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  turns = range(repeats)
  if progress is not None:
    turns = progress(turns, description="timing", total=repeats)
  for _ in turns:
    for name, call in programs.items():
      jax.block_until_ready(call())
      start = time.perf_counter()
      jax.block_until_ready(call())
      seconds[name].append(time.perf_counter() - start)
  return {name: np.array(values) for name, values in seconds.items()}


def measure(
  programs: Mapping[str, DecodeProgram],
  *,
  batch: int,
  dtype: str,
  repeats: int,
  progress: Callable | None = None,
) -> tuple[dict[str, Timing], float]:
  """Times programs of one batch size in turns, with a matrix product among them.

  Args:
    programs: by name.
    batch: requests of a call.
    dtype: of the matrix product.
    repeats: calls of each program.
    progress: called as `progress(turns, description, total)`; None shows nothing.

  Returns:
    Timings by name, and the FLOP/s of the matrix product (median).
  """
  multiply, matmul_flops = matmul(dtype)
  calls = {name: lambda p=p: p.search(*p.args) for name, p in programs.items()}
  seconds = time_in_turns(calls | {"": multiply}, repeats=repeats, progress=progress)
  rate = matmul_flops / float(np.median(seconds[""]))
  timings = {}
  for name, program in programs.items():
    p50, p90, p99 = (float(s) for s in np.percentile(seconds[name], (50, 90, 99)))
    timings[name] = Timing(
      1e3 * p50, 1e3 * p90, 1e3 * p99, batch / p50, program.flops / p50 / rate,
      program.compile_s, program.memory_bytes / 1e6,
    )
  return timings, rate


def run_bench(
  model: ModelConfig, config: DecodeConfig, *, progress: Callable | None = None
) -> dict[str, Any]:
  """Measures the grid.

  Args:
    model: what all decoders have in common.
    config: the grid; its decoders stand in place of the model's, and a type where it has one.
    progress: called as `progress(turns, description, total)`; None shows nothing.

  Returns:
    "device", "matmul_flops_per_s", and "rows": one dictionary for each decoder, batch and schedule,
    with the fields of Timing.
  """
  if config.compute_dtype:
    model = dataclasses.replace(model, compute_dtype=config.compute_dtype)
  vocabulary = random_vocabulary(
    config.codebook_sizes, num_ads=model.item_scorer * config.num_sids
  )
  tree = build_prefix_tree(random_sids(config.codebook_sizes, config.num_sids))
  rows, rates = [], []
  for batch, widths in itertools.product(config.batch_sizes, config.schedules):
    programs = {
      name: compile_decode(
        dataclasses.replace(model, decoder=name), vocabulary, tree, batch=batch, widths=widths,
        context_tokens=config.context_tokens, with_value=config.with_value,
      )
      for name in config.decoders
    }
    timings, rate = measure(
      programs, batch=batch, dtype=model.compute_dtype, repeats=config.repeats, progress=progress
    )
    rates.append(rate)
    cell = {"batch": batch, "widths": list(widths)}
    rows += [{"decoder": name} | cell | dataclasses.asdict(t) for name, t in timings.items()]
  device = jax.devices()[0]
  return {
    "device": f"{device.platform}: {device.device_kind}",
    "compute_dtype": model.compute_dtype,
    "matmul_flops_per_s": float(np.median(rates)),
    "rows": rows,
  }
