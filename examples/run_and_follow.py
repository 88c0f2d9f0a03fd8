"""Fine-tunes a model on this machine from Python and follows the run; shows the public API, and nothing else.

    python examples/run_and_follow.py ann.jsonl bob.jsonl
    python examples/run_and_follow.py mine.toml ann.jsonl bob.jsonl federation.rounds=1 run.out=runs/followed

One data file per device; a run file and overrides of it if you like.
"""

from __future__ import annotations

import math
import sys

import edgelam_fl
from edgelam_fl.telemetry.events import Event, NodeJoined, RoundDone


def show(event: Event) -> None:
    match event:
        case NodeJoined():
            print(f"{event.node} joined with {event.examples} examples")
        case RoundDone():
            for device in event.devices:
                print(f"round {event.round}: {device.name} at perplexity {device.perplexity:.2f}")


def main(*words: str) -> None:
    overrides = [word for word in words if "=" in word]
    run_file = next((word for word in words if word.endswith(".toml")), None)
    data = [word for word in words if word not in overrides and word != run_file]
    result = edgelam_fl.run(data, run_file, overrides, on_event=show)
    losses: dict[str, list[float]] = {}
    for event in result.events():
        if isinstance(event, RoundDone):
            for device in event.devices:
                losses.setdefault(device.name, []).extend(loss for loss in device.step_losses if loss is not None)
    for name, of_steps in losses.items():
        print(f"{name}: {len(of_steps)} steps, mean loss {math.fsum(of_steps) / max(1, len(of_steps)):.3f}")
    for done in result.summary.devices:
        print(f"{done.name}: perplexity {done.perplexity_before:.2f} before, {done.perplexity_after:.2f} after")
    print(f"adapter: {result.adapter}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except edgelam_fl.EdgelamError as error:
        sys.exit(f"{type(error).__name__}: {error}")
