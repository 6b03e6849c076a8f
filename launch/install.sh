#!/usr/bin/env bash
# Makes .venv at the top of the repository, or brings it up to date, with the versions of launch/constraints.txt.
# Usage: bash launch/install.sh [dev]          all extras of opfa; with dev also what lint, types and tests need
set -euo pipefail
cd "$(dirname "$0")/.."
extra="all"; if [ "${1:-}" = dev ]; then extra="dev"; fi
python="${PYTHON:-python3}"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "opfa needs Python 3.11 or later; $("$python" --version) was found. Set PYTHON=/path/to/python3.11" >&2
  exit 2
}
wanted="$(cat pyproject.toml launch/constraints.txt | sha256sum | cut -c1-16)"
if [ -e ".venv/opfa-$wanted-$extra" ] || [ -e ".venv/opfa-$wanted-dev" ]; then exit 0; fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
pin() { grep -i "^$1==" launch/constraints.txt; }
# seqeval is built from source without isolation, and asks setuptools-scm for its version.
.venv/bin/pip install --quiet --disable-pip-version-check \
  "$(pin pip)" "$(pin setuptools)" "$(pin setuptools-scm)" "$(pin vcs-versioning)" "$(pin wheel)"
# By its exact version and first: a later range then accepts what is there instead of fetching an accelerator build.
.venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/pip install --quiet "$(pin torch)"
# DeepSpeed comes as source; it needs no compiled op here, and sees the torch that is installed.
DS_BUILD_OPS=0 .venv/bin/pip install --quiet --no-build-isolation --constraint launch/constraints.txt --editable ".[$extra]"
rm -f .venv/opfa-*
touch ".venv/opfa-$wanted-$extra"
