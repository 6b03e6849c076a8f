#!/usr/bin/env bash
# What pre-training BERT-base costs on the GPU at hand, at 128 and 512 tokens, with torch.compile and
# without: tables on the screen, JSON in the directory given (default: bench).
set -euo pipefail
output=${1:-bench}
mkdir -p "$output"
for shape in "128 256" "512 64"; do
  read -r tokens batch <<<"$shape"
  for compile in false true; do
    echo "== BERT-base, $batch x $tokens tokens, launch.compile = $compile"
    opfa bench train "corpus.sequence_tokens=$tokens" "training.batch=$batch" \
      "launch.compile=$compile" --rounds 15 --json >"$output/$tokens-compile-$compile.json"
    python - "$output/$tokens-compile-$compile.json" <<'PYTHON'
import json, sys
from opfa.bench_markdown import training_markdown
print(training_markdown(json.load(open(sys.argv[1]))))
PYTHON
  done
done
