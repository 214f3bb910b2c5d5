"""`gr4ad recommend`: ads for one user on the terminal, or for many in a file."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import tyro

from gr4ad_jax.cli import tables
from gr4ad_jax.cli.options import Flat
from gr4ad_jax.config import ConfigError
from gr4ad_jax.machine import atomic
from gr4ad_jax.machine.progress import console, track
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.machine.terminal import one_line

if TYPE_CHECKING:  # they import JAX
  from gr4ad_jax.search.opened import Opened
  from gr4ad_jax.search.recommend import UserAds, UserSearch

FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
COLUMNS = (
  "user_id", "rank", "ad_id", "advertiser_id", "text", "sid", "logp", "expected_value", "score",
  "new",
)


@dataclasses.dataclass(frozen=True)
class Recommend:
  """For whom, how many, and where to."""

  workdir: Place
  """Folder of a trained run."""
  user: str | None = None
  """A user id of the logs."""
  users: str | None = None
  """Many users instead: all of the logs ("all"), or a file with an id a line, or with a column
  user_id (.csv, .parquet)."""
  k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
  """Ads for each."""
  where: tuple[str, ...] = ()
  """Search only ads that meet all of these, as COLUMN=VALUE of the ads table; a category takes in
  those below it."""
  exclude_seen: tyro.conf.FlagCreatePairsOff[bool] = False
  """No ad whose product the user has ever engaged with, promoted or not: prospecting. Runs that are
  set so (search.exclude_seen) need no option."""
  format: Literal["table", "json", "csv", "parquet"] | None = None
  """json is an object a user and line; default: as the name of OUT ends, else a table."""
  out: Path | None = None
  """File to write, which appears when it is complete; default: standard output."""
  overwrite: bool = False
  """Replace OUT."""
  data: Place | None = None
  """Where the run's data lie now, if they have moved."""


def recommend(options: Flat[Recommend]) -> None:
  """Ads for users, as if a request came right after the last event of each."""
  form = _form(options)
  wanted = [_typed(options.user)] if options.user is not None else _listed(options.users)

  from gr4ad_jax.api import open_run
  from gr4ad_jax.search.recommend import UserSearch

  opened = open_run(options.workdir, data=options.data)
  search = UserSearch(
    opened, options.k, where=[_typed(text) for text in options.where],
    exclude_seen=options.exclude_seen or None,
  )
  try:
    users = search.users(wanted)
  except ConfigError as error:
    raise ConfigError(f"--{'user' if options.user is not None else 'users'}: {error}") from None
  if form == "table":
    ((found,),) = search.batches(users)
    tables.console.print(f"user {found.user_id}: {found.about}")
    if found.ads:
      print_ads(found, opened)
    _say_fewer(search, options, fewer=len(found.ads) < options.k, users=1)
    return
  fewer = 0
  with _output(options) as file, _WRITERS[form](file, opened) as write:
    size = opened.search.batch_size
    batches = search.batches(users)
    if options.user is None:
      batches = track(batches, "recommend, users", len(users), step=size)
    for batch in batches:
      fewer += sum(len(found.ads) < options.k for found in batch)
      write(batch)
  _say_fewer(search, options, fewer=fewer, users=len(users))
  if options.out:
    tables.console.print(f"{options.out}: ads for {len(users):,} users")


def _form(options: Recommend) -> str:
  """Raises ConfigError where options do not go together, before anything is opened."""
  if (options.user is None) == (options.users is None):
    raise ConfigError("recommend: needs --user or --users, one of them")
  form = options.format
  if form is None and options.out:
    form = FORMATS.get(options.out.suffix.lower())
    if form is None:
      raise ConfigError(
        f"--out {options.out}: ends in none of {', '.join(FORMATS)}; say --format, too"
      )
  form = form or "table"
  if form == "table" and (options.out or options.users is not None):
    raise ConfigError("--format table: is for one user and the terminal; --format json or csv, or "
                      "--out recs.parquet, takes many")
  if form == "parquet" and not options.out:
    raise ConfigError("--format parquet: needs a file, --out recs.parquet")
  if options.out and options.out.exists() and not options.overwrite:
    raise ConfigError(f"--out {options.out}: exists already; pass --overwrite or another --out")
  return form


def _typed(text: str) -> str:
  """What was typed on a terminal of whatever locale, in UTF-8, as logs have it."""
  return os.fsencode(text).decode("utf-8", "surrogateescape")


def _listed(users: str) -> list[str] | None:
  """The ids that --users means; None = all.

  Raises:
    ConfigError: no such file, or none of its columns is user_id.
  """
  if users == "all":
    return None
  path = Path(users)
  if not path.is_file():
    raise ConfigError(f"--users {users}: no such file; a file of user ids, or all")
  if path.suffix.lower() in (".parquet", ".csv"):
    import pandas as pd

    try:
      if path.suffix.lower() == ".csv":
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
      else:
        frame = pd.read_parquet(path)
    except (ValueError, OSError) as error:
      raise ConfigError(f"--users {users}: cannot be read ({error})") from None
    if "user_id" not in frame.columns:
      raise ConfigError(f"--users {users}: has no column user_id, but {', '.join(frame.columns)}")
    ids = [str(user) for user in frame["user_id"]]
  else:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    ids = [line.strip() for line in lines if line.strip()]
  if not ids:
    raise ConfigError(f"--users {users}: holds no user id")
  return ids


def _say_fewer(search: UserSearch, options: Recommend, *, fewer: int, users: int) -> None:
  if fewer:
    who = f"{fewer:,} of {users:,} users have" if options.user is None else f"{options.user} has"
    console.print(f"{who} fewer than {options.k:,} ads: {search.why_fewer()}")


@contextlib.contextmanager
def _output(options: Recommend) -> Iterator[BinaryIO]:
  if options.out is None:
    yield sys.stdout.buffer
    sys.stdout.buffer.flush()
  else:
    with atomic.new_file(options.out) as file:
      yield file


def _row(row: dict[str, Any]) -> dict[str, Any]:
  return {**row, "sid": list(row["sid"]), "expected_value": _finite(row["expected_value"])}


def _finite(value: float) -> float | None:
  return value if math.isfinite(value) else None


@contextlib.contextmanager
def _json(file: BinaryIO, opened: Opened) -> Iterator[Any]:
  """An object for each user, with the ads in it."""

  def write(batch: Sequence[UserAds]) -> None:
    for found in batch:
      ads = [_row(row) for row in found.rows()]
      for ad in ads:
        del ad["user_id"]
      line = {"user_id": found.user_id, "currency": opened.logs.currency,
              "value_of": opened.value_of, "ads": ads}
      file.write(json.dumps(line, allow_nan=False).encode() + b"\n")

  yield write


@contextlib.contextmanager
def _csv(file: BinaryIO, opened: Opened) -> Iterator[Any]:
  text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
  writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
  writer.writeheader()

  def write(batch: Sequence[UserAds]) -> None:
    for found in batch:
      writer.writerows(
        {**_row(row), "sid": "-".join(map(str, row["sid"])), "new": int(row["new"])}
        for row in found.rows()
      )

  yield write
  text.detach()  # the file is closed by who opened it


@contextlib.contextmanager
def _parquet(file: BinaryIO, opened: Opened) -> Iterator[Any]:
  import pyarrow as pa
  import pyarrow.parquet as pq

  word, number = pa.dictionary(pa.int32(), pa.string()), pa.float32()
  kinds = (pa.string(), pa.int32(), word, word, word, pa.list_(pa.int32()), number, number, number,
           pa.bool_())
  schema = pa.schema(
    list(zip(COLUMNS, kinds, strict=True)),
    metadata={"currency": opened.logs.currency, "value_of": opened.value_of},
  )
  with pq.ParquetWriter(file, schema) as writer:

    def write(batch: Sequence[UserAds]) -> None:
      rows = [_row(row) for found in batch for row in found.rows()]
      writer.write_table(pa.Table.from_pylist(rows, schema=schema))

    yield write


_WRITERS = {"json": _json, "csv": _csv, "parquet": _parquet}


def print_ads(found: UserAds, opened: Opened) -> None:
  """One user's ads as a table; where the terminal is too narrow for one, in lines."""
  from rich.cells import cell_len
  from rich.measure import Measurement
  from rich.table import Table
  from rich.text import Text

  search, currency = opened.search, opened.logs.currency
  names = ["#", "ad", "advertiser", "text", "SID", "log p", f"expected value\n({currency})"]
  ranked_by_more = bool(search.value_exponent)
  names += ["score", "new"] * ranked_by_more
  rows = []
  for rank, ad in enumerate(found.ads, 1):
    cells = [
      str(rank), *map(one_line, (ad.ad_id, ad.advertiser_id, ad.text)),
      "-".join(map(str, ad.sid)), f"{ad.logp:.2f}", tables.three_digits(ad.expected_value),
    ]
    rows.append(cells + [f"{ad.score:.2f}", "new" if ad.new else ""] * ranked_by_more)
  table = Table()
  for name, cells in zip(names, zip(*rows, strict=True), strict=False):
    widest = max(map(cell_len, [*name.split("\n"), *cells]))
    words = name == "text"  # the one column whose cells may take several lines
    table.add_column(
      Text(name), justify="left" if name in ("ad", "advertiser", "text") else "right",
      no_wrap=not words, overflow="fold", min_width=min(widest, 16) if words else widest,
    )
  for cells in rows:
    table.add_row(*map(Text, cells))
  out = tables.console
  least = Measurement.get(out, out.options.update(max_width=10_000), table).minimum
  if not out.file.isatty() or least <= out.width:
    out.show(table)
    return
  for cells in rows:
    rank, ad, advertiser, text, *numbers = cells
    out.print(f"{rank:>3}  {ad}  advertiser {advertiser}")
    out.print(f"     {text}")
    named = zip((name.replace("\n", " ") for name in names[4:]), numbers, strict=True)
    out.print("     " + ", ".join(f"{name} {number}" for name, number in named if number))
