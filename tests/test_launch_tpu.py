"""launch_tpu.sh: what it would run, what it refuses, and that it cleans up."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "launch_tpu.sh"
PLACE = ("--name", "ads", "--zone", "us-east5-b")
TPU = ["gcloud", "compute", "tpus", "tpu-vm"]
QUEUE = ["gcloud", "compute", "tpus", "queued-resources"]
# Each word is one that careless quoting breaks.
AWKWARD = [
  "gr4ad", "it's", 'a "b"  c', "$HOME `id` \\", "*", "", "two\nlines", "--x=&|;", "é",
  "gs://bucket/run",
]


def launch(*arguments, path=None):
  environment = dict(os.environ) if path is None else {**os.environ, "PATH": path}
  return subprocess.run(
    ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, timeout=300
  )


@pytest.fixture
def fake_tools(tmp_path):
  """A PATH whose tools write down their words, and fail where $FAIL is one.

  Slices are in the states of $STATES, one after another; the last one stays.
  """
  tools = tmp_path / "bin"
  tools.mkdir()
  for name in ("gcloud", "tar", "mkdir", "srun"):
    tool = tools / name
    tool.write_text(
      f"#!{sys.executable}\nimport json, os, sys\n"
      f"with open({str(tmp_path / 'calls')!r}, 'a') as log:\n"
      f"  log.write(json.dumps([{name!r}, *sys.argv[1:]]) + '\\n')\n"
      "if 'describe' in sys.argv:\n"
      "  states = os.environ.get('STATES', 'ACTIVE').split()\n"
      f"  asked = open({str(tmp_path / 'calls')!r}).read().count('describe')\n"
      "  print(states[min(asked, len(states)) - 1])\n"
      "sys.exit(7 if os.environ.get('FAIL') in sys.argv else 0)\n"
    )
    tool.chmod(0o755)
  return f"{tools}{os.pathsep}{os.environ['PATH']}"


def calls(tmp_path):
  log = tmp_path / "calls"
  return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def remote_words(call):
  """The words that the host's shell makes of the last part of an ssh call."""
  (line,) = [word for word in call if word.startswith("--command=")]
  start = "--command=cd gr4ad_jax && . .venv/bin/activate && GR4AD_DISTRIBUTED=auto "
  return shlex.split(line.removeprefix(start))


def test_dry_run_prints_the_commands_that_a_real_run_makes(tmp_path, fake_tools):
  creation = ("--project", "my ads", "--create", "--type", "v6e-16", "--spot")
  arguments = (*PLACE, *creation, "--delete")
  printed = launch(*arguments, "--dry-run", "--", *AWKWARD, path=fake_tools)
  assert printed.returncode == 0, printed.stderr
  assert calls(tmp_path) == []

  real = launch(*arguments, "--", *AWKWARD, path=fake_tools)
  assert real.returncode == 0, real.stderr
  made = calls(tmp_path)
  (tmp_path / "calls").unlink()
  environment = {**os.environ, "PATH": fake_tools}
  subprocess.run(["sh", "-e"], input=printed.stdout, text=True, env=environment, check=True)
  assert calls(tmp_path) == made

  place = ["--zone=us-east5-b", "--project=my ads"]
  machine = [
    "--node-id=ads", "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--spot"
  ]
  assert made[0] == [*QUEUE, "create", "ads", *place, *machine]
  assert made[1] == [*QUEUE, "describe", "ads", *place, "--format=value(state.state)"]
  assert [call[0] for call in made[2:4]] == ["mkdir", "tar"]
  archive = made[3][made[3].index("-czf") + 1]
  assert made[4] == [*TPU, "scp", archive, "ads:gr4ad_jax.tar.gz", *place, "--worker=all"]
  for call in made[5:7]:
    assert call[:8] == [*TPU, "ssh", "ads", *place] and call[8] == "--worker=all"
  assert '".[tpu,gcs]"' in made[5][9]
  assert remote_words(made[6]) == AWKWARD
  assert made[7] == [*QUEUE, "delete", "ads", *place, "--force", "--quiet"]
  assert len(made) == 8


def test_only_the_asked_steps_run():
  assert launch(*PLACE, "--delete", "--dry-run").stdout.splitlines() == [
    "gcloud compute tpus queued-resources delete ads --zone=us-east5-b --force --quiet"
  ]
  assert launch(*PLACE, "--create", "--type", "v4-8", "--dry-run").stdout.splitlines() == [
    "gcloud compute tpus queued-resources create ads --zone=us-east5-b --node-id=ads"
    " --accelerator-type=v4-8 --runtime-version=tpu-ubuntu2204-base",
    "gcloud compute tpus queued-resources describe ads --zone=us-east5-b"
    " '--format=value(state.state)'",
  ]
  words = launch(*PLACE, "--dry-run", "--", "gr4ad", "demo").stdout.split()
  assert "create" not in words and "delete" not in words


def test_slice_is_deleted_after_a_failure_but_not_when_it_was_never_created(
  tmp_path, fake_tools, monkeypatch
):
  arguments = (*PLACE, "--create", "--type", "v6e-16", "--delete", "--", "gr4ad", "demo")
  monkeypatch.setenv("FAIL", "scp")
  assert launch(*arguments, path=fake_tools).returncode == 7
  steps = [call[4] for call in calls(tmp_path) if call[0] == "gcloud"]
  assert steps == ["create", "describe", "scp", "delete"]

  (tmp_path / "calls").unlink()
  monkeypatch.setenv("FAIL", "create")
  assert launch(*arguments, path=fake_tools).returncode == 7
  assert [call[4] for call in calls(tmp_path)] == ["create"]


def test_waits_in_the_queue_and_asks_again_for_a_slice_that_was_taken_away(
  tmp_path, fake_tools, monkeypatch
):
  monkeypatch.setenv("GR4AD_POLL_S", "0")
  monkeypatch.setenv("STATES", "WAITING_FOR_RESOURCES PROVISIONING ACTIVE SUSPENDED ACTIVE")
  monkeypatch.setenv("FAIL", "--command=cd gr4ad_jax && . .venv/bin/activate && "
                             "GR4AD_DISTRIBUTED=auto gr4ad demo")
  arguments = (*PLACE, "--create", "--type", "v6e-16", "--retries", "1", "--", "gr4ad", "demo")
  result = launch(*arguments, path=fake_tools)
  assert result.returncode == 7
  assert "ads is WAITING_FOR_RESOURCES, waiting" in result.stderr
  steps = [call[4] for call in calls(tmp_path) if call[0] == "gcloud"]
  made = ["scp", "ssh", "ssh"]
  assert steps == [
    "create", "describe", "describe", "describe", *made, "describe", "delete", "create",
    "describe", *made,
  ]

  (tmp_path / "calls").unlink()
  monkeypatch.setenv("STATES", "FAILED")
  result = launch(*arguments, path=fake_tools)
  assert result.returncode == 1 and "ads is FAILED" in result.stderr


def test_slurm_starts_one_process_a_gpu(tmp_path, fake_tools):
  arguments = ("--slurm", "2", "--gpus", "8")
  printed = launch(*arguments, "--dry-run", "--", *AWKWARD, path=fake_tools)
  assert printed.returncode == 0 and calls(tmp_path) == []
  assert launch(*arguments, "--", *AWKWARD, path=fake_tools).returncode == 0
  (made,) = calls(tmp_path)
  assert shlex.split(printed.stdout) == made == [
    "srun", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8",
    "--export=ALL,GR4AD_DISTRIBUTED=auto", "--kill-on-bad-exit=1", *AWKWARD,
  ]


@pytest.mark.parametrize(
  ("arguments", "complaint"),
  [
    ((), "--name is missing"),
    (("--name", "ads", "--", "ls"), "--zone is missing"),
    (("--name", "--zone", "z", "--", "ls"), "--name needs a value"),
    (("--name",), "--name needs a value"),
    (PLACE, "nothing to do"),
    ((*PLACE, "--"), "no command after --"),
    ((*PLACE, "gr4ad", "demo"), "unknown argument 'gr4ad'"),
    ((*PLACE, "--zoen", "z"), "unknown argument '--zoen'"),
    (("--local", "x", "--", "ls"), "--local x: needs a number"),
    (("--local", "2"), "nothing to do"),
    (("--local", "2", *PLACE, "--", "ls"), "no options of a slice"),
    ((*PLACE, "--retries", "x", "--", "ls"), "--retries x: needs a number"),
    (("--slurm", "0", "--gpus", "8", "--", "ls"), "--slurm 0: needs a number"),
    (("--slurm", "2", "--", "ls"), "--gpus : needs a number"),
    (("--slurm", "2", "--gpus", "8"), "nothing to do"),
    (("--slurm", "2", "--gpus", "8", *PLACE, "--", "ls"), "no options of a slice"),
    ((*PLACE, "--create"), "--create needs --type"),
    ((*PLACE, "--create", "--type", "h100-8"), "add --version"),
    ((*PLACE, "--spot", "--", "ls"), "go with --create"),
    ((*PLACE, "--type", "v6e-16", "--", "ls"), "go with --create"),
  ],
)
def test_bad_usage_exits_2_and_names_the_mistake(arguments, complaint):
  result = launch("--dry-run", *arguments)
  assert result.returncode == 2
  assert complaint in result.stderr
  assert result.stdout == ""


def test_help_names_every_option():
  result = launch("--help")
  assert result.returncode == 0
  for option in ("name", "zone", "project", "create", "type", "spot", "delete", "local", "slurm",
                 "gpus", "retries", "dry-run"):
    assert f"\n  --{option}" in result.stdout


LOCAL = "import os, signal, sys, time; number = int(os.environ['GR4AD_DISTRIBUTED'][-1]);"


def test_local_processes_know_each_other_and_all_must_succeed():
  code = LOCAL + (  # one write, so that lines do not mix
    "os.write(1, '{GR4AD_DISTRIBUTED} {JAX_PLATFORMS}\\n'.format(**os.environ).encode())"
  )
  result = launch("--local", "3", "--", sys.executable, "-c", code)
  assert result.returncode == 0, result.stderr
  lines = [line.split() for line in sorted(result.stdout.splitlines())]
  assert [line[0].split(",")[1:] for line in lines] == [["3", "0"], ["3", "1"], ["3", "2"]]
  assert len({line[0].split(",")[0] for line in lines}) == 1  # one address
  assert {line[1] for line in lines} == {os.environ.get("JAX_PLATFORMS", "cpu")}

  code = LOCAL + "sys.exit(5) if number else time.sleep(1)"
  result = launch("--local", "2", "--", sys.executable, "-c", code)
  assert result.returncode == 5


def test_processes_do_not_meet_at_a_port_that_a_connection_may_hold():
  first = Path("/proc/sys/net/ipv4/ip_local_port_range")
  if not first.exists():
    pytest.skip("the system does not tell which ports it gives to outgoing connections")
  outgoing = int(first.read_text().split()[0])
  ports = [
    int(launch("--local", "1", "--", "bash", "-c", "echo $GR4AD_DISTRIBUTED").stdout.split(":")[1]
        .split(",")[0])
    for _ in range(20)
  ]
  assert max(ports) < outgoing
  assert len(set(ports)) > 10


def test_local_passes_a_request_to_stop_on_and_waits(tmp_path):
  code = LOCAL + (
    "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), os.write(1, b'saved\\n'),"
    " sys.exit(143)));"
    f"open(r'{tmp_path}/' + str(number), 'w').close(); time.sleep(60)"
  )
  process = subprocess.Popen(
    ["bash", str(SCRIPT), "--local", "2", "--", sys.executable, "-c", code],
    stdout=subprocess.PIPE, text=True,
  )
  while len(list(tmp_path.iterdir())) < 2:
    time.sleep(0.05)
  process.terminate()
  output = process.communicate(timeout=300)[0]
  assert process.returncode == 143 and output.split() == ["saved", "saved"]


def test_a_failing_command_is_started_again(tmp_path, fake_tools, monkeypatch):
  code = LOCAL + (
    f"path = r'{tmp_path}/tries'; open(path, 'a').write('x'); sys.exit(len(open(path).read()) < 3)"
  )
  again = launch("--local", "1", "--retries", "2", "--", sys.executable, "-c", code)
  assert again.returncode == 0 and again.stderr.count("starting again") == 2
  monkeypatch.setenv("FAIL", "--command=cd gr4ad_jax && . .venv/bin/activate && "
                             "GR4AD_DISTRIBUTED=auto gr4ad demo")
  result = launch(*PLACE, "--retries", "1", "--", "gr4ad", "demo", path=fake_tools)
  assert result.returncode == 7 and result.stderr.count("starting again (0 left)") == 1
