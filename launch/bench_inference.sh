#!/usr/bin/env bash
# Measures the CPU runtime against torch, ONNX Runtime, OpenVINO and DeepSparse, all in one run on this machine.
# Usage: bash launch/bench_inference.sh [OUTPUT [MODEL] [option of opfa bench inference ...]]
# OUTPUT.json and OUTPUT.png are written; default: opfa/bench/results/inference, which the tables of opfa/bench/README.md are of.
# The engines get environments of their own, models and finished sections are kept beside them: the same command goes on after a stop.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
cache="${XDG_CACHE_HOME:-$HOME/.cache}/opfa/bench"
output="${1:-$root/opfa/bench/results/inference}"
python="${PYTHON:-python3}"
opfa=("${OPFA:-$root/.venv/bin/opfa}")
[ -n "${OPFA:-}" ] || bash "$root/launch/install.sh"

peers=()
engines() { # NAME PYTHON PACKAGE==VERSION ...: an environment, unless it is there
  local pins="${*:3}"
  local place="$cache/$1-$(echo "$2 $pins" | sha256sum | cut -c1-12)"
  if [ ! -e "$place/done" ]; then
    rm -rf "$place"
    "$2" -m venv "$place" && "$place/bin/python" -m pip install --quiet --disable-pip-version-check "${@:3}" && touch "$place/done" ||
      { echo "$1: can't be installed for $("$2" --version); it is left out" >&2; return; }
  fi
  peers+=(--peers "$place/bin/python")
}
engines onnxruntime-openvino "$python" numpy==2.4.6 onnxruntime==1.32.0 openvino==2026.4.1
# The last DeepSparse has wheels for Python 3.8 to 3.11, and reads no newer ONNX.
engines deepsparse "${PYTHON_DEEPSPARSE:-$python}" deepsparse==1.8.0 sparsezoo==1.8.1 numpy==1.26.4 onnx==1.14.1 protobuf==3.20.3

"${opfa[@]}" bench inference "${@:2}" "${peers[@]}" --work "$cache/work" --picture "$output.png" --json >"$output.json.part"
mv "$output.json.part" "$output.json"
echo "$output.json; tables: OPFA_REWRITE=1 .venv/bin/python -m pytest tests/bench/test_bench_page.py"
