"""Kills, damage, poison, idle sockets, a full disk, two holders: what is lost, what is named.

    python -m experiments.run bench_faults

A small model on a small market is served while clients send events and ask for ads without a pause.
In turn:

- SIGKILL under load, again and again. Every event has an id and is sent until it is acknowledged,
  to the next server where the last one died. At the end the segments that the servers wrote are
  read: lost counts acknowledged events that are not there, duplicated those that stand there twice.
- publications that a learner could not have meant (cut, one bit flipped, one weight NaN, weights
  x 1e30, a pointer cut short): each must be refused by name while the old parameters answer.
- a limit on the size of the server's files stands in for a full disk (so Linux is needed): 503
  until there is room again.
- idle sockets, more than the server takes: health and ads answer beside them.
- a second trainer, learner and server in a folder that has one: each must name the holder.
- files that are cut or overwritten, each in a copy of its folder: the command that reads it must
  name it in at most three lines, and go on where something whole is left.

stuck_starts counts servers that were not ready in time; nan_served answers without ads, or with a
number that is none; unplanned_5xx answers from 500 on that are not 503. Of corruptions_tried,
corruptions_named were named.

Expected: lost, duplicated, nan_served, unplanned_5xx, stuck_starts 0; corruptions_named =
corruptions_tried, holders_named = 3, slow_beside_idle 0. Run time on two CPU cores: 12 minutes.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from experiments._faults import (
  Load,
  Said,
  Tally,
  answers,
  gr4ad,
  half,
  poisons,
  publish,
  scribble,
  within,
)
from experiments._faults_files import damaged_files, poisoned_segments
from experiments._market import prepared_market
from experiments._runs import run_of, tokenized
from experiments._serving import Server, free_port, running_server
from gr4ad_jax.config import override_all
from gr4ad_jax.data.log_folder import read_logs
from gr4ad_jax.gr4ad.config import Config, ModelConfig
from gr4ad_jax.gr4ad.train_run import train_run
from gr4ad_jax.machine.progress import console
from gr4ad_jax.market.world import MarketConfig
from gr4ad_jax.search.config import SearchConfig
from gr4ad_jax.tokenizer.config import TokenizerConfig
from gr4ad_jax.training.config import TrainConfig
from gr4ad_jax.training.published import latest

ZERO = ("lost", "duplicated", "nan_served", "unplanned_5xx", "stuck_starts")
SECONDS_TO_REFUSE = 10.0  # a server looks for publications twice a second


@dataclasses.dataclass(frozen=True)
class Settings:
  """What --set may change."""

  kills: int = 10
  """Servers killed under load."""
  load_s: float = 4.0
  """Seconds of load before each blow."""
  idle_sockets: int = 3_000
  """Connections that say nothing."""
  start_s: float = 120.0
  """A server that is not ready by then is stuck."""


@dataclasses.dataclass(frozen=True)
class Options:
  """Everything that --set may change."""

  settings: Settings = Settings()
  market: MarketConfig = MarketConfig(
    num_users=300, num_ads=300, num_contents=150, num_advertisers=30, num_categories=8, days=28
  )
  model: ModelConfig = ModelConfig(width=32, num_heads=2, num_layers=2, num_lazy_layers=1)
  train: TrainConfig = TrainConfig(
    num_steps=60, batch_size=32, eval_every=30, eval_batches=1, checkpoint_every=30,
    data_parallel=1,
  )
  search: SearchConfig = SearchConfig(widths=(16, 16, 16), batch_size=16)


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """The counts above."""
  del size
  options = override_all(Options(), overrides)
  trained, data = _trained(workdir, options)
  scene = _Scene(workdir, trained, data, options.settings)
  for name in ("store", "online", "copies", "artifact"):
    shutil.rmtree(workdir / name, ignore_errors=True)
  scene.learn()
  results = scene.kills() | scene.publications() | scene.full_disk() | scene.idle_sockets()
  results |= scene.holders()
  results = scene.counts() | results
  scene.damaged_store()
  scene.named |= poisoned_segments(
    trained, workdir / "copies", ad_ids=scene.ad_ids, after_s=scene.end_s
  )
  scene.require(gr4ad("export", "--workdir", trained, "--out", workdir / "artifact"))
  scene.named |= damaged_files(workdir, data, user=scene.user)
  tried = len(scene.named)
  return results | {"stuck_starts": float(scene.stuck)} | {
    "corruptions_tried": float(tried), "corruptions_named": float(sum(scene.named.values())),
    **{f"named/{name}": float(found) for name, found in scene.named.items()},
  }


def _trained(workdir: Path, options: Options) -> tuple[Path, Path]:
  _, data = prepared_market(workdir, options.market)
  sids = tokenized(data, data / "sids", TokenizerConfig(codebook_sizes=(32, 32, 32)))
  config = Config(model=options.model, train=options.train, search=options.search)
  train_run(run_of(data, sids, config), workdir / "run", resume=True)
  return workdir / "run", data


class _Scene:
  """The run, its learner and its servers, and what has been counted."""

  def __init__(self, workdir: Path, trained: Path, data: Path, settings: Settings):
    self.workdir, self.trained, self.data, self.settings = workdir, trained, data, settings
    self.store, self.online = workdir / "store", workdir / "online"
    self.published = self.online / "published"
    self.tally, self.stuck = Tally(), 0
    self.named: dict[str, bool] = {}
    logs = read_logs(data / "logs")
    self.ad_ids = [str(ad) for ad in logs.ads.ad_id[:50]]
    self.user = str(logs.users.user_id[0])
    self.end_s = int(logs.events.time_s.max())
    self.lives = 0

  @contextlib.contextmanager
  def server(self, home: Path) -> Iterator[Server]:
    """One more life of a server whose store and publications lie in `home`."""
    self.lives += 1
    log = self.workdir / f"server-{self.lives}.log"
    began = time.monotonic()
    with running_server(
      self.trained, home / "store", "--clock", "log", "--published",
      home / "online" / "published",
      "--serving.batch-sizes", 1, 4, "--serving.beam-factors", 1.0, "--serving.cache-ttl-s", 0,
      "--serving.segment-s", 2, log=log, start_s=self.settings.start_s,
    ) as server:
      console.print(f"life {self.lives}: ready after {time.monotonic() - began:.0f} s")
      yield server

  def lives_of(self, what: Callable[[Server], None], home: Path | None = None) -> None:
    """Does something with a server; one that does not start is counted, and given up."""
    try:
      with self.server(home or self.workdir) as server:
        what(server)
    except (TimeoutError, RuntimeError) as error:  # not ready, or ended
      console.print(str(error))
      self.stuck += 1

  def learn(self) -> None:
    """A learner's first publication, so that servers have something to follow."""
    segments = self.store / "segments"
    segments.mkdir(parents=True)
    self.require(gr4ad(*self.learner(segments)))

  def learner(self, segments: Path, out: Path | None = None) -> tuple[object, ...]:
    """A command line of `gr4ad online`."""
    return ("online", "--workdir", self.trained, "--segments", segments, "--out",
            out or self.online, "--publish-every", 3)

  def require(self, said: Said) -> None:
    """What has to work before anything is harmed."""
    if said.code:
      raise RuntimeError(f"exit code {said.code}: {said.error[-1000:]}")

  def kills(self) -> dict[str, float]:
    """SIGKILL under load, and at last SIGTERM, after which all events stand in segments."""
    def strike(server: Server, number: int) -> None:
      with Load(server.url, self.tally, self.ad_ids):
        time.sleep(self.settings.load_s)
        server.process.send_signal(signal.SIGKILL if number else signal.SIGTERM)
        server.process.wait(timeout=60)

    for number in range(self.settings.kills, -1, -1):
      self.lives_of(functools.partial(strike, number=number))
    return {"kills": float(self.settings.kills)}

  def counts(self) -> dict[str, float]:
    """What the clients and the segments say at the end."""
    self.lives_of(lambda server: (server.process.send_signal(signal.SIGTERM),
                                  server.process.wait(timeout=60)))
    files = sorted((self.store / "segments").glob("events-*.parquet"))
    kept = collections.Counter(
      user for file in files for user in pd.read_parquet(file, columns=["user_id"])["user_id"]
    )
    ours = {user: count for user, count in kept.items() if user.startswith("event ")}
    return {
      "acknowledged": float(len(self.tally.acknowledged)),
      "lost": float(len(self.tally.acknowledged - ours.keys())),
      "duplicated": float(sum(count - 1 for count in ours.values())),
      "nan_served": float(self.tally.nan_served),
      "unplanned_5xx": float(self.tally.unplanned_5xx), "stuck_starts": float(self.stuck),
    }

  def publications(self) -> dict[str, float]:
    """Each poison is refused by name while ads are served, and a good one is taken afterwards."""
    good = (self.published / latest(self.published)["file"]).read_bytes()

    def poison(server: Server) -> None:
      with Load(server.url, self.tally, self.ad_ids):
        for step, (name, written) in enumerate(poisons(good).items(), 1_000):
          sha256 = hashlib.sha256(good if name in ("cut", "a bit flipped") else written).hexdigest()
          file = publish(self.published, step, written, sha256)
          self._name(f"published/{name}", within(
            SECONDS_TO_REFUSE, lambda file=file: file.name in server.log.read_text()
          ) and server.metric("gr4ad_parameters_step") < 1_000)
        publish(self.published, 2_000, good, hashlib.sha256(good).hexdigest())
        half(self.published / "latest.json")
        self._name("published/pointer cut", within(
          SECONDS_TO_REFUSE, lambda: "latest.json" in server.log.read_text()
        ))
        publish(self.published, 2_000, good, hashlib.sha256(good).hexdigest())
        taken = within(
          SECONDS_TO_REFUSE, lambda: server.metric("gr4ad_parameters_step") == 2_000
        )
      found["good_one_taken"] = float(taken)

    found = {"good_one_taken": 0.0}
    self.lives_of(poison)
    return found

  def full_disk(self) -> dict[str, float]:
    """No file of the server may grow for a while; what it has acknowledged stays."""
    refused = {}

    def fill(server: Server) -> None:
      with Load(server.url, self.tally, self.ad_ids):
        time.sleep(1)
        before = self.tally.statuses[503]
        none = (0, resource.RLIM_INFINITY)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, none)
        time.sleep(self.settings.load_s)
        refused["full_disk_refused"] = float(self.tally.statuses[503] - before)
        resource.prlimit(
          server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2
        )
        accepted = len(self.tally.acknowledged)
        time.sleep(self.settings.load_s)
        refused["accepted_afterwards"] = float(len(self.tally.acknowledged) - accepted)

    self.lives_of(fill)
    return refused

  def idle_sockets(self) -> dict[str, float]:
    """Seconds that health and ads take beside connections that say nothing."""
    took: dict[str, float] = {"slow_beside_idle": 2.0}

    def crowd(server: Server) -> None:
      address = server.url.removeprefix("http://").split(":")
      idle, slow = [], 0
      try:
        for _ in range(self.settings.idle_sockets):
          with contextlib.suppress(OSError):
            idle.append(socket.create_connection((address[0], int(address[1])), timeout=2))
        for path, body in (("/healthz", None), ("/v1/recommend", {"user_id": self.user, "k": 5})):
          slow += not answers(server.url + path, body, within_s=15.0)
      finally:
        for one in idle:
          one.close()
      took.update(slow_beside_idle=float(slow), idle_sockets=float(len(idle)))

    def crowd_with_files(server: Server) -> None:
      with _many_files():
        crowd(server)

    self.lives_of(crowd_with_files)
    return took

  def holders(self) -> dict[str, float]:
    """A second one in a folder that has one."""
    named = 0

    def second(server: Server) -> None:
      nonlocal named
      said = gr4ad(
        "serve", "--workdir", self.trained, "--store", self.store, "--port", free_port(),
        timeout_s=120,
      )
      named += _names_holder(said, server.process.pid)

    self.lives_of(second)
    for words in (
      ("train", "--data", self.data, "--workdir", self.workdir / "copies" / "train", "--preset",
       "tiny", "--train.num-steps", 100_000, "--resume"),
      (*self.learner(self.store / "segments", self.workdir / "copies" / "online"), "--follow", 1),
    ):  # fmt: skip
      first = subprocess.Popen(
        [sys.executable, "-m", "gr4ad_jax", *map(str, words)], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
      )
      try:
        folder = Path(words[words.index("--out" if "--out" in words else "--workdir") + 1])
        within(120, lambda folder=folder: (folder / "run.json").exists())
        said = gr4ad(*words, timeout_s=60)
        named += _names_holder(said, first.pid)
      finally:
        first.kill()
        first.wait()
    return {"holders_named": float(named)}

  def damaged_store(self) -> None:
    """A server starts beside damage, and says where it is."""
    for place, harm in (
      (Path("online", "published", "latest.json"), half),
      (Path("store", "journal.sqlite"), scribble),
    ):
      home = self.workdir / "copies" / f"start-{place.stem}"
      for part in ("store", "online"):
        shutil.copytree(self.workdir / part, home / part)
      harm(home / place)
      answered: list[bool] = []

      def look(server: Server, answered=answered) -> None:
        body = {"user_id": self.user, "k": 5}
        answered.append(answers(f"{server.url}/v1/recommend", body, within_s=15.0))

      self.lives_of(look, home)
      said = (self.workdir / f"server-{self.lives}.log").read_text()
      self._name(f"start/{place.name}", answered == [True] and place.name in said)

  def _name(self, name: str, found: bool) -> None:
    console.print(f"{name}: {'named' if found else 'NOT NAMED'}")
    self.named[name] = bool(found)


def _names_holder(said: Said, pid: int) -> bool:
  console.print(f"exit code {said.code}: {said.error.strip()[-200:]}")
  return said.code == 2 and str(pid) in said.error


@contextlib.contextmanager
def _many_files() -> Iterator[None]:
  """This process may open as many files as the machine allows; its children keep their limit."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def table(results: Mapping[str, float]) -> str:
  """What was counted, beside what is right."""
  right = dict.fromkeys(ZERO, "0") | {
    "corruptions_named": f"{results['corruptions_tried']:.0f}", "holders_named": "3",
    "good_one_taken": "1", "slow_beside_idle": "0", "full_disk_refused": "more than 0",
    "accepted_afterwards": "more than 0",
  }
  lines = ["| | | right |", "|---|---:|---|"]
  lines += [
    f"| {name} | {value:.0f} | {right.get(name, '')} |"
    for name, value in results.items() if not name.startswith("named/")
  ]
  missed = [name.removeprefix("named/") for name, value in results.items()
            if name.startswith("named/") and not value]
  return "\n".join(lines) + ("\n\nNot named: " + ", ".join(missed) if missed else "")


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """None."""
  del results
  return {}
