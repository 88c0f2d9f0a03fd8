"""Estimates what a device has to move and compute per round, from the run file and the model's index alone."""

from __future__ import annotations

import math
from collections import Counter
from functools import cached_property

from edgelam_fl.model.adapter import adapter_shapes
from edgelam_fl.model.base_names import FP32_BYTES
from edgelam_fl.model.index import layer_number
from edgelam_fl.plan.layout import by_name, device_ends
from edgelam_fl.plan.making import own_steps
from edgelam_fl.plan.modes import label_place
from edgelam_fl.plan.spec import RunSpec, tensors_per_round
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wireless.rounds import Load


class Loads:
    def __init__(self, spec: RunSpec) -> None:
        self.spec, self.config, self.source = spec, spec.config, spec.source
        self._operations: dict[tuple[int, int], float] = {}  # per token, by (front, back_first)

    def estimate(self, device: pb.Profile) -> Load:
        """Returns an upper bound: every example counts as long as the longest allowed."""
        max_tokens = self.config.task.max_tokens
        trained = own_steps(self.config, device.examples) * self.config.step_examples
        tensor_bytes = max_tokens * self.spec.token_bytes
        up, down = tensors_per_round(self.spec, trained, device.held_out)
        adapter_bytes = self.adapter_bytes(device.name)
        operations = trained * max_tokens * self.operations_per_token(device.name)
        return Load(adapter_bytes + up * tensor_bytes, adapter_bytes, down * tensor_bytes, operations)

    def operations_per_token(self, name: str) -> float:
        """Returns operations per token, forward and backward through a device's layers and head: two per weight, and two
        more per weight that a gradient passes.

        A frozen weight has no gradient of its own, and none passes below the lowest adapter that learns. Attention's own
        products and those of the adapters are left out: a few percent.
        """
        front, back_first = ends = device_ends(self.spec, name)
        if ends not in self._operations:
            held = {layer: n for layer, n in self._weights.items() if self._holds(layer, front, back_first)}
            learning = (
                layer for layer in self._adapters if layer is not None and self._learns(layer, front, back_first)
            )
            lowest = min(learning, default=self.source.num_layers)
            if self.spec.cut:  # its gradient passes the whole back
                lowest = min(lowest, back_first)
            passed = sum(n for layer, n in held.items() if layer >= lowest)
            self._operations[ends] = 2.0 * (sum(held.values()) + passed + 2 * self._head_weights)
        return self._operations[ends]

    def adapter_bytes(self, name: str) -> int:
        """Returns the bytes of the tensors that a device trains, with its head."""
        lora = self.config.lora
        front, back_first = device_ends(self.spec, name)
        weights = sum(
            count
            for layer, count in self._adapters.items()
            if layer is not None and self._holds(layer, front, back_first) and self._learns(layer, front, back_first)
        )
        head = (self._head_weights if self.config.task.classes else 0) + self._adapters[None]
        head *= "back" in lora.train and label_place(self.config.split.labels).on_device
        return FP32_BYTES * (by_name(lora.ranks, name, lora.rank) * weights // lora.rank + head)

    def _holds(self, layer: int, front: int, back_first: int) -> bool:
        return not self.config.split.hosts or not front <= layer < back_first

    def _learns(self, layer: int, front: int, back_first: int) -> bool:
        part = "front" if layer < front else "back" if layer >= back_first else "hosts"
        return part in self.config.lora.train

    @cached_property
    def _weights(self) -> Counter[int]:
        """Number of weights per layer that a position passes."""
        layers = range(self.source.num_layers)
        return Counter({layer: sum(map(math.prod, self.source.used_matrices(layer))) for layer in layers})

    @cached_property
    def _adapters(self) -> Counter[int | None]:
        """Number of adapter weights per layer, and outside the layers (None), but for a task head; with the run's rank."""
        lora, found = self.config.lora, Counter[int | None]()
        for name, shape in adapter_shapes(self.source, lora.targets, lora.rank, self.spec.kind).items():
            found[layer_number(name)] += math.prod(shape)
        found[None] += self.spec.value_weights
        return found

    @cached_property
    def _head_weights(self) -> int:
        """Number of weights of the head on the device; 0 if the last host has the head."""
        if not label_place(self.config.split.labels).on_device:
            return 0
        return self.spec.outputs * self.source.hidden_size
