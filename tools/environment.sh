# Functions for tools/setup.sh and clients/install.sh: find a usable Python, make an environment with uv, install PyTorch without CUDA.
# They read $venv (the environment's folder), $constraints (files) and $lock (a file with hashes, or empty), and know no package
# except PyTorch and uv.
# shellcheck shell=sh disable=SC2154  # the sourcing script sets them

python_range='>=3.11,<3.14'
system=$(uname -s) machine=$(uname -m)

usable() { # true for a Python in range that can make environments (Debian and Ubuntu package venv separately)
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

find_python() { # sets $python; leaves it empty if uv will download a Python, or if there is none
  python=''
  if ! "$venv/bin/python" -c '' 2>/dev/null; then rm -rf "$venv"; fi # incomplete, or its Python is gone
  if [ -d "$venv" ]; then
    python=$venv/bin/python
  elif ! command -v uv >/dev/null; then
    for candidate in python3 python3.13 python3.12 python3.11; do
      if usable $candidate; then python=$candidate; break; fi
    done
  fi
}

pip_setting() { # prints a setting of pip; arguments: name in the environment, key in pip.conf
  eval "value=\${PIP_$1:-}"
  [ -n "$value" ] || value=$(printf '%s\n' "$pip_settings" | sed -n "s/\\\\n/ /g; s/^[a-z]*\.$2='\(.*\)'\$/\1/p" | tail -n 1)
  printf '%s' "$value"
}

# Makes $venv with uv in it. uv is many times faster than pip and can choose PyTorch's CPU builds, but does not read pip's
# settings, so they are passed on.
make_environment() {
  if command -v uv >/dev/null; then
    [ -d "$venv" ] || uv venv --quiet --python "$python_range" "$venv"
  elif [ ! -x "$venv/bin/uv" ]; then
    [ -d "$venv" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m ensurepip >/dev/null # does nothing, unless an earlier set-up was interrupted
  fi
  pip_settings=$("$venv/bin/python" -m pip config list 2>/dev/null || python3 -m pip config list 2>/dev/null || true)
  certificates=$(pip_setting CERT cert) index=$(pip_setting INDEX_URL index-url) links=$(pip_setting FIND_LINKS find-links)
  [ -z "$certificates" ] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$certificates}"
  [ -z "$index" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"

  set -- -c constraints/tested.txt uv # uv, which flwr depends on anyway
  if [ -n "$lock" ]; then # uv checks the hashes of all others
    sed -n '/^uv==/,/[^\\]$/p' "$lock" >"$venv/uv.lock"
    set -- --require-hashes --no-deps -r "$venv/uv.lock"
  fi
  if [ -x "$venv/bin/uv" ]; then :
  elif command -v uv >/dev/null; then uv pip install --quiet --python "$venv/bin/python" "$@"
  else "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check "$@"; fi
}

uv_install() {
  for file in $constraints; do set -- -c "$file" "$@"; done
  "$venv/bin/uv" pip install --python "$venv/bin/python" "$@"
}

# Installs PyTorch and the given packages. Names the CPU build in full, because the default one for x86-64 has CUDA.
install_with_torch() { # arguments: backend (cpu, or as in --torch-backend), packages and options
  backend=$1
  shift
  cpu_torch=$(sed -n 's/^\(torch==[0-9.]*\) ;.*x86_64.*/\1+cpu/p' constraints/torch.txt)
  if [ "$system $machine" != 'Linux x86_64' ]; then
    uv_install torch "$@" # for this platform the index has the CPU build only
  elif [ "$backend" != cpu ]; then
    uv_install --torch-backend="$backend" torch "$@"
  elif [ -n "$links" ] && has_wheel "$cpu_torch"; then
    for link in $links; do set -- --find-links "$link" "$@"; done
    uv_install "$cpu_torch" "$@" # a wheel in pip's find-links
  else
    uv_install --torch-backend=cpu "$cpu_torch" "$@"
  fi
}

has_wheel() { # true if pip's find-links hold the package
  for link in $links; do set -- "$@" --find-links "$link"; done
  uv_install --quiet --dry-run --no-index --no-deps "$@" 2>/dev/null
}
