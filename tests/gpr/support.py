"""A small model far from its start, and full batches for it."""

import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.gpr.batch import Batch, Context, Vocabulary
from gr4ad_jax.gpr.config import ModelConfig
from gr4ad_jax.gpr.model import Gpr, init_params

SIZES = (7, 5, 6)
VOCABULARY = Vocabulary(SIZES, (4,), (3, 24, 7), value_mean=5.0, value_std=2.0)
SMALL = ModelConfig(
  width=16, num_heads=2, num_layers=1, recursions=2, num_token_layers=2, thinking=2, refining=2,
  predictions=3, dropout=0.0,
)


def codes(rng, *shape) -> np.ndarray:
  return np.stack([rng.integers(0, size, shape) for size in SIZES], axis=-1).astype(np.int32)


def random_batch(rows=2, groups=4, bundle=2, labels=3, heads=3, seed=0) -> Batch:
  """Full streams; the last group has no ad yet, and is asked for the last label."""
  rng = np.random.default_rng(seed)
  age_BG = np.sort(rng.integers(100, 10**6, (rows, groups)), axis=1)[:, ::-1].astype(np.int32)
  age_BG[:, -1] = 0
  ad_code_BTL = codes(rng, rows, groups * bundle)
  ad_code_BTL[:, -bundle:] = -1
  ad_age_BG = (age_BG - 10).astype(np.int32)
  ad_age_BG[:, -1] = -1
  action_BT = rng.integers(1, 3, (rows, groups * bundle)).astype(np.int32)
  context = Context(
    user_BF=rng.integers(0, 4, (rows, 1)).astype(np.int32),
    request_BGF=np.stack(
      [rng.integers(0, size, (rows, groups)) for size in (3, 24, 7)], axis=-1
    ).astype(np.int32),
    count_BG=rng.integers(0, 8, (rows, groups)).astype(np.int32),
    gap_BG=rng.integers(0, 20, (rows, groups)).astype(np.int32),
    age_BG=age_BG, ad_age_BG=ad_age_BG, ad_code_BTL=ad_code_BTL,
    ad_action_BT=np.where(ad_code_BTL[..., 0] < 0, -1, action_BT).astype(np.int32),
    organic_code_BOL=codes(rng, rows, groups * bundle),
  )
  group_BP = np.tile(np.arange(groups - labels, groups, dtype=np.int32), (rows, 1))
  target_BPNL = codes(rng, rows, labels, heads)
  every = np.full((*target_BPNL.shape, 1), 2**32 - 1, np.uint32)
  worth_BP = rng.integers(0, 9, group_BP.shape).astype(np.float32)
  return Batch(context, group_BP, target_BPNL, every, worth_BP)


def shaken(model: Gpr) -> dict:
  """Parameters far from their start."""
  rng = np.random.default_rng(4)
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.asarray(
      float(getattr(path[-1], "key", "") == "scale") + 0.3 * rng.normal(size=x.shape), x.dtype
    ), shapes,
  )


def asked(model: Gpr):
  """(params, *batch) -> what the model says of the labels; what they are worth is not asked."""
  return jax.jit(lambda params, *batch: model.apply({"params": params}, *batch[:4]))


def log_probs(model: Gpr):
  ask = asked(model)
  return lambda params, *batch: ask(params, *batch).logp_BPNL
