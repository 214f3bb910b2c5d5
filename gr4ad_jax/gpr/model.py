"""GPR as one model: unified input, sequence decoder, token decoder, evaluator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gr4ad_jax.gpr.attention import NUM_TYPES, REQUEST, allow, allow_causal, allow_encoder
from gr4ad_jax.gpr.batch import Context, SeenThoughts, Vocabulary
from gr4ad_jax.gpr.config import ModelConfig
from gr4ad_jax.gpr.hsd import HSD_LAYOUTS, Hsd, balance_loss
from gr4ad_jax.gpr.hte import Evaluator, currency
from gr4ad_jax.gpr.legal_codes import unpack
from gr4ad_jax.gpr.ptd import Caches, Thought, TokenDecoder
from gr4ad_jax.gpr.refining import Refiner, request_noise
from gr4ad_jax.gpr.tokens import ThoughtTokens, UnifiedInput, sees_thought
from gr4ad_jax.machine.sharding import FSDP, TENSOR, Layouts
from gr4ad_jax.nn import NEG_INF
from gr4ad_jax.nn.code_tables import CodeTables
from gr4ad_jax.nn.layers import LAYER_LAYOUTS
from gr4ad_jax.search.generator import MayGet

LAYOUTS: Layouts = (
  (r"tables/level_\d+|user_features|request_features", (TENSOR, None)),  # vocabulary, width
  *HSD_LAYOUTS,
  *LAYER_LAYOUTS,
  (r"\w+_projection/kernel", (FSDP, TENSOR)),  # width, width
)


WITHOUT_THOUGHTS = 0.1  # of the rows of training, so that their absence is nothing new
_ALLOW = {"hybrid": allow, "hstu": allow_causal, "bidirectional": allow_encoder}


class Encoded(NamedTuple):
  """A stream as the token decoder reads it."""

  intent_BSD: jax.Array
  allowed_BSS: jax.Array  # bool, from `allow`, or what the kind of attention has instead
  balance_B: jax.Array  # float32, L_bal of each row; zeros without recursions


class LabelLogProbs(NamedTuple):
  """What the heads say of labels, float32; padding holds any finite value."""

  logp_BPNL: jax.Array  # log P_j(z_l | z_<l, stream), among the codes that lead on to an ad
  value_BPV: jax.Array  # V_0 to V_L of the first head's target, see `Evaluator`; or none, V = 0
  refining_BP: jax.Array  # L_diff; zeros without a refining token
  balance_B: jax.Array
  head_logit_N: jax.Array  # a, of which the heads' weights are made
  value_range: tuple[jax.Array, jax.Array]  # quantiles of 5% and 95% of each value, [V]; or none


class BeamState(NamedTuple):
  """What each beam carries."""

  caches: Caches
  state_BWD: jax.Array  # that emits the next code


class Gpr(nn.Module):
  """Streams in, semantic IDs out. Source: GPR, Fig. 2."""

  config: ModelConfig
  vocabulary: Vocabulary

  def setup(self):
    config, vocabulary = self.config, self.vocabulary
    self.tables = CodeTables(config.width, vocabulary.codebook_sizes, config.compute_dtype)
    self.unified_input = UnifiedInput(config, vocabulary, self.tables)
    self.hsd = Hsd(config)
    if vocabulary.thought_size:
      self.thought_tokens = ThoughtTokens(config)
    self.ptd = TokenDecoder(config, vocabulary, self.tables)
    if config.values:
      self.hte = Evaluator(config, vocabulary)
    if config.refining:
      self.refiner = Refiner(config)
    self.head_logit_N = self.param("head_logit", nn.initializers.zeros, (config.predictions,))

  def encode(self, context: Context, *, deterministic: bool = True) -> Encoded:
    """Intent embeddings of a stream, and who may see which."""
    stream = self.unified_input(context)
    allowed_BSS = _ALLOW[self.config.attention](stream.there_BGY, stream.age_BGY)
    intents = self.hsd(
      stream.token_BGYD, stream.age_BGY, allowed_BSS, deterministic=deterministic
    )
    num_rows, *_, width = intents.intent_BGYD.shape
    balance_B = jnp.zeros(num_rows)
    if intents.depths is not None:
      balance_B = balance_loss(intents.depths, stream.there_BGY)
    return Encoded(intents.intent_BGYD.reshape(num_rows, -1, width), allowed_BSS, balance_B)

  def with_thoughts(
    self, thoughts: SeenThoughts | None, group_BP: jax.Array, intent_BSD: jax.Array,
    mask_BPS: jax.Array, *, deterministic: bool = True,
  ) -> tuple[jax.Array, jax.Array]:
    """What the token decoder attends to, and who sees which: thoughts follow the intents.

    Args:
      thoughts: None = there are none.
      group_BP: int32, the group whose request is asked.
      intent_BSD, mask_BPS: the intents, and which of them each request sees.
      deterministic: False leaves out the thoughts of some rows (needs the "dropout" rng).
    """
    if thoughts is None:
      return intent_BSD, mask_BPS
    sees_BPX = sees_thought(thoughts, group_BP)
    if not deterministic:
      told_B = jax.random.bernoulli(
        self.make_rng("dropout"), 1 - WITHOUT_THOUGHTS, sees_BPX.shape[:1]
      )
      sees_BPX &= told_B[:, None, None]
    token_BXD = self.thought_tokens(thoughts.embedding_BXE)
    return (
      jnp.concatenate([intent_BSD, token_BXD], axis=1),
      jnp.concatenate([mask_BPS, sees_BPX], axis=2),
    )

  def bos(self, context: Context, group_BP: jax.Array, thought: Thought) -> jax.Array:
    """What the position before the codes takes in for the requests of groups, [B, P, N, D]."""
    shape, dtype = thought.token_BCKD.shape[:2], thought.token_BCKD.dtype
    bos_BPND = self.ptd.bos(shape, dtype)
    if not self.config.refining:
      return bos_BPND
    number_BGF = jnp.concatenate(
      [context.request_BGF, context.count_BG[..., None], context.gap_BG[..., None]], axis=-1
    )
    number_BPF = jnp.take_along_axis(number_BGF, group_BP[..., None], axis=1)
    noise_BPD = request_noise(number_BPF, self.config.width)
    return bos_BPND + self.refiner(noise_BPD, jnp.sum(thought.token_BCKD, axis=2))[:, :, None]

  def __call__(
    self, context: Context, group_BP: jax.Array, target_BPNL: jax.Array, legal_BPNLU: jax.Array, *,
    deterministic: bool = True,
  ) -> LabelLogProbs:
    """Log-probabilities of known labels, by every head.

    Args:
      context: the stream.
      group_BP: int32, the group whose request is asked; -1 = no label.
      target_BPNL: int32 codes, -1 = none.
      legal_BPNLU: uint32, the codes that lead on from those before: no other has a probability.
      deterministic: False applies dropout (needs the "dropout" rng).
    """
    encoded = self.encode(context, deterministic=deterministic)
    group_BP = jnp.maximum(group_BP, 0)
    row_BP = NUM_TYPES * group_BP + REQUEST
    mask_BPS = jnp.take_along_axis(encoded.allowed_BSS, row_BP[..., None], axis=1)
    memory = self.with_thoughts(
      context.thoughts, group_BP, encoded.intent_BSD, mask_BPS, deterministic=deterministic
    )
    thought = self.ptd.think(*memory, deterministic=deterministic)
    num_rows, num_labels, heads, levels = target_BPNL.shape
    token_BCD = self.bos(context, group_BP, thought).reshape(num_rows, num_labels * heads, -1)
    refining_BP = jnp.zeros((num_rows, num_labels))
    if self.config.refining:
      # A validation draws the same noise every time.
      key = jax.random.key(1) if deterministic else self.make_rng("dropout")
      ad_BPD = self.tables.embed_all(target_BPNL[:, :, 0])
      refining_BP = self.refiner.loss(ad_BPD, jnp.sum(thought.token_BCKD, axis=2), key)

    def for_heads(x_BP: jax.Array) -> jax.Array:  # heads of one label lie side by side
      return jnp.repeat(x_BP, heads, axis=1)

    thought = thought._replace(
      mask=for_heads(thought.mask), caches=jax.tree.map(for_heads, thought.caches)
    )
    dtype, candidates = encoded.intent_BSD.dtype, num_labels * heads
    caches = self.ptd.no_caches(num_rows, candidates, levels, dtype)
    logps, values = [], [jnp.zeros((num_rows, num_labels, 0))]
    for level in range(levels):
      state_BCD, caches = self.ptd.emit(
        token_BCD, thought, caches, level, deterministic=deterministic
      )
      state_BPND = state_BCD.reshape(num_rows, num_labels, heads, -1)
      if level == 0 and self.config.values:
        values.append(self.hte.before(state_BPND[:, :, 0])[..., None])
      logit_BPNV = self.ptd.logits(state_BPND, level)
      leads_on_BPNV = unpack(legal_BPNLU[..., level, :], logit_BPNV.shape[-1])
      logp_BPNV = jax.nn.log_softmax(jnp.where(leads_on_BPNV, logit_BPNV, NEG_INF), axis=-1)
      code_BPN = target_BPNL[..., level]
      index_BPN1 = jnp.maximum(code_BPN, 0)[..., None]
      logps.append(jnp.take_along_axis(logp_BPNV, index_BPN1, axis=-1)[..., 0])
      token_BCD = self.tables.embed(code_BPN.reshape(num_rows, candidates), level)
      if self.config.values:
        token_BPD = token_BCD.reshape(state_BPND.shape)[:, :, 0]
        values.append(self.hte.after(state_BPND[:, :, 0], token_BPD, level + 1)[..., None])
    ranges = (jnp.zeros(0),) * 2
    if self.config.values:
      ranges = self.hte.low_V, self.hte.high_V
    return LabelLogProbs(
      jnp.stack(logps, axis=-1), jnp.concatenate(values, axis=-1), refining_BP,
      encoded.balance_B, self.head_logit_N, ranges,
    )

  def start(
    self, context: Context, may_get: MayGet
  ) -> tuple[Thought, BeamState, jax.Array]:
    """Reads the stream, thinks, and tells the first code of its last request.

    Args:
      context: of the requests.
      may_get: not asked; nothing is copied.

    Returns:
      What beams share, the state of one beam, and log p(s_1 | X) float32 [B, 1, V_1].
    """
    encoded = self.encode(context)
    last = encoded.allowed_BSS.shape[1] - NUM_TYPES + REQUEST
    dtype, num_rows = encoded.intent_BSD.dtype, encoded.intent_BSD.shape[0]
    group_B1 = jnp.full((num_rows, 1), context.age_BG.shape[1] - 1)
    mask_B1S = encoded.allowed_BSS[:, last : last + 1]
    thought = self.ptd.think(
      *self.with_thoughts(context.thoughts, group_B1, encoded.intent_BSD, mask_B1S)
    )
    token_B1D = self.bos(context, group_B1, thought)[:, :, 0]
    thought = thought._replace(mask=thought.mask[:, 0])
    caches = self.ptd.no_caches(num_rows, 1, self.vocabulary.num_levels, dtype)
    state_B1D, caches = self.ptd.emit(token_B1D, thought, caches, 0)
    return thought, BeamState(caches, state_B1D), self.ptd.first_head(state_B1D, 0)

  def step(
    self, thought: Thought, beam: BeamState, code_BW: jax.Array, level: int | jax.Array
  ) -> tuple[BeamState, jax.Array]:
    """One level for all beams; see `Generator.step`.

    Level L gives the logarithm of the expected value, as one bucket whose mean is 1.
    """
    token_BWD = self.tables.embed(code_BW, level - 1)
    if isinstance(level, int) and level == self.vocabulary.num_levels:
      value_BW = jnp.zeros(code_BW.shape)  # the mean of training
      if self.config.values:
        value_BW = self.hte.after(beam.state_BWD, token_BWD, level)
      return beam, jnp.log(currency(value_BW, self.vocabulary))[..., None]
    state_BWD, caches = self.ptd.emit(token_BWD, thought, beam.caches, level)
    return BeamState(caches, state_BWD), self.ptd.first_head(state_BWD, level)


def init_params(model: Gpr, key: jax.Array) -> Any:
  """Fresh float32 parameters."""
  levels, heads = model.vocabulary.num_levels, model.config.predictions
  one = jnp.zeros((1, 1), jnp.int32)
  codes = jnp.zeros((1, 1, levels), jnp.int32)
  size = model.vocabulary.thought_size
  context = Context(
    user_BF=jnp.zeros((1, len(model.vocabulary.user_sizes)), jnp.int32),
    request_BGF=jnp.zeros((1, 1, len(model.vocabulary.request_sizes)), jnp.int32),
    count_BG=one, gap_BG=one, age_BG=one, ad_age_BG=one, ad_code_BTL=codes, ad_action_BT=one,
    organic_code_BOL=codes,
    thoughts=SeenThoughts(jnp.zeros((1, 1, size)), one, one) if size else None,
  )
  target_BPNL = jnp.zeros((1, 1, heads, levels), jnp.int32)
  words = -(-max(model.vocabulary.codebook_sizes) // 32)
  legal_BPNLU = jnp.zeros((*target_BPNL.shape, words), jnp.uint32)
  return _compile_init(model)(key, context, one, target_BPNL, legal_BPNLU)["params"]


@functools.lru_cache(maxsize=16)
def _compile_init(model: Gpr) -> Callable[..., Any]:
  return jax.jit(model.init)
