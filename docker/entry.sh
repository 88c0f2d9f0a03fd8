#!/bin/sh
# Limits the container's link if a testbed asks for that, then runs the command as the user edgelam, without rights.
#
#   EDGELAM_UP_KBIT, EDGELAM_DOWN_KBIT   rates at which the node sends and receives, in kbit/s; empty: unlimited
#   EDGELAM_DELAY_MS                     delay of what the node sends, in milliseconds
#
# Only a container that starts as root with NET_ADMIN can be limited; any other one just runs its command.
set -eu

fail() { echo "edgelam testbed: $*" >&2; exit 3; }

# Adds a token bucket of 20 ms at the rate, but at least a few frames, and a queue of 400 ms, as in a home router.
bucket() { # device, kbit/s, parent
  burst=$(($2 * 20 / 8)); [ $burst -ge 6000 ] || burst=6000
  tc qdisc add dev "$1" $3 tbf rate "$2kbit" burst "$burst" latency 400ms
}

shape() {
  command -v tc >/dev/null || fail 'links are limited with tc, which this image lacks (package iproute2)'
  parent=root
  if [ "${EDGELAM_DELAY_MS:-0}" != 0 ]; then
    tc qdisc add dev eth0 root handle 1: netem delay "${EDGELAM_DELAY_MS}ms" 2>/dev/null ||
      fail "this kernel has no netem, so delay_ms = $EDGELAM_DELAY_MS cannot be kept; set delay_ms = 0 in the testbed's file"
    parent='parent 1:'
  fi
  [ -z "${EDGELAM_UP_KBIT:-}" ] || bucket eth0 "$EDGELAM_UP_KBIT" "$parent" ||
    fail "the kernel refused a token bucket (tc tbf) for up; the container needs NET_ADMIN and the module sch_tbf"
  [ -z "${EDGELAM_DOWN_KBIT:-}" ] || shape_down
}

# Incoming packets can be queued only behind a second device, ifb. Without ifb, packets above the rate are dropped.
shape_down() {
  if ip link add ifb0 type ifb 2>/dev/null && ip link set ifb0 up &&
    tc qdisc add dev eth0 handle ffff: ingress &&
    tc filter add dev eth0 parent ffff: protocol all u32 match u32 0 0 action mirred egress redirect dev ifb0; then
    bucket ifb0 "$EDGELAM_DOWN_KBIT" root || fail 'the kernel refused a token bucket (tc tbf) for down'
    return
  fi
  echo 'edgelam testbed: this kernel has no ifb, so incoming packets above the rate are dropped instead of queued' >&2
  tc qdisc replace dev eth0 handle ffff: ingress &&
    tc filter add dev eth0 parent ffff: protocol all u32 match u32 0 0 \
      police rate "${EDGELAM_DOWN_KBIT}kbit" burst 64k drop flowid :1 ||
    fail "down cannot be limited on this kernel: it has neither ifb with mirred nor police (modules ifb, act_mirred, act_police); leave 'down' out of the shape"
}

[ "$(id -u)" = 0 ] || exec "$@"
[ -z "${EDGELAM_UP_KBIT:-}${EDGELAM_DOWN_KBIT:-}" ] && [ "${EDGELAM_DELAY_MS:-0}" = 0 ] || shape
HOME=/home/edgelam exec setpriv --reuid edgelam --regid edgelam --clear-groups --inh-caps=-all --no-new-privs "$@"
