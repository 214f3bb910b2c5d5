"""Decoders at lower precision: close to the trained one, smaller, and searchable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr4ad_jax.catalog.legal_prefixes import build_prefix_tree
from gr4ad_jax.gr4ad.build import build_decoder, init_params, start_fn, step_fn
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.gr4ad.precision import at_precision, num_bytes
from gr4ad_jax.search.beam_search import compile_search
from tests.support import VOCABULARY, random_codes, random_context


@pytest.mark.parametrize(("kind", "precision", "smaller", "error"), [
  ("lazy", "bfloat16", 1.9, 0.05), ("lazy", "int8", 2, 0.05), ("lazy", "fp8", 2, 0.3),
  ("multi_token", "int8", 2, 0.05),
])  # fmt: skip
def test_is_close_smaller_and_searchable(kind, precision, smaller, error):
  config = ModelConfig(decoder=kind, width=64, num_heads=2, num_layers=2, num_lazy_layers=1,
                       copy_path=True, item_scorer=kind == "lazy")
  decoder = build_decoder(config, VOCABULARY)
  params = init_params(decoder, jax.random.key(0))
  rng = np.random.default_rng(0)
  context = random_context(rng, 2)
  sids = np.unique(random_codes(rng, 30), axis=0).astype(np.int32)
  tree = build_prefix_tree(sids)
  widths = (len(sids),) * 2 + (len(sids) - 1,)

  def find(decoder, params):
    search = compile_search(start_fn(decoder), step_fn(decoder), tree, widths)
    found = search(params, context, tree.arrays, np.arange(4, dtype=np.float32))
    logp_BS = np.full((2, len(sids)), np.nan)
    np.put_along_axis(logp_BS, np.asarray(found.sid_BW), np.asarray(found.logp_BW), axis=1)
    return logp_BS

  low_decoder, convert = at_precision(decoder, precision)
  low = low_decoder, convert(params)
  exact, found = find(decoder, params), find(*low)
  both = np.isfinite(exact) & np.isfinite(found)
  difference = np.abs(exact - found)[both]
  assert 0 < difference.max() < error * np.ptp(exact[both])
  dense = {k: v for k, v in params.items() if k not in ("tables", "context_processor")}
  small = {k: v for k, v in low[1].items() if k not in ("tables", "context_processor")}
  assert num_bytes(dense) > smaller * num_bytes(small)


def test_trained_is_unchanged_and_unknown_is_named():
  decoder = build_decoder(ModelConfig(width=16, num_heads=2), VOCABULARY)
  params = {"x": jnp.zeros(3)}
  same, convert = at_precision(decoder, "trained")
  assert same is decoder and convert(params) is params
  with pytest.raises(ValueError, match="one of trained, bfloat16, int8, fp8"):
    at_precision(decoder, "int3")
