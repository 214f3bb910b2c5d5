"""What several tests share: inputs, a catalogue and its encoder, collectives, text, pages."""

import functools
import re
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from gr4ad_jax.data.records import AdTable
from gr4ad_jax.data.shortlist import NUMBERS
from gr4ad_jax.embedding.ad_text import INSTRUCTIONS
from gr4ad_jax.embedding.cooccurrence import ItemPairs
from gr4ad_jax.embedding.text_encoder import BertConfig, BertEncoder, TokenStates
from gr4ad_jax.gr4ad.batch import Context, KnownAds, Vocabulary
from gr4ad_jax.gr4ad.build import Decoder, init_params

SHORTLIST = 7  # ads of a random context's
_CODES = np.unravel_index(np.arange(0, 210, 9), (7, 5, 6))
KNOWN_ADS = KnownAds.of(np.arange(1000, 1024), np.stack(_CODES, axis=-1))
VOCABULARY = Vocabulary(
  codebook_sizes=(7, 5, 6), feature_sizes=(3, 4), num_ecpm_bins=4, num_count_buckets=16,
  num_age_buckets=32, num_trend_buckets=32, num_trending=3, num_organic_buckets=8192,
  ads=KNOWN_ADS,
)


def random_codes(rng, *shape) -> np.ndarray:
  return np.stack([rng.integers(0, v, shape) for v in VOCABULARY.codebook_sizes], axis=-1)


def random_context(
  rng, rows: int, history: int = 5, organic: int = 4, numbers: int = len(NUMBERS)
) -> Context:
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
    short_code_BML=random_codes(rng, rows, SHORTLIST).astype(np.int32),
    short_number_BMF=rng.integers(0, 5000, (rows, SHORTLIST, numbers)).astype(np.int32),
    # A few are not known.
    ad_id_BT=(996 + 5 * np.arange(rows * history) % 28).reshape(rows, history).astype(np.int32),
  )


def showing(context: Context, sids_B) -> Context:
  """The same with no other SIDs on the shortlists than these; one collection for each request."""
  kept_B = [{tuple(sid) for sid in np.asarray(sids).tolist()} for sids in sids_B]
  gone_BM = np.array([
    [tuple(code) not in kept for code in code_ML]
    for code_ML, kept in zip(context.short_code_BML.tolist(), kept_B, strict=True)
  ])[..., None]
  return context._replace(
    short_code_BML=np.where(gone_BM, -1, context.short_code_BML),
    short_number_BMF=np.where(gone_BM, -1, context.short_number_BMF),
  )


def clustered(seed=0, num_points=400, width=12) -> np.ndarray:
  """Embeddings in twelve clusters."""
  rng = np.random.default_rng(seed)
  centres = 4 * rng.standard_normal((12, width))
  noise = rng.standard_normal((num_points, width))
  return (centres[rng.integers(0, 12, num_points)] + noise).astype(np.float32)


def check_rows_stand_alone(encode) -> None:
  """Equal rows get equal codes, whatever comes with them."""
  embedding = clustered(seed=2)
  codes = encode(embedding)
  order = np.random.default_rng(0).integers(0, len(embedding), 3000)
  np.testing.assert_array_equal(encode(embedding[order]), codes[order])
  np.testing.assert_array_equal(encode(embedding[:1]), codes[:1])


BRANDS = ("acme", "bolt", "cask", "dune")
COLOURS = ("red", "green", "blue", "white", "black")


def catalogue(num_ads=40) -> AdTable:
  """Every brand sells in both categories; the text names the brand, a colour and a number."""
  rows = np.arange(num_ads)
  brand = [BRANDS[n % 4] for n in rows]
  text = [f"{b} {COLOURS[n % 5]} size {n}" for n, b in enumerate(brand)]
  blank = np.array([""] * num_ads, object)
  return AdTable(
    ad_id=np.array([f"ad{n}" for n in rows], object),
    advertiser_id=np.array(brand, object),
    category=np.array([("home > tool", "home > lamp")[n // 4 % 2] for n in rows], object),
    text=np.array(text, object),
    price=np.full(num_ads, np.nan, np.float32),
    conversion_type=blank,
    ad_type=np.array(["product"] * num_ads, object),
    account_id=blank,
    campaign_id=blank,
    bid=np.full(num_ads, np.nan, np.float32),
    embedding_AD=None,
  )


def ring_pairs(num_ads=40) -> ItemPairs:
  """Each ad goes together with the next one and the one after it."""
  item = np.repeat(np.arange(num_ads, dtype=np.int32), 2)
  neighbour = (item + np.tile([1, 2], num_ads)).astype(np.int32) % num_ads
  return ItemPairs(item, neighbour, np.tile(np.float32([2, 1]), num_ads))


@functools.cache
def tiny_encoder() -> BertEncoder:
  """A random BERT of two layers that reads the words of the catalogue."""
  instruction = INSTRUCTIONS["product"].replace(":", " :").replace(",", " ,").replace(".", " .")
  words = [
    "[PAD]", "[UNK]", *BRANDS, *COLOURS, *"home tool lamp category advertiser text size".split(),
    *map(str, range(40)), *instruction.split(), ">",
  ]  # fmt: skip
  vocabulary = {word: n for n, word in enumerate(dict.fromkeys(words))}
  tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  config = BertConfig(
    vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=32, layer_norm_eps=1e-12,
  )  # fmt: skip
  tokens = jnp.zeros((1, 4), int), jnp.ones((1, 4), bool)
  params = jax.jit(TokenStates(config).init)(jax.random.key(0), *tokens)["params"]
  params["token_table"] *= 25  # so that texts differ
  return BertEncoder("tiny", config, jax.tree.map(np.asarray, params), tokenizer)


def shaken_params(decoder: Decoder) -> dict:
  """Parameters far from their start, so that gates are not neutral.

  Their shapes alone are the decoder's: its own start takes seconds to compile.
  """
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: init_params(decoder, jax.random.key(0)))

  def drawn(path, leaf):
    start = float(getattr(path[-1], "key", "") == "scale")  # of a norm
    return jnp.asarray(start + 0.35 * rng.normal(size=leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(drawn, shapes)


COLLECTIVE = re.compile(
  r"^ *(?:ROOT )?%?\S+ = (.*?) "
  r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(",
  re.MULTILINE,
)


def moved(program: str) -> dict[str, list[tuple[int, ...]]]:
  """Kind of collective -> shapes of its results."""
  found = {}
  for shapes, kind in COLLECTIVE.findall(program):
    for dims in re.findall(r"[a-z0-9]+\[([0-9,]*)\]", shapes):
      found.setdefault(kind, []).append(tuple(int(n) for n in dims.split(",") if n))
  return found


HOSTILE = "</style><script>alert(1)</script><img src=x onerror=\"alert(2)\"> & 'quoted' \u202e"


class Page(HTMLParser):
  """What a browser would see: tags with attributes, the visible text, the text of each cell."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.cells, self.chunks, self._open = [], [], [], []
    self.feed(text)
    assert not self._open, f"unclosed {self._open}"
    self.text = " ".join("".join(self.chunks).split())

  def assert_refers_to_itself(self, first):
    """No tag loads or runs anything, and links lead to sections, such as the `first`."""
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & {
      name for name, _ in self.tags
    }
    ids = {"#" + a["id"] for _, a in self.tags if "id" in a}
    for name, attributes in self.tags:
      assert not {"src", "srcset", "data", "xlink:href", "action"} & set(attributes), name
      assert attributes.get("href", first) in ids
      assert not any(key.startswith("on") for key in attributes)

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
