"""Measures the bytes on the wire and on disk that a node without the model needs for a slice of 13 layers, in every base.

A hub and a stage host with an empty cache and no model run as processes; a proxy between them counts every byte of TCP's
payload both ways. A second transfer is interrupted twice at random points: first its connection breaks, then the stage host
is killed. --smoke: only int8.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from benchmarks.common import Figure, main
from edgelam_fl.addresses import free_port
from edgelam_fl.config import parse_run_file
from edgelam_fl.federation.child import Child, end_all
from edgelam_fl.federation.hub_process import HubProcess
from edgelam_fl.hub.slices import offered
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.adapter import Span, initial_adapter
from edgelam_fl.model.base_names import BASES
from edgelam_fl.model.memory import weights_bytes
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.plan.layout import make_layout
from edgelam_fl.plan.making import RoundFacts, make_plans
from edgelam_fl.plan.reading import spans_of
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.telemetry.events import Event, EventTail, JobDone, JobStarted, SliceReceived
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.control import ControlClient
from tests.integration.proxy import Proxy

FIRST, LAYERS, OVER, SEED = 2, 13, 0.05, 1
MB = 1e6
DEADLINE_S = 900.0
_Kind = TypeVar("_Kind", bound=Event)


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    source, figures = find_model("smollm2-135m"), list[Figure]()
    with tempfile.TemporaryDirectory() as folder:
        hub = HubProcess("127.0.0.1", free_port(), Path(folder) / "hub")
        try:
            hub.start()
            with offered(source, hub.state) as token:
                for base in ("int8",) if smoke else BASES:
                    figures += _whole(source, hub, token, base, Path(folder) / base)
                figures += _interrupted(source, hub, token, "int8", Path(folder) / "interrupted")
        finally:
            end_all([hub.child] if hub.child else [])
    settings = {"model": "smollm2-135m", "layers": [FIRST, FIRST + LAYERS], "seed": SEED}
    return settings, figures


def _whole(source: ModelSource, hub: HubProcess, token: bytes, base: str, folder: Path) -> list[Figure]:
    size = weights_bytes(source, [Span(FIRST, FIRST + LAYERS)], base)
    proxy = Counting(f"127.0.0.1:{hub.port}")
    node = Node(source, base, token, proxy, folder)
    try:
        event = node.until(SliceReceived)
        node.until(JobStarted)
    finally:
        node.end()
        proxy.close()
    kept = on_disk(folder / "cache")
    name = f"{base}, {LAYERS} layers: "
    return [
        Figure(f"{name}the slice's own size", _mb(size), "MB"),
        _bar(f"{name}on the wire", proxy.passed, size),
        _bar(f"{name}on disk", kept, size),
        Figure(f"{name}seconds, the server's first conversion not among them", event.seconds, "s"),
    ]


def _interrupted(source: ModelSource, hub: HubProcess, token: bytes, base: str, folder: Path) -> list[Figure]:
    """Measures a transfer whose connection breaks at a random byte and whose stage host is killed later and restarted."""
    rng = random.Random(SEED)
    size = weights_bytes(source, [Span(FIRST, FIRST + LAYERS)], base)
    cut, kill = sorted(rng.uniform(0.1, 0.9) * size for _ in range(2))
    proxy = Counting(f"127.0.0.1:{hub.port}", cut, kill)
    node = Node(source, base, token, proxy, folder)
    try:
        _wait(proxy.holds.is_set, "the transfer's second interruption")
        at_kill = proxy.passed
        node.end(kill=True)
        proxy.go_on.set()
        node = Node(source, base, token, proxy, folder)
        event = node.until(SliceReceived)
    finally:
        node.end()
        proxy.close()
    name = f"{base}, {LAYERS} layers, interrupted: "
    after = proxy.passed - at_kill
    return [
        Figure(f"{name}bytes when the connection was cut", _mb(cut), "MB"),
        Figure(f"{name}bytes when the stage host was killed", _mb(at_kill), "MB"),
        Figure(f"{name}bytes after its restart", _mb(after), "MB"),
        Figure(f"{name}of the slice, what it still asked for", _mb(event.bytes), "MB"),
        _bar(f"{name}on the wire, all in all", proxy.passed, size),
    ]


# ---------------------------------------------------------------- the two ends


class Counting(Proxy):
    """A proxy that counts bytes, breaks the connection after `cut` bytes and pauses after `hold` until `go_on` is set."""

    def __init__(self, target: str, cut: float = 0.0, hold: float = 0.0) -> None:
        self.passed, self._cut, self._hold = 0, cut, hold
        self.holds, self.go_on = threading.Event(), threading.Event()
        super().__init__(target)

    def _watch(self) -> tuple[Callable[[bytes], object], Callable[[bytes], object]]:
        return self._count, self._count

    def _count(self, data: bytes) -> None:
        self.passed += len(data)
        if self._cut and self.passed > self._cut:
            self._cut = 0.0
            raise OSError("cut")
        if self._hold and self.passed > self._hold:
            self._hold = 0.0
            self.holds.set()
            self.go_on.wait(DEADLINE_S)


class Node:
    """A stage host that has no model and gets a plan to host the slice; the round itself never begins."""

    def __init__(self, source: ModelSource, base: str, token: bytes, proxy: Proxy, folder: Path) -> None:
        state = folder / "state"
        (state / "endpoint.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "edgelam_fl.node.daemon", "--name", "edge-1", "--state", str(state)]
        command += ["--threads", "1", "--server", "127.0.0.1:1"]
        home = {"HOME": str(folder / "home"), "EDGELAM_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        with patch.dict(os.environ, home):  # which a forked process takes over
            self._child = Child("edge-1's stage host", command, state / "stage-host.log", forked=True)
        plan, tensors = _plan(source, base, token, int(proxy.address.rpartition(":")[2]))
        self._tail = EventTail(state / "events.jsonl")
        self._tail.poll()
        client = ControlClient(state, DEADLINE_S)
        answer = client.call("Submit", pb.SubmitRequest(plan=plan, adapter=tensors), 60.0)
        client.close()
        if not answer.accepted:
            raise SystemExit(answer.reason)

    def until(self, kind: type[_Kind]) -> _Kind:
        """Waits for the next event of a kind and returns it; ends the benchmark if the job fails first."""
        found: list[_Kind] = []

        def came() -> bool:
            for each in self._tail.poll():
                if isinstance(each, JobDone):
                    raise SystemExit(f"the stage host gave up: {each.error}")
                if isinstance(each, kind):
                    found.append(each)
                    return True
            return False

        _wait(came, kind.__name__)
        return found[0]

    def end(self, kill: bool = False) -> None:
        if not kill:
            self._child.ask_to_end()
        self._child.make_end(0.0 if kill else 5.0)


def _plan(source: ModelSource, base: str, token: bytes, port: int) -> tuple[pb.Plan, bytes]:
    """Makes the plan and adapter of a host of the slice as the server does, with a model name that no node knows."""
    back = source.num_layers - FIRST - LAYERS
    overrides = ["model.name=smollm2-135m", f"model.base={base}", f"split.front={FIRST}", f"split.back={back}"]
    config = parse_run_file("", source="the benchmark", overrides=overrides)
    device, edge = pb.Profile(name="device-1", role=pb.DEVICE), pb.Profile(name="edge-1", role=pb.EDGE, address="x:1")
    layout = make_layout(RunSpec(config, source), [device], [edge])
    facts = RoundFacts(f"slices-{time.time_ns():x}", 1, 1, 0, 1, hub_port=port, slices_token=token)
    profiles = {"device-1": device, "edge-1": edge}
    plan = make_plans(RunSpec(config, source), facts, profiles, layout, {}, {"device-1": bytes(16)})["edge-1"]
    plan.model.name = "elsewhere/smollm2"
    start = initial_adapter(source, config.lora.targets, config.lora.rank, 1)
    tensors = adapters.slice_of(start, spans_of(plan))
    plan.adapter_digest = adapters.digest(tensors)
    return plan, adapters.to_bytes(tensors)


def on_disk(folder: Path) -> int:
    """Returns the bytes that a folder's files take on disk, in whole blocks."""
    return sum(512 * file.stat().st_blocks for file in folder.rglob("*") if file.is_file())


def _wait(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not done():
        if time.monotonic() > end:
            raise SystemExit(f"waited {DEADLINE_S:.0f} s for {what}")
        time.sleep(0.005)


def _bar(name: str, value: int, size: int) -> Figure:
    bar = f"at most {_mb((1 + OVER) * size)} MB: the slice's own size and {OVER:.0%}"
    return Figure(name, _mb(value), "MB", bar, value <= (1 + OVER) * size)


def _mb(size: float) -> float:
    return round(size / MB, 3)


if __name__ == "__main__":
    main("slices", measure)
