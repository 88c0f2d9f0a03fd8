"""Trains models that fit in no single container over several: SmolLM2, and a random Llama of 1.1 billion parameters.

Needs a Docker engine. The testbed has a server, a device and four edge servers; the device and the edge servers have the
same memory limit, without swap. SmolLM2 is trained with one run file unsplit without a limit, then unsplit on the limited
device, whose stage host the kernel kills, then split over the limited containers. The Llama (bf16, 2.2 GB, only in the
server's container, which sends each node the tensors of its slice) is trained unsplit without a limit, then split over five
containers of 1 GiB, 3 steps each.

Memory is measured per control group: the peak of everything charged to it, which contains pages of files (the kernel
reclaims these at need, so the peak may reach the limit), and the largest sample of memory that cannot be reclaimed. Only a
slice's own node writes and reads its file, so the file's pages are in that node's peak. Losses and perplexities do not depend
on how busy the machine is; seconds are not reported. A half that is finished in runs/benchmark-testbed-memory is not run
again: remove its folder there to repeat it. --smoke: a tiny model, nothing is killed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.big_llama import CONFIG, parameters, write_llama
from benchmarks.common import RESULTS, Figure, main
from edgelam_fl.config import read_run_file, to_toml
from edgelam_fl.tasks.docstrings import docstring_pairs
from edgelam_fl.telemetry.events import RoundDone, of_kind, read_events
from edgelam_fl.telemetry.human import human_bytes
from testbed.__main__ import IMAGE, started, train
from testbed.compose import RUNS, SERVER, SERVER_ADDRESS
from testbed.engine import Project, build, check_engine
from testbed.shapes import MachineShape, Testbed, TestbedNode

HOSTS = 4
SAME = 1e-3
KILLED = 128 + 9  # a shell's exit status for SIGKILL, which the kernel sends to a process that takes too much memory
KILL_S = 900.0
_FINISHED = "finished.json"
# Flower's processes and PyTorch take 600 MB. A micro-batch of 512 tokens takes 0.79 GB more unsplit and 0.37 GB on the
# split device, most of it for logits (model/memory.py). The limit is between the two, 0.2 GB from either.
SMOL_LIMIT, LLAMA_LIMIT, ENOUGH = "1200 MiB", "1 GiB", "12 GiB"
SMOL = """\
[split]
front = 2
back = 2
micro_batches = 4
window = 1
[federation]
rounds = 1
local_steps = 3
batch_size = 4
join_deadline_s = 600
step_deadline_s = 900
[task]
max_tokens = 512
loss_on = "all"
template = "plain"
[data]
held_out = 0.04
[optimizer]
lr = 2e-3
"""
# Few tokens: a bf16 base is computed in bf16 (server.checks), and a processor without bf16 instructions takes a minute for
# 16 tokens, most of it backward.
LLAMA = """\
[model]
name = "/models/llama"
base = "bf16"
[split]
front = 1
back = 1
micro_batches = 1
window = 1
[federation]
rounds = 1
local_steps = 3
batch_size = 1
join_deadline_s = 600
step_deadline_s = 900
[task]
max_tokens = 16
loss_on = "all"
template = "plain"
[data]
held_out = 0.0125
[optimizer]
lr = 1e-3
"""
TINY_LLAMA = {**CONFIG, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "vocab_size": 300}


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    out = Path("runs").absolute() / ("benchmark-testbed-memory-smoke" if smoke else "benchmark-testbed-memory")
    if smoke:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    config = TINY_LLAMA if smoke else CONFIG
    halves = {} if smoke else {"smollm2": smol}
    halves["llama"] = partial(llama, config=config, model="smoke" if smoke else "1.1b")
    if not options.finished:
        with (out / "lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two of these benchmarks at once would remove each other's containers
            for name, run in halves.items():
                _run_half(out / name, run)
    tables, figures = list[str](), list[Figure]()
    for file in (out / name / _FINISHED for name in halves):
        if file.exists():
            half = json.loads(file.read_text(encoding="utf-8"))
            figures += [Figure(**figure) for figure in half["figures"]]
            tables.append(half["table"])
    if not smoke:
        (RESULTS / "testbed_memory.md").write_text(page(tables, figures), encoding="utf-8")
    settings = {
        "hosts": HOSTS, "smollm2": SMOL, "smollm2_limit": SMOL_LIMIT, "llama": LLAMA, "llama_limit": LLAMA_LIMIT,
        "llama_parameters": parameters(config),
    }  # fmt: skip
    return settings, figures


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--finished", action="store_true", help="report the finished halves; run none")


def _run_half(out: Path, run: Callable[[Path], tuple[list[Figure], str]]) -> None:
    """Runs a half and writes its figures and table to a file; does nothing if the file exists."""
    if (out / _FINISHED).exists():
        return
    check_engine()
    build(IMAGE)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    figures, table = run(out)
    text = json.dumps({"figures": list(map(asdict, figures)), "table": table})
    (out / _FINISHED).write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- the two halves


def smol(out: Path) -> tuple[list[Figure], str]:
    data = _passages(out / "device.jsonl")
    run_file = _written(out / "smollm2.toml", SMOL)
    whole = _unsplit(out / "smollm2-whole", run_file, data)
    with _containers(out / "smollm2-split", SMOL_LIMIT, data) as found:
        kills, status = _killed(found, run_file)
        _train(found, run_file, [f"split.hosts={HOSTS}"])
    device, same = _device(found.folder), _device(out / "smollm2-whole")
    apart = abs(device["perplexity_after"] / same["perplexity_after"] - 1)
    name = "SmolLM2-135M"
    figures = [
        Figure(f"{name} unsplit, limited: processes killed for memory", kills, "", "at least 1", kills >= 1),
        Figure(f"{name} unsplit, limited: exit status", status, "", f"{KILLED}, SIGKILL", status == KILLED),
        Figure(f"{name} unsplit, unlimited: largest sample without file pages", whole, "MiB"),
        Figure(f"{name} perplexity before", round(same["perplexity_before"], 4), ""),
        Figure(f"{name} perplexity after, unsplit, unlimited", round(same["perplexity_after"], 4), ""),
        Figure(f"{name} perplexity after, split, limited", round(device["perplexity_after"], 4), ""),
        Figure(f"{name} perplexity, split against unsplit", apart, "", f"at most {SAME:g} apart", apart <= SAME),
        *_split_figures(name, found, before=kills),
    ]
    return figures, _table(f"{name}, each container limited to {SMOL_LIMIT}", found)


def llama(out: Path, config: dict[str, Any], model: str) -> tuple[list[Figure], str]:
    files = write_llama(out.parents[1] / f"benchmark-llama-{model}", config)
    data = _passages(out / "llama-device.jsonl", count=80)
    run_file = _written(out / "llama.toml", LLAMA)
    whole = _unsplit(out / "llama-whole", run_file, data, files)
    with _containers(out / "llama-split", LLAMA_LIMIT, data, files) as found:
        _train(found, run_file, [f"split.hosts={HOSTS}"])
    losses, same = _losses(found.folder), _losses(out / "llama-whole")
    apart = max(abs(ours / theirs - 1) for ours, theirs in zip(losses, same, strict=True))
    name = "random Llama"
    figures = [
        Figure(f"{name} unsplit, unlimited: largest sample without file pages", whole, "MiB"),
        *(Figure(f"{name} loss of step {n}, unsplit", loss, "") for n, loss in enumerate(same, 1)),
        *(Figure(f"{name} loss of step {n}, split", loss, "") for n, loss in enumerate(losses, 1)),
        Figure(f"{name} losses, split against unsplit", apart, "", f"at most {SAME:g} apart", apart <= SAME),
        *_split_figures(name, found),
    ]
    return figures, _table(f"{name}, {parameters() / 1e9:.2f} billion parameters, each container {LLAMA_LIMIT}", found)


def _split_figures(name: str, found: Found, before: int = 0) -> list[Figure]:
    kills = sum(found.kills.values()) - before
    figures = [Figure(f"{name} split: processes killed for memory", kills, "", "0", kills == 0)]
    for service, peak in found.peaks.items():
        own = round(found.own.get(service, 0) / 2**20, 1)
        figures += [
            Figure(f"{name} split, {service}: peak of the control group", round(peak / 2**20, 1), "MiB"),
            Figure(f"{name} split, {service}: largest sample without file pages", own, "MiB"),
        ]
    return figures


# ---------------------------------------------------------------- containers


@dataclass
class Found:
    """A testbed while it runs, and at its end the measurements of its control groups."""

    testbed: Testbed
    containers: Project
    folder: Path
    peaks: dict[str, int] = field(default_factory=dict)
    own: dict[str, int] = field(default_factory=dict)  # bytes that the kernel cannot reclaim, largest sample
    kills: dict[str, int] = field(default_factory=dict)


@contextmanager
def _containers(folder: Path, limit: str, data: Path, model: Path | None = None, hosts: int = HOSTS) -> Iterator[Found]:
    testbed = _testbed(limit, hosts)
    folder.mkdir(parents=True)
    mounts = {f"{model}": "/models/llama"} if model else {}
    stop = threading.Event()
    with started(testbed, folder, "edgelam-testbed-memory", Console(), [data], mounts, server_alone=True) as containers:
        found = Found(testbed, containers, folder)
        names = [node.name for node in testbed.nodes]
        sampler = threading.Thread(target=_sample, args=(containers, names, found.own, stop), daemon=True)
        sampler.start()
        try:
            yield found
        finally:
            stop.set()
            sampler.join()
        found.peaks = {name: containers.peak_memory_bytes(name) or 0 for name in names}
        found.kills = {name: containers.memory_kills(name) or 0 for name in names}


def _testbed(limit: str, hosts: int) -> Testbed:
    """Returns an untimed testbed: nodes of a route compute in turn, so each may use all the CPUs it needs."""
    node = MachineShape(memory=limit, cpus=2.0)
    nodes = (
        *(TestbedNode(shape="node", name=f"edge-{n}", role="edge") for n in range(1, hosts + 1)),
        TestbedNode(shape="node", name="device-1"),
    )
    shapes = {"node": node, "server": MachineShape(memory="2 GiB", cpus=2.0)}
    return Testbed(shapes=shapes, server="server", nodes=nodes, timed=False)


def _train(found: Found, run_file: Path, overrides: list[str]) -> None:
    train(found.containers, found.testbed, found.folder, run_file, overrides)


def _unsplit(folder: Path, run_file: Path, data: Path, model: Path | None = None) -> float:
    """Trains unsplit without a limit; returns the device's largest sample of memory without file pages, in MiB."""
    with _containers(folder, ENOUGH, data, model, hosts=0) as found:
        _train(found, run_file, ["split.hosts=0"])
    return round(found.own["device-1"] / 2**20, 1)


def _killed(found: Found, run_file: Path) -> tuple[int, int]:
    """Trains unsplit on the limited device until the kernel kills its stage host; returns (processes killed, exit status)."""
    containers, end = found.containers, time.monotonic() + KILL_S
    config = read_run_file(run_file, ["split.hosts=0", "federation.expect_nodes=1"])
    containers.put(SERVER, to_toml(config), f"{RUNS}/unsplit.toml")
    command = f"echo $$ > /tmp/unsplit; exec edgelam run {RUNS}/unsplit.toml --server {SERVER_ADDRESS} --operator /state/operator --out {RUNS}/unsplit"
    with subprocess.Popen(["docker", "exec", containers.container(SERVER), "sh", "-c", command]) as process:
        while process.poll() is None and time.monotonic() < end and not containers.memory_kills("device-1"):
            time.sleep(1.0)
        containers.ask(SERVER, "kill -INT $(cat /tmp/unsplit)")
    kills, end = containers.memory_kills("device-1") or 0, time.monotonic() + 30
    ended: list[str] = []
    while kills and not ended and time.monotonic() < end:  # the node logs it about a second later
        ended = re.findall(r"stage host ended with status (-?\d+)", containers.logs())
        time.sleep(1.0)
    return kills, 128 - int(ended[-1]) if ended else 0


def _sample(containers: Project, names: list[str], largest: dict[str, int], stop: threading.Event) -> None:
    while not stop.wait(1.0):
        for name in names:
            largest[name] = max(largest.get(name, 0), containers.own_memory_bytes(name) or 0)


# ---------------------------------------------------------------- files


def _passages(file: Path, count: int = 0) -> Path:
    """Writes examples of twelve docstrings each, so that examples are long, and returns the file."""
    answers = [f"{pair.prompt} {pair.answer}" for pair in docstring_pairs()][: 12 * count or 1200]
    rows = [{"question": "Python:", "answer": "\n".join(answers[n : n + 12])} for n in range(0, len(answers), 12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def _written(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def _device(folder: Path) -> dict[str, Any]:
    device: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["devices"][0]
    return device


def _losses(folder: Path) -> list[float]:
    first = next(of_kind(read_events(folder / "events.jsonl"), RoundDone))
    return list(first.devices[0].step_losses)


def _table(title: str, found: Found) -> str:
    lines = [
        f"## {title}",
        "",
        "| container | layers | peak of the control group | without file pages | killed |",
        "|---|---|---|---|---|",
    ]
    layers = {host["name"]: host["layers"] for host in json.loads((found.folder / "summary.json").read_text())["hosts"]}
    for name, peak in found.peaks.items():
        held = f"{layers[name][0]}-{layers[name][1] - 1}" if name in layers else "the ends"
        own = human_bytes(found.own.get(name))
        lines.append(f"| {name} | {held} | {human_bytes(peak)} | {own} | {found.kills[name]} |")
    return "\n".join(lines)


def page(tables: list[str], figures: list[Figure]) -> str:
    asked = [_verdict(figure) for figure in figures if figure.bar]
    head = "# Memory a container\n\nWritten by `python -m benchmarks.testbed_memory`. "
    head += "The device's count of killed processes includes the unsplit attempt's. The Llama's nodes have their slices from the "
    head += "server: the pages of a slice's file (0.44 GB a host) are in its container's peak, and the kernel takes them back at need."
    return "\n\n".join([head, *tables, "\n".join(asked)]) + "\n"


def _verdict(figure: Figure) -> str:
    value = f"{figure.value:.6g} {figure.unit}".strip()
    return f"- {'holds' if figure.holds else 'MISSED'}: {figure.name} = {value} ({figure.bar})"


if __name__ == "__main__":
    main("testbed_memory", measure, add_options)
