"""FedAvg on LoRA factors (FedIT, arXiv 2305.05644): A = sum p_k A_k and B = sum p_k B_k, p_k over a module's sources.

Inexact as an average of the products B_k A_k, and the baseline everywhere. A module with one source keeps its bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgelam_fl.errors import ConfigError
from strategies.base import Aggregated, Contribution


class FedAvg:
    def aggregate(self, contributions: Sequence[Contribution]) -> Aggregated:
        ordered = sorted(contributions, key=lambda contribution: contribution.source)
        names = sorted({name for contribution in ordered for name in contribution.tensors})
        return Aggregated({name: _weighted_mean(name, [c for c in ordered if name in c.tensors]) for name in names})


def _weighted_mean(name: str, sources: list[Contribution]) -> np.ndarray:
    if len(sources) == 1:
        return sources[0].tensors[name]
    shapes = {source.source: source.tensors[name].shape for source in sources}
    if len(set(shapes.values())) > 1:
        raise ConfigError(f"fedavg needs equal ranks; {name} has shapes {shapes}")
    total = sum(source.weight for source in sources)
    mean = sum(source.tensors[name].astype(np.float64) * (source.weight / total) for source in sources)
    return np.asarray(mean).astype(np.float32)
