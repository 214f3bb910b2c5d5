"""`gr4ad prepare`, `gr4ad market` and `gr4ad tokenize`."""

from __future__ import annotations

import time
from typing import Annotated

from tyro.conf import subcommand

from gr4ad_jax.cli import tables
from gr4ad_jax.cli.options import Flat
from gr4ad_jax.data.config import Amazon, CompleteJourney, Parquet, PrepareConfig
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import Place
from gr4ad_jax.market.world import MarketConfig
from gr4ad_jax.tokenizer.config import TokenizerConfig


def prepare(
  source: Flat[
    Annotated[CompleteJourney, subcommand("completejourney")]
    | Annotated[Parquet, subcommand("parquet")]
    | Annotated[Amazon, subcommand("amazon")]
  ],
  config: Flat[PrepareConfig],
) -> None:
  """Logs -> validated tables and ArrayRecord examples; with --check, what would become of them."""
  from gr4ad_jax.data.prepare import prepare_logs

  start = time.monotonic()
  summary = prepare_logs(source, config)
  seconds = time.monotonic() - start
  done = "checked, nothing was written," if config.check else f"prepared {config.out}"
  tables.print_summary(summary, title=f"{done} in {seconds:.0f} s")


def market(*, out: Place, stream_days: int = 0, config: Flat[MarketConfig]) -> None:
  """A simulated ad market -> log files as `prepare parquet` reads them, and market.json.

  Args:
    out: New folder to write: ads, contents, users and events (.parquet).
    stream_days: The last days go to OUT/segments instead, one file a day, for `online`.
  """
  from gr4ad_jax.market.log import write_market
  from gr4ad_jax.market.worlds import build_market

  start = time.monotonic()
  storage.require_free(out)
  with storage.new_folder(out) as copy:
    summary = write_market(build_market(config), copy.path, stream_days=stream_days)
  seconds = time.monotonic() - start
  tables.print_summary(summary, title=f"{out} in {seconds:.0f} s")


def tokenize(
  *,
  data: Place,
  out: Place | None = None,
  embeddings: Place | None = None,
  report: bool = False,
  overwrite: bool = False,
  config: Flat[TokenizerConfig],
) -> None:
  """Ads -> semantic IDs, judged line by line.

  Args:
    data: Folder that `prepare` wrote.
    out: Folder to write; default DATA/sids.
    embeddings: Your own embeddings, .npy or .npz [num_ads, D] in the order of the ads table (with
      --encoder given); default the embedding column of the ads.
    report: Give the reasons of what is fine, too, and draw OUT/report.html.
    overwrite: Replace semantic IDs in OUT; runs that were trained on them keep their own copy.
  """
  from gr4ad_jax.tokenizer.stage import tokenize

  out = out or data / "sids"
  made = tokenize(data, out, config, embeddings=embeddings, overwrite=overwrite)
  tables.print_health(made.lines, title=f"semantic IDs in {out}", reasons=report)
  if report:
    from gr4ad_jax.report.tokenizer_report import findings, write_tokenizer_report

    with storage.working_copy(out) as copy:
      write_tokenizer_report(copy.path, findings(made))
    tables.console.print(f"report: {tables.address(out / 'report.html')}")
