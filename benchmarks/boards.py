"""Compares a federation of emulated Raspberry Pis and x86 machines with the same federation on x86 alone.

    python -m benchmarks.boards --root-a72 DIR --root-a76 DIR

Two devices, `pi4` and `pi5`, keep two of SmolLM2's 30 layers each: the first, and the last with the head. Two edge servers
hold the layers between. In the reference all nodes are processes of this machine. Then each device is `edgelam client` in an
arm64 root folder (both may use one folder), emulated with the board's CPU; everything else is the same. The comparison covers
each device's loss per step and the run's change of the adapter. Emulation shows that the client runs and computes the same;
it shows nothing about speed.

A root folder is an arm64 Debian with /proc and /dev mounted in which `sh clients/install.sh --board pi4 --models` has run, on a
machine with binfmt and qemu-user-static. --smoke: two steps; without root folders, both federations run on this machine.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Figure, main
from edgelam_fl.addresses import free_port
from edgelam_fl.config import RunConfig, TaskSection, parse_run_file
from edgelam_fl.federation.child import Child, end_all
from edgelam_fl.federation.node_process import NodeProcesses
from edgelam_fl.federation.operator import Operator, operator_folder
from edgelam_fl.federation.submission import Submission
from edgelam_fl.federation.superlink import start_superlink
from edgelam_fl.model.adapter import Adapter, initial_adapter, read_peft_folder
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.source import find_model
from edgelam_fl.tasks.data import read_pairs
from edgelam_fl.tasks.docstrings import write_device_files
from edgelam_fl.tasks.kinds import make_task
from edgelam_fl.telemetry.events import DeviceResult, Event, RoundDone, RunDone, of_kind
from edgelam_fl.telemetry.summary import is_training_round

MODEL, LEAST_TOKENS, TOKENS, STEPS, PAIRS = "smollm2-135m", 17, 32, 5, 12
LOSS_APART, COSINE = 1e-4, 0.999  # the bars
# Deadlines are long because Python alone takes most of a minute to start under emulation.
SETTINGS = {
    "model.name": MODEL, "split.front": 1, "split.back": 1, "split.hosts": 2, "split.micro_batches": 1,
    "task.max_tokens": TOKENS, "task.template": "plain", "data.held_out": 0.1, "federation.rounds": 1, "federation.batch_size": 1,
    "federation.min_nodes": 2, "federation.join_deadline_s": 3000, "federation.step_deadline_s": 600,
    "federation.round_deadline_s": 3000,
}  # fmt: skip
RUN_S = 7200.0
EDGELAM = "/opt/edgelam/bin/edgelam"  # path in a root folder, as clients/install.sh makes it


@dataclass(frozen=True)
class Board:
    """An emulated board: a root folder whose programs run with the board's CPU."""

    name: str
    cpu: str
    root: Path
    enter: str  # command that runs another command in a root folder

    def command(self, *words: str) -> list[str]:
        return [*shlex.split(self.enter), str(self.root), *words]

    @property
    def environment(self) -> dict[str, str]:
        return {"QEMU_CPU": self.cpu, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": "/root"}

    def run(self, *words: str) -> str:
        environment = {**os.environ, **self.environment}
        return subprocess.run(
            self.command(*words), env=environment, text=True, stdout=subprocess.PIPE, check=True
        ).stdout.strip()

    def client(self, server: str, data: Path, log: Path) -> Child:
        """Starts the installed client in the root folder, with a new state folder and a copy of the data."""
        inside = self.root / "tmp" / f"benchmark-{self.name}"
        shutil.rmtree(inside, ignore_errors=True)
        inside.mkdir(parents=True)
        shutil.copy(data, inside / "data.jsonl")
        folder = f"/tmp/benchmark-{self.name}"
        words = [EDGELAM, "client", "--insecure", "--server", server, "--name", self.name, "--threads", "1"]
        words += ["--data", f"{folder}/data.jsonl", "--state", f"{folder}/state"]
        return Child(self.name, self.command(*words), log, self.environment)


def boards(options: argparse.Namespace) -> list[Board]:
    roots = {("pi4", "cortex-a72"): options.root_a72, ("pi5", "cortex-a76"): options.root_a76}
    given = {board: root for board, root in roots.items() if root is not None}
    if len(given) < len(roots) and (given or not options.smoke):
        raise SystemExit(
            "--root-a72 DIR and --root-a76 DIR are both needed; the docstring of benchmarks/boards.py says what a root folder is"
        )
    return [Board(name, cpu, root, options.enter) for (name, cpu), root in given.items()]


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    emulated = boards(options)
    out = Path("runs").absolute() / ("benchmark-boards-smoke" if smoke else "benchmark-boards")
    shutil.rmtree(out, ignore_errors=True)
    settings = {**SETTINGS, "federation.local_steps": 2 if smoke else STEPS}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    config = parse_run_file("", source="the benchmark", overrides=overrides)
    data = few_pairs(out)
    reference = _federate(out / "x86", config, data, [])
    versions = {board.name: _prepared(board) for board in emulated}
    result = _federate(out / "boards", config, data, emulated)
    source = find_model(MODEL)
    start = initial_adapter(source, config.lora.targets, config.lora.rank, config.run.seed)
    figures = list(losses_apart(reference.events, result.events))
    figures += cosines(start, reference.adapter, result.adapter, source.num_layers)
    return {**settings, "boards": {b.name: b.cpu for b in emulated}, "on the boards": versions}, figures


def few_pairs(out: Path) -> dict[str, Path]:
    """Writes a data file per board: short docstrings of LEAST_TOKENS to TOKENS tokens each, one of which makes a step."""
    files = write_device_files(out / "data", 2)
    settings = TaskSection(template="plain", max_tokens=2 * TOKENS, loss_on="all")
    task = make_task(settings, find_model(MODEL).folder)
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        pairs = read_pairs(file, "question", "answer")
        sizes = [len(example.ids) for pair in pairs for example in task.examples([pair]).examples]
        short = [line for line, size in zip(lines, sizes, strict=True) if LEAST_TOKENS <= size <= TOKENS]
        file.write_text("\n".join(short[:PAIRS]) + "\n", encoding="utf-8")
    return dict(zip(("pi4", "pi5"), files, strict=True))


def _prepared(board: Board) -> str:
    """Returns machine and versions of a root folder. Copies the cached model there, which takes minutes to read emulated."""
    read = find_model(MODEL).folder
    shutil.copytree(read, board.root / "root/.cache/edgelam-fl/models" / read.name, dirs_exist_ok=True)
    code = (
        "import platform; from importlib.metadata import version;"
        "print(platform.machine(), 'Python', platform.python_version(), 'torch', version('torch'))"
    )
    return board.run(str(Path(EDGELAM).with_name("python")), "-c", code)


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class Result:
    events: Sequence[Event]
    adapter: Adapter


def losses_apart(reference: Sequence[Event], result: Sequence[Event]) -> Iterator[Figure]:
    """Yields per device how far a step's loss was off at most, and how long a step took (shown, not compared)."""
    for name, device in trained(result).items():
        ours, theirs = trained(reference)[name].step_losses, device.step_losses
        apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        bar = f"at most {LOSS_APART:g} in each of {len(ours)} steps"
        yield Figure(f"{name}: loss of a step, farthest from x86", float(f"{apart:.2g}"), "", bar, apart <= LOSS_APART)
        yield Figure(f"{name}: loss of the first step", ours[0], "")
        yield Figure(f"{name}: loss of the last step", ours[-1], "")
        yield Figure(f"{name}: tokens a step", round(device.tokens / len(ours), 1), "")
        yield Figure(f"{name}: a step under emulation", round(device.train_seconds / len(ours), 1), "s")


def trained(events: Sequence[Event]) -> dict[str, DeviceResult]:
    """Returns the devices of the round that trained."""
    (found,) = filter(is_training_round, of_kind(events, RoundDone))
    return {device.name: device for device in found.devices}


def cosines(start: Adapter, reference: Adapter, result: Adapter, layers: int) -> Iterator[Figure]:
    """Yields the cosine between the two runs' changes of the adapter: in the boards' layers, in the hosts' layers, in all."""
    parts: dict[str, Callable[[int | None], bool]] = {
        "the boards' layers": lambda layer: layer in (0, layers - 1),
        "the hosts' layers": lambda layer: layer not in (0, layers - 1),
        "all layers": lambda layer: True,
    }
    for part, chosen in parts.items():
        names = sorted(name for name in start if chosen(layer_number(name)))
        ours, theirs = (np.concatenate([(a[n] - start[n]).ravel() for n in names]) for a in (reference, result))
        cosine = float(ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs)))
        yield Figure(f"update of {part}, cosine to x86", round(cosine, 7), "", f"at least {COSINE}", cosine >= COSINE)


# ---------------------------------------------------------------- processes


def _federate(out: Path, config: RunConfig, data: Mapping[str, Path], emulated: Sequence[Board]) -> Result:
    with _federation(out, data, emulated) as (server, watch):
        submission, events = Submission(Operator(server, operator_folder(out / "server"))), list[Event]()
        submission.submit(config, out / "run")
        for event in submission.events(RUN_S, awaited=f"the run's end ({out})", meanwhile=watch):
            events.append(event)
            about = (getattr(event, name, "") for name in ("node", "reason"))
            print(f"{out.name}: {type(event).__name__} {''.join(about)}", flush=True)
    if not isinstance(events[-1], RunDone):
        raise SystemExit(f"the run failed: {events[-1]}")
    return Result(events, read_peft_folder(out / "run/adapter"))


@contextmanager
def _federation(
    out: Path, data: Mapping[str, Path], emulated: Sequence[Board]
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Starts the processes; yields the SuperLink's address and a function that raises if one has ended. Ends all of them."""
    port = free_port()
    server, folder = f"127.0.0.1:{port}", out / "nodes"
    nodes = [NodeProcesses(f"edge-{n}", server, folder / f"edge-{n}", threads=1) for n in (1, 2)]
    own = [] if emulated else list(data)
    nodes += [NodeProcesses(name, server, folder / name, data[name], threads=1) for name in own]
    children = [start_superlink("127.0.0.1", port, out / "server")]

    def watch() -> None:
        for child in children:
            if child.ended():
                raise SystemExit(child.ended())

    try:
        for node in nodes:
            node.start()
        children += [board.client(server, data[board.name], out / f"{board.name}.log") for board in emulated]
        yield server, watch
    finally:
        end_all([*(child for node in nodes for child in node.children.values()), *children])


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root-a72", type=Path, metavar="DIR", help="root folder for the Raspberry Pi 4")
    parser.add_argument("--root-a76", type=Path, metavar="DIR", help="root folder for the Raspberry Pi 5")
    parser.add_argument("--enter", default="chroot", metavar="COMMAND", help="runs: COMMAND DIR PROGRAM ...")


if __name__ == "__main__":
    main("boards", measure, add_options)
