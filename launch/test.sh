#!/usr/bin/env bash
# Lint, spelling, types and all tests, set-up included; `-m 'not slow'` leaves the slow ones out.
# Usage: bash launch/test.sh [pytest options]
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE # each of some hundred processes would compile what it imports anew
PIP_COMPILE=0 bash launch/install.sh dev # only what is imported is compiled, when it is
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/codespell
.venv/bin/pyright --pythonpath .venv/bin/python & # beside the tests, which wait now and then
types=$!
trap 'kill "$types" 2>/dev/null || true' EXIT
.venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
wait "$types"
