"""Counts who engaged with which ad, and makes the vectors of `tastes.py` of it.

Latent semantic analysis: singular vectors of the users' log counts, rare ads weighing more. A table
holds what was before it was made, so that no request finds its own targets in it, nor later ones.

Letters: C counts, D tables, A ads, E numbers of a vector, U users.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from sklearn.utils.extmath import randomized_svd

from gr4ad_jax.data.engagements import product_engagements
from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.tastes import Tastes

NUM_TABLES = 8
WIDTH = 32
LEAST_USERS = 3  # of an ad that is known
MOST_USERS = 200_000  # more do not tell better which ads go together


class UserCounts(NamedTuple):
  """How often users engaged with ads, wide rule, by the first table that counts it."""

  table_C: np.ndarray  # int8
  user_C: np.ndarray  # int32
  ad_C: np.ndarray  # int32
  count_C: np.ndarray  # int32


def table_times(first_s: int, last_s: int) -> np.ndarray:
  """int64 [D], when tables are made: evenly over a log, the last one at its end; unix seconds."""
  return first_s + np.arange(1, NUM_TABLES + 1) * (last_s + 1 - first_s) // NUM_TABLES


def count_users(logs: Logs, made_s_D: np.ndarray, *, first_user: int, every: int) -> UserCounts:
  """Counts a part of a log, of the users whose number is a multiple of `every`."""
  event_N, ad_N = product_engagements(logs)
  user_N = logs.events.user[event_N] + first_user
  table_N = np.searchsorted(made_s_D, logs.events.time_s[event_N], side="right")
  chosen_N = user_N % every == 0
  rows = np.stack([table_N, user_N, ad_N])[:, chosen_N]
  (table_C, user_C, ad_C), count_C = np.unique(rows, axis=1, return_counts=True)
  return UserCounts(
    table_C.astype(np.int8), user_C.astype(np.int32), ad_C.astype(np.int32),
    count_C.astype(np.int32),
  )


def make_tastes(parts: Sequence[UserCounts], made_s_D: np.ndarray, num_ads: int) -> Tastes:
  """The tables of all parts, which hold different users."""
  table_C, user_C, ad_C, count_C = (np.concatenate(column) for column in zip(*parts, strict=True))
  vector_DAE = np.zeros((len(made_s_D), num_ads, WIDTH), np.float16)
  weight_DA = np.zeros((len(made_s_D), num_ads), np.float32)
  for table in range(len(made_s_D)):
    rows = table_C <= table
    user_N, ad_N, count_N = user_C[rows], ad_C[rows], count_C[rows]
    users, row_N = np.unique(user_N, return_inverse=True)
    count_UA = sp.csr_matrix((count_N, (row_N, ad_N)), (len(users), num_ads), dtype=np.float32)
    users_A = np.bincount(count_UA.indices, minlength=num_ads)
    weight_A = np.log(len(users) / np.maximum(users_A, 1)) if len(users) else np.zeros(num_ads)
    weight_A[users_A < LEAST_USERS] = 0
    log_UA = count_UA.log1p().multiply(weight_A[None].astype(np.float32)).tocsr()
    width = min(WIDTH, *log_UA.shape)
    if width and log_UA.count_nonzero():
      _, size_E, vector_EA = randomized_svd(log_UA, width, n_iter=4, random_state=0)
      # Between all directions alike, and cosines of what users took, which is mostly the same.
      vector_AE = vector_EA.T * np.sqrt(size_E)
      vector_AE[weight_A == 0] = 0
      vector_AE /= np.maximum(np.linalg.norm(vector_AE, axis=1, keepdims=True), 1e-9)
      vector_DAE[table, :, :width] = vector_AE
    weight_DA[table] = weight_A
  return Tastes(made_s_D, vector_DAE, weight_DA)


def save_tastes(tastes: Tastes, path: Path) -> None:
  """Writes one .npz file."""
  np.savez_compressed(path, **tastes._asdict())


def load_tastes(path: Path) -> Tastes:
  """Reads what `save_tastes` wrote."""
  with path.open("rb") as file, np.load(file) as arrays:
    return Tastes(*(arrays[name] for name in Tastes._fields))
