"""What the search knows of a model: functions and sizes, never the module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.machine.sharding import Layouts

Among = Literal["codes", "children"]


class MayGet(Protocol):
  """SIDs -> whether each exists and its request may get it.

  int32 codes [B, N, L], or [1, N, L] of SIDs that all requests ask for; any numbers. Gives bool
  [B, N]; where no request asks for less than all, [1, N] of the latter.
  """

  def __call__(self, code_BNL: jax.Array) -> jax.Array: ...


def whatever(code_BNL: jax.Array) -> jax.Array:
  """The `MayGet` of a search that nobody restricts, of SIDs that exist where they are not -1."""
  return code_BNL[..., 0] >= 0


class AtPrecision(Protocol):
  """A number type -> the model that computes in it, and what makes its parameters.

  Raises ValueError for a number type that is unknown, or whose package is missing.
  """

  def __call__(self, precision: str) -> tuple[Generator, Callable[[Any], Any]]: ...


@dataclasses.dataclass(frozen=True)
class ContextArray:
  """What the numbers of a context's array are, for those who make contexts without the run.

  Attributes:
    kind: one of the kinds that `artifact.py` makes of a raw history.
    below: bounds along the last axis, or one for all; every number is smaller, and at least -1.
  """

  kind: str
  below: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ValueGuide:
  """Lets promising beams have more children than others. Source: GPR 2.3, which has no formula.

      k(b) = clip(ceil(most * promise_b), least, most)

  Attributes:
    least, most: children of a beam that may be kept, the most probable ones.
    promise: (params, state, code_BW, level) -> float32 [B, W] in 0..1 of the beams after so many
      codes, given the state that told the last one, and that one.
  """

  least: int
  most: int
  promise: Callable[[Any, Any, jax.Array, int | jax.Array], jax.Array]

  def limit(self, params: Any, state: Any, code_BW: jax.Array, level: int | jax.Array) -> jax.Array:
    """k(b), int32 [B, W]."""
    wanted_BW = jnp.ceil(self.most * self.promise(params, state, code_BW, level))
    return jnp.clip(wanted_BW, self.least, self.most).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Generator:
  """A model that writes semantic IDs level by level.

  A context is any pytree of arrays whose first axis counts requests.

  Attributes:
    start: (params, context, may_get) -> what beams share, the state of one beam, log p(s_1 | X)
      [B, 1, V_1]. A model that copies SIDs copies those that `may_get` leaves, see `MayGet`.
    step: (params, shared, state, code_BW, level) -> the new state, log p(s_level | beam, X)
      [B, W, V]; level L asks for the value buckets.
    codebook_sizes: codes of each level.
    history: names of the context's arrays that hold SIDs of the user's history, int32 [B, T, L].
    at_precision: the same model in another number type.
    encode: (params, context) -> what `start` computes of the context alone, to be timed by itself.
    layouts: how the parameters lie on a mesh.
    arrays: name of each array of a context -> what it holds; {} = nobody but the run makes them.
    among: what log-probabilities are of: all codes of a level; or, as the search makes them of
      these, the codes that lead on to an SID that exists and that its request may get.
    guide: how many children a beam may have by its value; None = all.
  """

  start: Callable[[Any, Any, MayGet], tuple[Any, Any, jax.Array]]
  step: Callable[[Any, Any, Any, jax.Array, int | jax.Array], tuple[Any, jax.Array]]
  codebook_sizes: tuple[int, ...]
  history: tuple[str, ...]
  at_precision: AtPrecision
  encode: Callable[[Any, Any], Any]
  layouts: Layouts = ()
  arrays: Mapping[str, ContextArray] = dataclasses.field(default_factory=dict)
  among: Among = "codes"
  guide: ValueGuide | None = None

  def met_codes(self, context: Any) -> np.ndarray:
    """int32 [R, T, L], the SIDs that the requests' histories show; -1 = padding."""
    arrays = named_arrays(context)
    return np.concatenate([arrays[name] for name in self.history], axis=1)


def named_arrays(context: Any) -> dict[str, np.ndarray]:
  """The arrays of a context by name, in its own order; a field that is None has none."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): array
    for path, array in jax.tree_util.tree_leaves_with_path(context)
  }


def num_requests(context: Any) -> int:
  """Rows of a context."""
  return len(jax.tree.leaves(context)[0])
