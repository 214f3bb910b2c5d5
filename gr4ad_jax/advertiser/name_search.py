"""The most probable advertisers of a row, by a search in the tree of names.

Dimension key beyond docs/architecture.md: `B` rows, `S` tokens of what is known, `J` branches that
a round follows in each row, `P` tokens of a path, `T` = J x P, `V` tokens that lead on in the tree.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.advertiser.llama import Llama, Past, causal
from gr4ad_jax.advertiser.name_tree import NameTree

FOLLOWED = 8  # branches of a row in one round
_LENGTHS = 64  # what is known is padded to a multiple of it


class Told(NamedTuple):
  """The first names of R rows.

  Attributes:
    advertiser_RK: int32, most probable first; -1 = there are no more.
    logp_RK: float32, among all names; -inf where there is none.
  """

  advertiser_RK: np.ndarray
  logp_RK: np.ndarray


@functools.lru_cache(maxsize=4)
def _programs(llama: Llama):
  """The two programs of a search; each is compiled once a shape."""

  @jax.jit
  def known(variables: Any, token_BS: jax.Array, real_BS: jax.Array) -> Past:
    """Keys and values of what is known."""
    position_BS = jnp.broadcast_to(jnp.arange(token_BS.shape[1])[None], token_BS.shape)
    allow_BSS = causal(jnp.where(real_BS, 0, -1))
    return llama.apply(variables, token_BS, position_BT=position_BS, allow_BTS=allow_BSS).past

  @jax.jit
  def follow(variables, past, real_BS, path_BJP, length_BJ, token_V) -> jax.Array:
    """Logits [B, J, V] behind each path; paths see what is known, and not each other."""
    B, J, P = path_BJP.shape
    segment_T = jnp.repeat(jnp.arange(J), P)
    position_BT = real_BS.sum(axis=1)[:, None] + jnp.tile(jnp.arange(P), J)[None]
    own_BTT = jnp.broadcast_to(causal(segment_T[None]), (B, J * P, J * P))
    seen_BTS = jnp.broadcast_to(real_BS[:, None], (B, J * P, real_BS.shape[1]))
    read = llama.apply(
      variables, path_BJP.reshape(B, J * P), position_BT=position_BT,
      allow_BTS=jnp.concatenate([seen_BTS, own_BTT], axis=2), past=past,
    )
    last_BJ1D = jnp.take_along_axis(
      read.state_BTD.reshape(B, J, P, -1), (length_BJ - 1)[..., None, None], axis=2
    )
    state_ND = last_BJ1D.reshape(B * J, -1)
    return llama.apply(variables, state_ND, token_V, method=Llama.logits).reshape(B, J, -1)

  return known, follow


def tell(
  llama: Llama, variables: Any, known: Sequence[Sequence[int]], tree: NameTree, *, most: int
) -> Told:
  """The `most` most probable names of each row, exactly.

  A name's log p is the sum, over the branches on its way, of log p of the token that leads on,
  renormalised over the tokens that lead anywhere: tokens that are forced cost nothing. Branches are
  followed best first, and a row is done when no open branch is as probable as its last name. No
  name can be more probable than a branch on its way, so that none is missed.

  What is known goes through the model once; its keys and values stay for all rounds.

  Args:
    llama: the decoder.
    variables: its parameters.
    known: B rows of tokens before the name, none of them empty.
    tree: of all names.
    most: K.
  """
  read_known, follow = _programs(llama)
  length = max(len(tokens) for tokens in known) - 1
  token_BS = np.zeros((len(known), max(1, -(-length // _LENGTHS)) * _LENGTHS), np.int32)
  real_BS = np.zeros(token_BS.shape, bool)
  for b, tokens in enumerate(known):
    # The last one stands before each path, so that the root's path is not empty.
    token_BS[b, : len(tokens) - 1] = tokens[:-1]
    real_BS[b, : len(tokens) - 1] = True
  past = read_known(variables, token_BS, real_BS)
  rows = [_Row(tokens[-1], tree, most) for tokens in known]
  while any(asked := [row.next() for row in rows]):
    branches = max(map(len, asked))
    branches = 1 if branches == 1 else FOLLOWED
    longest = max(len(tree.branches[b].path) for of_row in asked for b in of_row) + 1
    path_BJP = np.zeros((len(rows), branches, 1 << (longest - 1).bit_length()), np.int32)
    length_BJ = np.ones(path_BJP.shape[:2], np.int32)
    for b, of_row in enumerate(asked):
      for j, number in enumerate(of_row):
        path = (rows[b].last, *tree.branches[number].path)
        path_BJP[b, j, : len(path)], length_BJ[b, j] = path, len(path)
    logit_BJV = np.asarray(
      follow(variables, past, real_BS, path_BJP, length_BJ, tree.token_V), np.float64
    )
    for row, of_row, logit_JV in zip(rows, asked, logit_BJV, strict=True):
      for number, logit_V in zip(of_row, logit_JV, strict=False):
        row.take(number, logit_V)
  return Told(
    np.array([[n for _, n in row.names()] for row in rows], np.int32),
    np.array([[logp for logp, _ in row.names()] for row in rows], np.float32),
  )


class _Row:
  """The search of one row: names found, and branches that may still hold better ones."""

  def __init__(self, last: int, tree: NameTree, most: int):
    self.last, self._tree, self._most = last, tree, most
    self._open = [(0.0, 0)]  # (-log p, branch): a heap
    self._logp = {0: 0.0}
    self._found: list[tuple[float, int]] = []  # (log p, -name): a heap of the best `most`

  def next(self) -> list[int]:
    """The open branches to follow now; none where no better name is left."""
    asked = []
    while self._open and len(asked) < FOLLOWED:
      cost, branch = self._open[0]
      if len(self._found) == self._most and -cost < self._found[0][0]:
        break
      asked.append(branch)
      heapq.heappop(self._open)
    return asked

  def take(self, number: int, logit_V: np.ndarray) -> None:
    """What leads on from a branch, and how probable it is."""
    branch = self._tree.branches[number]
    logit_C = logit_V[np.searchsorted(self._tree.token_V, branch.token_C)]
    most = logit_C.max()
    logp_C = self._logp.pop(number) + logit_C - most - np.log(np.exp(logit_C - most).sum())
    for logp, leads in zip(logp_C.tolist(), branch.leads_C.tolist(), strict=True):
      if leads < 0:
        self._logp[-1 - leads] = logp
        heapq.heappush(self._open, (-logp, -1 - leads))
      elif len(self._found) < self._most:
        heapq.heappush(self._found, (logp, -leads))
      else:
        heapq.heappushpop(self._found, (logp, -leads))

  def names(self) -> list[tuple[float, int]]:
    """(log p, name), best first, equal ones by number; filled up with -1."""
    found = [(logp, -name) for logp, name in sorted(self._found, reverse=True)]
    return found + [(-np.inf, -1)] * (self._most - len(found))
