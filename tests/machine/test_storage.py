"""Buckets behind emulators of both stores: whole paths of commands, what is fetched, errors."""

import http.server
import logging
import shutil
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
import s3fs
from gcp_storage_emulator.server import create_server
from moto.server import ThreadedMotoServer

from gr4ad_jax.gr4ad.run import load_params, open_inputs, read_run
from gr4ad_jax.gr4ad.train_run import train_run
from gr4ad_jax.machine import storage
from gr4ad_jax.machine.storage import StorageError, Url
from gr4ad_jax.training.metric_log import read_log
from gr4ad_jax.training.preemption import Preemption
from tests.commands import by_two_processes, run, train_arguments

WORLD = ("--world", "synthetic", "--num-users", 120, "--num-ads", 40, "--days", 12,
         "--num-contents", 20, "--num-advertisers", 6, "--num-categories", 4,
         "--sessions-per-day", 1)
TRAIN = ("--preset", "tiny", "--model.width", 32, "--model.num-layers", 2,
         "--model.num-lazy-layers", 1, "--search.widths", 4, 8, 8, "--train.num-steps", 6,
         "--train.batch-size", 8, "--train.eval-every", 3, "--train.eval-batches", 1,
         "--train.checkpoint-every", 4, "--train.log-every", 1)


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


@pytest.fixture(scope="module", autouse=True)
def stores(tmp_path_factory):
  """gs://bucket and s3://bucket, empty, for this process and those that it starts."""
  logging.getLogger("werkzeug").setLevel(logging.ERROR)
  google = create_server("127.0.0.1", free_port(), in_memory=True, default_bucket="bucket")
  amazon = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
  google.start()
  amazon.start()
  google_url = f"http://127.0.0.1:{google._api._port}"
  with pytest.MonkeyPatch.context() as patch:
    for name, value in {
      "STORAGE_EMULATOR_HOST": google_url, "TENSORSTORE_GCS_HTTP_URL": google_url,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
      "AWS_ENDPOINT_URL": "http://127.0.0.1:{1}".format(*amazon.get_host_and_port()),
      "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": "us-east-1",
      "AWS_DEFAULT_REGION": "us-east-1", "GR4AD_CACHE": str(tmp_path_factory.mktemp("cache")),
    }.items():
      patch.setenv(name, value)
    s3fs.S3FileSystem().mkdir("bucket")
    yield
  google.stop()
  amazon.stop()


@pytest.fixture(scope="module")
def data(stores) -> str:
  """A market, prepared and tokenized in a bucket."""
  market, folder = "gs://bucket/market", "gs://bucket/data"
  files = [f"--{name}={market}/{name}.parquet" for name in ("ads", "events", "users", "contents")]
  assert run("market", "--out", market, *WORLD) == 0
  prepare = ("prepare", "parquet", *files, "--validation-days", 2, "--test-days", 2,
             "--max-ad-history", 8, "--max-organic-history", 8, "--num-trending", 4, "--out")
  assert run(*prepare, folder) == 0
  assert run("tokenize", "--data", folder, "--codebook-sizes", 8, 4, 8, "--report") == 0
  assert fsspec.filesystem("gs").exists("bucket/data/sids/report.html")
  return folder


def assert_same_bits(a, b) -> None:
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def train(data: str, workdir: object, *more: object) -> int:
  return run("train", "--data", data, "--workdir", workdir, "--train.data-parallel", 1, *TRAIN,
             *more)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
  """The last state of a run in a local folder."""
  workdir = tmp_path_factory.mktemp("local") / "run"
  assert train(data, workdir) == 0
  return train_run(read_run(workdir), workdir, resume=True), workdir


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_run_in_a_bucket_goes_on_on_another_machine(
  scheme, data, undisturbed, tmp_path, monkeypatch, capsys
):
  """Stopped after step 4, resumed with nothing but the bucket; its newest checkpoint is damaged."""
  workdir = storage.place(f"{scheme}://bucket/run")
  with monkeypatch.context() as patch:
    patch.setattr(Preemption, "reached", lambda self, step: step == 4)
    assert train(data, workdir) == 143
  assert f"step 4 is saved in {workdir}" in capsys.readouterr().err
  assert [row["step"] for row in read_log(workdir) if row["kind"] == "train"] == [1, 2, 3, 4]
  assert read_run(workdir).data == data and not Path(f"{scheme}:").exists()

  store = fsspec.filesystem(scheme)
  newest = f"{workdir.path}/checkpoints/4"
  largest = max(store.find(newest, detail=True).values(), key=lambda info: info["size"])["name"]
  store.pipe_file(largest, store.cat_file(largest)[:100])
  monkeypatch.setenv("GR4AD_CACHE", str(tmp_path / "other"))
  assert train(data, workdir) == 2
  assert "pass --resume" in capsys.readouterr().err
  assert train(data, workdir, "--resume") == 0
  assert f"{workdir}/checkpoints/4: cannot be read, set aside" in capsys.readouterr().err
  assert store.exists(f"{newest}.damaged")
  state, local = undisturbed
  assert_same_bits(train_run(read_run(workdir), workdir, resume=True), state)
  rows, expected = read_log(workdir), read_log(local)
  assert [(r["step"], r["kind"], r["loss"]) for r in rows] == [
    (r["step"], r["kind"], r["loss"]) for r in expected
  ]
  left = {name.split("/")[3] for name in store.find(f"{workdir.path}/checkpoints")}
  assert {"4.damaged", "6"} <= left and len(left) <= 4

  half = f"{workdir.path}/checkpoints/9/state/half"  # of a run that is going on
  store.pipe_file(half, b"half")
  if scheme == "s3":  # the rest is as with gs://
    inputs = open_inputs(read_run(workdir))
    assert load_params(read_run(workdir), workdir, inputs.vocabulary)[2] in (3, 6)
    assert store.exists(half)
    return
  assert run("evaluate", "--workdir", workdir) == 0
  assert store.exists(half)
  assert run("report", "--workdir", workdir) == 0
  assert f"report: {workdir}/report.html" in capsys.readouterr().out.replace("\n", "")
  assert {"run.json", "metrics.json", "report.html"} <= {
    name.rpartition("/")[2] for name in store.ls(workdir.path, detail=False)
  }


def test_two_processes_write_one_run_in_a_bucket(tiny_data, tmp_path):
  """Neither has a folder that the other sees. The programs are those of test_two_processes."""
  data = storage.place("gs://bucket/tiny")
  for name in ("logs", "examples", "sids"):
    with storage.new_folder(data / name) as copy:
      shutil.copytree(tiny_data / name, copy.path)
  own_cache = 'GR4AD_CACHE="$GR4AD_CACHE/${GR4AD_DISTRIBUTED##*,}" exec "$@"'
  result = by_two_processes(
    *train_arguments(data, "gs://bucket/two", "--train.checkpoint-every", "8",
                     "--train.eval-every", "8"),
    before=("bash", "-c", own_cache, "-"), GR4AD_CACHE=str(tmp_path),
  )
  assert result.stdout.count("trained 8 steps in gs://bucket/two") == 1
  workdir = storage.place("gs://bucket/two")
  rows = [row for row in read_log(workdir) if row["kind"] == "train"]
  assert [row["step"] for row in rows] == list(range(1, 9))
  again = read_run(workdir)
  assert load_params(again, workdir, open_inputs(again).vocabulary)[2] == 8


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_only_what_has_changed_is_fetched(scheme, tmp_path):
  place = storage.place(f"{scheme}://bucket/some/folder")
  store = fsspec.filesystem(scheme)
  for name, text in {"a.txt": "one", "deep/b.txt": "two", "deep/c.txt": "three"}.items():
    storage.write_text(place / name, text)
  with ThreadPoolExecutor(4) as pool:  # each waits for the one that is fetching
    (path,) = set(pool.map(storage.fetch, [place] * 4))
  assert (path / "deep" / "b.txt").read_text() == "two" and path.name == "folder"
  before = {file: file.stat().st_ino for file in path.rglob("*.txt")}
  storage.write_text(place / "a.txt", "six")  # of the same size
  store.rm_file(f"{place.path}/deep/c.txt")
  (path / "deep" / "b.txt").write_text("a local accident")
  assert storage.fetch(place) == path
  assert (path / "a.txt").read_text() == "six" and not (path / "deep" / "c.txt").exists()
  assert (path / "deep" / "b.txt").read_text() == "two"
  after = {file: file.stat().st_ino for file in path.rglob("*.txt")}
  assert storage.fetch(place) == path
  assert {file: file.stat().st_ino for file in path.rglob("*.txt")} == after != before
  assert storage.fetch(place / "a.txt").read_text() == "six"
  assert not storage.fetch(storage.place(f"{scheme}://bucket/nothing")).exists()


def test_a_half_written_folder_has_no_marker(monkeypatch):
  place = storage.place("s3://bucket/whole")
  for content in ("old", "new"):
    with storage.new_folder(place) as copy:
      (copy.path / "part").mkdir(parents=True)
      (copy.path / "part" / f"{content}.bin").write_text(content)
      (copy.path / "part" / "part.json").write_text(content)
      (copy.path / "all.json").write_text(content)
  store = fsspec.filesystem("s3")
  assert {name.removeprefix("bucket/whole/") for name in store.find("bucket/whole")} == {
    "part/new.bin", "part/part.json", "all.json"
  }
  written = store.put_file

  def broken(source, target):
    if target.endswith(".bin"):
      raise OSError("the network is gone")
    written(source, target)

  monkeypatch.setattr(store, "put_file", broken)
  with pytest.raises(StorageError, match="s3://bucket/whole: .*network is gone; .* kept in"):
    with storage.new_folder(place) as copy:
      copy.path.mkdir()
      (copy.path / "x.bin").write_text("x")
      (copy.path / "all.json").write_text("third")
  assert not store.exists("bucket/whole/all.json") and copy.path.is_dir()


def test_a_folder_that_fails_is_not_pushed_but_changes_of_a_working_copy_are():
  place = storage.place("s3://bucket/fails")
  for opened in (storage.new_folder, storage.working_copy):
    with pytest.raises(ZeroDivisionError), opened(place) as copy:
      copy.path.mkdir(exist_ok=True)
      (copy.path / opened.__name__).write_text("text")
      raise ZeroDivisionError
    assert not copy.path.exists()
  assert not storage.exists(place / "new_folder") and storage.exists(place / "working_copy")
  with storage.working_copy(place) as copy:
    (copy.path / "working_copy").unlink()
  assert not storage.exists(place / "working_copy")


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("http://host/x", "http:// is not supported"), ("hdfs://x/y", "gs:// and s3:// are"),
    ("gs:/bucket/x", "write gs://BUCKET/FOLDER"), ("s3://", "write s3://BUCKET/FOLDER"),
    ("gs://bucket/../x", "write gs://BUCKET/FOLDER"),
  ],
)
def test_a_url_never_becomes_a_local_folder(text, words, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert run("train", "--data", text, "--workdir", "w") == 2
  error = capsys.readouterr().err
  assert words in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_places():
  assert storage.place("gs://bucket//a/b/") == Url("gs", "bucket/a/b")
  assert str(Url("gs", "bucket/a") / "b") == "gs://bucket/a/b"
  assert storage.place("a/b:c") == Path("a/b:c")
  with pytest.raises(TypeError):
    Path(storage.place("gs://bucket/a"))


def error_of(capsys, *argv: object) -> str:
  """The only line that a command leaves which is refused."""
  capsys.readouterr()
  assert run(*argv) == 2
  error = capsys.readouterr().err
  assert error.startswith("gr4ad: error: ") and error.count("\n") == 1
  return error


def test_what_cannot_be_in_a_bucket_is_refused(capsys):
  for argv in (
    ("sweep", "--data", "d", "--workdir", "gs://bucket/s", "--grid", "train.seed=0,1"),
    ("serve", "--workdir", "w", "--store", "s3://bucket/s"), ("demo", "--workdir", "gs://bucket/d"),
  ):
    assert "mounted disk" in error_of(capsys, *argv)
  assert "--store" in error_of(capsys, "serve", "--workdir", "gs://bucket/run")
  storage.write_text(storage.place("gs://bucket/taken/file"), "text")
  taken = error_of(capsys, "market", "--out", "gs://bucket/taken", *WORLD)
  assert "gs://bucket/taken: exists already" in taken
  online = ("online", "--workdir", "w", "--segments", "gs://bucket/s", "--out", "o", "--follow", 1)
  assert "is not followed" in error_of(capsys, *online)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_missing_bucket_is_told_in_one_line(scheme, data, capsys):
  nowhere = f"{scheme}://not-there/run"
  assert nowhere in error_of(capsys, "evaluate", "--workdir", nowhere)
  assert nowhere in error_of(capsys, "train", "--data", data, "--workdir", nowhere, *TRAIN)
  lost = error_of(capsys, "train", "--data", f"{scheme}://not-there/data", "--workdir", "w")
  assert f"{scheme}://not-there/data" in lost


def test_a_bucket_of_somebody_else_is_told_in_one_line(capsys, monkeypatch):
  class Forbidding(http.server.BaseHTTPRequestHandler):
    def answer(self):
      self.send_response(403)
      self.end_headers()

    do_GET = do_PUT = do_HEAD = do_POST = answer

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbidding)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  s3fs.S3FileSystem.clear_instance_cache()
  try:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    line = error_of(capsys, "report", "--workdir", "s3://bucket/run")
    assert "s3://bucket/run: cannot be read; " in line and "Forbidden" in line
  finally:
    server.shutdown()
    server.server_close()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_missing_driver_names_its_extra(capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gs", raising=False)
  error = error_of(capsys, "report", "--workdir", "gs://bucket/run")
  assert "gs://bucket/run: needs gcsfs; pip install 'gcsfs>=" in error
