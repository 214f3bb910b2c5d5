"""The embedding cache: what is encoded, what survives, and who may share it."""

import numpy as np
import pytest

from gr4ad_jax.embedding.cache import cached_encode, encoder_identity


class Encoder:
  """Embeds a text as its length and first letter, and remembers what it was asked for."""

  def __init__(self, *, calls_before_death=None):
    self.asked, self._calls = [], calls_before_death

  def __call__(self, texts):
    if self._calls is not None:
      if self._calls == 0:
        raise KeyboardInterrupt
      self._calls -= 1
    self.asked += texts
    return np.array([[len(text), ord(text[0])] for text in texts], np.float32)


TEXTS = [f"{chr(97 + n % 26)}{'x' * n}" for n in range(30)]
EXPECTED = Encoder()(TEXTS)


def encode(texts, encoder, folder, **options):
  return cached_encode(texts, encoder, folder=folder, identity="e", texts_per_part=8, **options)


def test_without_a_folder_each_distinct_text_is_encoded_once():
  encoder = Encoder()
  np.testing.assert_array_equal(encode(TEXTS[::-1] + TEXTS, encoder, None)[30:], EXPECTED)
  assert sorted(encoder.asked) == sorted(TEXTS)


def test_what_is_there_is_not_encoded_again(tmp_path):
  encode(TEXTS[:20], Encoder(), tmp_path)
  encoder = Encoder()
  result_ND = encode(TEXTS, encoder, tmp_path)
  np.testing.assert_array_equal(result_ND, EXPECTED)
  assert result_ND.dtype == np.float32
  assert sorted(encoder.asked) == sorted(TEXTS[20:])


def test_another_encoder_has_a_folder_of_its_own(tmp_path):
  encode(TEXTS, Encoder(), tmp_path)
  encoder = Encoder()
  cached_encode(TEXTS, encoder, folder=tmp_path, identity="other")
  assert len(encoder.asked) == 30


def test_a_killed_process_loses_the_part_it_was_at(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    encode(TEXTS, Encoder(calls_before_death=2), tmp_path)
  encoder = Encoder()
  np.testing.assert_array_equal(encode(TEXTS, encoder, tmp_path), EXPECTED)
  assert len(encoder.asked) == 30 - 2 * 8


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "flipped", "other arrays", "nan"])
def test_a_damaged_part_is_encoded_again_and_replaced(tmp_path, damage):
  encode(TEXTS, Encoder(), tmp_path)
  part = sorted((tmp_path / "e").glob("*.npz"))[0]
  whole = part.read_bytes()
  if damage == "cut":
    part.write_bytes(whole[: len(whole) // 2])
  elif damage == "garbage":
    part.write_bytes(b"no archive")
  elif damage == "empty":
    part.write_bytes(b"")
  elif damage == "flipped":
    with np.load(part) as arrays:
      at = whole.index(arrays["vectors"].tobytes())
    part.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
  elif damage == "other arrays":
    np.savez(part, keys=np.zeros((8, 3)), vectors=np.zeros((8, 2), np.float32))
  else:
    with np.load(part) as arrays:
      np.savez(part, keys=arrays["keys"], vectors=arrays["vectors"] * np.nan)
  encoder = Encoder()
  np.testing.assert_array_equal(encode(TEXTS, encoder, tmp_path), EXPECTED)
  assert 0 < len(encoder.asked) <= 8
  encoder = Encoder()
  np.testing.assert_array_equal(encode(TEXTS, encoder, tmp_path), EXPECTED)
  assert encoder.asked == []


def test_two_processes_may_write_at_once(tmp_path):
  first, second = Encoder(), Encoder()

  def encode_while_another_process_does_the_same(texts):
    if not second.asked:
      encode(TEXTS, second, tmp_path)
    return first(texts)

  np.testing.assert_array_equal(
    encode(TEXTS, encode_while_another_process_does_the_same, tmp_path), EXPECTED
  )
  assert len(first.asked) == len(second.asked) == 30
  files = [file.suffix for file in (tmp_path / "e").iterdir()]
  assert files == [".npz"] * 4  # the same parts, and nothing left behind


def test_progress_counts_the_parts_that_are_missing(tmp_path):
  seen = []

  def progress(parts, description, total):
    seen.append(total)
    return parts

  encode(TEXTS[:8], Encoder(), tmp_path, progress=progress)
  encode(TEXTS, Encoder(), tmp_path, progress=progress)
  encode(TEXTS, Encoder(), tmp_path, progress=progress)
  assert seen == [1, 3]


def test_an_identity_changes_with_the_parameters_and_the_cut():
  params = {"a": np.zeros(3, np.float32), "b": {"c": np.ones((2, 2), np.float32)}}
  changed = {"a": np.zeros(3, np.float32), "b": {"c": np.full((2, 2), 2, np.float32)}}
  names = {
    encoder_identity("m", params, max_tokens=8),
    encoder_identity("m", params, max_tokens=9),
    encoder_identity("n", params, max_tokens=8),
    encoder_identity("m", changed, max_tokens=8),
  }
  assert len(names) == 4
  assert encoder_identity("m", params, max_tokens=8) in names


def test_bad_arguments_are_named(tmp_path):
  with pytest.raises(ValueError, match="at least one text"):
    cached_encode([], Encoder(), folder=None, identity="e")
  with pytest.raises(ValueError, match="texts_per_part: 0"):
    cached_encode(["a"], Encoder(), folder=None, identity="e", texts_per_part=0)
  with pytest.raises(ValueError, match=r"encode_fn: shape \(1, 2\) for 2 texts"):
    cached_encode(["a", "b"], lambda texts: np.zeros((1, 2)), folder=tmp_path, identity="e")
