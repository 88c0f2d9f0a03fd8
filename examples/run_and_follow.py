"""Starts a run on this machine from Python and follows its events; shows the public API, and nothing else.

    python examples/run_and_follow.py examples/demo.toml runs/followed ann.jsonl bob.jsonl federation.rounds=1

A run file, a new folder for the run, one data file per device, and overrides of the run file.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import edgelam_fl
from edgelam_fl.telemetry.events import NodeJoined, RoundDone, RunFailure


def main(run_file: str, folder: str, *rest: str) -> None:
    config = edgelam_fl.read_run_file(Path(run_file), [word for word in rest if "=" in word])
    data = [Path(word) for word in rest if "=" not in word]
    losses: dict[str, list[float]] = {}
    for event in edgelam_fl.run_local(config, data, Path(folder)):
        match event:
            case NodeJoined():
                print(f"{event.node} joined with {event.examples} examples")
            case RoundDone():
                for device in event.devices:
                    losses.setdefault(device.name, []).extend(loss for loss in device.step_losses if loss is not None)
                    print(f"round {event.round}: {device.name} at perplexity {device.perplexity:.2f}")
            case RunFailure():
                sys.exit(f"the run failed: {event.reason}")
    result = edgelam_fl.open_result(Path(folder))
    for name, of_steps in losses.items():
        print(f"{name}: {len(of_steps)} steps, mean loss {math.fsum(of_steps) / max(1, len(of_steps)):.3f}")
    print(f"adapter: {result.adapter}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except edgelam_fl.EdgelamError as error:
        sys.exit(f"{type(error).__name__}: {error}")
