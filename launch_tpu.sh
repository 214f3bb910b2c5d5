#!/usr/bin/env bash
# Installs this checkout on every host of a Cloud TPU slice and starts one command on all of them; or
# starts it on the GPUs of a SLURM cluster, or as several processes on this machine.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: ./launch_tpu.sh --name NAME --zone ZONE [options] [-- COMMAND [ARGUMENT ...]]
       ./launch_tpu.sh --slurm NODES --gpus N [--retries N] -- COMMAND [ARGUMENT ...]
       ./launch_tpu.sh --local N [--retries N] -- COMMAND [ARGUMENT ...]

Copies this checkout to every host of a Cloud TPU slice, installs it there and runs COMMAND on all
hosts at once, with its output here; fails when COMMAND fails. Needs the gcloud CLI, logged in.

  --name NAME        the slice (TPU VM)
  --zone ZONE        its zone, for example us-east5-b
  --project PROJECT  the Google Cloud project; default: the one that gcloud is set to
  --create           ask for the slice first, as a queued resource, and wait for it; needs --type
  --type TYPE        with --create: accelerator type, for example v6e-16
  --version VERSION  with --create: TPU software version; default: Google's advice for TYPE
  --spot             with --create: a spot slice: cheaper, may be taken away at any time
  --delete           delete the slice (its queued resource) at the end, after a failure too
  --slurm NODES      instead, COMMAND on so many nodes by srun, from a shared installed checkout
  --gpus N           with --slurm: GPUs of a node, one process each
  --local N          instead, N processes on this machine, joined into one run (CPU: by gloo)
  --retries N        start COMMAND again where it fails, up to N times; give it --resume. With
                     --create a slice that was taken away is asked for again
  --dry-run          print the commands, run none
  --help             print this text

Without COMMAND, --create and --delete only create or delete. COMMAND runs in the copied checkout;
what it writes there stays on its host, so give it a bucket (gs://) or a folder that all hosts share.
The hosts join into one run of `gr4ad train` (GR4AD_DISTRIBUTED=auto). A run that is told to stop (SIGTERM) saves its
state first; --resume goes on.

examples:
  ./launch_tpu.sh --local 2 -- gr4ad train --preset tiny --data data/x --workdir runs/x
  ./launch_tpu.sh --slurm 2 --gpus 8 -- gr4ad train --data /shared/x --workdir /shared/run --resume
  ./launch_tpu.sh --name ads --zone us-east5-b --create --type v6e-8 --spot --retries 20 -- \
    gr4ad train --preset base --data gs://bucket/data --workdir gs://bucket/run --resume
  ./launch_tpu.sh --name ads --zone us-east5-b --delete
USAGE
}

fail_usage() {
  printf 'launch_tpu.sh: %s\nTry ./launch_tpu.sh --help\n' "$1" >&2
  exit 2
}

# The words as shell text that gives the same words back; bash's own %q would need bash to read it.
quote_words() {
  local apostrophe="'" escaped="'\\''" text='' word
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      word=${word//$apostrophe/$escaped}
      word="'$word'"
    fi
    text+="${text:+ }$word"
  done
  printf '%s' "$text"
}

run() {
  if ((dry_run)); then
    printf '%s\n' "$(quote_words "$@")"
  else
    printf '+ %s\n' "$(quote_words "$@")" >&2
    "$@"
  fi
}

name='' zone='' project='' type='' version='' local='' slurm='' gpus='' retries=0 create=0 spot=0 delete=0 dry_run=0
command=()
while (($#)); do
  case $1 in
    --name | --zone | --project | --type | --version | --local | --slurm | --gpus | --retries)
      [[ $# -gt 1 && -n $2 && $2 != -* ]] || fail_usage "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --create | --spot | --delete) printf -v "${1#--}" 1 ;;
    --dry-run) dry_run=1 ;;
    --help | -h)
      usage
      exit
      ;;
    --)
      shift
      (($#)) || fail_usage 'there is no command after --'
      command=("$@")
      break
      ;;
    *) fail_usage "unknown argument '$1' (the command goes after --)" ;;
  esac
  shift
done

[[ $retries =~ ^[0-9]+$ ]] || fail_usage "--retries $retries: needs a number"

# Runs its words until they succeed, one time and $retries more.
with_retries() {
  local left=$retries code=0
  while true; do
    "$@" && return
    code=$?
    ((left-- > 0)) || return "$code"
    printf 'launch_tpu.sh: failed with %s, starting again (%s left)\n' "$code" "$left" >&2
  done
}

# A port that nobody listens at, below those that the system gives to outgoing connections.
free_port() {
  local port tries=100
  while ((tries-- > 0)); do
    port=$((10000 + RANDOM % 22000))
    (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  printf '%s' "$port"
}

# One run as $local processes; where one fails the others, which would wait for it, are stopped.
run_local() {
  local number code=0 stopping=0 patience=30
  local port pids=()
  port=$(free_port)
  for ((number = 0; number < local; number++)); do
    GR4AD_DISTRIBUTED="127.0.0.1:$port,$local,$number" JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" \
      "${command[@]}" &
    pids+=($!)
  done
  trap 'stopping=1; kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
  for ((number = 0; number < local && !code; number++)); do
    wait -n || code=$?
  done
  # Those that were asked to stop take their time to save; the others have no use for it.
  while [[ -n $(jobs -r) ]] && ((stopping || patience-- > 0)); do
    sleep 1
  done
  kill -KILL "${pids[@]}" 2>/dev/null || true
  wait || true
  trap - TERM INT
  return "$code"
}

if [[ -n $local ]]; then
  [[ $local =~ ^[1-9][0-9]*$ ]] || fail_usage "--local $local: needs a number of processes"
  if [[ -n $name$zone$project$type$version ]] || ((create || spot || delete)); then
    fail_usage '--local takes no options of a slice'
  fi
  ((${#command[@]})) || fail_usage 'there is nothing to do: add -- COMMAND'
  if ((dry_run)); then
    for ((number = 0; number < local; number++)); do
      printf 'GR4AD_DISTRIBUTED=127.0.0.1:PORT,%s,%s %s &\n' \
        "$local" "$number" "$(quote_words "${command[@]}")"
    done
    exit
  fi
  with_retries run_local
  exit
fi

if [[ -n $slurm$gpus ]]; then
  [[ $slurm =~ ^[1-9][0-9]*$ ]] || fail_usage "--slurm $slurm: needs a number of nodes"
  [[ $gpus =~ ^[1-9][0-9]*$ ]] || fail_usage "--gpus $gpus: needs a number of GPUs"
  if [[ -n $name$zone$project$type$version ]] || ((create || spot || delete)); then
    fail_usage '--slurm takes no options of a slice'
  fi
  ((${#command[@]})) || fail_usage 'there is nothing to do: add -- COMMAND'
  # JAX reads SLURM's variables; every process takes the GPU of its number within the node. A job
  # that is to be preempted sends SIGTERM to its steps, time enough to save.
  with_retries run srun --nodes="$slurm" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" \
    --export=ALL,GR4AD_DISTRIBUTED=auto --kill-on-bad-exit=1 "${command[@]}"
  exit
fi

[[ -n $name ]] || fail_usage '--name is missing'
[[ -n $zone ]] || fail_usage '--zone is missing'
((${#command[@]} || create || delete)) || fail_usage 'there is nothing to do: add -- COMMAND'
if ((create)); then
  [[ -n $type ]] || fail_usage '--create needs --type'
elif ((spot)) || [[ -n $type$version ]]; then
  fail_usage '--type, --version and --spot go with --create'
fi
if ((create)) && [[ -z $version ]]; then
  # The table for JAX in https://cloud.google.com/tpu/docs/runtimes
  case $type in
    v6e-*) version='v2-alpha-tpuv6e' ;;
    v5p-*) version='v2-alpha-tpuv5' ;;
    v5e-* | v5litepod-*) version='v2-alpha-tpuv5-lite' ;;
    v2-* | v3-* | v4-*) version='tpu-ubuntu2204-base' ;;
    *) fail_usage "no software version is known for --type $type: add --version" ;;
  esac
fi
if ! ((dry_run)) && ! command -v gcloud >/dev/null; then
  echo 'launch_tpu.sh: gcloud is missing; see https://cloud.google.com/sdk/docs/install' >&2
  exit 1
fi

tpu=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)
place=(--zone="$zone")
if [[ -n $project ]]; then
  place+=(--project="$project")
fi

delete_slice() {
  run "${queue[@]}" delete "$name" "${place[@]}" --force --quiet
}

# The state of the queued resource, as Google names it.
slice_state() {
  run "${queue[@]}" describe "$name" "${place[@]}" '--format=value(state.state)'
}

create_slice() {
  local machine=(--node-id="$name" --accelerator-type="$type" --runtime-version="$version") state
  if ((spot)); then
    machine+=(--spot)
  fi
  run "${queue[@]}" create "$name" "${place[@]}" "${machine[@]}" || return
  while true; do
    state=$(slice_state) || return
    if ((dry_run)); then
      printf '%s\n' "$state"
      return
    fi
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        printf 'launch_tpu.sh: %s is %s\n' "$name" "$state" >&2
        return 1
        ;;
    esac
    printf 'launch_tpu.sh: %s is %s, waiting\n' "$name" "$state" >&2
    sleep "${GR4AD_POLL_S:-30}"
  done
}

on_every_host() {
  run "${tpu[@]}" ssh "$name" "${place[@]}" --worker=all --command="$1"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
archive=$root/.cache/launch/$name.tar.gz

install_on_slice() {
  run "${tpu[@]}" scp "$archive" "$name:gr4ad_jax.tar.gz" "${place[@]}" --worker=all || return
  # The images bring Python 3.10, so uv brings a newer one. Files that earlier runs wrote stay.
  # shellcheck disable=SC2016  # the variables are the host's
  on_every_host 'set -e
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
mkdir -p gr4ad_jax
cd gr4ad_jax
rm -rf gr4ad_jax experiments
tar -xzf ../gr4ad_jax.tar.gz
test -d .venv || uv venv --python 3.12
uv pip install --quiet --editable ".[tpu,gcs]"'
}

# The command; a slice that was created here and taken away since is made again first.
run_on_slice() {
  if ((starts++ && create)) && [[ $(slice_state) != ACTIVE ]]; then
    delete_slice || true
    create_slice && install_on_slice || return
  fi
  on_every_host "$line"
}

if ((create)); then
  create_slice
fi

# From here on only: where creating fails, a slice of this name may be somebody else's.
if ((delete)); then
  trap delete_slice EXIT
fi

if ((${#command[@]})); then
  run mkdir -p "$root/.cache/launch"
  run tar -C "$root" --exclude=__pycache__ -czf "$archive" \
    gr4ad_jax experiments pyproject.toml requirements.txt README.md LICENSE
  install_on_slice
  starts=0
  line="cd gr4ad_jax && . .venv/bin/activate && GR4AD_DISTRIBUTED=auto $(quote_words "${command[@]}")"
  with_retries run_on_slice
fi
