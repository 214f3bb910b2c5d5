"""Which columns of the user's files are read, under which names: `--map`, `--ignore-columns`."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import pandas as pd

from gr4ad_jax.config import ConfigError
from gr4ad_jax.data.records import Action, Naming
from gr4ad_jax.data.validation import LogError, require_columns

ALL = "all"  # ignores every unknown column


class Schema(NamedTuple):
  """Columns of a table; further ones begin with `prefix`: None allows none of them, "" any."""

  required: tuple[str, ...]
  optional: tuple[str, ...] = ()
  prefix: str | None = None

  @property
  def named(self) -> tuple[str, ...]:
    return (*self.required, *self.optional)

  def knows(self, column: str) -> bool:
    """Whether the table may have the column."""
    return column in self.named or (self.prefix is not None and column.startswith(self.prefix))


SCHEMAS = {
  "ads": Schema(
    ("ad_id", "advertiser_id", "category", "text"),
    ("price", "conversion_type", "ad_type", "account_id", "campaign_id", "bid", "embedding"),
  ),
  "contents": Schema(("content_id", "category", "text"), ("ad_id",)),
  "users": Schema(("user_id",), prefix=""),
  "events": Schema(
    ("user_id", "time", "ad_id", "action"), ("content_id", "request_id", "value", "ecpm"),
    "feature_",
  ),
}


def check_naming(naming: Naming) -> None:
  """Checks the form of the rules.

  Raises:
    ConfigError: one is not of the form, or says what no table has.
  """
  for rule in naming.map:
    table, _, yours = _map_rule(rule)
    if not yours or not any(_fits(rule, name) for name in SCHEMAS):
      tables = [table] if table else list(SCHEMAS)
      known = dict.fromkeys(column for name in tables for column in SCHEMAS[name].named)
      raise ConfigError(
        f"--map {rule}: must be OURS=YOURS or TABLE.OURS=YOURS, OURS one of {', '.join(known)}, "
        "feature_... of events, or any name of users"
      )
  action_words(naming)


def action_words(naming: Naming) -> dict[str, int]:
  """The log's own words for actions, in lower case -> an Action.

  Raises:
    ConfigError: a rule is not of the form, or a word has two meanings.
  """
  words: dict[str, int] = {}
  known = {action.name.lower(): int(action) for action in Action}
  for rule in naming.actions:
    name, _, theirs = rule.partition("=")
    if name.lower() not in known or not theirs:
      raise ConfigError(
        f"--actions {rule}: must be ACTION=WORD or ACTION=WORD,WORD, ACTION one of "
        f"{', '.join(known)}"
      )
    action = known[name.lower()]
    for word in theirs.split(","):
      if words.setdefault(word.lower(), action) != action:
        raise ConfigError(f"--actions {rule}: {word!r} is given to two actions")
  return words


class Chosen(NamedTuple):
  """Columns of one table.

  Attributes:
    source: our name -> the column's name in the file.
    left_out: columns of the file that are not read.
    unknown: columns that are neither.
    rules: those of the `Naming` that found a column.
  """

  source: dict[str, str]
  left_out: tuple[str, ...]
  unknown: tuple[str, ...]
  rules: frozenset[str]


def choose(
  table: str, present: Sequence[str], naming: Naming, *, unasked: Collection[str] = ()
) -> Chosen:
  """Chooses the columns of a table.

  Args:
    table: a name of SCHEMAS.
    present: columns of the file.
    naming: how they are called there.
    unasked: those of `present` that nobody wrote as a column (keys of folders, an index of pandas):
      left out where the table does not know them.

  Raises:
    ConfigError: two rules give the same column.
  """
  schema, source, used = SCHEMAS[table], {}, set()
  for rule in naming.map:
    _, ours, yours = _map_rule(rule)
    if _fits(rule, table) and yours in present:
      if source.setdefault(ours, yours) != yours:
        raise ConfigError(f"--map {rule}: column '{ours}' is read from '{source[ours]}' already")
      used.add(rule)
  ignored = set()
  for rule in naming.ignore_columns:
    found = _ignored(rule, table, present, schema)
    used |= {rule} if found or rule == ALL else set()
    ignored |= found
  left_out, unknown = [], []
  for name in present:
    if name in source.values():
      continue
    asked = name not in unasked
    if name in ignored or name in source:  # the latter gave way to a column of another name
      left_out.append(name)
    elif name in schema.named or _is_feature(schema, name) or (asked and schema.knows(name)):
      source[name] = name
    elif asked and ALL not in naming.ignore_columns:
      unknown.append(name)
    else:
      left_out.append(name)
  return Chosen(source, tuple(left_out), tuple(unknown), frozenset(used))


def require_columns_of(table: str, chosen: Chosen, present: Sequence[str], file: str) -> None:
  """Checks what was chosen of the columns of a file.

  Raises:
    LogError: a column is missing, doubled or unknown (a misspelt optional column must not pass
      for an absent one).
  """
  schema, unknown = SCHEMAS[table], chosen.unknown
  if missing := [column for column in schema.required if column not in chosen.source]:
    any_case = {name.lower(): name for name in present}
    rules = " ".join(f"{column}={any_case.get(column, 'NAME')}" for column in missing)
    have = ", ".join(present) or "none"
    raise LogError(
      f"{file}: {_several(missing, 'missing')}: required; columns present: {have}; --map {rules} "
      "reads others in their place"
    )
  for column in chosen.source.values():
    if list(present).count(column) > 1:
      raise LogError(f"{file}: column '{column}' occurs twice: column names must be unique")
  if unknown:
    further = f"; further columns begin with '{schema.prefix}'" if schema.prefix else ""
    raise LogError(
      f"{file}: {_several(unknown, 'unknown')}: must be {', '.join(schema.named)}{further}; "
      f"--map OURS=YOURS reads a column of another name, --ignore-columns {unknown[0]} (or {ALL}) "
      "leaves it out"
    )


def require_table(frame: pd.DataFrame, table: str, file: str) -> None:
  """Checks the columns of a table of SCHEMAS that is in memory.

  Raises:
    LogError: a column is missing, doubled or unknown, or there are no rows.
  """
  schema = SCHEMAS[table]
  require_columns(
    frame, schema.required, file, optional=schema.optional, prefix=schema.prefix
  )


def require_used(naming: Naming, chosen: Iterable[Chosen], columns: Collection[str]) -> None:
  """Refuses rules that found no column in any table.

  Raises:
    ConfigError: there is one; `columns` of all tables are what may have been meant.
  """
  used = frozenset[str]().union(*(tables.rules for tables in chosen))
  for option, rules in (("--map", naming.map), ("--ignore-columns", naming.ignore_columns)):
    for rule in rules:
      if rule not in used and rule != ALL:
        name = _map_rule(rule)[2] if option == "--map" else rule
        hint = f"; '{name}' is one of another table" if name in columns else _nearest(name, columns)
        raise ConfigError(f"{option} {rule}: no table that it is for has such a column{hint}")


def _several(columns: Sequence[str], what: str) -> str:
  names = ", ".join(map(repr, columns))
  return f"columns {names} are {what}" if len(columns) > 1 else f"column {names} is {what}"


def _map_rule(rule: str) -> tuple[str, str, str]:
  """Table ("" = any), our name, the file's name."""
  ours, _, yours = rule.partition("=")
  table, ours = _of_table(ours)
  return table, ours, yours


def _fits(rule: str, table: str) -> bool:
  """Whether a rule may be meant for a table; a feature of users must say that it is one."""
  of, ours, _ = _map_rule(rule)
  schema = SCHEMAS[table]
  if of:
    return of == table and bool(ours) and schema.knows(ours)
  return ours in schema.named or _is_feature(schema, ours)


def _of_table(name: str) -> tuple[str, str]:
  table, dot, rest = name.partition(".")
  return (table, rest) if dot and table in SCHEMAS else ("", name)


def _ignored(rule: str, table: str, present: Sequence[str], schema: Schema) -> set[str]:
  """Columns that a rule leaves out; a pattern spares what the table requires."""
  if rule in present:
    return {rule}
  of, pattern = _of_table(rule)
  if of not in ("", table):
    return set()
  if pattern in present:
    return {pattern}
  return {
    name for name in present
    if fnmatch.fnmatchcase(name, pattern) and name not in schema.required
  }


def _is_feature(schema: Schema, column: str) -> bool:
  return bool(schema.prefix) and column.startswith(schema.prefix or "")


def _nearest(name: str, columns: Collection[str]) -> str:
  close = difflib.get_close_matches(name, list(columns), 1)
  return f"; is '{close[0]}' meant?" if close else f"; there are {', '.join(columns) or 'none'}"
