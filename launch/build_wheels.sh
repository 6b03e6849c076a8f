#!/usr/bin/env bash
# Wheels of opfa: one of Python alone, whose kernels are compiled where they are first used, and one with them for x86-64
# and one for aarch64 Linux, compiled by zig for glibc 2.17 (2012). Run it on Linux.
# Usage: bash launch/build_wheels.sh [OUTPUT]        default: dist
#   PYTHON=.venv/bin/python ZIG="$PYTHON -m ziglang"
set -euo pipefail
mkdir -p "${1:-dist}"
output="$(cd "${1:-dist}" && pwd)"
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
read -ra zig <<< "${ZIG:-$python -m ziglang}"
"${zig[@]}" version > /dev/null 2>&1 || {
  echo "build_wheels: needs zig: $python -m pip install -c launch/constraints.txt ziglang" >&2
  exit 2
}
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export ZIG_GLOBAL_CACHE_DIR="$work/zig" ZIG_LOCAL_CACHE_DIR="$work/zig"

mkdir "$work/source"  # a copy: an older build/ would get into the wheel
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$work/source"
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" "$work/source"
pure=("$work"/opfa-*.whl)

for kind in x86_64 aarch64; do
  "$python" -m wheel unpack --dest "$work/$kind" "${pure[0]}" > /dev/null
  "$python" - "$kind" "$work/$kind" "$work/$kind"/opfa-*/opfa/runtime/kernels "${zig[@]}" << 'PYTHON'
import re
import shutil
import sys
from pathlib import Path

from opfa.runtime.build import file_name
from opfa.runtime.compiler import compile_into

kind, work, kernels, *zig = sys.argv[1:]
library = compile_into(Path(work), [*zig, "cc", "-target", f"{kind}-linux-gnu.2.17"], kind)
asked = {tuple(map(int, found.split(b"."))) for found in re.findall(rb"GLIBC_([\d.]+)", library.read_bytes())}
assert asked and max(asked) <= (2, 17), f"{kind}: asks for glibc {max(asked)}"
shutil.copy(library, Path(kernels) / file_name(library, kind))
PYTHON
  sed -i 's/^Root-Is-Purelib: true/Root-Is-Purelib: false/' "$work/$kind"/opfa-*/opfa-*.dist-info/WHEEL
  "$python" -m wheel pack --dest-dir "$work/$kind" "$work/$kind"/opfa-*/ > /dev/null
  "$python" -m wheel tags --platform-tag "manylinux_2_17_$kind.manylinux2014_$kind" --remove "$work/$kind"/opfa-*.whl > /dev/null
  mv "$work/$kind"/opfa-*.whl "$output"
done
mv "${pure[0]}" "$output"
ls -l "$output"/opfa-*.whl
