# What reproduce.sh and gpu_minutes.sh share, for a script whose arguments are MODEL DATA OUTPUT and more: goes into OUTPUT, where
# `model` and `data` are links, and leaves the other arguments. Set `root`, and `needs`: what DATA must hold.
if [ $# -lt 3 ]; then sed -n 's/^# Usage/Usage/p' "$0" >&2; exit 2; fi
for path in "$1/config.json" "$2" "${needs[@]/#/$2/}"; do
  if [ ! -e "$path" ]; then echo "$path: is not there" >&2; exit 2; fi
done
model="$(realpath "$1")" data="$(realpath "$2")"
mkdir -p "$3"
cd "$3"
shift 3
for pair in "model=$model" "data=$data"; do
  link="${pair%%=*}" target="${pair#*=}"
  if [ -e "$link" ] && [ "$(realpath "$link")" != "$target" ]; then
    echo "$PWD/$link: is $(realpath "$link") and not $target; give another OUTPUT" >&2
    exit 2
  fi
  ln -sfn "$target" "$link"
done
