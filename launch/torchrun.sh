#!/usr/bin/env bash
# `opfa pretrain` with torchrun: the same command on every machine, no ssh between them.
# Usage: bash launch/torchrun.sh RECIPE RUN [section.key=value ...]
#   GPUS=8                                      processes on this machine (default: its GPUs, or 1 without any)
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 MASTER_PORT=29500     many machines; RUN must be in a directory that all share
#   MAX_RESTARTS=3 RESTART_SECONDS=20
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
source "$here/until_done.sh"
[ $# -ge 2 ] || { sed -n 2,6p "$0"; exit 2; }
recipe="$1" run="$2"
shift 2
PATH="$here/../.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
check "$recipe" "$run" "$@"

options=(--nproc-per-node "$(processes)")
if [ "${NNODES:-1}" -gt 1 ]; then
  options+=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
  options+=(--standalone)
fi
until_done "$run" torchrun "${options[@]}" --module opfa pretrain "$recipe" --output "$run" "$@"
