"""What several tests share: small random inputs, hostile text, a reader of pages."""

from html.parser import HTMLParser

import numpy as np

from gr4ad_jax.data.batch import Context, Vocabulary

VOCABULARY = Vocabulary(
  codebook_sizes=(7, 5, 6), feature_sizes=(3, 4), num_ecpm_bins=4, num_count_buckets=16,
  num_age_buckets=32, num_trend_buckets=32, num_trending=3, num_organic_buckets=8192,
)


def random_codes(rng, *shape) -> np.ndarray:
  return np.stack([rng.integers(0, v, shape) for v in VOCABULARY.codebook_sizes], axis=-1)


def random_context(rng, rows: int, history: int = 5, organic: int = 4) -> Context:
  def buckets(width, size=8):
    return rng.integers(0, size, (rows, width)).astype(np.int32)

  return Context(
    feature_BF=np.stack([rng.integers(0, n, rows) for n in (3, 4)], axis=1).astype(np.int32),
    ad_code_BTL=random_codes(rng, rows, history).astype(np.int32),
    ad_count_BT=buckets(history), ad_age_BT=buckets(history), ad_trend_BT=buckets(history),
    organic_code_BOL=random_codes(rng, rows, organic).astype(np.int32),
    organic_id_BO=buckets(organic, 8192), organic_count_BO=buckets(organic),
    organic_age_BO=buckets(organic), organic_trend_BO=buckets(organic),
    trend_code_BNL=random_codes(rng, rows, 3).astype(np.int32), trend_share_BN=buckets(3),
  )


def clustered(seed=0, num_points=400, width=12) -> np.ndarray:
  """Embeddings in twelve clusters."""
  rng = np.random.default_rng(seed)
  centres = 4 * rng.standard_normal((12, width))
  noise = rng.standard_normal((num_points, width))
  return (centres[rng.integers(0, 12, num_points)] + noise).astype(np.float32)


HOSTILE = "</style><script>alert(1)</script><img src=x onerror=\"alert(2)\"> & 'quoted' \u202e"


class Page(HTMLParser):
  """What a browser would see: tags with attributes, the visible text, the text of each cell."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.cells, self.chunks, self._open = [], [], [], []
    self.feed(text)
    assert not self._open, f"unclosed {self._open}"
    self.text = " ".join("".join(self.chunks).split())

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    self.chunks.append(" ")
    if tag not in ("meta", "br"):
      self._open.append(tag)
    if tag == "td":
      self.cells.append((dict(attrs), []))

  def handle_endtag(self, tag):
    assert self._open.pop() == tag
    self.chunks.append(" ")

  def handle_data(self, data):
    if self._open and self._open[-1] != "style":
      self.chunks.append(data)
      if "td" in self._open:
        self.cells[-1][1].append(data)
