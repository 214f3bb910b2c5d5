"""`gr4ad evaluate`, `gr4ad report` and `gr4ad export`."""

from __future__ import annotations

import shlex
from typing import Literal

from gr4ad_jax.cli import tables
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import Place


def evaluate(
  *,
  workdir: Place,
  split: Literal["validation", "test"] = "test",
  data: Place | None = None,
  baseline_run: tuple[Place, ...] = (),
) -> None:
  """Searches a split and compares with simple baselines; writes WORKDIR/metrics.json.

  Args:
    workdir: Folder of a trained run, of any system.
    split: Requests to evaluate.
    data: Where the run's data lie now, if they have moved.
    baseline_run: Folders of other trained runs on the same data, of any system, that stand beside
      it; may be given several times.
  """
  from gr4ad_jax.api import evaluate_run
  from gr4ad_jax.machine import distributed

  distributed.join()
  system, metrics = evaluate_run(workdir, data=data, split=split, baseline_runs=baseline_run)
  if distributed.is_first():
    title = f"{split} split, written to {workdir}/metrics.json"
    tables.print_metrics(metrics, system=system.upper(), title=title)
    if "invalid_sid_rate" in metrics:  # searched by semantic IDs, which reports are about
      tables.print_next("report", "--workdir", workdir)


def report(*, workdir: Place) -> None:
  """WORKDIR -> one HTML page that opens from disk.

  Args:
    workdir: Folder of an evaluated run.
  """
  from gr4ad_jax.report.run_report import write_report

  with storage.working_copy(workdir) as copy:
    write_report(copy.path)
  tables.console.print(f"report: {tables.address(workdir / 'report.html')}")


def export(*, workdir: Place, out: Place, data: Place | None = None) -> None:
  """A trained run -> a folder that answers with jax and numpy alone, on CPU, CUDA and TPU.

  Args:
    workdir: Folder of a trained run.
    out: New folder to write.
    data: Where the run's data lie now, if they have moved.
  """
  from gr4ad_jax.api import open_run
  from gr4ad_jax.search.export import export_run

  num_bytes = export_run(open_run(workdir, data=data), out)
  reader = shlex.quote(f"{out}/reader.py")
  tables.console.print(f"{out}: {num_bytes / 1e6:.1f} MB; try `python {reader}`")
