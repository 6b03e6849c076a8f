#!/usr/bin/env bash
# What ten minutes of one GPU give: students of MiniLM at 90, 85 and 97 % and a control; for each, four tasks and a sentence encoder;
# compact archives of 8 bits. OUTPUT/results.json has what is finished when the time is over. The same command goes on.
# Usage: bash launch/gpu_minutes.sh MODEL DATA OUTPUT [--seconds 540] [--steps 4000] [--batch 128] [--at-once 6] [--percents 90 85] [...]
#   MODEL, DATA   as for launch/reproduce.sh, and DATA/stsb
#   All options:  python recipes/minilm/gpu_minutes.py --help. PYTHON is the interpreter; by default that of launch/install.sh
# The text is prepared before the time counts, on the CPU: some minutes. With `--steps 12 --batch 4 --epochs 0.01 --percents 90
# --tasks stsb --student pruning.pattern.score=magnitude` it can be tried without a GPU.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
needs=(stsb pretrain)
[ -z "${PYTHON:-}" ] || PYTHON="$(realpath -s "$PYTHON")"
source "$root/launch/experiment.sh"
if [ -z "${PYTHON:-}" ]; then bash "$root/launch/install.sh"; fi
python="${PYTHON:-$root/.venv/bin/python}"
export PYTHONPATH="$root:$root/recipes/minilm"
[ -e prepared/corpus.json ] || "$python" -m opfa prepare "$root/recipes/minilm/minilm-curvature.toml" --output prepared
if [ ! -e texts.jsonl ]; then
  "$python" "$root/recipes/minilm/texts.py" data texts.part "${TEXTS:-330000}"
  mv texts.part texts.jsonl
fi
exec "$python" "$root/recipes/minilm/gpu_minutes.py" "$@"
