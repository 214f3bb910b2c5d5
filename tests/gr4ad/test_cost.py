"""Counts from the config against real parameters and XLA's own analysis of the programs."""

import dataclasses

import jax
import numpy as np
import pytest

from gr4ad_jax.catalog.legal_prefixes import build_prefix_tree
from gr4ad_jax.gr4ad.batch import Batch, Vocabulary
from gr4ad_jax.gr4ad.build import build_decoder, init_params, start_fn, step_fn
from gr4ad_jax.gr4ad.config import LossConfig, ModelConfig
from gr4ad_jax.gr4ad.cost import decode_flops, num_params, train_flops
from gr4ad_jax.gr4ad.vsl_task import vsl_task
from gr4ad_jax.search.beam_search import compile_search
from gr4ad_jax.training.task import count_params
from tests.support import KNOWN_ADS, SHORTLIST, VOCABULARY, random_context

CONFIG = ModelConfig(width=64, num_heads=2, num_layers=4, num_lazy_layers=2)
VARIANTS = [
  {}, {"num_lazy_layers": 0}, {"num_lazy_layers": 3, "fuse_bos": True},
  {"kv_mode": "projected", "copy_path": True, "shortlist": SHORTLIST},
  {"decoder": "autoregressive", "copy_path": True, "shortlist": SHORTLIST},
  {"copy_path": True, "shortlist": SHORTLIST, "item_scorer": True, "item_width": 32,
   "history_length": 30, "history_blocks": 2},
  {"copy_path": True, "shortlist": SHORTLIST - 3, "neighbours": 3},
  {"decoder": "multi_token"}, {"decoder": "multi_token", "kv_mode": "projected"},
]  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("num_trending", [0, 3])
def test_parameters_are_counted(changes, num_trending):
  config = dataclasses.replace(CONFIG, **changes)
  vocabulary = dataclasses.replace(VOCABULARY, num_trending=num_trending)
  decoder = build_decoder(config, vocabulary)
  params = jax.eval_shape(lambda: init_params(decoder, jax.random.key(0)))
  assert num_params(config, vocabulary) == count_params(params)


WIDER = Vocabulary(
  codebook_sizes=(64, 32, 32), feature_sizes=(3, 4), num_ecpm_bins=8, num_count_buckets=16,
  num_age_buckets=32, num_trend_buckets=32, num_trending=3, num_organic_buckets=64,
  ads=KNOWN_ADS,
)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_flops_are_those_of_the_training_program(changes):
  config, targets = dataclasses.replace(CONFIG, **changes), 3
  decoder = build_decoder(config, WIDER)
  context = random_context(
    np.random.default_rng(0), 2, history=30, organic=20, numbers=config.copied_numbers
  )
  batch = Batch(
    context, np.zeros((2, targets, 3), np.int32), np.zeros((2, targets), np.int32),
    np.ones((2, targets), np.float32),
  )
  task = vsl_task(decoder, LossConfig())
  gradient = jax.jit(jax.grad(lambda params: task.loss(params, batch, None)["loss"][0]))
  measured = gradient.lower(jax.eval_shape(task.init, jax.random.key(0))).cost_analysis()["flops"]
  computed = 2 * train_flops(
    config, WIDER, context_tokens=1 + 2 + 30 + 20 + 3, targets=targets
  )
  assert 1.0 < measured / computed < 1.06, measured / computed


@pytest.mark.parametrize("changes", VARIANTS[2:8], ids=str)
def test_flops_are_those_of_the_compiled_search(changes):
  config, vocabulary = dataclasses.replace(CONFIG, **changes), WIDER
  rng, widths = np.random.default_rng(0), (32, 48, 64)
  decoder = build_decoder(config, vocabulary)
  params = jax.eval_shape(lambda: init_params(decoder, jax.random.key(0)))
  sids = np.stack(np.unravel_index(np.arange(64 * 32 * 32), vocabulary.codebook_sizes), axis=1)
  tree = build_prefix_tree(sids[rng.random(len(sids)) < 0.1].astype(np.int32))
  context = random_context(rng, 1, history=30, organic=20, numbers=config.copied_numbers)
  context_tokens = 1 + 2 + 30 + 20 + 3
  search = compile_search(start_fn(decoder), step_fn(decoder), tree, widths)
  for with_value in (False, True):
    args = (params, context, tree.arrays, *([np.ones(8, np.float32)] if with_value else []))
    measured = search.lower(*args).cost_analysis()["flops"]
    computed = decode_flops(
      config, vocabulary, context_tokens=context_tokens, widths=widths, with_value=with_value
    )
    # Element-wise work weighs more at so small a width.
    assert 1.0 < measured / computed < 1.2, measured / computed
