"""The ClientApp starts anew for every message, so what it imports is felt."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_the_client_app_loads_neither_torch_nor_transformers() -> None:
    code = "import clients.app, json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    loaded = set(json.loads(done.stdout))
    assert {"clients", "flwr", "grpc"} <= loaded
    assert not loaded & {"torch", "transformers", "peft", "gguf", "plotly"}
