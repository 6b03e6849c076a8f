#!/usr/bin/env bash
# Lint, spelling, types and all tests, set-up included; `-m 'not slow'` leaves the slow ones out.
# Usage: bash launch/test.sh [pytest options]
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/codespell
# Types are checked while the first tests run, of which many wait for processes.
types="$(mktemp)"
trap 'rm -f "$types"' EXIT
.venv/bin/pyright --pythonpath .venv/bin/python >"$types" 2>&1 &
checking=$! failed=0
.venv/bin/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder "$@" || failed=$?
wait "$checking" || failed=1
cat "$types"
exit "$failed"
