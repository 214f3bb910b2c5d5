"""Results as tables on the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gr4ad_jax.machine.storage import Place
from gr4ad_jax.machine.terminal import Terminal, plain

if TYPE_CHECKING:  # what is large is imported by the table that needs it
  from gr4ad_jax.cli.sweep import Result
  from gr4ad_jax.tokenizer.health_line import HealthLine
  from gr4ad_jax.training.plan import Plan

console = Terminal()


def address(page: Place) -> str:
  """What a browser opens."""
  return page.resolve().as_uri() if isinstance(page, Path) else str(page)


def say(text: str) -> None:
  """The heading of a stage."""
  console.rule(Text(text, style="bold"), align="left")


def print_next(*words: object) -> None:
  """The command to type next."""
  console.print(f"next: gr4ad {shlex.join(map(str, words))}")


def show(table: Table, *, title: str) -> None:
  """A table below its title; in a file or pipe nothing of it is cut or folded."""
  console.print(title)
  console.show(table)


def print_summary(summary: dict[str, int], *, title: str) -> None:
  """A table of counts; cleaning rules that touched nothing are summed up in one row."""
  rows = {name: count for name, count in summary.items() if count}
  if zero := len(summary) - len(rows):
    rows["cleaning rules that touched no row"] = zero
  print_numbers(rows, title=title)


def print_numbers(numbers: Mapping[str, float | str], *, title: str) -> None:
  """Names and numbers as a table."""
  table = Table(show_header=False)
  table.add_column(overflow="fold")
  table.add_column(justify="right", overflow="fold")
  for name, value in numbers.items():
    if not isinstance(value, str):
      value = f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
    table.add_row(name, value)
  show(table, title=title)


def print_sweep(results: Sequence[Result], *, title: str, best_by: str = "loss") -> None:
  """Runs by what names their best checkpoint, failed ones last."""
  table = Table()
  paths = list(dict.fromkeys(path for result in results for path in result.settings))
  for path in paths:
    table.add_column(path.replace(".", ".\n"), justify="right", overflow="fold")
  by_loss = best_by == "loss"
  for column in ("loss", "SID loss", "examples/s", *([] if by_loss else [f"best {best_by}"])):
    table.add_column(column, justify="right", overflow="fold")
  for result in sorted(results, key=lambda r: (
    r.status != "finished", r.loss if by_loss else -r.best
  )):
    cells = [result.settings.get(path, "") for path in paths]
    if result.status == "finished":
      speed = result.values.get("examples_per_second")
      cells += [f"{result.loss:.4f}", f"{result.values.get('sid_loss', float('nan')):.4f}",
                "" if speed is None else f"{speed:,.0f}"]
      cells += [] if by_loss else [f"{result.best:.4f}"]
    else:
      cells += ["failed", "", ""]
    table.add_row(*cells)
  show(table, title=title)


def print_plan(plan: Plan, *, title: str) -> None:
  """What a run needs, and whether the devices hold it."""
  def size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:,.2f} MB"

  from gr4ad_jax.training.pace import in_words

  print_numbers({
    "parameters": f"{plan.num_params:,}",
    "mesh (data x fsdp x tensor)": " x ".join(map(str, plan.mesh)),
    "FLOPs of an example": f"{plan.flops_per_example:.3g}",
    "FLOPs of a step": f"{plan.flops_per_step:.3g}",
    "per device: parameters": size(plan.params_bytes),
    "per device: optimizer": size(plan.optimizer_bytes),
    "per device: gradients and updates": size(2 * plan.gradients_bytes),
    "per device: activations, at most": size(plan.activations_bytes),
    "per device: all of it": size(plan.needed_bytes),
    "memory of a device": size(plan.memory_bytes),
    f"step, at {plan.mfu:.0%} of the peak or as memory allows": in_words(plan.step_s),
    "examples/s": f"{plan.examples_per_s:,.0f}",
    "all steps": in_words(plan.run_s),
  }, title=title)
  if not plan.fits:
    console.print(
      "does not fit: raise train.fsdp or train.tensor, take more devices, set train.accumulate, or "
      "with GR4AD model.remat=products or all"
    )


_COLOURS = {"fine": "green", "look": "yellow", "will hurt": "red"}


def print_health(lines: Sequence[HealthLine], *, title: str, reasons: bool = True) -> None:
  """The tokenizer's verdicts for a terminal of 80 columns or more.

  Args:
    lines: from `health_verdicts.verdicts`.
    title: over the table.
    reasons: False leaves out the reasons of what is fine.
  """
  from gr4ad_jax.report.health_lines import headline, value_of

  parts = []
  for name, group in groupby(lines, key=lambda line: line.group):
    grid = Table.grid(padding=(0, 2, 0, 0), expand=False)
    grid.add_column(width=9)
    grid.add_column(width=8, justify="right")
    grid.add_column(overflow="fold", max_width=76)
    for line in group:
      words = Text(plain(line.label))
      if reasons or line.verdict != "fine":
        words.append(f"\n{plain(line.reason)}", style="dim")
      grid.add_row(Text(line.verdict, style=_COLOURS[line.verdict]), value_of(line), words)
    parts += [Text(f"\n{plain(name)}", style="bold"), Padding(grid, (0, 0, 0, 1))]
  sentence, verdict = headline(lines)
  parts += [Text(), Text(plain(sentence), style=_COLOURS[verdict])]
  console.print(title, style="bold")
  console.print(Group(*parts), soft_wrap=False)


COLUMNS = ("recall@10", "recall@50", "ndcg@50", "value_recall@50", "prospecting/recall@50",
           "prospecting/value_recall@50")


def print_metrics(metrics: dict[str, float], *, system: str, title: str) -> None:
  """A system beside the baselines."""
  from gr4ad_jax.report.verdict import methods

  table = Table()
  table.add_column("", overflow="fold")
  for column in COLUMNS:
    header = column.replace("prospecting/", "prospect/")  # a terminal has 80 columns
    header = header.replace("_", "\n").replace("/", "\n").replace("@", "\n@")
    table.add_column(header, justify="right")
  for name, prefix in methods(metrics, system=system).items():
    cells = []
    for column in COLUMNS:
      value = metrics.get(prefix + column)
      low = metrics.get(f"{prefix}{column}/ci_low")
      high = metrics.get(f"{prefix}{column}/ci_high")
      interval = "" if low is None or high is None else f"\n{low:.3f}\n{high:.3f}"
      cells.append("-" if value is None else f"{value:.3f}{interval}")
    table.add_row(name, *cells)
  show(table, title=title)
  if "invalid_sid_rate" not in metrics:  # a baseline, judged by itself
    return
  console.print(
    f"invalid SIDs {metrics['invalid_sid_rate']:.2%}, "
    f"decoding {metrics['decode_requests_per_second']:.0f} requests/s, "
    f"{metrics['num_params']:,.0f} parameters, checkpoint of step {metrics['checkpoint_step']:,.0f}"
  )


def print_recalls(numbers: Mapping[str, float], *, title: str, bar: str) -> None:
  """Recall of the next advertiser: a row a rival, its paired difference to the bar behind it."""
  found = (key.partition("/") for key in numbers if "/" in key)
  names = [name for name in dict.fromkeys(key[0] for key in found) if "_minus_" not in name]
  depths = (1, 5, 20)
  table = Table(box=SIMPLE_HEAD)
  table.add_column("")
  for head in (*(f"R@{k}" for k in depths), f"R@5 - {bar}", "new R@5", "new R@20", "known R@5"):
    table.add_column(head, justify="right")
  for name in names:
    cells = [f"{numbers[f'{name}/recall@{k}']:.3f}" for k in depths]
    key = f"{name}_minus_{bar}/recall@5"
    cells.append("" if key not in numbers else (
      f"{numbers[key]:+.3f} [{numbers[f'{key}/ci_low']:+.3f}, {numbers[f'{key}/ci_high']:+.3f}]"
    ))
    more = ("new/recall@5", "new/recall@20", "known/recall@5")
    cells += [f"{numbers.get(f'{name}/{key}', float('nan')):.3f}" for key in more]
    table.add_row(name, *cells)
  title += f": {numbers['rows']:,.0f} rows, {numbers['advertisers']:,.0f} advertisers, "
  show(table, title=f"{title}{numbers['new_share']:.0%} of labels new to the user")


def print_load(summary: Mapping[str, Mapping[str, float]], *, title: str) -> None:
  """What a server did in each part of a day of traffic."""
  table = Table()
  table.add_column("part")
  names = {
    "requests": "sent", "qps": "QPS", "p50_ms": "p50 ms", "p99_ms": "p99 ms", "errors": "errors",
    "refused": "429", "cache_hits": "cached", "factor": "beams", "value": "value",
  }
  for name in names.values():
    table.add_column(name, justify="right", no_wrap=True)
  for part, numbers in summary.items():
    table.add_row(part, *(_load_cell(name, numbers[name]) for name in names))
  show(table, title=title)


def _load_cell(name: str, value: float) -> str:
  if value != value:
    return "-"
  match name:
    case "requests" | "errors" | "refused":
      return f"{value:,.0f}"
    case "cache_hits":
      return f"{100 * value:.0f} %"
    case "factor":
      return f"{value:.2f} x"
  return three_digits(value)


def print_decode_bench(result: dict) -> None:
  """Speed of decoders; the ratio compares requests/s with the first one of the same grid cell."""
  rate = result["matmul_flops_per_s"] / 1e9
  table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0))
  table.add_column("decoder", no_wrap=True)
  headers = ("batch x\nbeams", "ms: p50,\np90, p99", "req/s", "ratio", "FLOP\nshare",
             "comp.\ns", "MB")
  for name in headers:
    table.add_column(name, justify="right", no_wrap=True)
  first: dict[tuple, float] = {}
  for row in result["rows"]:
    cell = (row["batch"], tuple(row["widths"]))
    base = first.setdefault(cell, row["requests_per_s"])
    table.add_row(
      row["decoder"], f"{row['batch']} x {'-'.join(map(str, row['widths']))}",
      " ".join(three_digits(row[name]) for name in ("p50_ms", "p90_ms", "p99_ms")),
      f"{row['requests_per_s']:.1f}", f"{row['requests_per_s'] / base:.2f}",
      f"{row['flop_share']:.0%}", f"{row['compile_s']:.1f}", f"{row['memory_mb']:.0f}",
    )
  device = f"{result['device']}, {result['compute_dtype']}"
  show(table, title=f"{device}; a matrix product runs at {rate:,.0f} GFLOP/s")


def three_digits(value: float) -> str:
  """As many as matter, and all of a large number."""
  return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
