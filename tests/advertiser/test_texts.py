"""Histories as tokens, by hand; packing; the loss of names."""

import numpy as np
import pytest

from gr4ad_jax.advertiser.config import Config, ModelConfig, PrepareConfig
from gr4ad_jax.advertiser.prepared import open_advertisers, prepare
from gr4ad_jax.advertiser.texts import Speller, Text, batch_maker, pack
from gr4ad_jax.advertiser.tuning import llama_of, name_losses
from gr4ad_jax.config import ConfigError
from tests.advertiser import support


@pytest.fixture(scope="module")
def model():
  return support.tiny_model()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  home = tmp_path_factory.mktemp("texts")
  support.write_windows(home / "windows")
  for form in ("stream", "prompt"):
    prepare(home / "windows", home / form, PrepareConfig(form=form, prompt_chars=220))
  return home


@pytest.fixture(scope="module")
def stream(folders, model):
  return Speller(open_advertisers(folders / "stream"), model, max_tokens=64)


def _read(model, tokens) -> str:
  words = support.words()
  return "".join(words[t] for t in tokens).replace("Ġ", " ").replace("Ċ", "\n")


def test_a_stream_tells_every_name_but_the_first(stream, model):
  text = stream.stream([0, 3, 7])
  written = _read(model, text.token_T)
  assert written == "\nAcme: kit 0\nBo: kit 3\nAcme Pro: kit 7\n"
  told = [_read(model, [text.token_T[at + 1]]) for at in text.label_P]
  assert "".join(told) == "Bo:Acme Pro:"


def test_a_stream_that_does_not_fit_goes_on_in_a_text_that_begins_with_its_last_line(stream, model):
  items = [0, 3, 7, 2, 5]
  data, told = stream.data, "Bo:Acme Pro:Bolt:Dry:"
  for size in (32, 40, 64):
    texts = Speller(data, model, max_tokens=size).pieces(items)
    assert max(len(text.token_T) for text in texts) <= size
    labels = [t.token_T[at + 1] for t in texts for at in t.label_P]
    assert _read(model, labels) == told
  assert len(texts) == 1
  written = [_read(model, t.token_T) for t in Speller(data, model, max_tokens=40).pieces(items)]
  assert written[0] == "\nAcme: kit 0\nBo: kit 3\nAcme Pro: kit 7\n"
  assert written[1].startswith("\nAcme Pro: kit 7\nBolt: kit 2\n")


def test_of_what_is_known_whole_lines_are_left_out_from_the_oldest_on(stream, model):
  rows = stream.data.splits["test"]
  whole = _read(model, stream.known("test", rows, 0)).splitlines()
  for size in range(24, 64, 3):
    known = _read(model, Speller(stream.data, model, max_tokens=size).known("test", rows, 0))
    kept = known.splitlines()[1:]
    assert known.endswith("\n") and kept == whole[len(whole) - len(kept):]
  assert 1 < len(kept)


def test_no_text_is_longer_than_its_room_whatever_name_follows(folders, model):
  for size in (24, 33, 48):
    speller = Speller(open_advertisers(folders / "stream"), model, max_tokens=size)
    rows = speller.data.splits["test"]
    longest = max(map(len, speller.name_A)) + 1
    assert max(len(speller.known("test", rows, r)) for r in range(len(rows))) + longest <= size
    assert max(len(text.token_T) for text in speller.training()) <= size


def test_a_row_asks_for_its_own_name_behind_what_is_known(stream, model):
  rows = stream.data.splits["test"]
  text = stream.asked("test", rows, 0)
  name = stream.data.name_A[rows.target_R[0]]
  assert _read(model, text.token_T).endswith(f"\n{name}:")
  assert _read(model, [text.token_T[at + 1] for at in text.label_P]) == f"{name}:"
  assert text.token_T[: len(text.token_T) - len(text.label_P)] == stream.known("test", rows, 0)


def test_a_prompt_ends_its_answer_with_the_model_s_own_end(folders, model):
  data = open_advertisers(folders / "prompt")
  speller = Speller(data, model, max_tokens=256)
  text = speller.training()[0]
  written = _read(model, text.token_T)
  name = data.name_A[data.splits["train"].target_R[0]]
  assert written == f"{data.prompts['train'][0]}\n{name}<|im_end|>"
  assert [text.token_T[at + 1] for at in text.label_P] == [*model.encode(name), model.eos]
  with pytest.raises(ConfigError, match="a prompt has .* tokens, .* fit"):
    Speller(data, model, max_tokens=40).training()


def test_a_room_that_the_longest_name_fills_is_refused(folders, model):
  with pytest.raises(ConfigError, match="max_tokens=12: the longest name alone has"):
    Speller(open_advertisers(folders / "stream"), model, max_tokens=12)


def test_texts_share_rows_and_none_is_lost():
  texts = [Text([n] * size, [0]) for n, size in enumerate([9, 20, 12, 30, 3])]
  packed = pack(texts, 32)
  assert [[t.token_T[0] for t in row] for row in packed] == [[3], [1, 2], [0, 4]]
  batch = batch_maker(packed, 32)(packed)
  assert batch.segment_BT[1].tolist() == [0] * 20 + [1] * 12
  assert batch.position_BT[2, :13].tolist() == [*range(9), 0, 1, 2, 0]
  assert batch.label_BP.tolist() == [[0, -1], [0, 20], [0, 9]]
  assert batch.segment_BT[2, 12:].tolist() == [-1] * 20


def test_the_loss_of_names_is_the_same_alone_and_packed(stream, model):
  texts = stream.training()[:4]
  config = Config(tuning="full", model=ModelConfig(max_tokens=64))
  llama = llama_of(model, config)
  maker = batch_maker([texts], 256)
  packed = np.asarray(name_losses(llama, {"params": model.params}, maker([texts])))
  rows = [[text] for text in texts]
  alone = np.asarray(name_losses(llama, {"params": model.params}, maker(rows)))
  told = [alone[n, : len(text.label_P)] for n, text in enumerate(texts)]
  np.testing.assert_allclose(packed[0, : sum(map(len, told))], np.concatenate(told), rtol=1e-3)
  assert not packed[0, sum(map(len, told)) :].any()
  # By hand, of the first text.
  logits = support.logits_by_hand(model.config, model.params, texts[0].token_T)
  expected = [
    np.log(np.exp(logits[at] - logits[at].max()).sum()) + logits[at].max()
    - logits[at][texts[0].token_T[at + 1]] for at in texts[0].label_P
  ]  # fmt: skip
  np.testing.assert_allclose(told[0], expected, rtol=1e-3)
