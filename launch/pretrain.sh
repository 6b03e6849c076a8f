#!/usr/bin/env bash
# `opfa pretrain` on one machine or many with DeepSpeed's launcher; restarted from the newest resume point when it dies.
# Usage: bash launch/pretrain.sh RECIPE RUN [section.key=value ...]
#   GPUS=8                       processes on each machine (default: its GPUs, or 1 without any)
#   HOSTFILE=launch/hostfile     many machines (hostfile.example); RUN must be in a directory that all of them share
#   MASTER_ADDR, MASTER_PORT     of the first machine, if it has several addresses
#   MAX_RESTARTS=3 RESTART_SECONDS=20
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
source "$here/until_done.sh"
[ $# -ge 2 ] || { sed -n 2,8p "$0"; exit 2; }
recipe="$1" run="$2"
shift 2
PATH="$here/../.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
check "$recipe" "$run" "$@"

options=(--no_local_rank --module)
arguments=(pretrain "$recipe" --output "$run" "$@")
[ -n "${MASTER_ADDR:-}" ] && options+=(--master_addr "$MASTER_ADDR")
if [ -z "${HOSTFILE:-}" ] && [ -z "${MASTER_PORT:-}" ]; then  # several runs on one machine
  MASTER_PORT="$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
fi
[ -n "${MASTER_PORT:-}" ] && options+=(--master_port "$MASTER_PORT")
if [ -n "${HOSTFILE:-}" ]; then
  options+=(--hostfile "$HOSTFILE")
  # DeepSpeed hands only PYTHON* to other machines. One KEY=VALUE a line; no secrets, since they would show in `ps`.
  DS_ENV_FILE="$(mktemp)"
  export DS_ENV_FILE
  trap 'rm -f "$DS_ENV_FILE"' EXIT
  env | grep -E '^(PATH|LD_LIBRARY_PATH|DS_ACCELERATOR|(OMP|HF|TRANSFORMERS|NCCL|GLOO|TORCH|CUDA)_[A-Z0-9_]+)=[^[:space:]]+$' | grep -v TOKEN > "$DS_ENV_FILE"
  # A shell on each machine reads the arguments once more; DeepSpeed itself quotes only those with spaces.
  for i in "${!arguments[@]}"; do
    [[ "${arguments[i]}" == *" "* ]] || arguments[i]="$(printf %q "${arguments[i]}")"
  done
  # else a machine that is lost without a word leaves pdsh waiting for ever
  export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:--o ServerAliveInterval=20 -o ServerAliveCountMax=3}"
else
  options+=(--num_gpus "$(processes)")
fi
until_done "$run" deepspeed "${options[@]}" opfa "${arguments[@]}"
