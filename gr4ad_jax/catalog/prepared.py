"""Prepared data and semantic IDs, opened together: what every system learns from."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from gr4ad_jax.catalog.ad_index import AdIndex, build_ad_index
from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.engagements import engaged_with_ad
from gr4ad_jax.data.examples import ExampleSet, open_examples, training_events
from gr4ad_jax.data.log_folder import read_logs
from gr4ad_jax.data.records import Logs
from gr4ad_jax.machine import storage
from gr4ad_jax.tokenizer import semantic_id


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What `gr4ad prepare` and `gr4ad tokenize` wrote.

  Attributes:
    logs: the cleaned logs.
    examples: prepared requests.
    sids: codes of ads and contents.
    index: SID <-> ads; ads of one SID ordered by engagements in training.
    fingerprint: of examples and semantic IDs.
  """

  logs: Logs
  examples: ExampleSet
  sids: semantic_id.SemanticIds
  index: AdIndex
  fingerprint: str


def open_prepared(data: str, sids: str, *, fingerprint: str = "") -> Prepared:
  """Reads both folders.

  Args:
    data: that `gr4ad prepare` wrote.
    sids: that `gr4ad tokenize` wrote.
    fingerprint: what it has to be; "" = anything.

  Raises:
    LogError: a folder is missing.
    ConfigError: the semantic IDs are not of these logs, or the fingerprint is another.
  """
  place = storage.place(data)
  examples_folder = storage.fetch(place / "examples")
  examples = open_examples(examples_folder)
  logs = read_logs(storage.fetch(place / "logs"))
  coded = semantic_id.load(storage.fetch(storage.place(sids)))
  if len(coded.codes_AL) != len(logs.ads.ad_id):
    raise ConfigError(
      f"{sids}: holds {len(coded.codes_AL)} ads, {place / 'logs'} has {len(logs.ads.ad_id)}; "
      "run `gr4ad tokenize` on these logs"
    )
  if len(coded.codebook_sizes) < 2:
    raise ConfigError(f"{sids}: {len(coded.codebook_sizes)} SID level; needs at least 2")
  found = _fingerprint(examples_folder / "examples.json", coded)
  if fingerprint and fingerprint != found:
    raise ConfigError(f"{data}, {sids}: changed since the run was trained on them; train again")
  # Ads of one SID come by their clicks and conversions in training requests.
  rows = engaged_with_ad(logs.events) & training_events(logs, examples)
  engagements_A = np.bincount(logs.events.ad[rows], minlength=len(logs.ads.ad_id))
  index = build_ad_index(coded.codes_AL, engagements_A)
  return Prepared(logs, examples, coded, index, found)


def _fingerprint(examples: Path, sids: semantic_id.SemanticIds) -> str:
  digest = hashlib.blake2b(examples.read_bytes(), digest_size=8)
  for codes in (sids.codes_AL, sids.content_codes_OL):
    digest.update(np.ascontiguousarray(codes).tobytes())
  return digest.hexdigest()
