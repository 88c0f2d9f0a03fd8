"""Reads the tensors of an adapter that begin as what the base has: DoRA's magnitudes, and the modules that learn as a whole.

They are read by the code that a node loads its slices with, a few layers at a time, so they are what a node has to the bit.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping

from edgelam_fl.model.adapter import Adapter, Span, base_shapes
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import LoraSettings, load_stages
from edgelam_fl.model.value_ends import ValueModel

_AT_ONCE_BYTES = 128 << 20  # of weights in fp32 that are loaded at a time; a single layer may be larger


def read_of_base(
    source: ModelSource, lora: LoraSettings, base: str, *, classes: int = 0, values: ValueModel | None = None
) -> Adapter:
    """Returns the tensors of `base_shapes` with their first values. `base`, `classes`, `values`: as of `load_stages`."""
    wanted = base_shapes(source, lora.targets, lora.kind)
    found: Adapter = {}
    for number, span in enumerate(_pieces(source, wanted)):
        if number and not span.head:
            gc.collect()  # modules hold reference cycles: without it all pieces would be in memory together
        (stage,) = load_stages(source, [span], base, lora, classes=classes, values=values)
        found |= {name: array for name, array in stage.adapter().items() if name in wanted}
        del stage
    return found


def _pieces(source: ModelSource, wanted: Mapping[str, object]) -> Iterator[Span]:
    """Yields spans that hold all of the wanted tensors."""
    layers = source.num_layers
    at_once = max(1, _AT_ONCE_BYTES * layers // max(1, source.fp32_bytes))
    spans = [Span(first, min(first + at_once, layers)) for first in range(0, layers, at_once)]
    return (span for span in [*spans, Span(layers, layers, head=True)] if any(map(span.holds, wanted)))
