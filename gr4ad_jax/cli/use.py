"""`gr4ad evaluate`, `gr4ad recommend`, `gr4ad report` and `gr4ad export`."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro

from gr4ad_jax.cli import tables
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import Place


def evaluate(*, workdir: Place, split: Literal["validation", "test"] = "test") -> None:
  """Searches a split and compares with simple baselines; writes WORKDIR/metrics.json.

  Args:
    workdir: Folder of a trained run.
    split: Requests to evaluate.
  """
  from gr4ad_jax.api import open_run
  from gr4ad_jax.evaluation.evaluate import evaluate
  from gr4ad_jax.machine import distributed

  distributed.join()
  run = open_run(workdir)
  metrics = evaluate(run, split=split)
  if distributed.is_first():
    title = f"{split} split, written to {workdir}/metrics.json"
    tables.print_metrics(metrics, system=run.system.upper(), title=title)


def recommend(
  *,
  workdir: Place,
  user: str,
  k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10,
  where: tuple[str, ...] = (),
) -> None:
  """Ads for one user, as if a request came right after their last event.

  Args:
    workdir: Folder of a trained run.
    user: A user id of the logs.
    k: Ads to show.
    where: Search only ads that meet all of these, as COLUMN=VALUE of the ads table; a category
      takes in those below it.
  """
  from gr4ad_jax.api import open_run
  from gr4ad_jax.search.recommend import recommend_for_user

  found = recommend_for_user(open_run(workdir), user, k, where=where)
  tables.console.print(f"user {user}: {found.about}")
  tables.print_ads(found.ads, found.currency)


def report(*, workdir: Place) -> None:
  """WORKDIR -> one HTML page that opens from disk.

  Args:
    workdir: Folder of an evaluated run.
  """
  from gr4ad_jax.report.run_report import write_report

  with storage.working_copy(workdir) as copy:
    write_report(copy.path)
  tables.console.print(f"report: {tables.address(workdir / 'report.html')}")


def export(*, workdir: Place, out: Place) -> None:
  """A trained run -> a folder that answers with jax and numpy alone, on CPU, CUDA and TPU.

  Args:
    workdir: Folder of a trained run.
    out: New folder to write.
  """
  from gr4ad_jax.api import open_run
  from gr4ad_jax.search.export import export_run

  num_bytes = export_run(open_run(workdir), out)
  tables.console.print(f"{out}: {num_bytes / 1e6:.1f} MB; try `python {out}/reader.py`")
