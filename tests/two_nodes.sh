#!/usr/bin/env bash
# Two machines on one: two network namespaces joined by a veth pair, an sshd in each. Needs root, iproute2, openssh, pdsh.
# Usage: bash tests/two_nodes.sh up DIR | run DIR COMMAND... | lose DIR | down DIR
#   up     makes node-a (10.77.0.1) and node-b (10.77.0.2), and DIR/hostfile; again after `lose`, node-b's sshd comes back
#   run    a command on node-a
#   lose   kills everything that runs on node-b, as when its power fails
#   down   removes everything that `up` made
# Only processes inside the two namespaces are ever killed. /etc is as before outside of them: `ip netns exec` shows each
# namespace its own /etc/hosts and /etc/ssh from /etc/netns.
set -euo pipefail
[ $# -ge 2 ] || { sed -n 2,9p "$0"; exit 2; }
what="$1" dir="$2"
shift 2
run="$(echo "$dir" | cksum | cut -d' ' -f1)"  # another run of the tests, or what one left, is not in the way
net() { echo "opfa-$1-$run"; }
address() { if [ "$1" = a ]; then echo 10.77.0.1; else echo 10.77.0.2; fi; }
inside() { ip netns exec "$(net "$1")" "${@:2}"; }

serve() {
  inside "$1" /usr/sbin/sshd -f "$dir/sshd-$1.conf"
}

case "$what" in
up)
  mkdir -p "$dir/keys" /run/sshd
  if ip netns list | grep -q "^$(net b)\b"; then serve b; exit 0; fi
  for key in user host; do [ -e "$dir/keys/$key" ] || ssh-keygen -q -t ed25519 -N '' -f "$dir/keys/$key"; done
  chmod 600 "$dir"/keys/*
  for node in a b; do
    ip netns add "$(net $node)"
    inside $node ip link set lo up
    etc="/etc/netns/$(net $node)"
    mkdir -p "$etc/ssh"
    # A real machine's own name leads to its routable address; gloo needs that.
    printf '127.0.0.1 localhost\n10.77.0.1 node-a\n10.77.0.2 node-b\n%s %s\n' "$(address $node)" "$(hostname)" > "$etc/hosts"
    printf 'Host node-*\n  IdentityFile %s\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n' \
      "$dir/keys/user" > "$etc/ssh/ssh_config"
    printf 'HostKey %s\nAuthorizedKeysFile %s\nPidFile %s\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\nStrictModes no\n' \
      "$dir/keys/host" "$dir/keys/user.pub" "$dir/sshd-$node.pid" > "$dir/sshd-$node.conf"
  done
  ip link add eth0 netns "$(net a)" type veth peer name eth0 netns "$(net b)"
  for node in a b; do
    inside $node ip address add "$(address $node)/24" dev eth0
    inside $node ip link set eth0 up
    serve $node
  done
  printf 'node-a slots=1\nnode-b slots=1\n' > "$dir/hostfile"
  ;;
run) exec ip netns exec "$(net a)" "$@" ;;
lose) ip netns pids "$(net b)" | xargs --no-run-if-empty kill -KILL ;;
down)
  for node in a b; do
    ip netns pids "$(net $node)" 2>/dev/null | xargs --no-run-if-empty kill -KILL || true
    ip netns del "$(net $node)" 2>/dev/null || true
    rm -rf "/etc/netns/$(net $node)"
  done
  ;;
*) sed -n 2,9p "$0"; exit 2 ;;
esac
