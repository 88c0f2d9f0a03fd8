"""The error of an aggregation: how far the new adapter is from the weighted mean of what the sources trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from strategies.aggregation.carry import product_of
from strategies.aggregation.factors import by_module, product_norm, stacked
from strategies.api import Contribution, Start


def aggregation_error(
    contributions: Sequence[Contribution], tensors: Mapping[str, np.ndarray], start: Start
) -> float | None:
    """Returns ||s B A + C - sum_k p_k s_k B_k A_k|| / ||sum_k p_k s_k B_k A_k||, Frobenius norms over all contributed modules.

    C is what the carry factors gained. `tensors` are the aggregated ones, with carry factors. None if the mean is zero
    (nothing was learned yet, or there is no factor).
    """
    off, whole = [0.0], [0.0]
    for module, sources in by_module(contributions, start).items():
        left_OM, right_MI = stacked(sources)
        got_left_OM, got_right_MI = product_of(module, start, tensors)
        whole.append(product_norm(left_OM, right_MI))
        difference_OM = np.concatenate([left_OM, -got_left_OM], axis=1)
        off.append(product_norm(difference_OM, np.concatenate([right_MI, got_right_MI], axis=0)))
    return math.hypot(*off) / math.hypot(*whole) if any(whole) else None
