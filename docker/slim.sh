#!/bin/sh
# Removes from the image what no container runs, 0.6 GB, and compiles the modules that containers load.
set -eu
cd /opt/edgelam/lib/python3*/site-packages

# Code for GPUs, headers and tools for building other programs (torch needs one file in bin), tests, and pip.
rm -rf torch/test torch/include bitsandbytes/libbitsandbytes_cuda*.so bitsandbytes/libbitsandbytes_rocm*.so \
  sympy/*/tests sympy/*/*/tests networkx/*/tests networkx/*/*/tests numpy/*/tests pip setuptools hf_xet
rm -f /opt/edgelam/bin/uv /opt/edgelam/bin/uvx
find torch/bin -type f ! -name torch_shm_manager -delete

# Compiles only the modules that a server or a node loads. Others are compiled when they are first imported.
find /opt/edgelam -name __pycache__ -prune -exec rm -rf {} +
/opt/edgelam/bin/python - <<'END'
import importlib

for module in (
    "bitsandbytes", "peft", "flwr.serverapp", "edgelam_fl.federation.supernode", "safetensors.torch",
    "transformers.models.llama.modeling_llama", "transformers.models.llama.tokenization_llama", "transformers.tokenization_utils_fast",
    "edgelam_fl.cli.main", "edgelam_fl.federation.runs", "edgelam_fl.serving.generate", "edgelam_fl.node.daemon", "edgelam_fl.node.service",
    "edgelam_fl.telemetry.report.page", "edgelam_fl.wire.grpc.dial", "edgelam_fl.wire.control",
):
    try:
        importlib.import_module(module)
    except ImportError as problem:  # containers only start more slowly
        print(f"not compiled beforehand: {module}: {problem}")
END
for tool in flwr flower-superlink flwr-serverapp edgelam; do
  /opt/edgelam/bin/$tool --help >/dev/null || echo "not compiled beforehand: $tool"
done
