"""What a run is: its run file, and the index of the model that it trains. Knows nothing about nodes or rounds."""

from __future__ import annotations

from dataclasses import dataclass

from edgelam_fl.config import RunConfig
from edgelam_fl.model.source import ModelSource


@dataclass(frozen=True, slots=True)
class RunSpec:
    """The two values that every decision about a run needs, and that never change while the run goes on."""

    config: RunConfig
    source: ModelSource

    @property
    def unit_rows(self) -> int:
        """The most rows in one micro-batch of a device: ceil(batch_size / micro_batches)."""
        return -(-self.config.federation.batch_size // self.config.split.micro_batches)
