"""The tree of names by hand; the search against every name's probability, computed on its own."""

import numpy as np
import pytest

from gr4ad_jax.advertiser import name_search
from gr4ad_jax.advertiser.llama import Llama
from gr4ad_jax.advertiser.name_search import tell
from gr4ad_jax.advertiser.name_tree import build_tree
from tests.advertiser import support

END = 9
KNOWN = [[50, 60, 70, 80], [50, 61], [90], [33, 34, 35], [120], [7, 7, 7]]
LENGTH = 16


def test_a_tree_by_hand():
  # 1 2, 1 2 3, 1 2 3 4, 5 6 7, 5 6 8: the first is the beginning of two others.
  tree = build_tree([[1, 2], [5, 6, 8], [1, 2, 3, 4], [5, 6, 7], [1, 2, 3]], END)
  plain = [(b.path, b.token_C.tolist(), b.leads_C.tolist()) for b in tree.branches]
  assert plain == [
    ((), [1, 5], [-2, -4]), ((1, 2), [3, END], [-3, 0]), ((1, 2, 3), [4, END], [2, 4]),
    ((5, 6), [7, 8], [3, 1]),
  ]
  assert tree.token_V.tolist() == [1, 3, 4, 5, 7, 8, END]


def test_names_that_cannot_be_told_apart_are_refused():
  with pytest.raises(ValueError, match="two names have the same tokens"):
    build_tree([[1, 2], [1, 2]], END)
  with pytest.raises(ValueError, match="holds the token that ends names"):
    build_tree([[1, END, 2]], END)


def test_one_name_is_certain():
  model = support.tiny_model()
  told = tell(Llama(model.config), {"params": model.params}, [[50, 60]],
              build_tree([[4, 5]], END), most=2)
  assert told.advertiser_RK.tolist() == [[0, -1]]
  assert told.logp_RK[0, 0] == 0 and told.logp_RK[0, 1] == -np.inf


def _names(rng):
  """Forty names of up to five tokens; every fifth goes on where another one ends."""
  names = {tuple(rng.integers(20, 26, rng.integers(1, 5)).tolist()) for _ in range(60)}
  names |= {(*name, 27) for name in sorted(names)[::5]}
  return [list(name) for name in sorted(names)]


def _every_name(model, known, names):
  """log p of each name: at each place among the tokens with which any name goes on from there."""
  program = support.compiled(model.config)
  closed = [(*name, END) for name in names]
  beginnings = sorted({name[:at] for name in closed for at in range(len(name))})
  token_BT = np.zeros((len(beginnings), LENGTH), np.int32)
  for b, path in enumerate(beginnings):
    token_BT[b, : len(known) + len(path)] = [*known, *path]
  logits = np.asarray(program(model.params, token_BT), np.float64)
  of = {
    path: logits[b, len(known) + len(path) - 1] for b, path in enumerate(beginnings)
  }
  logp = []
  for name in closed:
    total = 0.0
    for at in range(len(name)):
      among = sorted({n[at] for n in closed if n[:at] == name[:at] and len(n) > at})
      score = of[name[:at]][among]
      total += of[name[:at]][name[at]] - score.max() - np.log(np.exp(score - score.max()).sum())
    logp.append(total)
  return np.array(logp)


@pytest.fixture(scope="module")
def searched():
  model, names = support.tiny_model(3), _names(np.random.default_rng(0))
  tree = build_tree(names, END)
  how = (Llama(model.config), {"params": model.params}, KNOWN, tree)
  every = np.stack([_every_name(model, known, names) for known in KNOWN])
  return how, every


def test_probabilities_of_all_names_add_up_to_one(searched):
  np.testing.assert_allclose(np.exp(searched[1]).sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(("most", "followed"), [(3, 1), (4, 1), (6, 1), (3, 8), (100, 8)])
def test_the_search_finds_the_most_probable_names_and_their_probability(
  searched, most, followed, monkeypatch
):
  how, every = searched
  monkeypatch.setattr(name_search, "FOLLOWED", followed)
  told = tell(*how, most=most)
  num = min(most, every.shape[1])
  order = np.argsort(-every, axis=1, kind="stable")[:, :num]
  assert told.advertiser_RK[:, :num].tolist() == order.tolist()
  np.testing.assert_allclose(
    told.logp_RK[:, :num], np.take_along_axis(every, order, axis=1), atol=2e-3
  )
  assert (told.advertiser_RK[:, num:] == -1).all()
