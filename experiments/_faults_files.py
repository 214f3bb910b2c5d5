"""Files that are harmed, and the commands that meet them: each has to name what it found."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments._faults import gr4ad, half, largest, overwrite
from experiments._serving import free_port
from gr4ad_jax.machine.progress import console

MOST_LINES = 3  # that a command needs to name a file


class Damage(NamedTuple):
  """A file that is harmed, and the command that meets it."""

  name: str
  file: Callable[[Path], Path]  # below a copy of the folders run, data, artifact
  harm: Callable[[Path], object]
  command: Callable[[Path], tuple[object, ...]]
  word: str = ""  # that has to be said; "" = the file's name
  goes_on: bool = False  # something whole is left, so the command ends with 0


def damaged_files(workdir: Path, data: Path, *, user: str) -> dict[str, bool]:
  """Harms one file after another, each in a copy; whether the command named it, by name.

  Args:
    workdir: holds `run`, a trained run, and `artifact`, its export.
    data: that the run was trained on.
    user: of the log.
  """

  def ask(folder: Path) -> tuple[object, ...]:
    return "recommend", "--workdir", folder / "run", "--user", user

  def judge(folder: Path) -> tuple[object, ...]:
    return "evaluate", "--workdir", folder / "run"

  def serve(folder: Path) -> tuple[object, ...]:
    return "serve", "--artifact", folder / "artifact", "--port", free_port()

  def at(*parts: str) -> Callable[[Path], Path]:
    return lambda folder: folder.joinpath(*parts)

  def test_requests(folder: Path) -> Path:
    return next((folder / "data" / "examples").rglob("*test.array_record*"))

  steps = sorted(int(f.name) for f in (workdir / "run" / "checkpoints").iterdir()
                 if f.name.isdigit())
  newest = str(steps[-1])
  damages = (
    Damage("newest checkpoint", lambda f: largest(f / "run" / "checkpoints" / newest), half, ask,
           word=newest, goes_on=len(steps) > 1),
    Damage("run.json", at("run", "run.json"), half, ask),
    Damage("codes", at("run", "codes", "codes.npz"), half, ask),
    Damage("logs", at("data", "logs", "ads.parquet"), half, ask),
    Damage("examples", test_requests, half, judge),
    Damage("examples.json", at("data", "examples", "examples.json"), half, ask),
    Damage("arrays of an artifact", at("artifact", "arrays.npz"), half, serve),
    Damage("program of an artifact", at("artifact", "program.bin"), half, serve),
    Damage("manifest of an artifact", at("artifact", "manifest.json"), overwrite("{}"), serve),
  )
  return {damage.name: _names(damage, workdir, data) for damage in damages}


def _names(damage: Damage, workdir: Path, data: Path) -> bool:
  folder = workdir / "copies" / damage.name
  for source in (workdir / "run", data, workdir / "artifact"):
    shutil.copytree(source, folder / source.name)
  run_file = folder / "run" / "run.json"
  moved = run_file.read_text().replace(str(data.resolve()), str((folder / "data").resolve()))
  run_file.write_text(moved)
  file = damage.file(folder)
  damage.harm(file)
  said = gr4ad(*damage.command(folder), timeout_s=120)
  shutil.rmtree(folder)
  lines = said.error.strip().splitlines()
  named = (
    said.code == (0 if damage.goes_on else 2) and len(lines) <= MOST_LINES
    and (damage.word or file.name) in said.error
  )
  console.print(
    f"{damage.name}: {'named' if named else 'NOT NAMED'}; exit code {said.code}, {len(lines)} "
    f"lines, the last one: {(lines or ['-'])[-1][:200]}"
  )
  return named


def poisoned_segments(
  trained: Path, folder: Path, *, ad_ids: Sequence[str], after_s: int
) -> dict[str, bool]:
  """A learner meets bad segments between good ones; whether it named each, by name.

  Args:
    trained: folder of the run that the learner begins with.
    folder: for the segments and the learner.
    ad_ids: of the log.
    after_s: unix seconds of the log's end.
  """
  segments = folder / "segments"
  segments.mkdir(parents=True)
  rows = np.arange(64)
  good = pd.DataFrame({
    "user_id": [f"late {row % 8}" for row in rows], "time": after_s + 100 + rows,
    "ad_id": [ad_ids[row % len(ad_ids)] for row in rows], "action": "click",
    "request_id": [f"late {row}" for row in rows], "value": 1.0,
  })
  good.to_parquet(segments / "s1.parquet", index=False)
  (segments / "s2-nothing.parquet").touch()
  good.to_parquet(segments / "s3-cut.parquet", index=False)
  half(segments / "s3-cut.parquet")
  good.rename(columns={"user_id": "who"}).to_parquet(segments / "s4-columns.parquet", index=False)
  (segments / "s5-bytes.csv").write_bytes(b"\x00\xff\xfe not a table")
  (segments / "s6-empty.csv").touch()
  good.assign(time=4_070_908_800).to_parquet(segments / "s7-2099.parquet", index=False)
  good.assign(time=good["time"] + 1_000).to_parquet(segments / "s8.parquet", index=False)
  said = gr4ad(
    "online", "--workdir", trained, "--segments", segments, "--out", folder / "fed",
    "--publish-every", 3,
  )
  text = said.out + said.error
  learned = said.code == 0 and "s8.parquet: " in text and "Traceback" not in text
  if not learned:
    console.print(f"online: exit code {said.code}: {text[-500:]}")
  bad = ("s2-nothing", "s3-cut", "s4-columns", "s5-bytes", "s6-empty", "s7-2099")
  return {f"segment {name}": learned and name in text for name in bad}
