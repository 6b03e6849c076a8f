#!/usr/bin/env bash
# What pre-training BERT-base costs on the GPU at hand, at 128 and 512 tokens, with torch.compile and
# without (the plain step it is compared with is never compiled): one Markdown file each, in the
# directory given (default: bench). BATCH_128 and BATCH_512 are sequences a step.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
output=${1:-bench}
bash "$here/install.sh"
mkdir -p "$output"
for tokens in 128 512; do
  batch=$([ "$tokens" = 128 ] && echo "${BATCH_128:-256}" || echo "${BATCH_512:-64}")
  for compile in false true; do
    echo "== BERT-base, $batch x $tokens tokens, launch.compile = $compile"
    "$here/../.venv/bin/opfa" bench train "corpus.sequence_tokens=$tokens" "training.batch=$batch" \
      "launch.compile=$compile" | tee "$output/bert-base-$tokens-compile-$compile.md"
  done
done
