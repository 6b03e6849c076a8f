#!/usr/bin/env bash
# The runtime's kernels against double precision (tests/runtime/kernels_test.c): as gcc, clang and zig compile them, under
# ASan with UBSan and under TSan, for aarch64 under qemu-user; or the libraries in wheels. What can't be done here is said.
# Usage: bash launch/check_kernels.sh [WHEEL ...]
#   NETWORKS=200 SEED=0     random networks, and where they begin
#   PYTHON=.venv/bin/python ZIG="$PYTHON -m ziglang" QEMU=qemu-aarch64-static SYSROOT=/usr/aarch64-linux-gnu
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}" networks="${NETWORKS:-200}" seed="${SEED:-0}"
read -ra zig <<< "${ZIG:-$python -m ziglang}"
qemu="${QEMU:-qemu-aarch64-static}" sysroot="${SYSROOT:-/usr/aarch64-linux-gnu}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 ZIG_GLOBAL_CACHE_DIR="$work/zig" ZIG_LOCAL_CACHE_DIR="$work/zig"

has() { command -v "$1" > /dev/null; }
has_zig() { "${zig[@]}" version > /dev/null 2>&1; }
skipped() { printf '%-12s skipped: %s\n' "$1" "$2"; }

# KIND DIRECTORY COMPILER...: the library of these sources; with sanitizers at -O1, since -O3 takes minutes
library() {
  "$python" -c '
import sys
from pathlib import Path
from opfa.runtime import compiler
kind, work, *command = sys.argv[1:]
compiler.MOST_SECONDS = 3600
if any("-fsanitize" in word for word in command):
    compiler.OPTIONS[compiler.OPTIONS.index("-O3")] = "-O1"
compiler.compile_into(Path(work), command, kind)' "$@"
}

# NAME DIRECTORY EMULATOR COMPILER...: the test, compiled against the libopfa.so of a directory
check() {
  local name="$1" at="$2" kilobytes=512 emulator
  read -ra emulator <<< "$3"
  # qemu and TSan keep memory for each thread that there was; ASan finds what is lost by itself
  if [[ "$3" == *qemu* || "$*" == *-fsanitize* ]]; then kilobytes=1000000; fi
  shift 3
  "$@" -std=gnu11 -O1 -Wall -Wextra -Werror -Iopfa/runtime/kernels tests/runtime/kernels_test.c "$at/libopfa.so" \
    "-Wl,-rpath,$at" -lm -lpthread -o "$at/kernels_test"
  "${emulator[@]}" "$at/kernels_test" "$networks" "$seed" "$kilobytes" | sed "s/^/$(printf '%-12s' "$name") /"
}

# NAME EMULATOR COMPILER...: both
compiled() {
  local name="$1" emulator="$2" kind
  kind="$(uname -m)"
  shift 2
  if [[ "$name" == aarch64* ]]; then kind=aarch64; fi
  mkdir "$work/$name"
  library "$kind" "$work/$name" "$@"
  check "$name" "$work/$name" "$emulator" "$@"
}

emulated() {  # NAME: whether aarch64 programs can run
  if ! has "$qemu" || [ ! -d "$sysroot/lib" ]; then
    skipped "$1" "needs qemu-user-static and libc6-arm64-cross (Debian's names)"
    return 1
  fi
}

if [ $# -gt 0 ]; then
  has_zig || { echo "check_kernels: wheels need zig: $python -m pip install ziglang" >&2; exit 2; }
  for wheel in "$@"; do
    at="$work/$(basename "$wheel")"
    "$python" -m zipfile -e "$wheel" "$at"
    cp "$at"/opfa/runtime/kernels/libopfa-*.so "$at/libopfa.so"
    case "$wheel" in
      *_x86_64.whl) check "wheel x86" "$at" "" "${zig[@]}" cc -target x86_64-linux-gnu.2.17 ;;
      *_aarch64.whl) emulated "wheel arm" && check "wheel arm" "$at" "$qemu -L $sysroot" "${zig[@]}" cc -target aarch64-linux-gnu.2.17 ;;
      *) echo "check_kernels: $wheel has no library" >&2; exit 2 ;;
    esac
  done
  exit 0
fi

for compiler in gcc clang; do
  if has "$compiler"; then compiled "$compiler" "" "$compiler"; else skipped "$compiler" "not installed"; fi
done
fixed=()  # TSan wants addresses where it knows them
if has setarch; then fixed=(setarch -R); fi
if has gcc; then
  ASAN_OPTIONS=quarantine_size_mb=1 compiled sanitized "" gcc -fsanitize=address,undefined -fno-sanitize-recover=all
  TSAN_OPTIONS=halt_on_error=1 compiled threads "${fixed[*]}" gcc -fsanitize=thread
fi
if has_zig; then
  compiled zig "" "${zig[@]}" cc -mcpu=baseline
  if emulated aarch64; then compiled aarch64 "$qemu -L $sysroot" "${zig[@]}" cc -target aarch64-linux-gnu.2.17; fi
else
  skipped "zig" "not installed: pip install ziglang"
  skipped "aarch64" "needs zig"
fi
