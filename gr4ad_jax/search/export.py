"""Writes a trained search as a portable artifact; `artifact.py` reads it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.catalog.ad_index import AdIndex
from gr4ad_jax.catalog.legal_prefixes import build_prefix_tree
from gr4ad_jax.catalog.subsets import num_words
from gr4ad_jax.data import neighbours, shortlist, tastes
from gr4ad_jax.data.example_records import to_example
from gr4ad_jax.data.pipeline import ad_facts
from gr4ad_jax.data.trending import arrays_of
from gr4ad_jax.machine import atomic, storage
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.search import artifact, raw_histories
from gr4ad_jax.search.beam_search import search_function
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.generator import Generator, named_arrays
from gr4ad_jax.search.opened import Opened
from gr4ad_jax.version import __version__

PLATFORMS = ("cpu", "cuda", "tpu")


class Histories(NamedTuple):
  """What contexts are made of raw histories with, where the generator says what its arrays hold."""

  arrays: dict[str, np.ndarray]  # tables by ad, content and day
  features: dict[str, tuple[int, list[str]]]  # name -> its place, and its values from 1 on


# Ten parameters: each is one thing that an artifact holds.
def write_artifact(
  folder: Path,
  generator: Generator,
  params: Any,
  *,
  index: AdIndex,
  ad_id_A: np.ndarray,
  config: SearchConfig,
  bin_means: Sequence[float],
  sample: Any,
  about: dict[str, Any],
  histories: Histories | None = None,
) -> None:
  """Exports the search with a symbolic batch size into a folder, which appears whole or not at all.

  `sample` is the context of a request, whose shapes are those of all requests; `bin_means` holds
  the mean value of each bucket, and `about` says in the manifest what was exported.

  Raises:
    ValueError: the folder is there already.
  """
  if folder.exists():
    raise ValueError(f"{folder}: exists already; pass another --out")
  generator, convert = generator.at_precision(config.precision)
  tree = build_prefix_tree(index.sids_SL)
  fixed, structure = jax.tree.flatten(
    jax.tree.map(np.asarray, (convert(params), tree.arrays, np.asarray(bin_means, np.float32)))
  )
  arrays, known = named_arrays(sample), generator.arrays
  search = search_function(
    generator.start, generator.step, tree, config.widths, generator.among, generator.guide
  )

  def call(
    fixed: list[jax.Array], context: dict[str, jax.Array], word_BU: jax.Array | None = None
  ) -> dict[str, jax.Array]:
    """What is exported: arrays without structure -> beams by name."""
    params, prefixes, bin_means = jax.tree.unflatten(structure, fixed)
    whole = jax.tree.unflatten(jax.tree.structure(sample), [context[name] for name in arrays])
    own_B1 = None if word_BU is None else jnp.arange(word_BU.shape[0])[:, None]
    beams = search(params, whole, prefixes, bin_means, word_BU, own_B1)
    return {name: x for name, x in beams._asdict().items() if x is not None}

  (batch,) = jax.export.symbolic_shape("batch")
  request = (
    [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in fixed],
    _shapes(arrays, batch),
  )
  word_BU = jax.ShapeDtypeStruct((batch, num_words(tree.capacity)), np.uint32)
  export = jax.export.export(jax.jit(call), platforms=PLATFORMS)
  programs = {"program.bin": export(*request), "without.bin": export(*request, word_BU)}
  manifest = {
    "format": artifact.FORMAT,
    "platforms": list(PLATFORMS),
    "versions": {"gr4ad_jax": __version__, "jax": jax.__version__, "flax": flax.__version__},
    "codebook_sizes": list(generator.codebook_sizes),
    "widths": list(config.widths),
    "precision": config.precision,
    "num_sids": tree.num_sids,
    "num_ads": len(ad_id_A),
    "ranking": {"value_exponent": config.value_exponent},
    "context": {name: list(array.shape[1:]) for name, array in arrays.items()},
    "floats": [name for name, x in arrays.items() if x.dtype.kind == "f"],
    "history": list(generator.history),
    "program_arrays": len(fixed),
    "below": {name: list(known[name].below) for name in arrays if name in known},
    "run": about,
  }
  if histories is not None:
    manifest["kinds"] = {name: known[name].kind for name in arrays}
    manifest["features"] = histories.features
  with atomic.new_folder(folder) as fresh:
    for name, program in programs.items():
      (fresh / name).write_bytes(program.serialize())
    np.savez(
      fresh / "arrays.npz", ads_start=index.ads_start, ads_A=index.ads_A,
      ad_id_A=ad_id_A.astype(str), **{f"program_{i:04d}": x for i, x in enumerate(fixed)},
      **(histories.arrays if histories is not None else {}),
    )
    np.savez(fresh / "sample.npz", **arrays)
    shutil.copy(artifact.__file__, fresh / "reader.py")
    for module in (raw_histories, shortlist, tastes, neighbours):  # which it imports
      shutil.copy(module.__file__, fresh)
    manifest["sha256"] = {
      name: artifact.digest(fresh / name) for name in (*programs, "arrays.npz", "sample.npz")
    }
    (fresh / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _shapes(arrays: dict[str, np.ndarray], rows: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """Of a context with so many requests: whole numbers are int32, others float32."""
  types = {"f": np.float32}
  return {
    name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), types.get(x.dtype.kind, np.int32))
    for name, x in arrays.items()
  }


def export_run(opened: Opened, out: Place) -> int:
  """Writes a trained run as a portable artifact; returns the bytes of its files.

  Raises:
    ValueError: `out` exists already.
  """
  example = to_example(opened.examples.sources["test"][0], 1)
  storage.require_free(out)
  with storage.new_folder(out) as copy:
    write_artifact(
      copy.path, opened.generator, opened.params, index=opened.index,
      ad_id_A=opened.logs.ads.ad_id, config=opened.search, bin_means=opened.bin_means,
      sample=opened.contexts.context([example]),
      about={"step": opened.step, "fingerprint": opened.fingerprint,
             "currency": opened.logs.currency, "config": dataclasses.asdict(opened.config)},
      histories=_histories(opened) if opened.generator.arrays else None,
    )
    return sum(file.stat().st_size for file in copy.path.iterdir())


def _histories(opened: Opened) -> Histories:
  contents, trending = opened.logs.contents, opened.examples.trending
  arrays = {
    "ad_code_AL": opened.sids.codes_AL, "content_id_O": contents.content_id.astype(str),
    "content_code_OL": opened.sids.content_codes_OL, "content_ad_O": contents.ad,
    "max_met_ads": np.array(opened.examples.config.max_met_ads),
    **{f"ad_{name}": array for name, array in ad_facts(opened.logs.ads)._asdict().items()},
    **opened.history_tables,
  }
  if trending is not None:
    arrays |= {f"trending_{name}": x for name, x in arrays_of(trending).items()}
  features: dict[str, tuple[int, list[str]]] = {}
  known = opened.examples.features
  for place, (name, values) in enumerate([*known.user.items(), *known.request.items()]):
    features.setdefault(name, (place, values))  # of two with one name it is the user's
  return Histories(arrays, features)
