"""Measures what a user waits for and what a node takes before anything is trained: the demo part by part, imports, idle memory.

The first run fills the caches and is not counted; then the demo runs `--pairs` times, by turns with an older checkout if
`--against` names one (as PYTHONPATH: the checkout first, then what else it needs), and figures are medians. CPU seconds are user
and system of all processes that a command starts. --smoke: the shortest command alone. The demo's runs stay in runs/.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.common import Figure, main
from edgelam_fl.addresses import answers, free_port

ROOT = Path(__file__).parents[1]
MIB = 2**20
_ASK = """
import sys
from pathlib import Path
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.control import control
with control(Path(sys.argv[1]), 300.0) as node:
    node.call("GetProfile", pb.ProfileRequest(protocol_version=PROTOCOL_VERSION), 600.0)
"""
_BEFORE = "import edgelam_fl.split.stage_host, edgelam_fl.wire.grpc_link, peft, transformers.models.llama.modeling_llama"  # at d19f339
_FIND = "from edgelam_fl.model.source import find_model; find_model('smollm2-135m')"


@dataclass(frozen=True)
class Checkout:
    """A checkout of this project, and how its commands are run."""

    name: str
    path: str
    """What goes before PYTHONPATH: its folder first."""

    @property
    def folder(self) -> Path:
        return Path(self.path.split(os.pathsep)[0])

    def environment(self, **more: str) -> dict[str, str]:
        """Returns the environment of its commands. Each checkout has a cache of its own: an older one cannot read a newer one's notes."""
        cache = str(ROOT / "runs" / f"benchmark-start-{self.name}-cache")
        own = {"PYTHONPATH": self.path, "EDGELAM_CACHE": cache, "XDG_CACHE_HOME": cache}
        return {**os.environ, **own, "HF_HUB_OFFLINE": "1", "COLUMNS": "100", **more}

    def command(self, *arguments: str) -> list[str]:
        """Returns the command line of its `edgelam`."""
        scripts = tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
        module, _, function = scripts["edgelam"].partition(":")
        return [sys.executable, "-c", f"from {module} import {function}; {function}()", *arguments]

    def stage_host_imports(self) -> str:
        """Returns a program that imports what a stage host imports."""
        if (self.folder / "edgelam_fl" / "node" / "preloaded.py").exists():
            return "import edgelam_fl.node.preloaded"
        return _BEFORE


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    checkouts = [Checkout("now", str(ROOT))]
    if options.against:
        checkouts.append(Checkout("before", options.against))
    settings = {"pairs": options.pairs, "against": bool(options.against)}
    if smoke:
        return settings, list(_processes(checkouts, 1, ["edgelam --help"]))
    figures = [*_idle_nodes(checkouts), *_processes(checkouts, 5)]
    if not options.no_demo:
        with _adopting_orphans():
            figures += _demos(checkouts, options.pairs)
    return settings, figures


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", default="", metavar="PYTHONPATH", help="an older checkout to compare with")
    parser.add_argument("--pairs", type=int, default=3, help="runs of the demo per checkout")
    parser.add_argument("--no-demo", action="store_true", help="only imports and memory")


# ---------------------------------------------------------------- the demo


def _demos(checkouts: Sequence[Checkout], pairs: int) -> list[Figure]:
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(pairs + 1):
        for checkout in checkouts:
            parts = _demo(checkout)
            if number:  # the first one fills the caches
                found[checkout.name].append(parts)
    bars = {"first training step": 20.0, "messages per round": 3.0}
    figures = []
    for checkout in checkouts:
        for part in found[checkout.name][0]:
            value = median(parts[part] for parts in found[checkout.name])
            bar = bars.get(part) if checkout.name == "now" else None
            words, holds = (f"at most {bar:g}", value <= bar) if bar else (None, None)
            unit = "" if part.endswith("perplexity after") else "s"
            figures.append(Figure(f"demo {checkout.name}: {part}", round(value, 2), unit, words, holds))
    if len(checkouts) == 2:
        ratio = median(
            now["whole command"] / before["whole command"]
            for now, before in zip(found["now"], found["before"], strict=True)
        )
        figures.append(Figure("demo: whole command, ratio", round(ratio, 3), "", "at most 0.5", ratio <= 0.5))
    return figures


def _demo(checkout: Checkout) -> dict[str, float]:
    """Runs the demo; returns the seconds of its parts."""
    out = ROOT / "runs" / f"benchmark-start-{checkout.name}"
    shutil.rmtree(out, ignore_errors=True)
    began, clock, cpu_s = time.monotonic(), time.time(), _children_cpu_s()
    others = set(psutil.Process().children())
    log = out.with_suffix(".txt")
    log.parent.mkdir(exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        subprocess.run(
            checkout.command("demo", "--out", str(out)),
            cwd=checkout.folder, env=checkout.environment(), stdout=output, stderr=subprocess.STDOUT, check=True,
        )  # fmt: skip
    whole_s = time.monotonic() - began
    parts = {"whole command": whole_s, "CPU": _children_cpu_s(others) - cpu_s, **parts_of(out, clock, clock + whole_s)}
    print(
        json.dumps({"checkout": checkout.name, **{name: round(value, 2) for name, value in parts.items()}}), flush=True
    )
    return parts


def parts_of(run: Path, began: float, ended: float) -> dict[str, float]:
    """Returns the seconds of a finished run's parts, from its events and those of its nodes. `began`, `ended`: of its command.

    Messages are what a round takes beside evaluation and training: from its plan until all nodes play, and from the end of
    the last part to the aggregate; the round of the last evaluation counts as well.
    """
    events = _events(run / "events.jsonl")
    rounds: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted(run.glob("nodes/*/events.jsonl")):
        for event in _events(file):
            if "job" in event:
                of_round = rounds[int(event["job"].split("/")[1])]
                of_round[event["event"]].append(event["time"])
                if event["event"] == "step":
                    of_round["first"].append(event["time"] - event["seconds"])
    planned = {event["round"]: event["time"] for event in events if event["event"] == "plan"}
    closed = {event["round"]: event for event in events if event["event"] == "round_done"}
    messages, evaluation_s, training_s = [], 0.0, 0.0
    for number, closing in closed.items():
        of_round = rounds[number]
        started, evaluated, done = (max(of_round[kind] or [0.0]) for kind in ("job_started", "evaluated", "job_done"))
        messages.append(started - planned[number] + closing["time"] - done)
        evaluation_s += max(0.0, evaluated - started)
        training_s += done - max(evaluated, started) if of_round["step"] else 0.0
    last = closed[max(closed)]["devices"]
    return {
        "until the ServerApp starts": events[0]["time"] - began,
        "until all nodes have joined": max(event["time"] for event in events if event["event"] == "node_joined")
        - began,
        "first training step": min(rounds[1]["first"]) - began,
        "training": training_s,
        "evaluation": evaluation_s,
        "messages per round": median(messages),
        "after the last round": ended - closed[max(closed)]["time"],
        **{f"{device['name']} perplexity after": device["perplexity"] for device in last if device.get("perplexity")},
    }


def _events(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- single processes


def _processes(checkouts: Sequence[Checkout], times: int, only: Sequence[str] = ()) -> Iterator[Figure]:
    """Yields what imports, `edgelam --help` and the first look at a built-in model take; `only`: of these cases."""
    cases: dict[str, Callable[[Checkout], list[str]]] = {
        "edgelam --help": lambda checkout: checkout.command("--help"),
        "imports of a stage host": lambda checkout: [sys.executable, "-c", checkout.stage_host_imports()],
        "first use of the built-in model": lambda checkout: [sys.executable, "-c", _FIND],
    }
    for name, command in cases.items():
        if only and name not in only:
            continue
        taken: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for _ in range(times):
            for checkout in checkouts:
                taken[checkout.name].append(_timed(command(checkout), checkout))
        for checkout in checkouts:
            cpu_s, wall_s = (median(each[kind] for each in taken[checkout.name]) for kind in (0, 1))
            bar = name == "edgelam --help" and checkout.name == "now"
            yield Figure(f"{name}, {checkout.name}: CPU", round(cpu_s, 2), "s")
            yield Figure(
                f"{name}, {checkout.name}", round(wall_s, 2), "s", "at most 0.3" if bar else None, wall_s <= 0.3 if bar else None
            )  # fmt: skip


def _timed(command: Sequence[str], checkout: Checkout) -> tuple[float, float]:
    """Runs a command with an empty cache folder; returns its CPU seconds and its wall seconds."""
    with tempfile.TemporaryDirectory() as cache:
        cpu_s, began = _children_cpu_s(), time.monotonic()
        subprocess.run(
            command, cwd=checkout.folder, env=checkout.environment(XDG_CACHE_HOME=cache), stdout=subprocess.DEVNULL, check=True
        )  # fmt: skip
        return _children_cpu_s() - cpu_s, time.monotonic() - began


def _idle_nodes(checkouts: Sequence[Checkout]) -> Iterator[Figure]:
    """Yields the memory of a node that has joined a server, has been asked for its profile, and holds no model."""
    for checkout in checkouts:
        with tempfile.TemporaryDirectory() as folder:
            by_process = _idle_node(checkout, Path(folder))
        for name, process in by_process.items():
            yield Figure(f"idle node {checkout.name}: {name}, PSS", round(process.pss / MIB), "MiB")
        pss = sum(process.pss for process in by_process.values()) / MIB
        alone = sum(process.private for process in by_process.values()) + _files_once(list(by_process.values()))
        bar = checkout.name == "now"
        yield Figure(
            f"idle node {checkout.name}: all processes, PSS", round(pss), "MiB",
            "at most 420 MB" if bar else None, pss * MIB <= 420e6 if bar else None,
        )  # fmt: skip
        yield Figure(f"idle node {checkout.name}: alone on a machine", round(alone / MIB), "MiB")


@dataclass(frozen=True)
class Memory:
    """The memory of a process, in bytes."""

    pss: int
    private: int
    files: dict[str, int]
    """Resident bytes of each file that is mapped."""


def _idle_node(checkout: Checkout, folder: Path) -> dict[str, Memory]:
    address = f"127.0.0.1:{free_port(count=2)}"
    with (
        _running(checkout.command("server", "--listen", address, "--insecure", "--state", str(folder / "server")), checkout, folder),
        _running(checkout.command("client", "--server", address, "--insecure", "--wait", "--name", "node", "--state", str(folder / "node")), checkout, folder) as client,
    ):  # fmt: skip
        host, _, port = address.partition(":")
        end = time.monotonic() + 300
        while not answers(host, int(port), 0.5):
            if time.monotonic() > end:
                raise SystemExit("the server does not answer")
            time.sleep(0.2)
        subprocess.run([sys.executable, "-c", _ASK, str(folder / "node")], env=checkout.environment(), check=True)
        time.sleep(5)  # its SuperNode has registered by then
        processes = [client, *client.children(recursive=True)]
        return {_name(process): _memory(process.pid) for process in processes}


@contextmanager
def _running(command: Sequence[str], checkout: Checkout, folder: Path) -> Iterator[psutil.Process]:
    with (folder / "log").open("a") as log:
        process = psutil.Popen(command, cwd=folder, env=checkout.environment(), stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def _name(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    known = {"node.daemon": "stage host", "supernode": "SuperNode", "edgelam_fl.cli": "edgelam client"}
    return next((name for part, name in known.items() if part in command), command.split("/")[-1][:40])


def _memory(pid: int) -> Memory:
    pss = private = resident = 0
    files: dict[str, int] = defaultdict(int)
    place = ""
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            place = values[4] if len(values) > 4 and values[4].startswith("/") else ""
        elif key == "Pss:":
            pss += int(values[0]) * 1024
        elif key == "Rss:":
            resident = int(values[0]) * 1024
        elif key == "Anonymous:":
            private += int(values[0]) * 1024
            if place:
                files[place] += resident - int(values[0]) * 1024
    return Memory(pss, private, files)


def _files_once(processes: Sequence[Memory]) -> int:
    """Returns the bytes of all mapped files, each counted once."""
    largest: dict[str, int] = {}
    for process in processes:
        for place, size in process.files.items():
            largest[place] = max(size, largest.get(place, 0))
    return sum(largest.values())


# ---------------------------------------------------------------- CPU seconds of processes that are nobody's child


@contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Makes this process the parent of its descendants whose parents end: their CPU seconds then count here."""
    subreaper = 36  # PR_SET_CHILD_SUBREAPER
    ctypes.CDLL(None).prctl(subreaper, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).prctl(subreaper, 0)


def _children_cpu_s(but: Collection[psutil.Process] | None = None) -> float:
    """Returns the CPU seconds of all children that have ended; waits for all before, except for `but` if that is given."""
    while but is not None and (left := set(psutil.Process().children()) - set(but)):
        with suppress(ChildProcessError):
            os.waitpid(left.pop().pid, 0)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main("start", measure, add_options)
