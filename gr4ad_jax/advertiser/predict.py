"""`gr4ad advertiser predict`: the daily batch, shard by shard.

    OUT/part-00000.parquet    user_id, advertiser, rank (1 = first), logp, cut_s, key, model

Each file holds all rows of SHARD_USERS users. It appears whole, so that a batch that was killed
goes on behind the last one. `key` is a hash of all that an answer depends on: model, names,
history. A user whose key is known from an earlier batch in OUT keeps that answer and its cut.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gr4ad_jax.advertiser.histories import NOW
from gr4ad_jax.advertiser.run import AdvertiserRun
from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import atomic, lock, storage
from gr4ad_jax.machine.progress import console
from gr4ad_jax.machine.storage import Place

SHARD_USERS = 1024
COLUMNS = ("user_id", "advertiser", "rank", "logp", "cut_s", "key", "model")


class Predicted(NamedTuple):
  """What a batch did."""

  users: int
  computed: int
  """Users whose answer was not known."""
  shards: int
  kept_shards: int
  """Files that stayed as they were."""


def predict(
  opened: AdvertiserRun, out: Place, *, most: int = 20, shard_users: int = SHARD_USERS
) -> Predicted:
  """Writes the first advertisers of every user of the log, by all that is in it.

  Args:
    opened: a run, or published weights.
    out: folder of the shards.
    most: advertisers a user.
    shard_users: users of a shard.

  Raises:
    ConfigError: `out` is something else, or another process works in it.
  """
  if isinstance(out, Path) and out.exists() and not out.is_dir():
    raise ConfigError(f"{out}: is a file; predictions are a folder of shards")
  data = opened.data
  rows = data.splits[NOW]
  with lock.held(out, "a batch"), storage.working_copy(out) as copy:
    known, whole = _read(copy.path)
    shards = range(0, len(rows), shard_users)
    computed = kept = 0
    for number, start in enumerate(shards):
      mine = range(start, min(start + shard_users, len(rows)))
      file = copy.path / f"part-{number:05d}.parquet"
      users = data.user_id_U[rows.user_R[start : mine.stop]].tolist()
      keys = [f"{opened.key(NOW, row)}-{most}" for row in mine]
      if whole.get(file.name) == list(zip(users, keys, strict=True)):
        kept += 1
        continue
      asked = [row for row, key in zip(mine, keys, strict=True) if key not in known]
      if asked:
        told = opened.tell(NOW, asked, most)
        for at, row in enumerate(asked):
          best_K = told.advertiser_RK[at][told.advertiser_RK[at] >= 0]
          known[keys[row - start]] = _Answer(
            data.name_A[best_K].tolist(), told.logp_RK[at][: len(best_K)].tolist(),
            int(rows.cut_s_R[row]),
          )
      computed += len(asked)
      _write(file, users, [known[key] for key in keys], keys, opened.version)
      copy.push()
    for file in copy.path.glob("part-*.parquet"):  # of an earlier batch with more users
      if int(file.stem.split("-")[1]) >= len(shards):
        file.unlink()
  return Predicted(len(rows), computed, len(shards), kept)


class _Answer(NamedTuple):
  """What one history was answered, and by when."""

  names: list[str]
  logps: list[float]
  cut_s: int


def _write(
  file: Path, users: list[str], answers: list[_Answer], keys: list[str], version: str
) -> None:
  columns = {name: [] for name in COLUMNS}
  for user, answer, key in zip(users, answers, keys, strict=True):
    for rank, (name, logp) in enumerate(zip(answer.names, answer.logps, strict=True), 1):
      row = (user, name, rank, logp, answer.cut_s, key, version)
      for column, value in zip(COLUMNS, row, strict=True):
        columns[column].append(value)
  table = pa.table({
    **columns, "rank": pa.array(columns["rank"], pa.int32()),
    "logp": pa.array(columns["logp"], pa.float32()),
  })
  with atomic.new_file(file) as opened:
    pq.write_table(table, opened, compression="zstd")


def _read(folder: Path) -> tuple[dict[str, _Answer], dict[str, list[tuple[str, str]]]]:
  """Answers by key, and the users of each shard with their keys; what cannot be read is named."""
  known, whole = {}, {}
  for file in sorted(folder.glob("part-*.parquet")):
    try:
      frame = pq.ParquetFile(file).read(columns=list(COLUMNS)).to_pandas()
    except (OSError, pa.ArrowException) as error:
      console.print(f"{file.name}: cannot be read ({type(error).__name__}); it is made again")
      continue
    for key, of in frame.groupby("key", sort=False):
      first = of[of["user_id"] == of["user_id"].iloc[0]]  # users with one history share a key
      known[key] = _Answer(
        first["advertiser"].tolist(), first["logp"].tolist(), int(first["cut_s"].iloc[0])
      )
    whole[file.name] = list(dict.fromkeys(zip(frame["user_id"], frame["key"], strict=True)))
  return known, whole
