"""Prepared data and semantic IDs, opened together: what every system learns from."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gr4ad_jax.catalog.ad_index import AdIndex, build_ad_index
from gr4ad_jax.config import ConfigError, read_values
from gr4ad_jax.data.engagements import engaged_with_ad
from gr4ad_jax.data.examples import ExampleSet, open_examples, training_events
from gr4ad_jax.data.log_folder import PREPARE_AGAIN, read_logs
from gr4ad_jax.data.records import Logs
from gr4ad_jax.machine import digests, storage
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.tokenizer import semantic_id


class PreparedLogs(NamedTuple):
  """What `gr4ad prepare` wrote.

  Attributes:
    logs: the cleaned logs.
    examples: prepared requests.
    fingerprint: of both, a hash of each.
  """

  logs: Logs
  examples: ExampleSet
  fingerprint: str


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What `gr4ad prepare` and `gr4ad tokenize` wrote.

  Attributes:
    logs: the cleaned logs.
    examples: prepared requests.
    sids: codes of ads and contents.
    index: SID <-> ads; ads of one SID ordered by engagements in training.
    fingerprint: of logs, examples and semantic IDs, a hash of each.
    early_fingerprint: as earlier versions made it, of counts and semantic IDs alone.
  """

  logs: Logs
  examples: ExampleSet
  sids: semantic_id.SemanticIds
  index: AdIndex
  fingerprint: str
  early_fingerprint: str = dataclasses.field(default="", kw_only=True)

  def are(self, fingerprint: str) -> bool:
    """Whether these are the data that a fingerprint was taken of."""
    return fingerprint in (self.fingerprint, self.early_fingerprint)

  @property
  def without_sids(self) -> PreparedLogs:
    """Logs and examples alone."""
    return PreparedLogs(self.logs, self.examples, self.fingerprint.rpartition("-")[0])


def open_logs(data: Place, *, fingerprint: str = "") -> PreparedLogs:
  """Reads logs and examples.

  Args:
    data: folder that `gr4ad prepare` wrote.
    fingerprint: what it has to be; "" = anything.

  Raises:
    LogError: a folder is missing.
    ConfigError: a file is not what was written, or the fingerprint is another.
  """
  examples_folder, logs_folder = (storage.fetch(data / name) for name in ("examples", "logs"))
  found = data_fingerprint(logs_folder, examples_folder)
  if fingerprint not in ("", found):
    raise ConfigError(f"{data}: {_changed(fingerprint, found)} since the model was trained on "
                      "them; train it again")
  return PreparedLogs(read_logs(logs_folder), open_examples(examples_folder), found)


def open_prepared(data: str, sids: str, *, fingerprint: str = "") -> Prepared:
  """Reads both folders.

  Args:
    data: that `gr4ad prepare` wrote.
    sids: that `gr4ad tokenize` wrote.
    fingerprint: what it has to be; "" = anything.

  Raises:
    LogError: a folder is missing.
    ConfigError: a file is not what was written, the semantic IDs are not of these logs, or the
      fingerprint is another.
  """
  place = storage.place(data)
  logs, examples, of_data = open_logs(place)
  coded = semantic_id.load(storage.fetch(storage.place(sids)))
  _require_of(coded, logs, sids, place)
  found = f"{of_data}-{_hash_codes(coded)}"
  about = storage.fetch(place / "examples") / "examples.json"
  early = _hash_codes(coded, about.read_bytes())
  if fingerprint not in ("", found, early):
    raise ConfigError(f"{data}, {sids}: {_changed(fingerprint, found)} since the run was trained "
                      "on them; train again")
  if fingerprint == early:
    console.print(
      f"{data}: this run is of an earlier version, which knew its data by counts and semantic IDs "
      "alone; whether logs or examples have changed since cannot be told",
    )
  # Ads of one SID come by their clicks and conversions in training requests.
  rows = engaged_with_ad(logs.events) & training_events(logs, examples)
  engagements_A = np.bincount(logs.events.ad[rows], minlength=len(logs.ads.ad_id))
  index = build_ad_index(coded.codes_AL, engagements_A)
  return Prepared(logs, examples, coded, index, found, early_fingerprint=early)


def data_fingerprint(logs: Path, examples: Path) -> str:
  """A hash of the logs and one of the examples, from the digests that `gr4ad prepare` has kept.

  Raises:
    ConfigError: a file is not what was written.
  """
  of_logs = digests.check(logs / "log.json", remedy=PREPARE_AGAIN)
  digests.check(examples / "examples.json", remedy=PREPARE_AGAIN)
  file = examples / "examples.json"
  about = read_values(file) if file.exists() else {}  # which `open_examples` tells
  return f"{digests.of_value(of_logs)}-{digests.of_value(about)}"


def _require_of(coded: semantic_id.SemanticIds, logs: Logs, sids: str, data: Place) -> None:
  """Raises ConfigError where codes are not of these logs, or are too few for a search."""
  if len(coded.codes_AL) != len(logs.ads.ad_id):
    raise ConfigError(
      f"{sids}: holds {len(coded.codes_AL)} ads, {data / 'logs'} has {len(logs.ads.ad_id)}; "
      "run `gr4ad tokenize --overwrite` on these logs"
    )
  if coded.of_rows and coded.of_rows != semantic_id.name_rows(logs):
    raise ConfigError(
      f"{sids}: made for other ads or contents, or another order of them, than {data / 'logs'} "
      "has; run `gr4ad tokenize --overwrite` on these logs"
    )
  if len(coded.codebook_sizes) < 2:
    raise ConfigError(f"{sids}: {len(coded.codebook_sizes)} SID level; needs at least 2")


def _hash_codes(sids: semantic_id.SemanticIds, first: bytes = b"") -> str:
  digest = hashlib.blake2b(first, digest_size=8)
  for codes in (sids.codes_AL, sids.content_codes_OL):
    digest.update(np.ascontiguousarray(codes).tobytes())
  return digest.hexdigest()


def _changed(before: str, now: str) -> str:
  """What two fingerprints say has changed, in words."""
  parts = zip(("logs", "examples", "semantic IDs"), before.split("-"), now.split("-"), strict=False)
  found = [name for name, a, b in parts if a != b] if "-" in before else ["data"]
  return f"{' and '.join(found)} have changed"
