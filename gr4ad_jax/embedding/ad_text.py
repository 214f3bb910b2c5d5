"""What an encoder reads of an ad: an instruction for its kind, then its fields in words.

    Product offer: identify vertical, brand, key attributes. category: Makeup > Nails. advertiser:
    OPI. price about 10. conversion: purchase. text: polish, matte red

Short, as a small encoder reads 256 tokens at most; the text comes last, so that a long one loses
its own end and no other field.

Source: GR4AD (arXiv 2602.22732) 3.1, six instruction templates; the wording is our own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from gr4ad_jax.data.records import DEFAULT_AD_TYPE, AdTable, ContentTable

# What to attend to in each kind of ad of `records.AD_TYPES`.
INSTRUCTIONS = {
  "product": "Product offer: identify vertical, brand, key attributes.",
  "livestream": "Livestream: identify theme, host persona, mood.",
  "image_sequence": "Product images: identify category, brand, specifications.",
  "virtual": "Virtual content: identify delivered value, story hook.",
  "lead_in_video": "Selling video: identify host appeal, demonstration, offer.",
  "product_video": "Product video: identify attributes, format, hooks, style.",
}
INPUTS = ("category", "advertiser_id", "price", "conversion_type")  # that can be left out
BLANK = "unknown"  # stands where no field is known

_UNKNOWN_NAMES = ("", "unknown")  # "unknown": brands that a reader of logs had to fill in
_FREE, _NO_PRICE = -10_000, -10_001  # price bands of 0 and NaN, below those of all other prices


def ad_inputs(
  ads: AdTable,
  *,
  rows: np.ndarray | None = None,
  masked: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
  """The encoder's input for each ad; fields that are not known are left out.

  The text loses a copy of the whole category path, which the category field holds already.

  Args:
    ads: the catalogue.
    rows: [N] ads to describe, repeats allowed; None = all, N = A.
    masked: an attribute of `INPUTS` -> [N] bool, where it must not be seen: the field is left out,
      and the advertiser's name and the parts of the category also vanish from the text (names
      without a letter stay, as a "7" in a text is rarely the advertiser).

  Returns:
    [N] str objects, none blank.

  Raises:
    ValueError: masked names something else, or a mask has another shape or dtype.
  """
  rows = np.arange(len(ads.ad_id)) if rows is None else np.asarray(rows)
  hidden = _hidden(masked or {}, len(rows))
  band_N = price_bands(ads.price[rows])
  inputs_N = np.empty(len(rows), object)
  for n, row in enumerate(rows):
    hides_category, hides_advertiser, hides_price, hides_conversion = hidden[:, n]
    inputs_N[n] = _input(
      INSTRUCTIONS[ads.ad_type[row]],
      ads.category[row],
      ads.text[row],
      hides_category=hides_category,
      advertiser=ads.advertiser_id[row],
      hides_advertiser=hides_advertiser,
      price="" if hides_price else price_words(int(band_N[n])),
      conversion="" if hides_conversion else ads.conversion_type[row],
    )
  return inputs_N


def content_inputs(contents: ContentTable, *, rows: np.ndarray | None = None) -> np.ndarray:
  """The encoder's input for each organic content: that of a product ad with its text and category.

  Args:
    contents: the contents.
    rows: [N] contents to describe, repeats allowed; None = all, N = O.

  Returns:
    [N] str objects, none blank.
  """
  rows = np.arange(len(contents.content_id)) if rows is None else np.asarray(rows)
  inputs_N = np.empty(len(rows), object)
  for n, row in enumerate(rows):
    instruction = INSTRUCTIONS[DEFAULT_AD_TYPE]
    inputs_N[n] = _input(instruction, contents.category[row], contents.text[row])
  return inputs_N


def ad_attributes(ads: AdTable, *, min_count: int) -> dict[str, np.ndarray]:
  """What an encoder can be trained to tell of each ad, as classes.

  Args:
    ads: the catalogue.
    min_count: a value that fewer ads have is no class.

  Returns:
    Attribute -> [A] int32, a class from 0, or -1 = unknown or rare. "category_1", "category_2", ...
    (a class is the path down to this depth), "advertiser", "price" (a band of `price_bands`) and
    "conversion_type"; without those that have fewer than two classes. `input_of` names the input
    that gives an attribute away.

  Raises:
    ValueError: min_count is below 1.
  """
  if min_count < 1:
    raise ValueError(f"min_count: {min_count}, must be >= 1")
  parts_A = [_path(category) for category in ads.category]
  values = {}
  for depth in range(1, max(map(len, parts_A), default=0) + 1):
    values[f"category_{depth}"] = [
      " > ".join(parts[:depth]) if len(parts) >= depth else "" for parts in parts_A
    ]
  values["advertiser"] = [name if _is_known(name) else "" for name in ads.advertiser_id]
  values["price"] = price_bands(ads.price)
  values["conversion_type"] = ads.conversion_type
  classes = {}
  for name, value_A in values.items():
    unknown = _NO_PRICE if name == "price" else ""
    class_A = _classes(value_A, unknown, min_count)
    if class_A.max(initial=-1) >= 1:
      classes[name] = class_A
  return classes


def input_of(attribute: str) -> str:
  """The name for `masked` of the input that gives an attribute of `ad_attributes` away."""
  if re.fullmatch(r"category_\d+", attribute):
    return "category"
  name = {"advertiser": "advertiser_id"}.get(attribute, attribute)
  if name not in INPUTS:
    known = "category_1, category_2, ..., advertiser, price, conversion_type"
    raise ValueError(f"attribute: {attribute!r} is none of {known}")
  return name


def price_bands(price_N: np.ndarray) -> np.ndarray:
  """Numbers of price bands, three a decade: about 1, 2, 5, 10, ... are 0, 1, 2, 3, ...

  Args:
    price_N: [N] float32 >= 0, currency units; NaN = unknown.

  Returns:
    [N] int32, ascending with the price; 0 and NaN have bands of their own below all others.
  """
  price_N = np.asarray(price_N, np.float64)
  with np.errstate(divide="ignore"):
    band_N = np.round(3 * np.log10(price_N))
  band_N = np.where(price_N == 0, _FREE, np.where(np.isnan(price_N), _NO_PRICE, band_N))
  return band_N.astype(np.int32)


def price_words(band: int) -> str:
  """A price band in words, without a currency; "" = unknown."""
  if band == _NO_PRICE:
    return ""
  if band == _FREE:
    return "free"
  decade, step = divmod(band, 3)
  return f"price about {float(f'{(1, 2, 5)[step]}e{decade}'):.10g}"


def _hidden(masked: Mapping[str, np.ndarray], num_rows: int) -> np.ndarray:
  """The masks as [inputs, N] bool, in the order of INPUTS."""
  hidden = np.zeros((len(INPUTS), num_rows), bool)
  for name, mask_N in masked.items():
    if name not in INPUTS:
      raise ValueError(f"masked: {name!r} is none of {', '.join(INPUTS)}")
    mask_N = np.asarray(mask_N)
    if mask_N.shape != (num_rows,) or mask_N.dtype != bool:
      got = f"{mask_N.dtype} {mask_N.shape}"
      raise ValueError(f"masked: {name!r} is {got}, must be bool ({num_rows},), one for each row")
    hidden[INPUTS.index(name)] = mask_N
  return hidden


def _input(
  instruction: str,
  category: str,
  text: str,
  *,
  hides_category: bool = False,
  advertiser: str = "",
  hides_advertiser: bool = False,
  price: str = "",
  conversion: str = "",
) -> str:
  parts = _path(category)
  fields = []
  if hides_category:
    text = _without(text, parts)
  elif parts:
    fields.append(f"category: {' > '.join(parts)}")
    text = _without_path(text, parts)
  if hides_advertiser:
    text = _without(text, (advertiser,))
  elif _is_known(advertiser):
    fields.append(f"advertiser: {advertiser.strip()}")
  if price:
    fields.append(price)
  if _is_known(conversion):
    fields.append(f"conversion: {conversion.strip()}")
  if text := " ".join(text.split()):
    fields.append(f"text: {text}")
  return f"{instruction} {'. '.join(fields or [BLANK])}"


@functools.lru_cache(maxsize=1 << 16)
def _path(category: str) -> tuple[str, ...]:
  parts = (part.strip() for part in category.split(" > "))
  return tuple(part for part in parts if _is_known(part))


def _is_known(name: str) -> bool:
  return name.strip().lower() not in _UNKNOWN_NAMES


@functools.lru_cache(maxsize=1 << 16)
def _pattern(names: tuple[str, ...], between: str) -> re.Pattern:
  """The names as whole words, in any case."""
  return re.compile(rf"(?<!\w)(?:{between.join(map(re.escape, names))})(?!\w)", re.IGNORECASE)


def _without(text: str, names: tuple[str, ...]) -> str:
  """The text without any of the names; names without a letter are left alone."""
  lower = text.lower()
  found = {name for name in names if name.lower() in lower and any(map(str.isalpha, name))}
  longest_first = tuple(sorted(filter(_is_known, found), key=lambda name: (-len(name), name)))
  if not longest_first:
    return text
  return _joined(_pattern(longest_first, "|").sub(" ", text))


def _without_path(text: str, parts: tuple[str, ...]) -> str:
  """The text without a copy of the whole path, its parts joined by commas or '>'."""
  lower = text.lower()
  if not all(part.lower() in lower for part in parts):
    return text
  shorter = _pattern(parts, r"\s*[,>]\s*").sub(" ", text)
  return text if shorter == text else _joined(shorter)


def _joined(text: str) -> str:
  """Mends what removed words left: separators that follow each other, or have nothing to part."""
  return re.sub(r"\s*[,;>|](?:\s*[,;>|])*\s*", ", ", text).strip(" ,")


def _classes(value_A: Sequence, unknown: object, min_count: int) -> np.ndarray:
  class_A, names = pd.factorize(pd.Series(value_A), sort=True)
  kept = (np.bincount(class_A, minlength=len(names)) >= min_count) & (names != unknown)
  return np.where(kept, np.cumsum(kept) - 1, -1)[class_A].astype(np.int32)
