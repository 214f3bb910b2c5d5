"""Beam search over SID levels, constrained to existing SIDs, compiled as lax.scan.

The model enters as two functions, so the search knows nothing of any decoder. Levels of equal
width run as one `lax.scan`; where the schedule changes width a level stands alone, so that narrow
levels never pay for wide ones: padding 128-256-512 to one scan of 512 takes 1.7 to 1.9 times as
long (docs/decoding.md). Source: paper 4.2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.catalog.legal_prefixes import LegalPrefixes, PrefixTree, find_sids
from gr4ad_jax.catalog.subsets import AllowedSids, combine, count_before, holds
from gr4ad_jax.nn import NEG_INF
from gr4ad_jax.search.artifact import compiler_options
from gr4ad_jax.search.generator import Among, MayGet, ValueGuide


class StartFn(Protocol):
  """Begins a request: what beams share, the state of one beam, log p(s_1 | X) [B, 1, V_1]."""

  def __call__(self, context: Any, may_get: MayGet) -> tuple[Any, Any, jax.Array]: ...


class StepFn(Protocol):
  """Extends beams by one level: the new state and log p(s_level | beam, X) [B, W, V]."""

  def __call__(
    self, shared: Any, state: Any, code_BW: jax.Array, level: int | jax.Array
  ) -> tuple[Any, jax.Array]: ...


class Children(NamedTuple):
  """How many of its children each beam may keep, the most probable ones; see `ValueGuide`."""

  most: int  # of any beam
  limit: Callable[[Any, jax.Array, int | jax.Array], jax.Array]  # (state, code_BW, level) -> [B, W]


class TopK(Protocol):
  """The `width` best of [B, W, M]: scores and flat indices [B, width], best first.

  Ties go to the lower flat index.
  """

  def __call__(self, score_BWM: jax.Array, width: int) -> tuple[jax.Array, jax.Array]: ...


class Sampling(NamedTuple):
  """Asks for SIDs drawn without replacement instead of the most probable ones."""

  key: jax.Array  # of jax.random
  temperature: jax.Array | float = 1.0  # of the codes of every level; 1 = the model's own


class Beams(NamedTuple):
  """Found SIDs, best first. A beam that could not be filled has NEG_INF, codes and row -1."""

  code_BWL: jax.Array  # int32
  logp_BW: jax.Array  # float32, log p(SID | X)
  level_logp_BWL: jax.Array  # float32, log p(s_l | s_<l, X); sums to logp
  sid_BW: jax.Array  # int32, row in the sorted SID table
  expected_value_BW: jax.Array | None  # float32, sum_b p(bucket b | SID, X) * mean value of b
  perturbed_BW: jax.Array | None  # float32, what sampling ranked by; best first


class _Carry(NamedTuple):
  state: Any
  code_BW: jax.Array  # codes chosen last
  node_BW: jax.Array
  score_BW: jax.Array
  path_BWL: jax.Array
  level_BWL: jax.Array  # log-probs of the path's codes
  drawn: _Drawn | None


class _Rules(NamedTuple):
  """What is the same at every level of a search."""

  prefixes: LegalPrefixes
  allowed: AllowedSids | None
  sampling: Sampling | None
  top_k: TopK
  among: Among
  children: Children | None


class _Drawn(NamedTuple):
  """What stochastic beam search keeps of each beam."""

  logp_BW: jax.Array  # of the prefix in the distribution that is drawn from
  perturbed_BW: jax.Array  # the largest Gumbel-perturbed log-prob of any SID below it


# Twelve parameters: each is a different thing that a caller may want to choose.
def beam_search(
  context: Any,
  prefixes: LegalPrefixes,
  *,
  tree: PrefixTree,
  widths: tuple[int, ...],
  start: StartFn,
  step: StepFn,
  bin_value_V: jax.Array | None = None,
  allowed: AllowedSids | None = None,
  sampling: Sampling | None = None,
  top_k: TopK | None = None,
  among: Among = "codes",
  children: Children | None = None,
) -> Beams:
  """The `widths[-1]` most probable SIDs found by keeping `widths[l]` prefixes after level l.

  With widths of at least the number of prefixes of each level the search is exhaustive. Ties go to
  the better parent beam, then to the smaller code.

  Args:
    context: passed to `start`, with what each request may get.
    prefixes: arrays of the tree (an argument, so that they can change without recompilation).
    tree: its static facts.
    widths: beams after each level; cut to the number of prefixes that can exist there.
    start: first level of the model.
    step: every further level; level L (a Python int) asks for the value buckets.
    bin_value_V: mean value of each bucket; None skips the value step.
    allowed: the SIDs that each request may get; None = all.
    sampling: draws SIDs without replacement (stochastic beam search) instead.
    top_k: None = `platform_top_k`.
    among: see `Generator`.
    children: None = a beam may keep all of them.

  Raises:
    ValueError: not one width per level.
  """
  num_levels = len(tree.branching_L)
  if len(widths) != num_levels:
    raise ValueError(f"search.widths={widths}: the SIDs have {num_levels} levels, one width each")
  widths = _possible_widths(widths, tree, children)
  shared, state, logp_B1V = start(context, functools.partial(_may_get, prefixes, tree, allowed))
  num_rows = logp_B1V.shape[0]
  zero_B1 = jnp.zeros((num_rows, 1))
  root = _Carry(
    state,
    jnp.zeros((num_rows, 1), jnp.int32),
    jnp.zeros((num_rows, 1), jnp.int32),
    zero_B1,
    jnp.full((num_rows, 1, num_levels), -1, jnp.int32),
    jnp.zeros((num_rows, 1, num_levels)),
    None if sampling is None else _Drawn(zero_B1, zero_B1),
  )
  select = functools.partial(
    _select, _Rules(prefixes, allowed, sampling, top_k or platform_top_k, among, children)
  )
  carry = select(root, logp_B1V, 0, None, branching=tree.branching_L[0], width=widths[0])

  level = 1
  while level < num_levels:
    end = level
    while end < num_levels and widths[end] == widths[level - 1]:
      end += 1
    if end - level >= 2:  # a run of equal widths is one scan
      branching = max(tree.branching_L[level:end])
      scanned = functools.partial(select, branching=branching, width=widths[level])
      advance = functools.partial(_advance, shared, step, scanned, children)
      carry = jax.lax.scan(advance, carry, jnp.arange(level, end))[0]
      level = end
    else:
      single = functools.partial(select, branching=tree.branching_L[level], width=widths[level])
      carry, _ = _advance(shared, step, single, children, carry, level)
      level += 1

  filled_BW = carry.score_BW > NEG_INF / 2
  expected_BW = None
  if bin_value_V is not None:
    _, bin_logp_BWV = step(shared, carry.state, carry.code_BW, num_levels)
    expected_BW = jnp.where(filled_BW, jnp.exp(bin_logp_BWV) @ bin_value_V, 0.0)
  return Beams(
    jnp.where(filled_BW[..., None], carry.path_BWL, -1),
    jnp.where(filled_BW, carry.score_BW, NEG_INF),
    jnp.where(filled_BW[..., None], carry.level_BWL, NEG_INF),
    jnp.where(filled_BW, carry.node_BW, -1),
    expected_BW,
    None if carry.drawn is None else jnp.where(filled_BW, carry.drawn.perturbed_BW, NEG_INF),
  )


def search_function(
  start: Callable[..., Any], step: Callable[..., Any], tree: PrefixTree, widths: tuple[int, ...],
  among: Among = "codes", guide: ValueGuide | None = None,
) -> Callable[..., Beams]:
  """`beam_search` as a function of arrays alone; arguments and result as `compile_search`."""

  def search(
    params, context, prefixes: LegalPrefixes, bin_value_V=None, word_TU=None, subset_BN=None,
    sampling: Sampling | None = None,
  ) -> Beams:
    return beam_search(
      context, prefixes, tree=tree, widths=widths, bin_value_V=bin_value_V,
      allowed=None if word_TU is None else combine(word_TU, subset_BN),
      sampling=sampling, among=among,
      start=lambda context, may_get: start(params, context, may_get),
      step=lambda shared, state, code, level: step(params, shared, state, code, level),
      children=None if guide is None else Children(
        guide.most, functools.partial(guide.limit, params)
      ),
    )

  return search


def compile_search(
  start: Callable[..., Any], step: Callable[..., Any], tree: PrefixTree, widths: tuple[int, ...],
  among: Among = "codes", guide: ValueGuide | None = None,
) -> Callable[..., Beams]:
  """One program for every set of SIDs that `refill` puts into `tree`.

  Args:
    start: (params, context, may_get) -> as StartFn.
    step: (params, shared, state, code_BW, level) -> as StepFn.
    tree: the prefixes that will be searched.
    widths: beams after each level.
    among, guide: see `Generator`.

  Returns:
    (params, context, prefixes, bin_value_V, word_TU, subset_BN, sampling) -> Beams. Those after
    prefixes may be None or left out: value step, subsets of `subsets.py`, sampling.
  """
  return _compile_search(start, step, tree.branching_L, tree.capacity, widths, among, guide)


@functools.lru_cache(maxsize=32)
def _compile_search(
  start: Callable[..., Any], step: Callable[..., Any], branching_L: tuple[int, ...], capacity: int,
  widths: tuple[int, ...], among: Among, guide: ValueGuide | None,
) -> Callable[..., Beams]:
  """Of the tree's static facts alone, so that no arrays are kept."""
  nothing = LegalPrefixes(*[np.empty((0, 0), np.int32)] * 3)
  tree = PrefixTree(nothing, branching_L, capacity, 0)
  search = search_function(start, step, tree, widths, among, guide)
  return jax.jit(search, compiler_options=compiler_options())


def _may_get(
  prefixes: LegalPrefixes, tree: PrefixTree, allowed: AllowedSids | None, code_BNL: jax.Array
) -> jax.Array:
  """See `MayGet`; the first three arguments as `beam_search`."""
  row_BN = find_sids(tree._replace(arrays=prefixes), code_BNL)
  if allowed is None:
    return row_BN >= 0
  num_rows = allowed.word_BU.shape[0]
  row_BN = jnp.broadcast_to(row_BN, (num_rows, row_BN.shape[1]))
  return (row_BN >= 0) & holds(allowed, jnp.maximum(row_BN, 0))


def _possible_widths(
  widths: tuple[int, ...], tree: PrefixTree, children: Children | None
) -> tuple[int, ...]:
  """No level can fill more beams than its parents keep children, nor than there are SIDs."""
  possible, parents = [], 1
  for level, (width, branching) in enumerate(zip(widths, tree.branching_L, strict=True)):
    if children is not None and level:
      branching = min(branching, children.most)
    parents = min(width, parents * branching, tree.capacity)
    possible.append(parents)
  return tuple(possible)


def _advance(
  shared: Any, step: StepFn, select: Callable[..., _Carry], children: Children | None,
  carry: _Carry, level: int | jax.Array,
) -> tuple[_Carry, None]:
  """One level, as lax.scan calls it: what beams may keep, what the model says, what is kept."""
  limit_BW = None if children is None else children.limit(carry.state, carry.code_BW, level)
  state, logp_BWV = step(shared, carry.state, carry.code_BW, level)
  return select(carry._replace(state=state), logp_BWV, level, limit_BW), None


def global_top_k(score_BWM: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
  """One selection among all W x M. As TopK."""
  return tuple(jax.lax.top_k(score_BWM.reshape(score_BWM.shape[0], -1), width))


def pre_cut_top_k(score_BWM: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
  """The best of each beam first, then among those: no beam can win more than `width` times.

  Gives what `global_top_k` gives, ties included. Where a beam has no more than `width` extensions
  it is the same selection. Source: paper 4.2 (TopK pre-cut). As TopK. On CPU it loses: many small
  selections cost more than a large one (512 of 512 x 1,024, 8 requests: 268 ms, global 10 ms).
  """
  num_rows, _, extensions = score_BWM.shape
  if extensions <= width or score_BWM.shape[1] == 1:
    return global_top_k(score_BWM, width)
  best_BWK, index_BWK = jax.lax.top_k(score_BWM, width)
  score_BW, flat_BW = global_top_k(best_BWK, width)
  parent_BW = flat_BW // width
  index_BW = jnp.take_along_axis(index_BWK.reshape(num_rows, -1), flat_BW, axis=1)
  return score_BW, parent_BW * extensions + index_BW


def platform_top_k(score_BWM: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
  """The pre-cut on accelerators, one selection on CPU; the results are the same. As TopK."""
  return jax.lax.platform_dependent(
    score_BWM,
    cpu=functools.partial(global_top_k, width=width),
    default=functools.partial(pre_cut_top_k, width=width),
  )


def _select(
  rules: _Rules,
  carry: _Carry,
  logp_BWV: jax.Array,
  level: int | jax.Array,
  limit_BW: jax.Array | None,
  *,
  branching: int,
  width: int,
) -> _Carry:
  """Keeps the `width` best legal extensions of all beams and gathers what they carry."""
  prefixes, allowed, sampling, top_k, among, children = rules
  start_N, code_N = prefixes.start_LN[level], prefixes.code_LN[level]
  first_BW, last_BW = start_N[carry.node_BW], start_N[carry.node_BW + 1]
  child_BWM = first_BW[..., None] + jnp.arange(branching)[None, None]
  legal_BWM = child_BWM < last_BW[..., None]
  # A dead beam has no legal extension: its node is any node.
  legal_BWM &= carry.score_BW[..., None] > NEG_INF / 2
  child_BWM = jnp.minimum(child_BWM, code_N.shape[0] - 1)
  if allowed is not None:
    sid_N = prefixes.first_sid_LN[level]
    before_BWM, after_BWM = (count_before(allowed, sid_N[child_BWM + i]) for i in (0, 1))
    legal_BWM &= after_BWM > before_BWM
  code_BWM = code_N[child_BWM]
  logp_BWM = jnp.take_along_axis(logp_BWV, jnp.where(legal_BWM, code_BWM, 0), axis=-1)
  if among == "children":
    logp_BWM = jax.nn.log_softmax(jnp.where(legal_BWM, logp_BWM, NEG_INF), axis=-1)
  if children is not None and limit_BW is not None:
    branching = min(branching, children.most)
    at_BWM = jax.lax.top_k(jnp.where(legal_BWM, logp_BWM, NEG_INF), branching)[1]
    child_BWM, code_BWM, logp_BWM, legal_BWM = (
      jnp.take_along_axis(x, at_BWM, axis=-1) for x in (child_BWM, code_BWM, logp_BWM, legal_BWM)
    )
    legal_BWM &= jnp.arange(branching)[None, None] < limit_BW[..., None]
  score_BWM = jnp.where(legal_BWM, carry.score_BW[..., None] + logp_BWM, NEG_INF)

  num_rows, drawn = score_BWM.shape[0], None
  if sampling is None:
    score_BW, flat_BW = top_k(score_BWM, width)
  else:
    drawn_BWM = _draw(carry.drawn, logp_BWM, legal_BWM, sampling, level)
    _, flat_BW = top_k(drawn_BWM.perturbed_BW, width)
  parent_BW = flat_BW // branching

  def pick(x_BWM: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BWM.reshape(num_rows, -1), flat_BW, axis=1)

  def gather(x: jax.Array) -> jax.Array:
    return jax.vmap(lambda row_W, parent_W: row_W[parent_W])(x, parent_BW)

  if sampling is not None:
    score_BW, drawn = pick(score_BWM), jax.tree.map(pick, drawn_BWM)
  code_BW = pick(code_BWM)
  return _Carry(
    jax.tree.map(gather, carry.state),
    code_BW,
    pick(child_BWM),
    jnp.maximum(score_BW, NEG_INF),  # finite, so that sums of NEG_INF never overflow
    gather(carry.path_BWL).at[:, :, level].set(code_BW),
    gather(carry.level_BWL).at[:, :, level].set(pick(logp_BWM)),
    drawn,
  )


def _draw(
  beam: _Drawn,
  logp_BWM: jax.Array,
  legal_BWM: jax.Array,
  sampling: Sampling,
  level: int | jax.Array,
) -> _Drawn:
  """Gumbel-perturbed log-probs of all extensions, given the largest one below each beam.

  The fields are [B, W, M]. The distribution drawn from is the model's with the temperature, among
  legal extensions. Source: Kool et al. 2019 (arXiv 1903.06059), algorithm 1 and appendix B.3.
  """
  tempered_BWM = jnp.where(legal_BWM, logp_BWM / sampling.temperature, NEG_INF)
  local_BWM = jnp.where(legal_BWM, jax.nn.log_softmax(tempered_BWM, axis=-1), NEG_INF)
  logp_BWM = jnp.maximum(beam.logp_BW[..., None] + local_BWM, NEG_INF)
  noise_BWM = jax.random.gumbel(jax.random.fold_in(sampling.key, level), logp_BWM.shape)
  free_BWM = logp_BWM + noise_BWM
  largest_BW1 = free_BWM.max(axis=-1, keepdims=True)
  bound_BW1 = beam.perturbed_BW[..., None]
  gap_BWM = jnp.minimum(free_BWM - largest_BW1, 0)
  v_BWM = bound_BW1 - free_BWM + jnp.log(-jnp.expm1(gap_BWM))
  perturbed_BWM = bound_BW1 - jnp.maximum(v_BWM, 0) - jnp.log1p(jnp.exp(-jnp.abs(v_BWM)))
  return _Drawn(logp_BWM, jnp.where(legal_BWM, perturbed_BWM, NEG_INF))
