"""The stage that writes semantic IDs: prepared data -> codes, with their health."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from gr4ad_jax.data.examples import open_examples, training_events
from gr4ad_jax.data.log_folder import PREPARE_AGAIN, read_logs
from gr4ad_jax.data.records import Logs
from gr4ad_jax.embedding.embeddings import LogEmbeddings, embed
from gr4ad_jax.machine import digests, sharding, storage
from gr4ad_jax.machine.progress import track
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.tokenizer import semantic_id
from gr4ad_jax.tokenizer.groups import NUM_GROUPS
from gr4ad_jax.tokenizer.health_line import HealthLine
from gr4ad_jax.tokenizer.health_verdicts import as_record
from gr4ad_jax.tokenizer.judge import health, judge


class Tokenized(NamedTuple):
  """What `tokenize` has made and found."""

  logs: Logs
  embedded: LogEmbeddings
  sids: semantic_id.SemanticIds
  health: dict[str, float]
  lines: list[HealthLine]


def tokenize(
  data: Place,
  out: Place,
  config: semantic_id.TokenizerConfig,
  *,
  embeddings: Place | None = None,
  overwrite: bool = False,
) -> Tokenized:
  """Assigns and stores semantic IDs with their health (health.json beside them).

  Embeddings are kept in DATA/embeddings, and a fit that was interrupted goes on.

  Args:
    data: folder of prepared data.
    out: folder to write.
    config: encoder, quantizer, codebooks, last level.
    embeddings: .npy or .npz file [num_ads, D] for encoder "given"; None = the ads' column.
    overwrite: replace semantic IDs that are there.

  Raises:
    LogError, ValueError: no logs there, or settings that do not fit them.
    ConfigError: `out` holds semantic IDs already, or something else.
  """
  # An interrupted stage leaves no config.json, which comes with the codes, in a bucket after them.
  storage.require_replaceable(
    out, "semantic IDs", markers=("config.json", "codes.npz"), overwrite=overwrite
  )
  digests.check(storage.fetch(data / "logs") / "log.json", remedy=PREPARE_AGAIN)
  logs = read_logs(storage.fetch(data / "logs"))
  train_E = None
  if config.encoder == "uae":  # the others learn from no event
    train_E = training_events(logs, open_examples(storage.fetch(data / "examples")))
  with storage.new_folder(out) as copy:
    folder = copy.path
    with storage.working_copy(data / "embeddings") as cache:
      embedded = embed(
        logs, config.encoder, file=embeddings and storage.fetch(embeddings), folder=cache.path,
        train_E=train_E, seed=config.seed, progress=track,
      )
    sids = semantic_id.assign_semantic_ids(
      logs, embedded, config, mesh=sharding.data_mesh(NUM_GROUPS),
      resume_path=folder.with_name(f".{folder.name}.resume.npz"), progress=track,
    )
    metrics = health(logs, sids, embedded)
    lines = judge(sids, metrics)
    sids = dataclasses.replace(sids, health=as_record(metrics, lines))
    semantic_id.save(sids, folder)
  return Tokenized(logs, embedded, sids, metrics, lines)
