"""The fabric: all nodes of a simulated federation in one process, each a stage host with its own data and adapter.

The nodes share the frozen tensors of a base, the tokens of a text, the output of frozen lower layers for a text, and the
cores. Links are queues inside the process, with the frames, windows and byte counts of links between machines. Knows no
Flower: a ClientApp calls a node by its federation and number, as it would call a stage host of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.activation_cache import Activations
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.chip import CPU
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import LoraSettings, Stage, load_stages
from edgelam_fl.model.value_ends import ValueModel
from edgelam_fl.model.weights import read_tensors
from edgelam_fl.node.examples import DeviceExamples, ReadPairs, task_of
from edgelam_fl.node.held import Held
from edgelam_fl.node.part import Part
from edgelam_fl.node.play import NodeHooks
from edgelam_fl.node.service import StageHost
from edgelam_fl.simulation.attacks import ATTACKS
from edgelam_fl.simulation.frozen import OnFrozen, frozen_layers, whole_model
from edgelam_fl.simulation.nodes_file import SimulatedNode, read_federation
from edgelam_fl.split.route import memory_dial
from edgelam_fl.tasks.base import Made, Task
from edgelam_fl.tasks.data import DevicePairs, Pair
from edgelam_fl.tasks.kinds import device_data
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.control import FABRIC_SEPARATOR, Handlers

_FEDERATIONS_KEPT = 4


@dataclass
class Shared:
    """What all nodes of a fabric share: cores, and results that do not depend on the node."""

    seats: threading.Semaphore  # how many nodes may compute at a time, of those that wait for no other node
    _tensors: dict[tuple[str, str, str], dict[str, torch.Tensor]] = field(default_factory=dict)
    _activations: dict[tuple[str, str, str, int], Activations] = field(default_factory=dict)
    _tasks: dict[bytes, tuple[Task, dict[Pair, Made]]] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def seat(self, plan: pb.Plan) -> AbstractContextManager[object]:
        """Returns a seat to take for a node's part; nothing to take for a part that waits for other nodes."""
        waits_for_others = plan.serves or any(route.hops for route in plan.routes)
        return nullcontext() if waits_for_others else self.seats

    def load(
        self,
        source: ModelSource,
        spans: list[Span],
        base: str,
        lora: LoraSettings,
        *,
        compute: str,
        classes: int,
        values: ValueModel | None = None,
        chip: torch.device = CPU,
    ) -> list[Stage]:
        """Loads as `load_stages`; of a whole model only the layers from the lowest one that learns (`OnFrozen`).

        With the model's own dropout, or above what learns in the place of an embedding, frozen layers give something else in every
        step, so nothing of them can be kept. `chip`: the CPU, as all nodes of a simulation compute there.
        """
        assert chip == CPU

        def loaded(spans: list[Span]) -> list[Stage]:
            return load_stages(
                source, spans, base, lora, compute=compute, classes=classes, values=values, read=self._read
            )

        with self._lock:
            first = 0 if values is not None or lora.own_dropout else frozen_layers(source, lora)
            if not (first and len(spans) == 1 and whole_model(spans[0], source)):
                return loaded(spans)
            key = (source.weights_digest, base, compute, first)
            if key not in self._activations:
                (below,) = loaded([Span(0, first, embed=True)])
                self._activations[key] = Activations(below)
            (top,) = loaded([Span(first, source.num_layers, head=True)])
            return [OnFrozen(top, lora.dropout, self._activations[key])]

    def _read(
        self, source: ModelSource, names: list[str], base: str, compute: str
    ) -> Iterable[tuple[str, torch.Tensor]]:
        known = self._tensors.setdefault((source.weights_digest, base, compute), {})
        known.update(read_tensors(source, [name for name in names if name not in known], base, compute))
        return known.items()

    def examples(self, task: Task, purpose: bytes, pairs: list[Pair]) -> Made:
        """Turns pairs into examples; tokenizes a pair once for the same settings and model, whatever nodes have it."""
        with self._lock:
            task, known = self._tasks.setdefault(purpose, (task, {}))
            for pair in pairs:
                if pair not in known:
                    known[pair] = task.examples([pair])
            made = [known[pair] for pair in pairs]
        examples = [example for one in made for example in one.examples]
        return Made(
            examples, sum(one.cut for one in made), sum(one.skipped for one in made), sum(one.refused for one in made)
        )


def _make_node(folder: Path, facts: SimulatedNode, others: Mapping[str, StageHost], shared: Shared) -> StageHost:
    """Makes a stage host that shares a process with `others`."""
    examples = None
    if facts.data:
        held_out = [folder / facts.held_out] if facts.held_out else []
        read = _reader(held_out[0]) if held_out else device_data
        examples = DeviceExamples(folder / facts.data, read, shared.examples, held_out)
    hooks = NodeHooks(
        load=shared.load,
        around_part=shared.seat,
        around_play=lambda part, held: _around_play(part, held, examples, facts.attack),
    )
    return StageHost(
        facts.name, memory_dial(others), lambda event: None, examples=examples, address=f"{facts.name}:1", hooks=hooks
    )


@contextmanager
def _around_play(part: Part, held: Held, examples: DeviceExamples | None, attack: str) -> Iterator[None]:
    """Fills the cache of frozen layers before a part is played, and replaces an attacker's contributions after it."""
    plan = part.plan
    if examples is not None and held.ends and isinstance(held.ends[0], OnFrozen):
        loaded = examples.load(task_of(plan, held.source.folder), plan.task, held.source.digest)
        held.ends[0].activations.warm(example.ids for example in loaded.training + loaded.held_out)
    start = held.known() if attack else {}
    yield
    if attack:
        for number, contribution in enumerate(part.report.contributions):
            trained = adapters.from_bytes(contribution.adapter)
            sent = ATTACKS[attack](start, trained, f"{plan.seed}/{plan.node}/{plan.round}/{number}")
            contribution.adapter = adapters.to_bytes(sent)


class Fabric:
    """The nodes of the newest federations, made when they are first asked for."""

    def __init__(self, seats: int) -> None:
        """`seats`: how many nodes may compute at a time."""
        self._shared = Shared(threading.Semaphore(seats))
        self._federations: dict[str, list[Handlers]] = {}
        self._lock = threading.Lock()

    def node(self, name: str) -> Handlers:
        """Returns the handlers of node `FOLDER::NUMBER`; a number beyond the federation's nodes gets a spare one's."""
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
        nodes[facts.name] = _make_node(folder, facts, nodes, shared)
    return [{"GetProfile": node.profile, "Submit": node.submit, "Wait": node.wait} for node in nodes.values()]


def _spare_profile(request: pb.ProfileRequest) -> pb.Profile:
    return pb.Profile(protocol_version=PROTOCOL_VERSION, name="spare", problem="has no part in this federation")


def _reader(held_out: Path) -> ReadPairs:
    """Returns a reader that takes the held-out examples from a file of their own; from an empty file, none."""

    def read(path: Path, settings: pb.TaskSettings) -> DevicePairs:
        if held_out.stat().st_size:
            return device_data(path, settings, held_out)
        none = pb.TaskSettings()  # fewer examples to measure than devices
        none.CopyFrom(settings)
        none.held_out = 0.0
        return device_data(path, none)

    return read
