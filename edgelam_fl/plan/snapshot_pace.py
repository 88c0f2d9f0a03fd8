"""Says after how many steps the nodes of a round keep a snapshot, and hosts leave theirs at the hub. Pure functions.

A snapshot costs the bytes of an adapter and its moments: on the disk of each node, and for hosts on their link to the hub. Both
are bounded by a share of what the same steps send over the routes, so that a snapshot costs little beside training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from edgelam_fl.model.base_names import FP32_BYTES, ITEM_BYTES
from edgelam_fl.plan.footprint import Footprints
from edgelam_fl.plan.modes import host_mode
from edgelam_fl.plan.reading import codecs_of, spans_of
from edgelam_fl.plan.resuming import keeps_steps
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codec_bytes import CODEC_BYTES

_DISK_SHARE, _HUB_SHARE = 0.25, 0.01  # of the bytes that the same steps send over the node's routes
_SNAPSHOT_BYTES = 3 * FP32_BYTES  # per weight of an adapter: itself and two moments
_LENGTH = 4  # an example is as long as max_tokens divided by this, or longer
_PASSES = 2  # of hidden states, and of gradients: on an entry and on an exit link


def set_pace(spec: RunSpec, plans: Mapping[str, pb.Plan]) -> None:
    """Sets `snapshot_every` of all plans, which is the same for all, and `kept_every` of hosts, a multiple of it.

    A number in the run file is both. Nothing is set if no attempt of the round could go on from a snapshot, and none without plans.
    """
    asked = spec.config.federation.snapshot_every
    if asked == 0 or not plans or not all(keeps_steps(plan) for plan in plans.values()):
        return
    footprints = Footprints(spec)
    every = (
        max(_steps_for(spec, footprints, plan, _DISK_SHARE) for plan in plans.values()) if asked == "auto" else asked
    )
    for plan in plans.values():
        plan.snapshot_every = every
        if plan.serves:
            least = _steps_for(spec, footprints, plan, _HUB_SHARE) if asked == "auto" else every
            plan.kept_every = math.ceil(least / every) * every


def _steps_for(spec: RunSpec, footprints: Footprints, plan: pb.Plan, share: float) -> int:
    """Returns the fewest steps whose routes carry so many bytes that a snapshot is at most `share` of them."""
    layers = [layer for span in spans_of(plan) for layer in range(span.first, span.last)]
    weights = sum(footprints.adapter_weights.get(layer, 0) for layer in layers) * plan.lora.rank / spec.config.lora.rank
    devices = max(1, len(plan.serves))
    copies = devices if plan.serves and host_mode(plan.host_mode).has_copies else 1
    tokens = plan.batch_size * max(1, plan.task.max_tokens // _LENGTH)
    item_bytes = ITEM_BYTES[plan.model.wire]
    token_bytes = sum(CODEC_BYTES[codec].bytes_of_row(spec.source.hidden_size, item_bytes) for codec in codecs_of(plan))
    step_bytes = devices * tokens * token_bytes * _PASSES
    return max(1, math.ceil(weights * copies * _SNAPSHOT_BYTES / (share * step_bytes)))
