"""The hash level: against a scalar splitmix64 and pinned values."""

import hashlib

import numpy as np

from gr4ad_jax.tokenizer.feature_hash import column_values, hash_codes, splitmix64

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def scalar_mix(state: int) -> int:
  z = (state + GOLDEN) & MASK
  z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
  z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
  return z ^ (z >> 31)


def scalar_code(values: list[int], size: int, seed: int) -> int:
  h = seed
  for i, value in enumerate(values):
    h = scalar_mix(h ^ scalar_mix((value + i * GOLDEN) & MASK))
  return h % size


def test_splitmix64_gives_the_published_stream_of_seed_0():
  states = np.array([0, GOLDEN, 2 * GOLDEN & MASK], np.uint64)
  assert splitmix64(states).tolist() == [
    0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F
  ]  # fmt: skip


def test_columns_are_mixed_as_written():
  numbers = np.array([0, 1, 2**40, -1])
  names = np.array(["a", "b", "a", "Zürich"], object)
  names_64 = [
    int.from_bytes(hashlib.blake2b(n.encode(), digest_size=8).digest(), "little") for n in names
  ]
  for size, seed in ((16, 0), (1000, 7)):
    expected = [
      scalar_code([int(n) & MASK, t], size, seed) for n, t in zip(numbers, names_64, strict=True)
    ]
    assert hash_codes([numbers, names], size=size, seed=seed).tolist() == expected


def test_codes_are_pinned():
  columns = [np.array(["12", "12", "69"], object), np.array(["purchase", "call", "call"], object)]
  assert hash_codes(columns, size=1024, seed=0).tolist() == [695, 102, 781]


def test_order_of_columns_and_seed_matter():
  a, b = np.arange(200), np.arange(200)[::-1]
  codes = hash_codes([a, b], size=1 << 20)
  assert (codes != hash_codes([b, a], size=1 << 20)).any()
  assert (codes != hash_codes([a, b], size=1 << 20, seed=1)).any()
  assert codes.dtype == np.int32


def test_equal_floats_hash_equal():
  values = column_values(np.array([np.nan, -np.nan, 0.0, -0.0, 1.5, 2.5], np.float32))
  assert values[0] == values[1]
  assert values[2] == values[3]
  assert len(set(values.tolist())) == 4


def test_codes_spread_over_the_level():
  codes = hash_codes([np.array([str(i) for i in range(6400)], object)], size=64)
  counts = np.bincount(codes, minlength=64)
  assert counts.min() > 60 and counts.max() < 140  # 100 +- 4 standard deviations
