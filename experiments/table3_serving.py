"""GR4AD's Table 3 in kind: what each optimisation of decoding is worth, alone and together.

    python -m experiments.run table3_serving

A trained run (the preset "demo" on Complete Journey, 500 steps; `--set settings.run=FOLDER` takes
another) answers real requests of the test weeks. Without the KV cache every level decodes all
positions before it again, the context included; without beam-shared KV each beam has a copy of the
context's keys and values. Each is switched off alone, and both; programs take turns. The pre-cut
is timed on a selection alone, with many extensions a beam. Low precision: requests/s, bytes
of parameters, recall and value recall at 50. Result cache: the share of the test requests that
come within the time to live after an answer to the same user.

Expected (docs/decoding.md, beside the paper's): all optimisations are 1.8 times as fast as without
the KV cache, 13 times as without sharing, 17 times as without both; recall@50 .382 to .384 at each
precision, of which none is faster on a CPU; a result cache of a day answers 12.6%. Run time on two
CPU cores: 15 minutes with a trained run. `--set settings.requests=200` shortens it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments._runs import OfTrainedRun, open_trained
from experiments._settings import with_overrides
from gr4ad_jax.cli.bench_decode import time_in_turns
from gr4ad_jax.gr4ad.build import start_fn, step_fn
from gr4ad_jax.gr4ad.precision import at_precision, num_bytes
from gr4ad_jax.machine.progress import console, track
from gr4ad_jax.search.beam_search import compile_search, global_top_k, pre_cut_top_k

VARIANTS = {
  "all": "all optimisations",
  "no_cache": "without KV cache",
  "no_sharing": "without beam-shared KV",
  "none": "without both",
}
PRECISIONS = ("trained", "bfloat16", "int8", "fp8")
TTL_S = {"minute": 60, "hour": 3_600, "day": 86_400}


@dataclasses.dataclass(frozen=True)
class Settings(OfTrainedRun):
  """What --set may change."""

  batch: int = 2
  """Requests of a timed call; few, as copies of the context for each beam are large."""
  widths: tuple[int, ...] = (128, 256, 512)


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """VARIANT/requests_per_s, precision/NAME/..., cache/TTL/hit_share."""
  del size
  settings = with_overrides(Settings(), overrides)
  trained = open_trained(workdir, settings.run)
  decoder, params = trained.decoder, trained.opened.params
  context = trained.context(settings.batch)

  def call(decoder, params, start, step) -> Callable:
    search = compile_search(start, step, trained.tree, settings.widths)
    return lambda: search(params, context, *trained.fixed)

  start, step = start_fn(decoder), step_fn(decoder)
  replayed = replaying(start, step, len(settings.widths))
  unshared = start, tiled(step)
  light = {
    "all": call(decoder, params, start, step),
    "no_cache": call(decoder, params, *replayed),
  }
  megabytes = {"trained": num_bytes(params) / 1e6}
  for precision in PRECISIONS[1:]:
    low_decoder, convert = at_precision(decoder, precision)
    low_params = convert(params)
    megabytes[precision] = num_bytes(low_params) / 1e6
    light[precision] = call(low_decoder, low_params, start_fn(low_decoder), step_fn(low_decoder))
  # Copies for every beam are gigabytes, and whatever runs after them is slower.
  heavy = {
    "no_sharing": call(decoder, params, *unshared),
    "none": call(decoder, params, *replaying(*unshared, len(settings.widths))),
  }
  check_equal({name: f() for name, f in (light | heavy).items() if name in VARIANTS})
  seconds = time_in_turns(light, repeats=settings.repeats, progress=track)
  seconds |= time_in_turns(heavy, repeats=settings.repeats, progress=track)
  results = {
    f"{name}/requests_per_s": settings.batch / float(np.median(seconds[name])) for name in VARIANTS
  }
  search = dataclasses.replace(trained.opened.search, widths=settings.widths)
  for precision in PRECISIONS:
    console.print(f"quality: {precision}")
    timed = "all" if precision == "trained" else precision
    metrics = trained.score(dataclasses.replace(search, precision=precision), settings.requests)
    results |= {
      f"precision/{precision}/requests_per_s": settings.batch / float(np.median(seconds[timed])),
      f"precision/{precision}/megabytes": megabytes[precision],
    } | {
      f"precision/{precision}/{name}": metrics[name] for name in ("recall@50", "value_recall@50")
    }
  results |= selection_ms()
  users = np.array([group[0].user for group in trained.groups])
  times = np.array([group[0].time_s for group in trained.groups])
  return results | {
    f"cache/{name}/hit_share": hit_share(users, times, ttl) for name, ttl in TTL_S.items()
  }


def replaying(start: Callable, step: Callable, num_levels: int) -> tuple[Callable, Callable]:
  """Start and step without any cache: beams carry codes, and everything is decoded again."""

  def first(params, context, may_get):
    _, _, logp_B1V = start(params, context, may_get)
    return (context, may_get), jnp.full((logp_B1V.shape[0], 1, num_levels), -1, jnp.int32), logp_B1V

  def again(params, asked, code_BWL, code_BW, level: int):
    context, may_get = asked
    code_BWL = code_BWL.at[:, :, level - 1].set(code_BW)
    # The barrier keeps the compiler from seeing that it has computed this before.
    shared, state, _ = start(params, jax.lax.optimization_barrier(context), may_get)
    beams = code_BW.shape[1]
    state = jax.tree.map(
      lambda x: jnp.broadcast_to(x, (x.shape[0], beams, *x.shape[2:])), state
    )
    for position in range(1, level + 1):
      state, logp_BWV = step(params, shared, state, code_BWL[:, :, position - 1], position)
    return code_BWL, logp_BWV

  return first, again


def tiled(step: Callable) -> Callable:
  """The step with a copy of everything that beams share for each beam."""

  def unshared(params, shared, state, code_BW, level: int):
    rows, beams = code_BW.shape
    copies = jax.lax.optimization_barrier(
      jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), shared)
    )
    alone = jax.tree.map(lambda x: x.reshape(rows * beams, 1, *x.shape[2:]), state)
    alone, logp_RV = step(params, copies, alone, code_BW.reshape(rows * beams, 1), level)
    together = jax.tree.map(lambda x: x.reshape(rows, beams, *x.shape[2:]), alone)
    return together, logp_RV.reshape(rows, beams, -1)

  return unshared


def check_equal(found: Mapping[str, object]) -> None:
  """All variants compute the same search.

  Raises:
    ValueError: one does not.
  """
  expected = np.sort(found["all"].logp_BW, axis=1)
  for name, beams in found.items():
    if not np.allclose(np.sort(beams.logp_BW, axis=1), expected, atol=1e-2):
      raise ValueError(f"{name}: finds other SIDs than the search with all optimisations")


def selection_ms() -> dict[str, float]:
  """One selection of 512 among 512 beams with 1,024 extensions each, eight requests."""
  score_BWM = jax.random.normal(jax.random.key(0), (8, 512, 1024))
  functions = {"pre_cut": pre_cut_top_k, "global": global_top_k}
  calls = {}
  for name, top_k in functions.items():
    select = jax.jit(functools.partial(top_k, width=512))
    calls[name] = lambda select=select: select(score_BWM)
  seconds = time_in_turns(calls, repeats=10)
  return {f"selection_ms/{name}": 1e3 * float(np.median(s)) for name, s in seconds.items()}


def hit_share(users: np.ndarray, times: np.ndarray, ttl: int) -> float:
  """Share of requests that come at most `ttl` seconds after one of the user that was answered."""
  answered: dict[int, int] = {}
  hits = 0
  for row in np.argsort(times, kind="stable"):
    user, time_s = int(users[row]), int(times[row])
    if user in answered and time_s - answered[user] <= ttl:
      hits += 1
    else:
      answered[user] = time_s
  return hits / len(users)


def table(results: Mapping[str, float]) -> str:
  """Optimisations, precisions, cache."""
  base = results["all/requests_per_s"]
  lines = ["| | requests/s | all optimisations are so many times faster |", "|---|---:|---:|"]
  for name, label in VARIANTS.items():
    speed = results[f"{name}/requests_per_s"]
    lines.append(f"| {label} | {speed:.2f} | {base / speed:.2f} |")
  lines += [
    "", f"A selection of 512 among 512 beams x 1,024 extensions (8 requests) takes "
    f"{results['selection_ms/pre_cut']:.1f} ms with the pre-cut and "
    f"{results['selection_ms/global']:.1f} ms without. Where no beam has more extensions than "
    "beams are kept, as in most trees of legal prefixes, there is nothing to cut.",
  ]
  lines += ["", "| precision | requests/s | parameters, MB | recall@50 | value_recall@50 |",
            "|---|---:|---:|---:|---:|"]
  for name in PRECISIONS:
    part = {
      key: results[f"precision/{name}/{key}"]
      for key in ("requests_per_s", "megabytes", "recall@50", "value_recall@50")
    }
    lines.append(
      f"| {name} | {part['requests_per_s']:.2f} | {part['megabytes']:.2f} | "
      f"{part['recall@50']:.4f} | {part['value_recall@50']:.4f} |"
    )
  lines += ["", "| result cache, time to live | requests answered | capacity |", "|---|---:|---:|"]
  for name in TTL_S:
    share = results[f"cache/{name}/hit_share"]
    lines.append(f"| {name} | {share:.1%} | x {1 / (1 - share):.2f} |")
  return "\n".join(lines)


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """Requests/s of every variant."""
  figure = Figure(figsize=(7, 3), layout="constrained")
  ax = figure.subplots()
  names = [*VARIANTS, *PRECISIONS[1:]]
  values = [
    results.get(f"{name}/requests_per_s", results.get(f"precision/{name}/requests_per_s"))
    for name in names
  ]
  ax.barh(range(len(names)), values)
  ax.set_yticks(range(len(names)), [VARIANTS.get(name, name) for name in names])
  ax.invert_yaxis()
  ax.set_title("Requests/s", loc="left")
  ax.spines[["top", "right"]].set_visible(False)
  return {"table3": figure}
