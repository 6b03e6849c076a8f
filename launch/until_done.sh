# Sourced by the scripts beside it: runs a command that trains RUN until RUN/done.json is there.
#   check RECIPE RUN [section.key=value ...]      refuses at once what `opfa pretrain` would refuse; ends well when RUN is done
#   processes                                     how many to start on this machine: GPUS, else its GPUs, or 1 without any
#   until_done RUN COMMAND [ARGUMENT...]
# A launcher's own exit code is no proof: DeepSpeed's is 0 when it was killed and its ranks run on.
# MAX_RESTARTS (3) and RESTART_SECONDS (20) bound what happens after a failure. SIGTERM, SIGHUP and Ctrl-C make RUN/stop, the
# sign for every rank to save and end, which becomes RUN/stopped; no signal goes to the launcher (see README.md).
processes() {
  local found
  found="$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" || found=0
  echo "${GPUS:-$((found > 0 ? found : 1))}"
}

check() {
  local recipe="$1" run="$2" resume=()
  shift 2
  if [ -e "$run/done.json" ]; then echo "launch: $run is done" >&2; exit 0; fi
  [ -e "$run/recipe.toml" ] && resume=(--resume)
  RANK=0 opfa pretrain "$recipe" --output "$run" --check "${resume[@]}" "$@" || exit $?
}

until_done() {
  local run="$1" restarts=0 stopping="" child="" status resume
  shift
  rm -f "$run/stop" "$run/stopped"
  trap 'stopping=yes; if [ -n "$child" ]; then echo "launch: stopping; the run saves first (kill -9 -- -$child ends without)" >&2; mkdir -p "$run"; touch "$run/stop"; fi' TERM INT HUP
  while [ -z "$stopping" ]; do
    resume=()
    [ -e "$run/recipe.toml" ] && resume=(--resume)
    setsid "$@" "${resume[@]}" &  # its own session: a terminal's Ctrl-C comes here alone
    child=$!
    while true; do  # `wait` returns early when a signal was trapped
      wait "$child" && status=0 || status=$?
      kill -0 "$child" 2>/dev/null || break
    done
    kill -KILL -- "-$child" 2>/dev/null || true  # ranks that a killed launcher left behind
    child=""
    [ -e "$run/done.json" ] && return 0
    [ "$status" = 0 ] && status=1
    if [ -e "$run/stopped" ]; then echo "launch: stopped and saved" >&2; break; fi
    if [ "$status" = 2 ] || [ ! -e "$run/recipe.toml" ]; then  # refused: restarting can't help
      echo "launch: ended with $status; the message is above" >&2
      return "$status"
    fi
    if [ "$restarts" -ge "${MAX_RESTARTS:-3}" ]; then
      echo "launch: ended with $status after $restarts restarts; giving up" >&2
      return "$status"
    fi
    restarts=$((restarts + 1))
    echo "launch: ended with $status; restart $restarts of ${MAX_RESTARTS:-3} in ${RESTART_SECONDS:-20} s" >&2
    for ((pause = ${RESTART_SECONDS:-20}; pause > 0; pause--)); do
      [ -n "$stopping" ] && break
      sleep 1 || true
    done
  done
  rm -f "$run/stop"
  return 75
}
