"""Compares the time of a step behind 5, 20 and 100 Mbit/s, limited with `tc` in the device's container, with a formula.

Needs a Docker engine. One device and one edge server train a random Llama that takes little compute and much transfer: a
step has m micro-batches of B x T tokens, and a route over one host moves 2 B T D fp32 numbers per micro-batch each way (the
device sends activations of the front and gradients of the back, and receives the others). Transfers overlap compute, so a
step should take

    (m + p - 1) max(max_i t_i, S / R)

with p = 2 ends of the link, t_i the seconds that node i computes per micro-batch (measured in the same run), S the bytes per
micro-batch and direction, and R the rate set with tc. Headers of frames, gRPC, TCP and Ethernet are in the measured time, not
in the formula. The run file names the rate (wire.capacity), so both ends pace their sending and no queue builds up before the
link: in a router's queue of 400 ms the acknowledgements of one direction would wait behind the data of the other, and both
directions would stall at times. The capacity leaves room for what tc counts beside the data: headers of 66 bytes per frame of
1514 bytes, and one frame of 66 bytes for every two in the other direction. The first round is not counted.
This measures time: run it on a machine that does nothing else. --smoke: only 100 Mbit/s, no bars.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.big_llama import CONFIG, write_llama
from benchmarks.common import Figure, main
from benchmarks.links import write_pairs
from edgelam_fl.telemetry.events import RoundDone, of_kind, read_events
from testbed.__main__ import IMAGE, started, train
from testbed.engine import build, check_engine
from testbed.shapes import MachineShape, Testbed, TestbedNode

RATES_MBPS = (5, 20, 100)
MICRO_BATCHES, TOKENS, STEPS, ENDS = 8, 256, 4, 2
DATA = 1 - 66 / 1514 - 66 / (2 * 1514)  # share of the rate that is left for data
OFF = 0.15
HIDDEN = 512
MODEL = {
    **CONFIG, "vocab_size": 300, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 1,
}  # fmt: skip
RUN = """\
[model]
name = "/models/llama"
[split]
front = 1
back = 1
micro_batches = {micro_batches}
window = {micro_batches}
[federation]
rounds = 2
local_steps = {steps}
batch_size = {micro_batches}
join_deadline_s = 400
step_deadline_s = 600
[task]
max_tokens = {tokens}
[data]
held_out = 0.05
[wire]
capacity = "{capacity:.0f} kbit/s"
"""


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    check_engine()
    build(IMAGE)
    out = Path("runs").absolute() / ("benchmark-links-tc-smoke" if smoke else "benchmark-links-tc")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    model = write_llama(out / "model", MODEL)
    data = write_pairs(out / "pairs.jsonl", TOKENS)
    figures = []
    for rate in RATES_MBPS[-1:] if smoke else RATES_MBPS:
        figures += of_rate(rate, _run(out / f"{rate}-mbps", rate, data, model), bar=not smoke)
    settings = {"run": RUN, "rates_mbps": RATES_MBPS, "bytes_a_micro_batch": micro_batch_bytes(), "model": MODEL}
    return settings, figures


def run_text(rate_mbps: float) -> str:
    capacity = DATA * rate_mbps * 1e3
    return RUN.format(micro_batches=MICRO_BATCHES, steps=STEPS, tokens=TOKENS, capacity=capacity)


def micro_batch_bytes() -> int:
    """Returns the bytes of hidden states per micro-batch, each way."""
    return 2 * TOKENS * HIDDEN * 4


def predicted_s(rate_mbps: float, compute_s: float) -> float:
    return (MICRO_BATCHES + ENDS - 1) * max(compute_s, micro_batch_bytes() * 8 / (rate_mbps * 1e6))


def of_rate(rate: int, done: RoundDone, bar: bool) -> list[Figure]:
    """Returns the figures of a round of one device, compared with the formula."""
    (device,) = done.devices
    micro_batches = STEPS * MICRO_BATCHES
    compute_s = max(node.compute_seconds for node in (device, *done.hosts)) / micro_batches
    step_s, formula_s = device.train_seconds / STEPS, predicted_s(rate, compute_s)
    off = step_s / formula_s - 1
    asked = f"within {OFF:.0%} of the formula" if bar else None
    return [
        Figure(f"{rate} Mbit/s: largest compute a micro-batch", round(compute_s, 4), "s"),
        Figure(f"{rate} Mbit/s: transfer a micro-batch", round(micro_batch_bytes() * 8 / (rate * 1e6), 4), "s"),
        Figure(f"{rate} Mbit/s: a step by the formula", round(formula_s, 3), "s"),
        Figure(f"{rate} Mbit/s: a step", round(step_s, 3), "s", asked, abs(off) <= OFF if bar else None),
        Figure(f"{rate} Mbit/s: off the formula", round(100 * off, 1), "%"),
    ]


def _run(folder: Path, rate: int, data: Path, model: Path) -> RoundDone:
    shapes = {
        "server": MachineShape(memory="2 GiB", cpus=0.3),
        "edge": MachineShape(memory="2 GiB", cpus=0.75),
        "device": MachineShape(memory="2 GiB", cpus=0.75, up=f"{rate} Mbit/s", down=f"{rate} Mbit/s"),
    }
    nodes = (TestbedNode(shape="edge", name="edge-1", role="edge"), TestbedNode(shape="device", name="device-1"))
    testbed = Testbed(shapes=shapes, server="server", nodes=nodes)
    run_file = folder / "links.toml"
    folder.mkdir()
    run_file.write_text(run_text(rate), encoding="utf-8")
    with started(
        testbed, folder, "edgelam-links-tc", Console(), [data], {str(model): "/models/llama"}, lend=True
    ) as containers:
        train(containers, testbed, folder, run_file)
    return next(done for done in of_kind(read_events(folder / "events.jsonl"), RoundDone) if done.round == 2)


if __name__ == "__main__":
    main("links_tc", measure)
