"""Beam search over SID levels, constrained to existing SIDs, compiled as lax.scan.

The model enters as two functions, so the search knows nothing of any decoder. Levels of equal
width run as one `lax.scan`; where the schedule changes width a level stands alone, so that narrow
levels never pay for wide ones. Source: paper 4.2; reference 2.5 and 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from gr4ad_jax.search.legal_prefixes import LegalPrefixes, PrefixTree

NEG_INF = -1e30


class StartFn(Protocol):
  """Begins a request: what beams share, the state of one beam, log p(s_1 | X) [B, 1, V_1]."""

  def __call__(self, context: Any) -> tuple[Any, Any, jax.Array]: ...


class StepFn(Protocol):
  """Extends beams by one level: the new state and log p(s_level | beam, X) [B, W, V]."""

  def __call__(
    self, shared: Any, state: Any, code_BW: jax.Array, level: int | jax.Array
  ) -> tuple[Any, jax.Array]: ...


class Beams(NamedTuple):
  """Found SIDs, best first. A beam that could not be filled has NEG_INF, codes and row -1."""

  code_BWL: jax.Array  # int32
  logp_BW: jax.Array  # float32, log p(SID | X)
  sid_BW: jax.Array  # int32, row in the sorted SID table
  expected_value_BW: jax.Array | None  # float32, sum_b p(bucket b | SID, X) * mean value of b


class _Carry(NamedTuple):
  state: Any
  code_BW: jax.Array  # codes chosen last
  node_BW: jax.Array
  score_BW: jax.Array
  path_BWL: jax.Array


def beam_search(
  context: Any,
  prefixes: LegalPrefixes,
  *,
  tree: PrefixTree,
  widths: tuple[int, ...],
  start: StartFn,
  step: StepFn,
  bin_value_V: jax.Array | None = None,
) -> Beams:
  """The `widths[-1]` most probable SIDs found by keeping `widths[l]` prefixes after level l.

  With widths of at least the number of prefixes of each level the search is exhaustive. Ties go to
  the better parent beam, then to the smaller code.

  Args:
    context: passed to `start`.
    prefixes: arrays of the tree (an argument, so that they can change without recompilation).
    tree: its static facts.
    widths: beams after each level; cut to the number of prefixes that can exist there.
    start: first level of the model.
    step: every further level; level L (a Python int) asks for the value buckets.
    bin_value_V: mean value of each bucket; None skips the value step.

  Raises:
    ValueError: not one width per level.
  """
  num_levels = len(tree.branching_L)
  if len(widths) != num_levels:
    raise ValueError(f"search.widths={widths}: the SIDs have {num_levels} levels, one width each")
  widths = _possible_widths(widths, tree)
  shared, state, logp_B1V = start(context)
  num_rows = logp_B1V.shape[0]
  root = _Carry(
    state,
    jnp.zeros((num_rows, 1), jnp.int32),
    jnp.zeros((num_rows, 1), jnp.int32),
    jnp.zeros((num_rows, 1), jnp.float32),
    jnp.full((num_rows, 1, num_levels), -1, jnp.int32),
  )
  carry = _select(root, logp_B1V, prefixes, 0, tree.branching_L[0], widths[0])

  level = 1
  while level < num_levels:
    end = level
    while end < num_levels and widths[end] == widths[level - 1]:
      end += 1
    if end - level >= 2:  # a run of equal widths is one scan
      carry = _scan_levels(carry, shared, prefixes, tree, step, level, end)
      level = end
    else:
      state, logp_BWV = step(shared, carry.state, carry.code_BW, level)
      carry = carry._replace(state=state)
      carry = _select(carry, logp_BWV, prefixes, level, tree.branching_L[level], widths[level])
      level += 1

  filled_BW = carry.score_BW > NEG_INF / 2
  expected_BW = None
  if bin_value_V is not None:
    _, bin_logp_BWV = step(shared, carry.state, carry.code_BW, num_levels)
    expected_BW = jnp.where(filled_BW, jnp.exp(bin_logp_BWV) @ bin_value_V, 0.0)
  return Beams(
    jnp.where(filled_BW[..., None], carry.path_BWL, -1),
    jnp.where(filled_BW, carry.score_BW, NEG_INF),
    jnp.where(filled_BW, carry.node_BW, -1),
    expected_BW,
  )


def compile_search(
  start: Callable[..., Any],
  step: Callable[..., Any],
  tree: PrefixTree,
  widths: tuple[int, ...],
) -> Callable[..., Beams]:
  """One compiled program: (params, context, prefixes, bin_value_V or None) -> Beams.

  Args:
    start: (params, context) -> as StartFn.
    step: (params, shared, state, code_BW, level) -> as StepFn.
    tree: the prefixes that will be searched.
    widths: beams after each level.
  """

  @jax.jit
  def search(params, context, prefixes: LegalPrefixes, bin_value_V=None) -> Beams:
    return beam_search(
      context, prefixes, tree=tree, widths=widths, bin_value_V=bin_value_V,
      start=lambda c: start(params, c),
      step=lambda shared, state, code, level: step(params, shared, state, code, level),
    )

  return search


def _possible_widths(widths: tuple[int, ...], tree: PrefixTree) -> tuple[int, ...]:
  """No level can fill more beams than its parents have children, nor than there are SIDs."""
  possible, parents = [], 1
  for width, branching in zip(widths, tree.branching_L, strict=True):
    parents = min(width, parents * branching, tree.num_sids)
    possible.append(parents)
  return tuple(possible)


def _scan_levels(carry, shared, prefixes, tree, step, level: int, end: int):
  """Levels [level, end) at one width: a single scan, its body compiled once."""
  width = carry.code_BW.shape[1]
  branching = max(tree.branching_L[level:end])

  def body(carry: _Carry, level: jax.Array) -> tuple[_Carry, None]:
    state, logp_BWV = step(shared, carry.state, carry.code_BW, level)
    return _select(carry._replace(state=state), logp_BWV, prefixes, level, branching, width), None

  return jax.lax.scan(body, carry, jnp.arange(level, end))[0]


def _select(
  carry: _Carry,
  logp_BWV: jax.Array,
  prefixes: LegalPrefixes,
  level: int | jax.Array,
  branching: int,
  width: int,
) -> _Carry:
  """Keeps the `width` best legal extensions of all beams and gathers what they carry."""
  start_N, code_N = prefixes.start_LN[level], prefixes.code_LN[level]
  first_BW, last_BW = start_N[carry.node_BW], start_N[carry.node_BW + 1]
  child_BWM = first_BW[..., None] + jnp.arange(branching)
  legal_BWM = child_BWM < last_BW[..., None]
  child_BWM = jnp.minimum(child_BWM, code_N.shape[0] - 1)
  code_BWM = code_N[child_BWM]
  logp_BWM = jnp.take_along_axis(logp_BWV, jnp.where(legal_BWM, code_BWM, 0), axis=-1)
  score_BWM = jnp.where(legal_BWM, carry.score_BW[..., None] + logp_BWM, NEG_INF)

  num_rows = score_BWM.shape[0]
  score_BW, flat_BW = jax.lax.top_k(score_BWM.reshape(num_rows, -1), width)
  parent_BW = flat_BW // branching

  def pick(x_BWM: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BWM.reshape(num_rows, -1), flat_BW, axis=1)

  def gather(x: jax.Array) -> jax.Array:
    return jax.vmap(lambda row_W, parent_W: row_W[parent_W])(x, parent_BW)

  code_BW = pick(code_BWM)
  path_BWL = gather(carry.path_BWL).at[:, :, level].set(code_BW)
  # A dead beam keeps a finite floor, so that sums of NEG_INF never overflow.
  score_BW = jnp.maximum(score_BW, NEG_INF)
  return _Carry(jax.tree.map(gather, carry.state), code_BW, pick(child_BWM), score_BW, path_BWL)
