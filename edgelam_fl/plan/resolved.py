"""Says what a run file comes to with its model: layers, trainable parameters, bytes and memory. Pure functions; knows no node.

Bytes and memory are what the planner would count for nodes like these; they are estimates, and no promise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from edgelam_fl.model.adapter import Span, adapter_shapes
from edgelam_fl.model.base_names import FP32_BYTES
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.value_ends import is_of_module
from edgelam_fl.plan.bases import choose_base
from edgelam_fl.plan.footprint import GROWTH_BYTES, IDLE_BYTES, Footprints
from edgelam_fl.plan.layout import cut_layers
from edgelam_fl.plan.making import own_steps
from edgelam_fl.plan.modes import label_place
from edgelam_fl.plan.spec import RunSpec, tensors_per_round
from edgelam_fl.telemetry.human import human_bytes, human_count, human_number
from edgelam_fl.wire import edgelam_pb2 as pb


@dataclass(frozen=True)
class DataSize:
    """The amount of data that one device learns from and measures with."""

    examples: int
    held_out: int
    tokens_per_example: float


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The numbers that a run file comes to with its model."""

    model: str
    layers: int
    parameters: int
    trained: int
    """Numbers that learn: LoRA factors, and the head of a classification or the modules of values."""
    front: int
    back: int
    hosts: int
    base: str
    up_bytes: float
    """What a device sends in a round to its hosts, as hidden states and gradients."""
    down_bytes: float
    adapter_bytes: int
    """Size of the whole adapter, which goes to and from the server in parts."""
    device_bytes: int
    """Memory of a device's process."""
    host_bytes: int
    """Memory of the process of the host with the most layers; 0: there is none."""
    process_bytes: int
    """What every process of a node takes before it holds anything, most of which the processes of one machine share."""
    is_bound: bool
    """Whether bytes are those of the longest examples, since the data are not known."""
    modules: str = ""
    """What stands in the places of embedding and head, in words; empty: the model's own."""

    def in_words(self) -> Iterator[str]:
        """Yields a sentence on the model, on the bytes of a round and on the memory, without full stops."""
        if not self.layers:
            yield f"{self.model}: a network of {human_number(self.trained)} parameters, whole on each device"
            yield f"trained: all of them, an adapter of {human_bytes(self.adapter_bytes)}"
            yield f"memory: about {human_bytes(self.device_bytes)} at a device"
            return
        middle = self.layers - self.front - self.back
        hosted = f"{self.front} layers in front and {self.back} at the back stay on each device, {middle} on {human_count(self.hosts, 'host')}"
        where = hosted if self.hosts else "each device computes all of them"
        share = 100 * self.trained / self.parameters
        yield f"{self.model}: {self.layers} layers ({where}), {human_number(self.parameters)} parameters in {self.base}"
        yield f"trained: {human_number(self.trained)} of them ({share:.2g} %), an adapter of {human_bytes(self.adapter_bytes)}"
        if self.modules:
            yield self.modules
        if self.hosts:
            most = "at most " if self.is_bound else "about "
            yield (
                f"per round and device: {most}{human_bytes(self.up_bytes)} to its host and {human_bytes(self.down_bytes)} back, and the "
                f"adapter both ways"
            )
        host = f", about {human_bytes(self.host_bytes)} at a host" if self.hosts else ""
        yield f"memory: about {human_bytes(self.device_bytes)} at a device{host}"


def resolve(spec: RunSpec, devices: int = 1, data: DataSize | None = None) -> Resolved:
    """Returns what a run comes to. devices: how many a host computes for. data: of the largest device; None: not known."""
    config, source, footprints = spec.config, spec.source, Footprints(spec)
    split, layers = config.split, source.num_layers
    on_device = label_place(split.labels).on_device
    back_first = layers - (split.back if on_device else 0)
    spans = _own_spans(split.front, back_first, layers, on_device, bool(split.hosts))
    pair = "/".join(choose_base(spec, pb.Profile(), spans))
    trained = _trained(spec, back_first)
    examples = data.examples if data else config.step_examples
    learned = own_steps(config, examples) * config.step_examples
    held_out = data.held_out if data else 0
    tokens = data.tokens_per_example if data else float(config.task.max_tokens)
    up, down = tensors_per_round(spec, learned, held_out)
    example_bytes = tokens * spec.token_bytes
    process = IDLE_BYTES + GROWTH_BYTES
    return Resolved(
        model=source.name, layers=layers, parameters=_parameters(spec), modules=_modules(spec),
        trained=trained, front=split.front, back=layers - back_first, hosts=split.least_hosts, base=pair.partition("/")[0],
        up_bytes=up * example_bytes, down_bytes=down * example_bytes, adapter_bytes=FP32_BYTES * trained,
        device_bytes=footprints.of_device("", spans, pair, config.pieces.window) + process,
        host_bytes=_host_bytes(spec, footprints, pair, devices, back_first) + process if split.hosts else 0,
        process_bytes=process, is_bound=data is None,
    )  # fmt: skip


def _parameters(spec: RunSpec) -> int:
    """Counts the numbers of the model as the task has it: with the modules of values in the places of embedding and head."""
    ends = spec.source.names_of_tokens if spec.values else ()
    kept = (entry for name, entry in spec.source.index.items() if name not in ends)
    return sum(math.prod(entry.shape) for entry in kept) + spec.value_weights


def _modules(spec: RunSpec) -> str:
    """Says what stands in the places of embedding and head, and whose it is; empty for a task of texts."""
    if spec.values is None:
        return ""
    shapes, said = spec.values.shapes(spec.source.hidden_size), list[str]()
    for module in ("input", "output"):
        count = sum(math.prod(shape) for name, shape in shapes.items() if is_of_module(name, [module]))
        whose = "kept by each device" if module in spec.config.task.private_modules else "averaged over devices"
        said.append(f"an {module} module of {count:,} numbers, {whose}")
    return f"in the places of embedding and head, on each device: {', and '.join(said)}"


def _own_spans(front: int, back_first: int, layers: int, on_device: bool, is_split: bool) -> list[Span]:
    """Returns what a device holds."""
    if not is_split:
        return [Span(0, layers, embed=True, head=True)]
    return [Span(0, front, embed=True), *([Span(back_first, layers, head=True)] if on_device else [])]


def _host_bytes(spec: RunSpec, footprints: Footprints, pair: str, devices: int, back_first: int) -> int:
    """Returns the memory of the slice of the host with the most layers, with full windows of its devices."""
    split = spec.config.split
    borders = cut_layers(spec.config, split.front, back_first)
    first, last = max(pairwise(borders), key=lambda ends: ends[1] - ends[0])
    of_site = -(-devices // split.sites)
    found = footprints.of_host(pair, of_site, spec.config.pieces.window)
    units = of_site * (found.unit_bytes + (last - first) * found.unit_layer_bytes)
    return sum(found.layer_bytes[first:last]) + found.head_bytes + units


def _trained(spec: RunSpec, back_first: int) -> int:
    """Counts the numbers that learn: of the adapter in the places of lora.train, of a cut adapter, and of the task's own modules."""
    config, hidden = spec.config, spec.source.hidden_size

    def learns(layer: int | None) -> bool:
        if layer is None or layer >= back_first:
            return "back" in config.lora.train
        return ("front" if layer < config.split.front else "hosts") in config.lora.train

    shapes = adapter_shapes(spec.source, config.lora.targets, config.lora.rank, spec.kind)
    found = sum(math.prod(shape) for name, shape in shapes.items() if learns(layer_number(name)))
    found += spec.value_weights if learns(None) else 0
    return found + len(config.task.classes) * (hidden + 1) + (spec.cut.rank * hidden if spec.cut else 0)
