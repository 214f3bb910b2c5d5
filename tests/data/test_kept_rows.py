import numpy as np
import pytest

from gr4ad_jax.data.kept_rows import KeptRows


class Source(list):
  """Counts how often each row is read."""

  def __init__(self, rows):
    super().__init__(rows)
    self.read = [0] * len(rows)

  def __getitem__(self, row):
    self.read[row] += 1
    return super().__getitem__(row)


def source():
  return Source([{"x": np.full(100, n), "y": n} for n in range(4)])  # of 800 + 8 + 300 bytes


@pytest.mark.parametrize(("most_bytes", "kept"), [(1 << 20, 4), (2300, 2), (0, 0)])
def test_rows_are_read_once_while_they_fit(most_bytes, kept):
  records = source()
  rows = KeptRows(records, lambda record: record["y"] * 10, most_bytes=most_bytes)
  for _ in range(3):
    assert [rows[n] for n in range(len(rows))] == [0, 10, 20, 30]
  assert records.read == [1] * kept + [3] * (4 - kept)


def test_a_row_beyond_the_last_is_an_error():
  rows = KeptRows(source(), lambda record: record["y"])
  with pytest.raises(IndexError):
    rows[4]
