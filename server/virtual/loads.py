"""What a device has to move and compute in a round, before it was in one: from the run file and the model's index."""

from __future__ import annotations

from collections import Counter
from functools import cached_property

from edgelam_fl.model.adapter import target_modules
from edgelam_fl.model.base_names import FP32_BYTES
from edgelam_fl.model.index import layer_number
from edgelam_fl.plan.bases import value_bytes
from edgelam_fl.plan.layout import by_name, device_ends
from edgelam_fl.plan.making import own_steps
from edgelam_fl.plan.modes import label_place
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wireless.rounds import Load


class Loads:
    def __init__(self, spec: RunSpec) -> None:
        self.spec, self.config, self.source = spec, spec.config, spec.source
        self._operations: dict[tuple[int, int], float] = {}  # a token, by where a device's layers end and begin again

    def estimate(self, device: pb.Profile) -> Load:
        """From above: every example as long as the longest."""
        federation, max_tokens = self.config.federation, self.config.task.max_tokens
        trained = own_steps(self.config, device.examples) * federation.batch_size
        # Each way a hidden state of every example; of those that are learned its gradient too.
        tensors = 2 * trained + device.held_out if self.config.split.hosts else 0
        data_bytes = tensors * max_tokens * self.source.hidden_size * value_bytes(self.config)
        adapter_bytes = self.adapter_bytes(device.name)
        operations = trained * max_tokens * self.operations_a_token(device.name)
        return Load(adapter_bytes + data_bytes, adapter_bytes, data_bytes, operations)

    def operations_a_token(self, name: str) -> float:
        """Forward and backward through a device's layers and head: two operations a weight, two more where a gradient passes.

        A frozen weight has no gradient of its own, and none passes below the lowest adapter that learns. Attention's own
        products and those of the adapters are left out: a few percent.
        """
        front, back_first = ends = device_ends(self.spec, name)
        if ends not in self._operations:
            held = {layer: n for layer, n in self._weights.items() if self._holds(layer, front, back_first)}
            learning = (layer for layer in self._widths if self._learns(layer, front, back_first))
            lowest = min(learning, default=self.source.num_layers)
            passed = sum(n for layer, n in held.items() if layer >= lowest)
            self._operations[ends] = 2.0 * (sum(held.values()) + passed + 2 * self._head_weights)
        return self._operations[ends]

    def adapter_bytes(self, name: str) -> int:
        """Of what a device trains, a head with it."""
        lora = self.config.lora
        front, back_first = device_ends(self.spec, name)
        widths = sum(
            width
            for layer, width in self._widths.items()
            if self._holds(layer, front, back_first) and self._learns(layer, front, back_first)
        )
        head = self._head_weights if self.config.task.classes and "back" in lora.train else 0
        return FP32_BYTES * (by_name(lora.ranks, name, lora.rank) * widths + head)

    def _holds(self, layer: int, front: int, back_first: int) -> bool:
        return not self.config.split.hosts or not front <= layer < back_first

    def _learns(self, layer: int, front: int, back_first: int) -> bool:
        part = "front" if layer < front else "back" if layer >= back_first else "hosts"
        return part in self.config.lora.train

    @cached_property
    def _weights(self) -> Counter[int]:
        """By layer."""
        weights = Counter[int]()
        for module, (rows, columns) in self.source.linear_modules().items():
            weights[_layer(module)] += rows * columns
        return weights

    @cached_property
    def _widths(self) -> Counter[int]:
        """Of the modules with adapters, both sides together, by layer."""
        widths = Counter[int]()
        for module, (rows, columns) in target_modules(self.source, self.config.lora.targets).items():
            widths[_layer(module)] += rows + columns
        return widths

    @cached_property
    def _head_weights(self) -> int:
        """Of the device's; a host has it where it sees the labels."""
        if not label_place(self.config.split.labels).on_device:
            return 0
        outputs = len(self.config.task.classes) or int(self.source.config["vocab_size"])
        return outputs * self.source.hidden_size


def _layer(module: str) -> int:
    number = layer_number(module)
    assert number is not None, "linear modules are those inside the layers"
    return number
