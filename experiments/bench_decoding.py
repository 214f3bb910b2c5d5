"""Decoding speed: LazyAR beside the ordinary decoder, and the constrained search alone.

    python -m experiments.run bench_decoding

LazyAR (L = 9, K = 6), the autoregressive and the multi-token decoder of the same width 256, with
the same optimisations, 256 context tokens, codebooks 4096, 1024, 256, beams 128-256-512 and the
step for the value bucket; requests/s over that of the autoregressive decoder at batch 1 and 8, and
the FLOP/s of LazyAR as a share of a matrix product's. Programs take turns in one process.

Then the search without a decoder (random log-probabilities on the device) over the semantic IDs of
Amazon Beauty (12,101 ads, three quantised levels of 256 codes and a suffix), beside what STATIC
takes on two cores; and how many of a million SIDs it returns do not exist. Without the data the
SIDs are random.

`--set settings.data=FOLDER` names the folder with amazon_beauty, `--set settings.repeats=5` and
`--set settings.generated=100000` shorten the run.

Expected on two CPU cores (docs/decoding.md): lazyar_over_ar 2.6 at batch 1 and 2.7 at batch 8,
flop_share .62 and .63 (.53 to .68 between runs), constrained_ms .3, 1.0, 1.6 and 9.4 in the order
of CASES, invalid_sids 0. Run time there: about 3 minutes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments._settings import SHARED_DATA, with_overrides
from gr4ad_jax.catalog.legal_prefixes import LegalPrefixes, PrefixTree, build_prefix_tree
from gr4ad_jax.cli.bench_config import DecodeConfig
from gr4ad_jax.cli.bench_decode import random_sids, run_bench, time_in_turns
from gr4ad_jax.data.amazon import read_amazon
from gr4ad_jax.embedding.text_encoder import encode_texts
from gr4ad_jax.gr4ad.config import preset
from gr4ad_jax.machine.progress import console, track
from gr4ad_jax.search.beam_search import Beams, beam_search
from gr4ad_jax.tokenizer import residual_kmeans
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.tokenizer.semantic_id import SemanticIds, code_new_ads

SIZES = (256, 256, 256, 256)
NUM_SIDS = 12_101
CASES = ((1, 10), (1, 100), (1, 512), (16, 100))  # batch, beams
PEER_MS = {  # measured on two CPU cores; STATIC cannot search with more beams than codes
  "b1_k10": ("STATIC", 0.64), "b1_k100": ("STATIC", 1.94), "b1_k512": ("FlashRec", 5.21),
  "b16_k100": ("STATIC", 10.3),
}
PEER_FLOPS_PER_S = 170e9  # a matrix product on two cores of that kind; scales the peers' times
NAMES = {"lazy": "lazyar", "autoregressive": "ar", "multi_token": "mtp"}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change."""

  data: str = SHARED_DATA
  """Folder that holds amazon_beauty; without it the SIDs are random."""
  repeats: int = 15
  """Timed calls of each decoder."""
  search_repeats: int = 100
  """Timed calls of the search alone."""
  generated: int = 1_000_000
  """SIDs to generate and look up."""


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """lazyar_over_ar/bB, mtp_over_ar/bB, flop_share/bB, constrained_ms/bB_kK, invalid_sids, ..."""
  del workdir, size
  settings = with_overrides(Settings(), overrides)
  config = DecodeConfig(repeats=settings.repeats)
  bench = run_bench(preset("small").model, config, progress=track)
  results = {"matmul_gflops_per_s": bench["matmul_flops_per_s"] / 1e9}
  speed = {(row["decoder"], row["batch"]): row for row in bench["rows"]}
  for (decoder, batch), row in speed.items():
    name = NAMES[decoder]
    results[f"{name}_requests_per_s/b{batch}"] = row["requests_per_s"]
    if decoder != "autoregressive":
      ratio = row["requests_per_s"] / speed["autoregressive", batch]["requests_per_s"]
      results[f"{name}_over_ar/b{batch}"] = ratio
    results[("" if decoder == "lazy" else f"{name}/") + f"flop_share/b{batch}"] = row["flop_share"]
  sids_SL = beauty_sids(Path(settings.data) / "amazon_beauty")
  tree = build_prefix_tree(sids_SL)
  prefixes = jax.device_put(tree.arrays)
  for batch, beams in CASES:
    search = compile_constrained(tree, beams)
    logp = random_log_probs(jax.random.key(0), batch, beams)
    seconds = time_in_turns(
      {"search": lambda f=search, logp=logp: f(logp, prefixes)}, repeats=settings.search_repeats
    )["search"]
    results[f"constrained_ms/b{batch}_k{beams}"] = 1e3 * float(np.median(seconds))
  return results | count_invalid(sids_SL, settings.generated)


def beauty_sids(folder: Path) -> np.ndarray:
  """int32 [S, 4], sorted: three quantised levels of item texts, and a suffix."""
  if not folder.is_dir():
    console.print(f"{folder}: not there; random SIDs instead")
    return random_sids(SIZES, NUM_SIDS)
  embedding_AD = encode_texts(list(read_amazon(folder).ads.text), "wordllama")
  none = np.empty((0, len(SIZES)), np.int32)
  config = TokenizerConfig(last_level="suffix")
  arrays = residual_kmeans.fit(embedding_AD, SIZES[:-1])
  codes_AL = code_new_ads(
    SemanticIds(none, none, (*SIZES[:-1], 0), arrays, config), embedding_AD, {}
  )
  return np.unique(np.minimum(codes_AL, max(SIZES) - 1), axis=0)  # few texts have more twins


def compile_constrained(tree: PrefixTree, beams: int) -> Callable:
  """(log-probs [L, B, beams, V], prefixes) -> Beams; the same numbers whatever the prefix."""

  def search(logp_LBWV: jax.Array, prefixes: LegalPrefixes) -> Beams:
    return beam_search(
      None, prefixes, tree=tree, widths=(beams,) * len(SIZES),
      start=lambda _, may_get: (None, (), logp_LBWV[0, :, :1]),
      step=lambda shared, state, code_BW, level: (
        (), logp_LBWV[level][:, : code_BW.shape[1]]
      ),
    )

  return jax.jit(search)


def random_log_probs(key: jax.Array, batch: int, beams: int) -> jax.Array:
  """float32 [L, B, beams, V]."""
  return jax.nn.log_softmax(jax.random.normal(key, (len(SIZES), batch, beams, max(SIZES))))


def count_invalid(sids_SL: np.ndarray, wanted: int) -> dict[str, float]:
  """Generates SIDs with new random log-probs a call, and looks each up in a plain set."""
  batch, beams = 16, 512
  tree = build_prefix_tree(sids_SL)
  search = compile_constrained(tree, beams)
  prefixes = jax.device_put(tree.arrays)
  legal = {tuple(sid) for sid in sids_SL.tolist()}
  generated = invalid = repeated = 0
  for call in track(range(-(-wanted // (batch * beams))), description="generate"):
    found = search(random_log_probs(jax.random.key(call), batch, beams), prefixes)
    for row_WL, row_W in zip(np.asarray(found.code_BWL), np.asarray(found.sid_BW), strict=True):
      sids = [tuple(sid) for sid in row_WL[row_W >= 0].tolist()]
      generated += len(sids)
      invalid += sum(sid not in legal for sid in sids)
      repeated += len(sids) - len(set(sids))
  return {
    "generated_sids": float(generated), "invalid_sids": float(invalid),
    "repeated_sids": float(repeated),
  }


def table(results: Mapping[str, float]) -> str:
  """Decoders, then the search alone beside peers."""
  lines = [
    f"A matrix product runs at {results['matmul_gflops_per_s']:.0f} GFLOP/s.", "",
    "| | batch | requests/s | over autoregressive | FLOP share |", "|---|---:|---:|---:|---:|",
  ]
  for decoder, name in NAMES.items():
    for batch in (1, 8):
      ratio = results.get(f"{name}_over_ar/b{batch}", 1.0)
      prefix = "" if decoder == "lazy" else f"{name}/"
      lines.append(
        f"| {decoder} | {batch} | {results[f'{name}_requests_per_s/b{batch}']:.1f} | {ratio:.2f} | "
        f"{results[f'{prefix}flop_share/b{batch}']:.0%} |"
      )
  scale = PEER_FLOPS_PER_S / 1e9 / results["matmul_gflops_per_s"]
  lines += [
    "", "The search alone:", "", "| batch, beams | ms | peer | its ms, scaled to this machine |",
    "|---|---:|---|---:|",
  ]
  for case, (peer, peer_ms) in PEER_MS.items():
    lines.append(
      f"| {case} | {results[f'constrained_ms/{case}']:.2f} | {peer} | {peer_ms * scale:.2f} |"
    )
  lines += [
    "", f"Of {results['generated_sids']:,.0f} generated SIDs {results['invalid_sids']:,.0f} do not "
    f"exist, and {results['repeated_sids']:,.0f} repeat another of their list.",
  ]
  return "\n".join(lines)


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """The search alone beside peers."""
  figure = Figure(figsize=(7, 2.6), layout="constrained")
  ax = figure.subplots()
  rows = np.arange(len(PEER_MS))
  ax.barh(rows - 0.2, [results[f"constrained_ms/{case}"] for case in PEER_MS], 0.4, label="ours")
  ax.barh(rows + 0.2, [ms for _, ms in PEER_MS.values()], 0.4, label="peer", color="tab:gray")
  ax.set_yticks(rows, [f"{case} ({peer})" for case, (peer, _) in PEER_MS.items()])
  ax.invert_yaxis()
  ax.set_title("Constrained search alone, ms a call", loc="left")
  ax.legend(frameon=False)
  ax.spines[["top", "right"]].set_visible(False)
  return {"constrained": figure}
