"""The quantizers behind one signature: embeddings -> arrays -> codes, and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from gr4ad_jax.tokenizer import fsq, residual_kmeans, rq_vae
from gr4ad_jax.tokenizer.config import METHODS, Method
from gr4ad_jax.tokenizer.residual_kmeans import KMeansConfig


class Quantizer(NamedTuple):
  """Three plain functions; what a fit has learned is a flat dict of numpy arrays.

  All of them are deterministic, and give the same on any mesh whose data axis divides 8.
  """

  fit: Callable
  """(embedding_ND, codebook_sizes, *, seed=0, mesh=None, resume=None, progress=None) -> arrays.

  Args:
    embedding_ND: [N, D] float32, finite.
    codebook_sizes: codes V_l of each level.
    seed: of all draws; the same seed gives the same arrays.
    mesh: rows are spread over its axis `data`; None = one device.
    resume: where the state of an interrupted fit of the same input is kept; the caller removes it.
      None keeps nothing.
    progress: called as `progress(steps, description=, total=, completed=)`; None shows nothing.

  Returns:
    What `encode` and `decode` need, under flat names.

  Raises:
    ValueError: embeddings, sizes or mesh that do not fit.
  """
  encode: Callable
  """(arrays, embedding_ND, *, mesh=None) -> code_NL, int32; equal rows get equal codes.

  Raises:
    ValueError: embeddings of another width, or with a value that is not finite; mesh.
  """
  decode: Callable
  """(arrays, code_NL) -> what the codes stand for, float32 [N, D].

  `code_NL` holds the first 1 to L codes of each row.

  Raises:
    ValueError: codes of another shape or out of range.
  """


def quantizer(
  method: Method, *, kmeans_iterations: int = 20, balance_epsilon: float = 1.0
) -> Quantizer:
  """The functions of a method.

  Args:
    method: balanced_kmeans and kmeans (residual k-means, with and without balance), rq_vae,
      rq_kmeans_plus (an RQ-VAE that starts as residual k-means), fsq (no codebooks).
    kmeans_iterations: a level (the k-means methods and the start of rq_kmeans_plus).
    balance_epsilon: see `KMeansConfig` (balanced_kmeans).

  Raises:
    ValueError: an unknown method, or an option out of range.
  """
  match method:
    case "balanced_kmeans" | "kmeans":
      epsilon = balance_epsilon if method == "balanced_kmeans" else math.inf
      config = KMeansConfig(kmeans_iterations, epsilon)
      fit = functools.partial(residual_kmeans.fit, config=config)
      return Quantizer(fit, residual_kmeans.encode, residual_kmeans.decode)
    case "rq_vae":
      return Quantizer(rq_vae.fit, rq_vae.encode, rq_vae.decode)
    case "rq_kmeans_plus":
      config = rq_vae.RqKmeansPlusConfig(kmeans_iterations=kmeans_iterations)
      fit = functools.partial(rq_vae.fit_plus, config=config)
      return Quantizer(fit, rq_vae.encode, rq_vae.decode)
    case "fsq":
      return Quantizer(fsq.fit, fsq.encode, fsq.decode)
  raise ValueError(f"quantizer: {method!r} is none of {', '.join(METHODS)}")
