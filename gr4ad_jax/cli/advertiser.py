"""`gr4ad advertiser`: the language model that predicts the next advertiser."""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated, Literal

from tyro.conf import subcommand

from gr4ad_jax.advertiser.config import PrepareConfig
from gr4ad_jax.cli import tables
from gr4ad_jax.cli.options import Flat
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import Place


@dataclasses.dataclass(frozen=True)
class Prepare:
  """A prepared log, or a folder of windows -> histories, labels and texts."""

  data: Place
  """Folder that `gr4ad prepare` wrote, or one with items.parquet, train*.parquet, valid*.parquet
  and test*.parquet (docs/advertiser.md)."""
  out: Place
  """Folder to write."""
  overwrite: bool = False
  """Replace an earlier result in --out."""
  config: Flat[PrepareConfig] = PrepareConfig()

  def run(self) -> None:
    """Prepares."""
    from gr4ad_jax.advertiser.prepared import prepare

    start = time.monotonic()
    sizes, merged = prepare(self.data, self.out, self.config, overwrite=self.overwrite)
    for spellings in merged:
      tables.console.print(f"one name, {len(spellings)} spellings: {', '.join(spellings)}")
    seconds = time.monotonic() - start
    tables.print_numbers(sizes, title=f"prepared {self.out} in {seconds:.0f} s")
    tables.print_next("advertiser", "evaluate", "--data", self.out)


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """Recall of the next advertiser: rivals beside each other, paired intervals."""

  data: Place
  """Folder that `advertiser prepare` wrote."""
  split: Literal["validation", "test"] = "test"
  """Rows to evaluate."""
  out: Place | None = None
  """File to write all numbers to (JSON)."""

  def run(self) -> None:
    """Evaluates."""
    from gr4ad_jax.advertiser.evaluate import evaluate_rivals
    from gr4ad_jax.advertiser.prepared import open_advertisers

    numbers = evaluate_rivals(open_advertisers(self.data), self.split)
    if self.out is not None:
      storage.write_json(self.out, numbers)
    tables.print_recalls(numbers, title=f"{self.split} split of {self.data}", bar="linear")


Command = Annotated[Prepare, subcommand("prepare")] | Annotated[Evaluate, subcommand("evaluate")]


def advertiser(command: Flat[Command]) -> None:
  """A language model that predicts whom a user converts with next (docs/advertiser.md)."""
  command.run()
