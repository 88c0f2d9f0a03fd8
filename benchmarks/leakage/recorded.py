"""Federated runs of the project's own engine in this process, with everything kept that a server gets to see.

Devices hold the whole model (split.hosts = 0), so that adapters are all that leaves them. They compute one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.dishonest import MemoryExchange
from edgelam_fl.config import RunConfig, parse_run_file
from edgelam_fl.flower import from_record
from edgelam_fl.model.adapter import Adapter, initial_adapter
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import ReadTensors, load_stages
from edgelam_fl.model.weights import read_tensors
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.node.play import NodeHooks
from edgelam_fl.node.service import StageHost
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.split.route import memory_dial
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from server.exchange import Arrived, Missing, Request
from server.roster import Roster
from server.rounds import Rounds
from server.run_folder import RunFolder
from server.state import FederationState

SETTINGS = (
    "split.hosts=0", "task.template=plain", "task.max_tokens=80", "data.held_out=0.001", "federation.evaluate_every=100000",
    "federation.join_deadline_s=60", "optimizer.lr=2e-3",
)  # fmt: skip


@dataclass(frozen=True)
class RecordedRound:
    """The adapters of one round."""

    start: Adapter
    trained: Mapping[str, Adapter]  # what each device sent back, by its name
    published: Adapter


class RecordingExchange(MemoryExchange):
    """Hands its job to one device after the other, and keeps the adapter that each sends back."""

    def __init__(self, hosts: Mapping[str, StageHost], examples: Mapping[str, int]) -> None:
        super().__init__(hosts, examples, None)
        self.trained: dict[str, Adapter] = {}

    def replies(self, requests: Iterable[Request], limit_s: float, **options: Any) -> Iterator[Arrived | Missing]:
        for request in requests:
            for answer in super().replies([request], limit_s, **options):
                if isinstance(answer, Arrived) and "adapter-0" in answer.content:
                    self.trained[answer.name] = from_record(answer.content["adapter-0"])
                yield answer


def run_config(source: ModelSource, settings: Sequence[str]) -> RunConfig:
    """Makes the run file's settings: `SETTINGS`, then `settings`."""
    overrides = [f"model.name={source.name}", *SETTINGS, *settings]
    return parse_run_file("", source="benchmarks.leakage", overrides=overrides)


def recorded_rounds(
    source: ModelSource, data: Mapping[str, Path], folder: Path, settings: Sequence[str]
) -> Iterator[RecordedRound]:
    """Plays the rounds of a run of the devices of `data`, in `folder`, and yields each as it ends."""
    config = run_config(source, [f"federation.min_nodes={len(data)}", *settings])
    spec = RunSpec(config, source)
    hosts: dict[str, StageHost] = {}
    hooks = NodeHooks(load=partial(load_stages, read=reads_once()))
    with ExitStack() as stack:
        for name, file in data.items():
            examples = DeviceExamples(file)
            hosts[name] = StageHost(name, memory_dial(hosts), lambda event: None, examples=examples, hooks=hooks)
            stack.callback(hosts[name].stop)
        counts = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in data.items()}
        run = RunFolder(folder, spec)
        exchange = RecordingExchange(hosts, counts)
        roster = Roster(exchange, run, pb.ProfileRequest(protocol_version=PROTOCOL_VERSION))
        noise = np.random.default_rng(config.run.seed)  # of a private run: a measurement has to be repeatable
        rounds = Rounds(spec, exchange, roster, run, folder.name, generator=noise)
        lora = config.lora
        state = FederationState(adapter=initial_adapter(source, lora.targets, lora.rank, config.run.seed))
        while state.round < config.federation.rounds:
            start = state.adapter
            state = rounds.round_after(state)
            yield RecordedRound(start, dict(exchange.trained), state.adapter)


def reads_once() -> ReadTensors:
    """Returns what reads a model's tensors once for all devices of this process; nobody writes to them."""
    known: dict[tuple[str, ...], list[tuple[str, torch.Tensor]]] = {}

    def read(source: ModelSource, names: list[str], base: str, compute: str) -> list[tuple[str, torch.Tensor]]:
        key = (base, compute, *names)
        if key not in known:
            known[key] = list(read_tensors(source, names, base, compute))
        return known[key]

    return read
