"""Measures what `edgelam demo` reaches and costs. --smoke: one device, one short round.

The run stays in runs/benchmark-demo, so that its report can be read.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, Figure, main

SMOKE_RUN = Path("runs/benchmark-demo-smoke")
_SETTINGS = (
    "federation.rounds=1",
    "federation.local_steps=2",
    "federation.batch_size=2",
    "data.held_out=0.01",
    "task.max_tokens=128",
)
_SMOKE = ["--devices", "1", *(word for setting in _SETTINGS for word in ("--set", setting))]


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    out = SMOKE_RUN if smoke else Path("runs/benchmark-demo")
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    printed = _run_demo(["--out", str(out), *(_SMOKE if smoke else [])])
    seconds = time.monotonic() - began
    if not smoke:
        (RESULTS / "demo.txt").write_text(printed.replace(f"{Path.cwd()}/", ""), encoding="utf-8")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    settings = (out / "config.toml").read_text(encoding="utf-8")
    figures = [Figure("whole command", round(seconds, 1), "s", "under 360 s after set-up", seconds < 360)]
    figures.append(Figure("run, from its start in Flower", summary["seconds"], "s"))
    for device in summary["devices"]:
        before, after = device["perplexity_before"], device["perplexity_after"]
        bar = None if smoke else "at most half of before"
        figures += [
            Figure(f"{device['name']} held-out perplexity before", round(before, 2), ""),
            Figure(
                f"{device['name']} held-out perplexity after",
                round(after, 2),
                "",
                bar,
                after <= before / 2 if bar else None,
            ),
            Figure(f"{device['name']} training speed", device["tokens_per_s"], "tokens/s"),
            Figure(f"{device['name']} sent", device["bytes_up"], "bytes"),
            Figure(f"{device['name']} received", device["bytes_down"], "bytes"),
            Figure(f"{device['name']} peak resident memory", device["peak_rss_bytes"], "bytes"),
        ]
    for host in summary["hosts"]:
        figures.append(Figure(f"{host['name']} peak resident memory", host["peak_rss_bytes"], "bytes"))
    return {"run_file": settings}, figures


def _run_demo(arguments: list[str]) -> str:
    """Prints the demo's output as it arrives and returns it; README.md quotes the output."""
    command = [str(Path(sys.executable).with_name("edgelam")), "demo", *arguments]
    environment = {**os.environ, "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    if process.returncode:
        raise SystemExit(f"the demo ended with status {process.returncode}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main("demo", measure)
