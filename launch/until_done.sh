# Sourced by the scripts beside it: runs a command that trains RUN until RUN/done.json is there.
#   until_done RUN COMMAND [ARGUMENT...]
# A launcher's own exit code is no proof: DeepSpeed's is 0 when it was killed and its ranks run on.
# MAX_RESTARTS (3) and RESTART_SECONDS (20) bound what happens after a failure. SIGTERM and Ctrl-C make RUN/stop, the sign
# for every rank to save and end; no signal goes to the launcher (see README.md).
until_done() {
  local run="$1" restarts=0 stopping="" child status
  shift
  trap 'stopping=yes; echo "launch: stopping; the run saves first (kill -9 $$ ends without)" >&2; mkdir -p "$run"; touch "$run/stop"' TERM INT
  while true; do
    local resume=()
    [ -e "$run/recipe.toml" ] && resume=(--resume)
    setsid "$@" "${resume[@]}" &  # its own session: a terminal's Ctrl-C comes here alone
    child=$!
    while true; do  # `wait` returns early when a signal was trapped
      wait "$child" && status=0 || status=$?
      kill -0 "$child" 2>/dev/null || break
    done
    [ -e "$run/done.json" ] && return 0
    rm -f "$run/stop"
    [ "$status" = 0 ] && status=1
    if [ -n "$stopping" ]; then return 75; fi
    [ -e "$run/recipe.toml" ] || return "$status"  # refused before it began: restarting can't help
    if [ "$restarts" -ge "${MAX_RESTARTS:-3}" ]; then
      echo "launch: ended with $status after $restarts restarts; giving up" >&2
      return "$status"
    fi
    restarts=$((restarts + 1))
    echo "launch: ended with $status; restart $restarts of ${MAX_RESTARTS:-3} in ${RESTART_SECONDS:-20} s" >&2
    sleep "${RESTART_SECONDS:-20}"
  done
}
