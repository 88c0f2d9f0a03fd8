"""Checks that split equals whole to the bit over many steps: 20 of SmolLM2 over processes and gRPC, 200 over stalling links.

Makes the comparisons of tests/parity with more steps: one device over one host in fp32 and bf16, three devices that share a
host, and a chain of three hosts behind sockets of 64 KiB whose links stall at random. A figure is 1 if adapters and losses
are equal to the bit; otherwise the benchmark fails and names the difference. --smoke: two steps each, of a tiny random model.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Figure, main
from edgelam_fl.model.source import find_model
from tests.parity.daemons import running
from tests.parity.test_grpc_processes import (
    FROZEN_ENDS,
    SHORT,
    one_device_against_the_plain_loop,
    three_devices_against_the_plain_loop,
)
from tests.parity.test_small_buffers import stalling_links_train_to_the_same_bits, write_wide_llama
from tests.support import run_config, write_data_files, write_tiny_llama

STEPS, STALLING_STEPS = 20, 200
BAR = "equal to the bit"


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    steps, stalling = (2, 2) if smoke else (STEPS, STALLING_STEPS)
    torch.set_num_threads(1)  # the order of sums depends on the number of threads
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_data_files(folder)
        model = find_model(str(write_tiny_llama(folder / "tiny")) if smoke else "smollm2-135m")
        wide = write_wide_llama(folder / "wide")
        with running(["edge-1", "edge-2", "edge-3"], files, folder / "daemons") as daemons:
            for base in ("fp32", "bf16"):
                config = run_config(model.name, f"model.base={base}", *SHORT)
                one_device_against_the_plain_loop(daemons, f"one-{base}", model, config, files[0], steps)
                figures.append(Figure(f"one device, {base}, {steps} steps", 1, "", BAR, True))
            config = run_config(model.name, *FROZEN_ENDS, *SHORT)
            # Two plain loops, which sum in another order: below 1e-5 with AVX-512, 4.9e-5 without.
            three_devices_against_the_plain_loop(daemons, "three", model, config, files, apart=1e-4, steps=steps)
            figures.append(Figure(f"three devices, joint, {steps} steps", 1, "", BAR, True))
            stalling_links_train_to_the_same_bits(daemons, wide, files, 1, stalling)
            figures.append(
                Figure(f"three devices over three hosts, stalling links, {stalling} steps", 1, "", BAR, True)
            )
    return {"model": model.name, "steps": steps, "stalling_steps": stalling}, figures


if __name__ == "__main__":
    main("exactness", measure)
