"""Memory that slices of a run's model take: weights, adapters, and what units in flight keep for their backward pass.

Computed from the run file and the model's index alone; knows no node and no chain. Whether a slice fits a node:
`chain_memory`. Memory is always counted for the longest examples that the run file allows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property

from edgelam_fl.model.adapter import Span, adapter_shapes
from edgelam_fl.model.base_names import DTYPES, FP32_BYTES, ITEM_BYTES
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.memory import DoraBytes, unit_bytes, weights_bytes
from edgelam_fl.plan.bases import split_pair
from edgelam_fl.plan.facts import Footprint
from edgelam_fl.plan.layout import by_name
from edgelam_fl.plan.modes import label_place
from edgelam_fl.plan.spec import RunSpec

LEARNING_BYTES = 16  # per adapter weight and device, in fp32: its gradient, two moments, and the device's accumulator
IDLE_BYTES = 435 << 20  # resident memory of an empty stage host that did not report its own; x86, torch 2.13
GROWTH_BYTES = 40 << 20  # code and buffers that come with a process's first slice; measured by benchmarks.memory


class Footprints:
    """Memory of slices of one run's model. Remembers the weights of each layer, as it is asked for them often."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec, self._kind = spec, spec.kind
        self._layer_weights: dict[str, list[int]] = {}

    def of_host(self, pair: str, devices: int, window: int) -> Footprint:
        """Returns the footprint of a host's layers in a pair, with `window` units in flight of each of its devices."""
        one, two = (self._unit(pair, layers) for layers in (1, 2))
        head_bytes = 0
        if not label_place(self.spec.config.split.labels).on_device:
            end = self.spec.source.num_layers
            head_bytes = self._weights([Span(end, end, head=True)], pair)
            head_bytes += self._unit(pair, 0, head=True) - self._unit(pair, 0)  # one unit at a time
            head_bytes += (FP32_BYTES + LEARNING_BYTES * devices) * self._weights_by_place[None]
        layer_bytes = tuple(
            weights + (FP32_BYTES + LEARNING_BYTES * devices) * self.adapter_weights.get(layer, 0)
            for layer, weights in enumerate(self._weights_by_layer(pair))
        )
        return Footprint(layer_bytes, window * (2 * one - two), window * (two - one), head_bytes)

    def of_device(self, name: str, spans: Sequence[Span], pair: str, window: int) -> int:
        """Returns the bytes of a device's own spans and their units.

        The front layers keep all units in flight, the back layers one: they are through with it before the next arrives.
        """
        lora = self.spec.config.lora
        rank = by_name(lora.ranks, name, lora.rank) / lora.rank
        layers = (layer for span in spans for layer in range(span.first, span.last))
        adapters = sum(self.adapter_weights.get(layer, 0) for layer in layers)
        whole = self._weights_by_place[None] if any(span.head for span in spans) else 0
        units = window * self._unit(pair, spans[0].last)
        if spans[0].head:  # the whole model
            units += self._unit(pair, 0, head=True) - self._unit(pair, 0)
        units += sum(self._unit(pair, span.last - span.first, head=True) for span in spans[1:])
        frozen = self.spec.cut.rank * self.spec.source.hidden_size if self.spec.cut else 0  # B of a cut adapter
        learning = round((FP32_BYTES + LEARNING_BYTES) * (rank * adapters + whole))
        return self._weights(spans, pair) + learning + FP32_BYTES * frozen + units

    def _weights_by_layer(self, pair: str) -> list[int]:
        if pair not in self._layer_weights:
            layers = range(self.spec.source.num_layers)
            self._layer_weights[pair] = [self._weights([Span(layer, layer + 1)], pair) for layer in layers]
        return self._layer_weights[pair]

    def _weights(self, spans: Sequence[Span], pair: str) -> int:
        base, compute = split_pair(pair)
        return weights_bytes(self.spec.source, spans, base, DTYPES[compute], tokens=self.spec.values is None)

    @cached_property
    def adapter_weights(self) -> dict[int, int]:
        """Number of adapter weights per layer, with the run's rank."""
        found = {layer: count for layer, count in self._weights_by_place.items() if layer is not None}
        if cut := self.spec.cut:
            found[cut.layer] = found.get(cut.layer, 0) + cut.rank * self.spec.source.hidden_size
        return found

    @cached_property
    def _weights_by_place(self) -> Counter[int | None]:
        """Number of adapter weights per layer, and outside the layers (None), but for a task head."""
        lora = self.spec.config.lora
        shapes = adapter_shapes(self.spec.source, lora.targets, lora.rank, self._kind)
        found = Counter[int | None]()
        for name, shape in shapes.items():
            found[layer_number(name)] += math.prod(shape)
        found[None] += self.spec.value_weights
        return found

    def _unit(self, pair: str, layers: int, *, head: bool = False) -> int:
        if self.spec.source.is_network:
            return 0  # what a network of our own keeps is small beside its process
        config, itemsize = self.spec.config, ITEM_BYTES[DTYPES[split_pair(pair)[1]]]
        of_model = self.spec.source.config
        if self.spec.values is not None:  # no logits of a vocabulary
            of_model = {**of_model, "vocab_size": self.spec.outputs}
        return unit_bytes(
            of_model, layers, self.spec.unit_rows, config.task.max_tokens, itemsize,
            checkpointing=config.pieces.checkpointing, head=head, all_linear=list(config.lora.targets) == ["all-linear"],
            dora_bytes=self._dora(itemsize).kept,
        )  # fmt: skip

    def _dora(self, itemsize: int) -> DoraBytes:
        lora, packed = self.spec.config.lora, self.spec.config.model.base not in ("fp32", "bf16")
        return DoraBytes.of(self.spec.source, lora.targets, self._kind, itemsize, packed=packed)

    @cached_property
    def growth_bytes(self) -> int:
        """Returns the bytes that come with a process's first slice, whatever its layers."""
        return GROWTH_BYTES + self._dora(FP32_BYTES).passing
