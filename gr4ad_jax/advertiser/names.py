"""Names of advertisers, and titles without them: what a language model reads and tells."""

from __future__ import annotations

import collections
import html
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NO_NAME = ("", "unknown")  # what stands in logs where nobody knows the advertiser
_TAKEN = re.compile(r"[|<>\x00-\x1f\x7f]+")  # the separators of prompts, and control characters


class Names(NamedTuple):
  """A advertisers, in the order of their names' normal form.

  Attributes:
    name_A: str objects, the most frequent spelling, without what separates names in texts.
    advertiser_N: int32, the advertiser of each row; -1 = nobody knows.
    merged: lists of spellings that are one name but for case and width.
  """

  name_A: np.ndarray
  advertiser_N: np.ndarray
  merged: list[list[str]]


def clean(text: str) -> str:
  """A text without separators, control characters and HTML's entities, words one space apart."""
  return " ".join(_TAKEN.sub(" ", html.unescape(text)).split())


def normal_form(name: str) -> str:
  """What two spellings of a name have in common: NFKC, casefold, single spaces."""
  return unicodedata.normalize("NFKC", _without_colon(name)).casefold()


def _without_colon(name: str) -> str:
  """A clean name; a colon ends names in a stream."""
  return clean(name.replace(":", " "))


def merge_names(spelling_N: Sequence[str]) -> Names:
  """Numbers advertisers by name; spellings with one normal form are one advertiser.

  Args:
    spelling_N: the advertiser of each ad, as found.

  Returns:
    Numbers that depend on the set of names alone, not on the order of rows.
  """
  counts: dict[str, collections.Counter] = {}
  forms = {text: normal_form(text) for text in set(spelling_N)}
  for text in spelling_N:
    counts.setdefault(forms[text], collections.Counter())[text] += 1
  for nobody in NO_NAME:
    counts.pop(nobody, None)
  number = {form: n for n, form in enumerate(sorted(counts))}
  best = [min(counts[form].items(), key=lambda pair: (-pair[1], pair[0]))[0] for form in number]
  return Names(
    np.array([_without_colon(text) for text in best], object),
    np.array([number.get(forms[text], -1) for text in spelling_N], np.int32),
    [sorted(counts[form]) for form in number if len(counts[form]) > 1],
  )


def title_without(name: str, text: str, *, most_chars: int) -> str:
  """A title that does not begin with its advertiser's name, cut between words.

  Most titles of shops begin with the brand; left there, a line tells its name twice.

  Args:
    name: of the advertiser.
    text: the ad's.
    most_chars: a longer title ends before the word that does not fit; one word that is longer than
      that is cut itself.
  """
  title, name = clean(text), clean(name)
  while name and title.casefold().startswith(name.casefold()):
    rest = title[len(name):]
    if rest[:1].isalnum():  # a longer word that begins alike
      break
    title = rest.lstrip(" -,:;.'")
  if len(title) <= most_chars:
    return title
  return title[: most_chars + 1].rpartition(" ")[0] or title[:most_chars]
