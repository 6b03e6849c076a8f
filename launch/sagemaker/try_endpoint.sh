#!/usr/bin/env bash
# An archive behind Amazon's own model server (multi-model-server, on Java) on this machine, over HTTP.
# Usage: bash launch/sagemaker/try_endpoint.sh MODEL.tar.gz 'REQUEST IN JSON'
#   PYTHON=/path/to/python    one that has sagemaker-huggingface-inference-toolkit, sagemaker-inference,
#                             multi-model-server, boto3, retrying, six, setuptools<81, and transformers
#   PORT=8080 SECONDS_TO_START=300
# Needs java, and the right to unshare: /opt/ml and /etc are this script's own while it runs.
set -euo pipefail
[ $# = 2 ] || { sed -n 2,7p "$0"; exit 2; }
archive="$(realpath "$1")" request="$2"
python="${PYTHON:-python3}" port="${PORT:-8080}"
work="$(mktemp -d)"
made=""; [ -d /opt/ml ] || { mkdir -p /opt/ml; made=yes; }
server=""
finish() {
  [ -z "$server" ] || kill -KILL "$server" 2>/dev/null || true  # unshare; what it started ends with it
  wait 2>/dev/null || true
  [ -z "$made" ] || rmdir /opt/ml  # not before: a mount point that goes takes its mounts along
  rm -rf "$work"
}
trap finish EXIT
mkdir -p "$work/ml/model" "$work/etc" "$work/tmp" "$work/site"
tar -xzf "$archive" -C "$work/ml/model"
# The toolkit's newest release imports a name that transformers 5 lacks; each process of the server gets it.
printf '%s\n' 'import transformers.file_utils as f' 'f.is_tf_available = lambda: False' > "$work/site/sitecustomize.py"
env SAGEMAKER_BIND_TO_PORT="$port" SAGEMAKER_MODEL_SERVER_WORKERS=1 TEMP="$work/tmp" TMPDIR="$work/tmp" \
  PYTHONPATH="$work/site" PATH="$(dirname "$(realpath -s "$(command -v "$python")")"):$PATH" \
  unshare --mount --pid --fork --mount-proc --kill-child bash -c '
    mount --bind "$1/ml" /opt/ml
    cp -a /etc/. "$1/etc" && mount --bind "$1/etc" /etc
    cd "$1" && exec "$2" -c "from sagemaker_huggingface_inference_toolkit.serving import main; main()"
  ' - "$work" "$python" > "$work/log" 2>&1 &
server=$!
for ((left = ${SECONDS_TO_START:-300}; left > 0; left--)); do
  [ "$(curl -s -o /dev/null -w '%{http_code}' "http://127.0.0.1:$port/ping" || true)" = 200 ] && break
  kill -0 "$server" 2>/dev/null || break
  sleep 1
done
# It answers pings before the model is loaded.
curl -sS -f --retry 30 --retry-all-errors --retry-delay 2 --max-time 120 -X POST -H 'Content-Type: application/json' --data "$request" "http://127.0.0.1:$port/invocations" || {
  tail -n 40 "$work/log" >&2
  exit 1
}
echo
