"""`gr4ad advertiser prepare`: a log becomes histories, labels and texts on disk.

    OUT/about.json            settings, sizes, source, digests
    OUT/advertisers.parquet   name, spellings
    OUT/items.parquet         item_id, advertiser, title
    OUT/popularity.parquet    cut_s, advertiser, count
    OUT/streams.parquet       what training reads: user_id, items
    OUT/{train,validation,test,now}.parquet    user_id, cut_s, items, age_days; prompt
    OUT/labels.parquet        split, row, advertiser

Of what happens behind the last cut of a log nothing stands in any file but labels and `now`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr4ad_jax import config as config_lib
from gr4ad_jax.advertiser.config import PrepareConfig
from gr4ad_jax.advertiser.histories import ALL_SPLITS, Rows, Source, from_logs, make_rows
from gr4ad_jax.advertiser.names import normal_form
from gr4ad_jax.advertiser.prompts import prompts_of
from gr4ad_jax.advertiser.windows import are_windows, from_windows
from gr4ad_jax.catalog.prepared import open_logs
from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import atomic, digests, storage
from gr4ad_jax.machine.storage import Place

FORMAT = 1


class Prepared(NamedTuple):
  """What `prepare` wrote.

  Attributes:
    config: its settings.
    name_A: str objects, names of the advertisers.
    advertiser_N, title_N: of the items.
    user_id_U: str objects.
    streams: what training reads.
    splits: train, validation, test, now; with labels.
    prompts: split -> texts; {} in stream form.
    popularity: cut_s -> int64 [A].
    source: of the log, in words.
    fingerprint: a hash of all files.
  """

  config: PrepareConfig
  name_A: np.ndarray
  advertiser_N: np.ndarray
  title_N: np.ndarray
  user_id_U: np.ndarray
  streams: Rows
  splits: dict[str, Rows]
  prompts: dict[str, list[str]]
  popularity: dict[int, np.ndarray]
  source: str
  fingerprint: str


def read_source(data: Place, config: PrepareConfig) -> Source:
  """Histories from a folder that `gr4ad prepare` wrote, or from a folder of windows.

  Raises:
    LogError, ConfigError: it is neither, or broken.
  """
  if not storage.exists(data / "logs" / "log.json"):
    if are_windows(folder := storage.fetch(data)):
      return from_windows(folder, config)
    raise ConfigError(
      f"{data}: holds neither logs that `gr4ad prepare` wrote nor windows (items.parquet and "
      "train*.parquet)"
    )
  opened = open_logs(data)
  return from_logs(opened.logs, opened.examples.config, config)


def prepare(data: Place, out: Place, config: PrepareConfig, *, overwrite: bool = False
            ) -> tuple[dict[str, int], list[list[str]]]:
  """Reads a log and writes what training, rivals and the daily batch read.

  Args:
    data: from `gr4ad prepare`, or windows.
    out: folder to write; it appears when all is complete.
    config: settings.
    overwrite: replace an earlier result.

  Returns:
    Sizes, and the spellings of names that were merged.

  Raises:
    LogError: nothing to learn, or a file is broken.
    ConfigError: `out` holds something, or `data` is nothing of the kind.
  """
  storage.require_replaceable(
    out, "prepared histories", markers=("about.json",), overwrite=overwrite
  )
  source = read_source(data, config)
  sizes = _sizes(source)
  with storage.new_folder(out) as copy, atomic.new_folder(copy.path) as folder:
    _write(source, config, folder)
    about = {
      "format": FORMAT, "config": dataclasses.asdict(config), "source": source.about,
      "sizes": sizes, "merged": source.names.merged,
      "digests": digests.of_files(folder, folder.glob("*.parquet")),
    }
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")
  return sizes, source.names.merged


def _sizes(source: Source) -> dict[str, int]:
  sizes = {
    "advertisers": len(source.names.name_A), "names merged": len(source.names.merged),
    "items": len(source.title_N), "users": len(source.user_id_U),
    "training streams": len(source.streams),
    "labels of streams": len(source.streams.item_E) - len(source.streams),
  }
  for name in ALL_SPLITS:
    rows = source.splits[name]
    sizes |= {f"{name} rows": len(rows), f"{name} labels": int((rows.target_R >= 0).sum())}
  return sizes


def _write(source: Source, config: PrepareConfig, folder: Path) -> None:
  names = source.names
  spellings = {normal_form(several[0]): several for several in names.merged}
  _save(folder / "advertisers.parquet", {
    "name": names.name_A,
    "spellings": [spellings.get(normal_form(name), [name]) for name in names.name_A],
  })
  _save(folder / "items.parquet", {
    "item_id": source.item_id_N, "advertiser": names.advertiser_N, "title": source.title_N,
  })
  cuts = sorted(source.popularity)
  counted = [np.flatnonzero(source.popularity[cut]) for cut in cuts]
  _save(folder / "popularity.parquet", {
    "cut_s": np.repeat(np.array(cuts, np.int64), [len(a) for a in counted]),
    "advertiser": np.concatenate(counted).astype(np.int32),
    "count": np.concatenate(
      [source.popularity[cut][a] for cut, a in zip(cuts, counted, strict=True)]
    ).astype(np.int64),
  })
  _save(folder / "streams.parquet", _columns(source, source.streams))
  labels = {"split": [], "row": [], "advertiser": []}
  for name, rows in source.splits.items():
    columns = _columns(source, rows)
    if config.form == "prompt":
      columns["prompt"] = prompts_of(source, rows, most_chars=config.prompt_chars)
    _save(folder / f"{name}.parquet", columns)
    asked = np.flatnonzero(rows.target_R >= 0)
    labels["split"] += [name] * len(asked)
    labels["row"] += asked.tolist()
    labels["advertiser"] += rows.target_R[asked].tolist()
  _save(folder / "labels.parquet", labels)


def _columns(source: Source, rows: Rows) -> dict[str, Any]:
  def lists(values: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(rows.bound_R.astype(np.int32)), pa.array(values))

  return {
    "user_id": source.user_id_U[rows.user_R], "cut_s": rows.cut_s_R,
    "items": lists(rows.item_E), "age_days": lists(rows.age_E),
  }


def _save(file: Path, columns: dict[str, Any]) -> None:
  pq.write_table(pa.table({
    name: values if isinstance(values, pa.Array) else pa.array(values)
    for name, values in columns.items()
  }), file, compression="zstd")


def open_advertisers(data: Place, *, fingerprint: str = "") -> Prepared:
  """Reads what `prepare` wrote.

  Args:
    data: its folder.
    fingerprint: what it has to be; "" = anything.

  Raises:
    ConfigError: no such folder, a file is not what was written, or the fingerprint is another.
  """
  folder = storage.fetch(data)
  if not (folder / "about.json").is_file():
    raise ConfigError(f"{data}: nothing is prepared there; run `gr4ad advertiser prepare`")
  about = config_lib.read_values(folder / "about.json")
  again = "run `gr4ad advertiser prepare` again"
  if about.get("format") != FORMAT:
    raise ConfigError(f"{data}: format {about.get('format')}, must be {FORMAT}; {again}")
  found = digests.of_value(digests.check(folder / "about.json", remedy=again))
  if fingerprint not in ("", found):
    raise ConfigError(f"{data}: is no longer what the model was trained on; train it again")

  def table(name: str) -> pa.Table:
    return pq.ParquetFile(folder / f"{name}.parquet").read()

  names, items, labels = table("advertisers"), table("items"), table("labels").to_pandas()
  tables = {name: table(name) for name in ("streams", *ALL_SPLITS)}
  users = sorted({user for t in tables.values() for user in t["user_id"].to_pylist()})
  number = {user: n for n, user in enumerate(users)}
  read = {name: _rows(t, number) for name, t in tables.items()}
  for split, of in labels.groupby("split"):
    read[split].target_R[of["row"].to_numpy()] = of["advertiser"].to_numpy()
  config = config_lib.from_dict(PrepareConfig, about["config"])
  prompts = {
    name: tables[name]["prompt"].to_pylist() for name in ALL_SPLITS if config.form == "prompt"
  }
  streams = read.pop("streams")
  return Prepared(
    config, np.array(names["name"].to_pylist(), object), items["advertiser"].to_numpy(),
    np.array(items["title"].to_pylist(), object), np.array(users, object), streams, read, prompts,
    _popularity(table("popularity"), len(names), read), about["source"], found,
  )


def _rows(table: pa.Table, number: dict[str, int]) -> Rows:
  items, ages = (table[name].combine_chunks() for name in ("items", "age_days"))
  return Rows(
    np.array([number[user] for user in table["user_id"].to_pylist()], np.int32),
    table["cut_s"].to_numpy(), np.asarray(items.offsets, np.int64),
    np.asarray(items.flatten(), np.int32), np.asarray(ages.flatten(), np.int32),
    np.full(len(table), -1, np.int32),
  )


def _popularity(table: pa.Table, num_names: int, splits: dict[str, Rows]) -> dict[int, np.ndarray]:
  frame = table.to_pandas()
  cuts = {int(cut) for rows in splits.values() for cut in np.unique(rows.cut_s_R)}
  counts = {cut: np.zeros(num_names, np.int64) for cut in cuts}
  for cut, of in frame.groupby("cut_s"):
    counts.setdefault(int(cut), np.zeros(num_names, np.int64))[of["advertiser"]] = of["count"]
  return counts


def training_rows(data: Prepared) -> Rows:
  """Questions of training: every later name of each stream, or each prompt with a label."""
  if data.config.form == "prompt":
    return data.splits["train"]
  streams = data.streams

  def ask():
    for row in range(len(streams)):
      item = streams.item_E[streams.history(row)]
      for at in range(1, len(item)):
        yield (streams.user_R[row], 0, item[:at], np.full(at, -1), data.advertiser_N[item[at]])

  return make_rows(ask())


def own_advertisers(data: Prepared, rows: Rows) -> np.ndarray:
  """int32 [R, H], whom each history converted with, the newest in the last place; -1 = none."""
  most = data.config.max_history
  own_RH = np.full((len(rows), most), -1, np.int32)
  for row, own_H in enumerate(own_RH):
    own = data.advertiser_N[rows.item_E[rows.history(row)]][-most:]
    own_H[most - len(own) :] = own
  return own_RH
