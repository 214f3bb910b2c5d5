"""The artifact answers as the run does, in a process that knows nothing of this package."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from gr4ad_jax.catalog.ad_index import build_ad_index
from gr4ad_jax.catalog.legal_prefixes import build_prefix_tree
from gr4ad_jax.gr4ad.build import build_decoder, start_fn, step_fn
from gr4ad_jax.gr4ad.config import ModelConfig
from gr4ad_jax.gr4ad.generator import generator_of
from gr4ad_jax.search.artifact import Artifact
from gr4ad_jax.search.beam_search import compile_search
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.search.export import PLATFORMS, write_artifact
from gr4ad_jax.search.recommender import Recommender
from tests.support import VOCABULARY, random_codes, random_context, shaken_params

BIN_MEANS = (1.0, 4.0, 9.0, 16.0)
CONFIG = SearchConfig(widths=(5, 9, 12), batch_size=3, value_exponent=0.5, new_ad_bonus=1.0)
AD_IDS = np.array([f"ad {n}" for n in range(40)], object)

ANSWER = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from reader import Artifact
artifact = Artifact(sys.argv[1])
context = dict(np.load(sys.argv[2]))
np.savez(sys.argv[3], **artifact.search(context))
alien = {name.split(".")[0] for name in sys.modules} & {"gr4ad_jax", "flax", "optax", "orbax"}
assert not alien, alien
"""


@pytest.fixture(scope="module", params=["lazy"])
def exported(request, tmp_path_factory):
  """An artifact, and what it was made of."""
  config = ModelConfig(decoder=request.param, width=16, num_heads=2, num_layers=3,
                       num_lazy_layers=1, copy_path=True)
  decoder = build_decoder(config, VOCABULARY)
  params = shaken_params(decoder)
  rng = np.random.default_rng(0)
  index = build_ad_index(random_codes(rng, 40), rng.random(40))
  folder = tmp_path_factory.mktemp("export") / "artifact"
  write_artifact(
    folder, generator_of(decoder), params, index=index, ad_id_A=AD_IDS, config=CONFIG,
    bin_means=BIN_MEANS, sample=random_context(rng, 1), about={"step": 7},
  )
  return folder, decoder, params, index


@pytest.mark.parametrize("rows", [1, 3])
def test_equals_the_jitted_search_bit_for_bit(exported, tmp_path, rows):
  folder, decoder, params, index = exported
  context = random_context(np.random.default_rng(rows), rows)
  tree = build_prefix_tree(index.sids_SL)
  search = compile_search(start_fn(decoder), step_fn(decoder), tree, CONFIG.widths)
  expected = search(params, context, tree.arrays, np.asarray(BIN_MEANS, np.float32))
  np.savez(tmp_path / "context.npz", **context.present())
  paths = [str(path) for path in (folder, tmp_path / "context.npz", tmp_path / "found.npz")]
  subprocess.run([sys.executable, "-c", ANSWER, *paths], check=True, cwd=tmp_path)
  with np.load(tmp_path / "found.npz") as found:
    names = set(found.files)
    assert names == {name for name, x in expected._asdict().items() if x is not None}
    for name in names:
      np.testing.assert_array_equal(found[name], getattr(expected, name), err_msg=name)


def test_recommends_what_the_run_recommends(exported):
  folder, decoder, params, index = exported
  context = random_context(np.random.default_rng(5), 3)
  context.ad_code_BTL[:, 0] = index.sids_SL[3]  # an SID of the history
  expected = Recommender(
    generator_of(decoder), params, index=index, config=CONFIG, bin_means=BIN_MEANS
  )(context, 6)
  ads, scores = Artifact(folder).recommend(context.present(), k=6)
  assert ads == [[str(AD_IDS[ad]) for ad in row if ad >= 0] for row in expected.ad_RK.tolist()]
  assert all(row == sorted(row, reverse=True) for row in scores)


def test_manifest_and_sample(exported, tmp_path):
  folder, decoder, _, index = exported
  manifest = json.loads((folder / "manifest.json").read_text())
  assert manifest["platforms"] == list(PLATFORMS) == ["cpu", "cuda", "tpu"]
  assert manifest["num_ads"] == 40 and manifest["num_sids"] == len(index.sids_SL)
  assert manifest["widths"] == [5, 9, 12] and manifest["run"] == {"step": 7}
  assert manifest["versions"]["jax"] == jax.__version__
  printed = subprocess.run(
    [sys.executable, folder / "reader.py"], check=True, capture_output=True, text=True, cwd=tmp_path
  ).stdout.splitlines()
  assert len(printed) == 10 and "ad " in printed[0]


def test_bad_requests_and_folders_are_named(exported, tmp_path):
  folder, decoder, params, index = exported
  artifact = Artifact(folder)
  context = random_context(np.random.default_rng(0), 2).present()
  missing = {name: x for name, x in context.items() if name != "ad_age_BT"}
  with pytest.raises(ValueError, match="ad_age_BT is missing"):
    artifact.search(missing)
  with pytest.raises(ValueError, match=r"ad_age_BT has shape \(2, 3\), needs \(2, \*\[5\]\)"):
    artifact.search(context | {"ad_age_BT": np.zeros((2, 3))})
  with pytest.raises(ValueError, match="manifest.json"):
    Artifact(tmp_path)
  (tmp_path / "manifest.json").write_text('{"format": 99}')
  with pytest.raises(ValueError, match="format 99"):
    Artifact(tmp_path)
  with pytest.raises(ValueError, match="exists already"):
    write_artifact(
      folder, generator_of(decoder), params, index=index, ad_id_A=AD_IDS, config=CONFIG,
      bin_means=BIN_MEANS, sample=random_context(np.random.default_rng(0), 1), about={},
    )
