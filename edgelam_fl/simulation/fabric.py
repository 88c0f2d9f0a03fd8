"""The fabric: all nodes of a simulated federation in one process, each a stage host with its own data and adapter.

What they share: the frozen tensors of a base, the tokens of a text, what frozen lower layers make of it, and the cores.
Links are queues inside the process, with the frames, windows and byte counts of those between machines. Knows no Flower:
a ClientApp calls a node by its federation and number, as it would call a stage host of its own.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from edgelam_fl.errors import DataError
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.activation_cache import Activations
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import LoraSettings, Stage, load_stages
from edgelam_fl.model.weights import read_tensors
from edgelam_fl.node.examples import task_of
from edgelam_fl.node.held import Held
from edgelam_fl.node.service import Part, StageHost
from edgelam_fl.simulation.attacks import ATTACKS
from edgelam_fl.simulation.frozen import OnFrozen, frozen_layers, whole_model
from edgelam_fl.split.route import memory_dial
from edgelam_fl.tasks.base import Example, Task
from edgelam_fl.tasks.data import Pair, device_pairs, read_pairs
from edgelam_fl.telemetry.events import EmitInJob
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.control import FABRIC_SEPARATOR, Handlers

_FEDERATIONS_KEPT = 4


@dataclass(frozen=True, kw_only=True)
class SimulatedNode:
    """A node as a federation's file has it. Paths are relative to that file."""

    name: str
    data: str = ""  # a device's examples; '': an edge server
    held_out: str = ""  # what it measures on, apart from its data; '': a share of them (data.held_out)
    attack: str = ""  # what it does to its updates (edgelam_fl.simulation.attacks); '': nothing


def write_federation(folder: Path, nodes: Iterable[SimulatedNode]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"nodes": [vars(node) for node in nodes]}, indent=1)
    (folder / "federation.json").write_text(text + "\n", encoding="utf-8")


def read_federation(folder: Path) -> list[SimulatedNode]:
    try:
        entries = json.loads((folder / "federation.json").read_text(encoding="utf-8"))["nodes"]
        return [SimulatedNode(**entry) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'federation.json'} does not describe a federation: {error}") from error


@dataclass
class Shared:
    """What the nodes have in common."""

    seats: threading.Semaphore  # who may compute at a time, of those that wait for nobody
    _tensors: dict[tuple[str, str, str], dict[str, torch.Tensor]] = field(default_factory=dict)
    _activations: dict[tuple[str, str, str, int], Activations] = field(default_factory=dict)
    _tasks: dict[bytes, tuple[Task, dict[Pair, list[Example]]]] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def load(
        self, source: ModelSource, spans: list[Span], base: str, lora: LoraSettings, *, compute: str, classes: int
    ) -> list[Stage]:
        """As load_stages; where a whole model is asked for, only the layers from the lowest one that learns."""
        with self._lock:
            first = frozen_layers(source, lora)
            if not (first and len(spans) == 1 and whole_model(spans[0], source)):
                return self._load(source, spans, base, lora, compute, classes)
            key = (source.digest, base, compute, first)
            if key not in self._activations:
                (below,) = self._load(source, [Span(0, first, embed=True)], base, lora, compute, classes)
                self._activations[key] = Activations(below)
            (top,) = self._load(source, [Span(first, source.num_layers, head=True)], base, lora, compute, classes)
            return [OnFrozen(top, lora.dropout, self._activations[key])]

    def _load(
        self, source: ModelSource, spans: list[Span], base: str, lora: LoraSettings, compute: str, classes: int
    ) -> list[Stage]:
        return load_stages(source, spans, base, lora, compute=compute, classes=classes, read=self._read)

    def _read(
        self, source: ModelSource, names: list[str], base: str, compute: str
    ) -> Iterable[tuple[str, torch.Tensor]]:
        known = self._tensors.setdefault((source.digest, base, compute), {})
        known.update(read_tensors(source, [name for name in names if name not in known], base, compute))
        return known.items()

    def examples(self, task: Task, settings: pb.TaskSettings, pairs: list[Pair]) -> list[Example]:
        """Each pair is tokenized once for the same settings, whoever has it."""
        with self._lock:
            key = settings.SerializeToString(deterministic=True)
            task, known = self._tasks.setdefault(key, (task, {}))
            for pair in pairs:
                if pair not in known:
                    known[pair] = _one(task, pair)
            return [example for pair in pairs for example in known[pair]]


def _one(task: Task, pair: Pair) -> list[Example]:
    """Nothing where task.max_tokens leaves no room for its answer."""
    try:
        return task.examples([pair])
    except DataError:
        return []


class VirtualNode(StageHost):
    """A stage host that shares a process with others."""

    def __init__(self, folder: Path, facts: SimulatedNode, others: Mapping[str, StageHost], shared: Shared) -> None:
        super().__init__(
            facts.name, memory_dial(others), lambda *_, **__: None,
            data=folder / facts.data if facts.data else None, address=facts.name,
            read=_reader(folder / facts.held_out if facts.held_out else None), load=shared.load,
        )  # fmt: skip
        self._shared = shared
        self._attack = ATTACKS[facts.attack] if facts.attack else None
        self._started_from: adapters.Adapter = {}

    def _load_examples(self, plan: pb.Plan, task: Task) -> tuple[list[Example], list[Example]]:
        assert self._data is not None
        key = plan.task.SerializeToString(deterministic=True)
        if self._examples is None or self._examples[0] != key:
            training, held_out = self._read(self._data, plan.task)
            self._examples = key, (
                self._shared.examples(task, plan.task, training), self._shared.examples(task, plan.task, held_out),
            )  # fmt: skip
        return self._examples[1]

    def _run_part(self, part: Part, request: pb.SubmitRequest, emit: EmitInJob) -> None:
        plan = part.plan
        waits_for_others = plan.serves or any(route.hops for route in plan.routes)
        with contextlib.nullcontext() if waits_for_others else self._shared.seats:
            super()._run_part(part, request, emit)
        if self._attack is not None:
            for number, contribution in enumerate(part.report.contributions):
                trained = adapters.from_bytes(contribution.adapter)
                start = {name: self._started_from[name] for name in trained}
                sent = self._attack(start, trained, f"{plan.seed}/{plan.node}/{plan.round}/{number}")
                contribution.adapter = adapters.to_bytes(sent)

    def _drive(self, part: Part, held: Held, emit: EmitInJob) -> None:
        self._started_from = held.ends_trainee.adapter()
        if isinstance(held.ends[0], OnFrozen):
            training, held_out = self._load_examples(part.plan, task_of(part.plan, held.source.folder))
            held.ends[0].activations.warm(example.ids for example in training + held_out)
        super()._drive(part, held, emit)


class Fabric:
    """The newest federations' nodes, made when first asked for."""

    def __init__(self, seats: int) -> None:
        self._shared = Shared(threading.Semaphore(seats))
        self._federations: dict[str, list[Handlers]] = {}
        self._lock = threading.Lock()

    def node(self, name: str) -> Handlers:
        """The handlers of node `FOLDER::NUMBER`."""
        folder, _, number = name.partition(FABRIC_SEPARATOR)
        with self._lock:
            if folder not in self._federations:
                self._federations[folder] = _make_nodes(Path(folder), self._shared)
                while len(self._federations) > _FEDERATIONS_KEPT:
                    self._federations.pop(next(iter(self._federations)))
            nodes = self._federations[folder]
        return nodes[int(number)] if int(number) < len(nodes) else {"GetProfile": _spare_profile}


def _make_nodes(folder: Path, shared: Shared) -> list[Handlers]:
    nodes: dict[str, StageHost] = {}
    for facts in read_federation(folder):
        nodes[facts.name] = VirtualNode(folder, facts, nodes, shared)
    return [{"GetProfile": node.profile, "Submit": node.submit, "Wait": node.wait} for node in nodes.values()]


def _spare_profile(request: pb.ProfileRequest) -> pb.Profile:
    return pb.Profile(protocol_version=PROTOCOL_VERSION, problem="has no part in this federation")


def _reader(held_out: Path | None) -> Callable[[Path, Any], tuple[list[Pair], list[Pair]]]:
    def read(path: Path, settings: Any) -> tuple[list[Pair], list[Pair]]:
        if held_out is None:
            return device_pairs(path, settings)
        fields = settings.prompt_field, settings.answer_field, settings.classes
        return read_pairs(path, *fields), read_pairs(held_out, *fields)

    return read
