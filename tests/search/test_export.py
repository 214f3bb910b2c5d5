"""The artifact answers as the run does, in a process that knows nothing of this package."""

import json
import shutil
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
CONFIG = SearchConfig(widths=(5, 9, 12), batch_size=3, value_exponent=0.5)
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
                       num_lazy_layers=1, copy_path=True, item_scorer=True, item_width=8,
                       copied_items=10)
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


def test_excludes_what_the_run_excludes(exported):
  folder, decoder, params, index = exported
  context = random_context(np.random.default_rng(5), 3)
  recommender = Recommender(
    generator_of(decoder), params, index=index, config=CONFIG, bin_means=BIN_MEANS
  )
  plain = recommender(context, 6)
  seen = [plain.ad_RK[0], np.arange(35), np.zeros(0, np.int64)]
  expected = recommender(context, 6, allowed=[recommender.without(ads) for ads in seen])
  artifact = Artifact(folder)
  ids = [[*AD_IDS[ads].tolist(), "unheard of"] for ads in seen]
  ads, _ = artifact.recommend(context.present(), k=6, exclude=ids)
  assert ads == [[str(AD_IDS[ad]) for ad in row if ad >= 0] for row in expected.ad_RK.tolist()]
  assert [len(row) for row in ads] == [6, 5, 6] and not set(ads[0]) & set(ids[0])
  assert set(ads[1]) == {f"ad {n}" for n in range(35, 40)}
  with pytest.raises(ValueError, match="exclude: of 1 request, the context has 3"):
    artifact.recommend(context.present(), k=6, exclude=ids[:1])


def test_artifacts_of_earlier_versions_open(exported, tmp_path, capsys):
  """They were ranked with a bonus that is no more, and know no excluded ads."""
  folder = tmp_path / "artifact"
  shutil.copytree(exported[0], folder)
  (folder / "without.bin").unlink()
  manifest = json.loads((folder / "manifest.json").read_text())
  manifest["ranking"]["new_ad_bonus"] = 1.0
  (folder / "manifest.json").write_text(json.dumps(manifest))
  artifact = Artifact(folder)
  said = capsys.readouterr().err
  assert "ranking.new_ad_bonus=1.0 is no setting any more" in said and said.count("\n") == 1
  whole = Artifact(exported[0])
  assert artifact.recommend(artifact.sample(), 5) == whole.recommend(whole.sample(), 5)
  with pytest.raises(ValueError, match="without.bin: is missing; export the run again"):
    artifact.recommend(artifact.sample(), 5, exclude=[["ad 1"]])


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
  with pytest.raises(ValueError, match="takes no histories"):
    artifact.context([{"ad_id": "ad 1"}])
  with pytest.raises(ValueError, match="exists already"):
    write_artifact(
      folder, generator_of(decoder), params, index=index, ad_id_A=AD_IDS, config=CONFIG,
      bin_means=BIN_MEANS, sample=random_context(np.random.default_rng(0), 1), about={},
    )


@pytest.mark.parametrize("k", [-1, 0, 2.5, "3", None, True])
def test_only_a_number_of_ads_can_be_asked_for(exported, k):
  artifact = Artifact(exported[0])
  with pytest.raises(ValueError, match=r"k=.*: must be a whole number of at least 1"):
    artifact.recommend(artifact.sample(), k)
  assert len(artifact.recommend(artifact.sample(), np.int64(2))[0][0]) == 2


@pytest.mark.parametrize("name, change, words", [
  ("ad_code_BTL", (..., 1, 5), r"holds 5 at \[0, 0, 1\], must be in \[-1, 5\)"),  # of 7, 5, 6
  ("organic_code_BOL", (..., 2, -2), "holds -2 at"),
  ("trend_code_BNL", (..., 0, 7), r"holds 7 at .*\[-1, 7\)"),
  ("feature_BF", (..., 1, 4), r"holds 4 at \[0, 1\]"),
  ("ad_age_BT", (0, 2, 32), r"holds 32 at \[0, 2\]"),
  ("ad_count_BT", (0, 0, 2**32 + 1), "holds 4294967297"),  # 1 in 32 bits
])
def test_numbers_that_the_model_does_not_know_are_named(exported, name, change, words):
  artifact, (rows, column, value) = Artifact(exported[0]), change
  context = {key: x.astype(np.int64) for key, x in artifact.sample().items()}
  context[name][rows, column] = value
  with pytest.raises(ValueError, match=f"context: {name} {words}"):
    artifact.search(context)


def test_only_whole_numbers_in_whole_arrays_are_a_context(exported):
  artifact = Artifact(exported[0])
  sample = artifact.sample()
  for values, words in (
    (sample["feature_BF"] + 0.5, "holds float64, needs whole numbers"),
    (sample["feature_BF"] == 1, "holds bool, needs whole numbers"),
    ([[1, 2], [1]], "rows differ in length"),
    ([["1", "2"]], "needs whole numbers"),
  ):
    with pytest.raises(ValueError, match=f"feature_BF .*{words}"):
      artifact.check(sample | {"feature_BF": values})


@pytest.mark.parametrize("text, words", [
  ("{}", "names no format"), ("[]", "names no format"), ("", "is not readable"),
  ("\ufeff{", "is not readable"), ('{"format": 1}', "context is missing or no dict"),
  ('{"format": 1, "context": []}', "context is missing or no dict"),
  ('{"format": 1, "context": {}, "program_arrays": "3"}', "program_arrays is missing or no int"),
  ('{"format": 1, "context": {}, "program_arrays": 3, "ranking": {}}', "ranking must name"),
])
def test_a_manifest_that_is_none_is_named(tmp_path, text, words):
  (tmp_path / "manifest.json").write_text(text)
  with pytest.raises(ValueError, match=f"manifest.json: .*{words}") as said:
    Artifact(tmp_path)
  assert "\n" not in str(said.value)


@pytest.mark.parametrize("name", ["arrays.npz", "program.bin", "sample.npz"])
@pytest.mark.parametrize("known", [True, False], ids=["with its hash", "without"])
def test_damaged_files_of_an_artifact_are_named(exported, tmp_path, name, known):
  folder = tmp_path / "artifact"
  shutil.copytree(exported[0], folder)
  if not known:  # as artifacts of earlier versions
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
  whole = (folder / name).read_bytes()
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 1
  damaged = [b"", whole[: len(whole) // 2], *([bytes(flipped)] if known else []), None]
  for content in damaged:
    if content is None:
      (folder / name).unlink()
    else:
      (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: (is|lacks)") as said:
      Artifact(folder).sample()
    assert "\n" not in str(said.value)


def test_the_reader_alone_says_in_one_line_what_is_wrong(exported, tmp_path):
  for name in ("reader.py", "raw_histories.py", "shortlist.py", "tastes.py", "neighbours.py"):
    shutil.copy(exported[0] / name, tmp_path)
  (tmp_path / "manifest.json").write_text("{}")
  said = subprocess.run(
    [sys.executable, tmp_path / "reader.py"], capture_output=True, text=True, cwd=tmp_path
  )
  assert said.returncode == 1 and said.stderr.startswith("error: ")
  assert said.stderr.count("\n") == 1
