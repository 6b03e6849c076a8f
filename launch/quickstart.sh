#!/usr/bin/env bash
# The whole method in minutes on a laptop, set-up included.
# Usage: bash launch/quickstart.sh [OUTPUT]        OUTPUT: a new directory, or one that an interrupted
# quickstart left: it goes on from there. Default: quickstart-out
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
output="${1:-quickstart-out}"
echo "Installing into .venv (the first time takes a few minutes) ..."
bash "$root/launch/install.sh"
"$root/.venv/bin/opfa" quickstart --output "$output"
echo
echo "The released encoder of 90 % zeros on the same task, in torch and in the runtime ..."
exec "$root/.venv/bin/python" "$root/recipes/quickstart/released.py" "$output"
