"""RQ-VAE, and RQ-Kmeans+: learned residual quantisation with a neural encoder and decoder.

An encoder maps a row x to a latent z, every level takes the code nearest to what is left of z, and
a decoder maps the sum q of the chosen code vectors back:

  r_0 = z,  c_l = argmin_k |r_{l-1} - e_{l,k}|^2,  r_l = r_{l-1} - e_{l,c_l},  q = sum_l e_{l,c_l}
  loss = |x - dec(z + sg(q - z))|^2 + sum_l |sg(r_{l-1}) - e_l|^2 + beta |r_{l-1} - sg(e_l)|^2

The code vectors of earlier levels are constants inside the terms of later ones. Rows are measured
from `center` in units of `scale`, so that no setting depends on the size of the embeddings.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gr4ad_jax.config import Count, NotNegative, ShareBelowOne
from gr4ad_jax.embedding.rows import check_embeddings
from gr4ad_jax.tokenizer import autoencoder, residual_kmeans
from gr4ad_jax.tokenizer.autoencoder import Arrays, Objective, TrainingConfig
from gr4ad_jax.tokenizer.groups import check_mesh, map_groups
from gr4ad_jax.tokenizer.kmeans_programs import squared_distance
from gr4ad_jax.tokenizer.residual_kmeans import KMeansConfig
from gr4ad_jax.training.resume import ResumeFile, Upkeep

INIT_POINTS_PER_CODE = 16  # rows whose latents start the codebooks of RQ-VAE
LAST_RESTART = 0.8  # share of the steps after which no code restarts, so that all are trained


@dataclass(frozen=True)
class _QuantizerConfig(TrainingConfig):
  """Settings of RQ-VAE's loss.

  Attributes:
    beta: weight of the commitment of the encoder to its codes.
    restart_below: a code restarts from a residual of the batch when its use falls below this share
      of even use (1 / V_l); 0 restarts none.
    usage_decay: of the running mean of the use, per step.
  """

  beta: NotNegative = 0.25
  restart_below: ShareBelowOne = 0.1
  usage_decay: ShareBelowOne = 0.99


@dataclass(frozen=True)
class RqVaeConfig(_QuantizerConfig):
  """RQ-VAE; the attributes of TrainingConfig, beta, restart_below, usage_decay, and these.

  Attributes:
    hidden_widths: of the encoder; the decoder has them in reverse.
    latent_width: of z and the code vectors.
  """

  learning_rate: float = 3e-3
  hidden_widths: tuple[Count, ...] = (512, 256)
  latent_width: Count = 64


@dataclass(frozen=True)
class RqKmeansPlusConfig(_QuantizerConfig):
  """RQ-Kmeans+; the attributes of TrainingConfig, beta, restart_below, usage_decay, and these.

  Attributes:
    hidden_factor: hidden units of encoder and decoder per column of the embeddings.
    kmeans_iterations: iterations of RQ-Kmeans a level.
  """

  num_steps: int = 500
  batch_size: int = 512
  learning_rate: float = 1e-3
  restart_below: float = 0.0  # its cure of dead codes is the start from k-means
  hidden_factor: Count = 4
  kmeans_iterations: Count = 20


def fit(
  embedding_ND: np.ndarray, codebook_sizes: Sequence[int], config: RqVaeConfig = RqVaeConfig(), *,
  seed: int = 0, mesh: Mesh | None = None, resume: ResumeFile | None = None,
  progress: Callable | None = None,
) -> Arrays:
  """Trains an RQ-VAE; its codebooks start as k-means of the untrained encoder's latents.

  Arguments, result and errors: see `quantizers.Quantizer`.

  Source: RQ-VAE (arXiv 2203.01941), as used for semantic IDs with this start in TIGER
    (arXiv 2305.05065); restarts as in Jukebox (arXiv 2005.00341).
  """
  check_embeddings(embedding_ND, codebook_sizes)
  mesh, upkeep = check_mesh(mesh), Upkeep(resume, progress, "RQ-VAE")
  rng = np.random.default_rng(seed)
  widths = (embedding_ND.shape[1], *config.hidden_widths, config.latent_width)
  params = autoencoder.init_coders(rng, widths)
  constants = autoencoder.center_and_scale(embedding_ND) | {"residual": np.array(False)}
  if upkeep.saved() is None:
    row_M = rng.permutation(len(embedding_ND))[: INIT_POINTS_PER_CODE * max(codebook_sizes)]
    program = functools.partial(_latent, constants | params, residual=False, mesh=mesh)
    latent_MW = autoencoder.map_rows(program, embedding_ND, row_M, mesh)
    kmeans = KMeansConfig(balance_epsilon=math.inf)
    params |= _codebooks_of(
      residual_kmeans.fit(latent_MW, codebook_sizes, kmeans, seed=seed, mesh=mesh)
    )
  else:
    params |= _codebook_shapes(codebook_sizes, config.latent_width)
  objective = _objective(constants, codebook_sizes, config, decoder_only_steps=0)
  return constants | autoencoder.train(
    objective, params, embedding_ND, config, seed=seed, mesh=mesh, upkeep=upkeep
  )


def fit_plus(
  embedding_ND: np.ndarray, codebook_sizes: Sequence[int],
  config: RqKmeansPlusConfig = RqKmeansPlusConfig(), *,
  seed: int = 0, mesh: Mesh | None = None, resume: ResumeFile | None = None,
  progress: Callable | None = None,
) -> Arrays:
  """Trains RQ-Kmeans+: codebooks of plain RQ-Kmeans, tuned with RQ-VAE's loss.

  The encoder is z = x + mlp(x) with a last layer of zeros, so that the codes of zero steps are
  those of RQ-Kmeans. The decoder trains alone for the first epoch (a quarter of the steps at most),
  so that its random start does not pull the encoder.

  Arguments, result and errors: see `quantizers.Quantizer`.

  Source: GPR (arXiv 2511.10138) 2.1; zero start, widths and first epoch are our choices.
  """
  check_embeddings(embedding_ND, codebook_sizes)
  mesh, upkeep = check_mesh(mesh), Upkeep(resume, progress, "RQ-Kmeans+")
  N, width = embedding_ND.shape
  scale = autoencoder.center_and_scale(embedding_ND)["scale"]
  # No center: rows are only divided by a power of two, which changes no bit of their ranking.
  constants = {
    "center": np.zeros(width, np.float32), "scale": scale, "residual": np.array(True)
  }
  widths = (width, config.hidden_factor * width, width)
  params = autoencoder.init_coders(np.random.default_rng(seed), widths)
  params["encoder_kernel_1"] = np.zeros_like(params["encoder_kernel_1"])
  if upkeep.saved() is None:
    kmeans = KMeansConfig(config.kmeans_iterations, math.inf)
    codebooks = _codebooks_of(residual_kmeans.fit(
      embedding_ND, codebook_sizes, kmeans, seed=seed, mesh=mesh, resume=resume, progress=progress
    ))
    params |= {name: codebook_VD / scale for name, codebook_VD in codebooks.items()}
  else:
    params |= _codebook_shapes(codebook_sizes, width)
  epoch = math.ceil(N / min(config.batch_size, N))
  objective = _objective(
    constants, codebook_sizes, config, decoder_only_steps=min(epoch, config.num_steps // 4)
  )
  return constants | autoencoder.train(
    objective, params, embedding_ND, config, seed=seed, mesh=mesh, upkeep=upkeep
  )


def encode(arrays: Arrays, embedding_ND: np.ndarray, *, mesh: Mesh | None = None) -> np.ndarray:
  """Codes of rows, of either fit; ties go to the lower code.

  Arguments, result and errors: see `quantizers.Quantizer`.
  """
  check_embeddings(embedding_ND, width=len(arrays["center"]))
  mesh = check_mesh(mesh)
  latents = functools.partial(_latent, dict(arrays), residual=bool(arrays["residual"]), mesh=mesh)
  codebooks = {f"centroids_{level}": book for level, book in enumerate(_codebooks(arrays))}

  def codes_of(row_M):
    latent_MW = autoencoder.map_rows(latents, embedding_ND, row_M, mesh)
    return residual_kmeans.encode(codebooks, latent_MW, mesh=mesh)

  return autoencoder.encode_rows(codes_of, embedding_ND)


def decode(arrays: Arrays, code_NL: np.ndarray) -> np.ndarray:
  """Rows that the decoder makes of codes; of the first levels only, it sees a part of their sum.

  Arguments, result and errors: see `quantizers.Quantizer`.
  """
  sizes = [len(codebook_VW) for codebook_VW in _codebooks(arrays)]
  return autoencoder.decode_rows(functools.partial(_decoded, dict(arrays)), code_NL, sizes)


def _codebooks_of(centroids: Arrays) -> Arrays:
  return {name.replace("centroids", "codebook"): array for name, array in centroids.items()}


def _codebook_shapes(sizes: Sequence[int], width: int) -> Arrays:
  """Codebooks of zeros, for what a resumed fit is about to read from its file."""
  return {
    f"codebook_{level}": np.zeros((size, width), np.float32) for level, size in enumerate(sizes)
  }


def _codebooks(arrays):
  levels = sum(name.startswith("codebook_") for name in arrays)
  return [arrays[f"codebook_{level}"] for level in range(levels)]


def _encoder(arrays, x_BD, residual):
  h_BD = autoencoder.in_units(arrays, x_BD)
  z_BW = autoencoder.apply_mlp(arrays, "encoder", h_BD)
  return h_BD + z_BW if residual else z_BW


@functools.partial(jax.jit, static_argnames=("residual", "mesh"))
def _latent(arrays, x_KBD, *, residual, mesh):
  with jax.default_matmul_precision("float32"):
    return map_groups(
      lambda arrays, x_BD: _encoder(arrays, x_BD, residual), arrays, x_KBD, mesh
    )


@jax.jit
def _decoded(arrays, code_KBL):
  books = _codebooks(arrays)[: code_KBL.shape[-1]]
  q_KBW = sum(book_VW[code_KBL[..., level]] for level, book_VW in enumerate(books))
  return autoencoder.decoded(arrays, q_KBW)


def _objective(
  constants: Arrays, codebook_sizes: Sequence[int], config: _QuantizerConfig,
  decoder_only_steps: int,
) -> Objective:
  """The loss of the module; after every step, codes that are out of use restart.

  Encoder and codebooks stand still for the `decoder_only_steps`.
  """
  residual = bool(constants["residual"])

  def loss(params, x_BD, key):
    arrays = constants | params
    h_BD = autoencoder.in_units(constants, x_BD)
    z_BW = _encoder(arrays, x_BD, residual)
    residual_LBW, count_LV, loss_B = [], [], 0.0
    r_BW = z_BW
    for codebook_VW in _codebooks(params):
      distance_BV = squared_distance(r_BW, codebook_VW)
      code_B = jax.lax.stop_gradient(distance_BV).argmin(-1)
      e_BW = codebook_VW[code_B]
      loss_B += jnp.square(jax.lax.stop_gradient(r_BW) - e_BW).sum(-1)
      loss_B += config.beta * jnp.square(r_BW - jax.lax.stop_gradient(e_BW)).sum(-1)
      residual_LBW.append(r_BW)
      count_LV.append(jnp.bincount(code_B, length=len(codebook_VW)))
      r_BW = r_BW - jax.lax.stop_gradient(e_BW)
    straight_BW = z_BW - jax.lax.stop_gradient(r_BW)  # q, with the gradient of z
    loss_B += jnp.square(h_BD - autoencoder.apply_mlp(params, "decoder", straight_BW)).sum(-1)
    return loss_B.mean(), (jax.lax.stop_gradient(jnp.stack(residual_LBW)), count_LV)

  def restart(params, usage_LV, aux, step):
    residual_GLBW, count_LGV = aux
    params, new_usage = dict(params), []
    for level, usage_V in enumerate(usage_LV):
      residual_NW = residual_GLBW[:, level].reshape(-1, residual_GLBW.shape[-1])
      N, V, name = len(residual_NW), len(usage_V), f"codebook_{level}"
      use_V = count_LGV[level].sum(0) * (V / N)  # even use is 1
      usage_V = config.usage_decay * usage_V + (1 - config.usage_decay) * use_V
      dead_V = (usage_V < config.restart_below) & (step < LAST_RESTART * config.num_steps)
      # Rows of a batch are in random order; levels begin at different ones.
      row_V = (jnp.cumsum(dead_V) - 1 + level * N // len(usage_LV)) % N
      params[name] = jnp.where(dead_V[:, None], residual_NW[row_V], params[name])
      new_usage.append(jnp.where(dead_V, 1.0, usage_V))
    return params, new_usage

  optimizers = {
    "decoder": autoencoder.adamw(config),
    "encoder": autoencoder.adamw(config, decoder_only_steps),
    "codebook": optax.adam(autoencoder.learning_rate(config, decoder_only_steps)),
  }
  return Objective(
    loss,
    optax.multi_transform(
      optimizers, lambda params: {name: name.split("_")[0] for name in params}
    ),
    after_step=restart if config.restart_below else None,
    extra=[np.ones(size, np.float32) for size in codebook_sizes],
  )
