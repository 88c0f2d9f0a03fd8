"""What a plan says about its node: the names of its job, and the layers that it holds. Imports no torch.

Read by the server, which slices adapters with it, and by the stage host, which loads these slices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from edgelam_fl.model.adapter import Span
from edgelam_fl.plan.modes import label_place
from edgelam_fl.wire import edgelam_pb2 as pb


def job_id(plan: pb.Plan) -> str:
    """The round's attempt, the same at all nodes: what HELLO carries."""
    return f"{plan.run}/{plan.round}/{plan.attempt}"


def part_id(plan: pb.Plan, node: str = "") -> str:
    """A node's part in it, this one's by default: what Submit and Wait name, and what a relay joins links for."""
    return f"{job_id(plan)}/{node or plan.node}"


def link_name(plan: pb.Plan, route: pb.Route, number: int, side: pb.LinkRole) -> str:
    """What the node that dials the route's hop `number` calls the link; its bytes are counted under it."""
    name = f"{'entry' if side == pb.ENTRY else 'exit'} {route.hops[number].node}"
    return name if route.device == plan.node else f"{name} for {route.device}"


def dialled_links(plan: pb.Plan) -> dict[str, str]:
    """The names of all links that the node dials, and the host at each one's other end."""
    dialled = [(route, number, side) for route in plan.routes if route.hops
               for number, side in ((0, pb.ENTRY), (len(route.hops) - 1, pb.EXIT))]  # fmt: skip
    for route in plan.serves:
        own = [hop.node for hop in route.hops].index(plan.node)
        if own + 1 < len(route.hops):
            dialled.append((route, own + 1, pb.ENTRY))
    return {link_name(plan, route, number, side): route.hops[number].node for route, number, side in dialled}


def end_spans(plan: pb.Plan) -> list[Span]:
    """What a device holds of its own route, in the route's order; nothing on an edge server."""
    if not plan.routes:
        return []
    route, layers = plan.routes[0], plan.model.num_layers
    if not route.hops:
        return [Span(0, layers, embed=True, head=True)]
    front = Span(0, route.front, embed=True)
    back = [Span(route.back_first, layers, head=True)] if label_place(plan.labels).on_device else []
    return [front, *back]


def hosted_span(plan: pb.Plan) -> Span | None:
    """What the node holds for the routes that cross it; None where it is no host."""
    if not plan.serves:
        return None
    last = plan.serves[0].hops[-1].node == plan.node
    return Span(plan.hosted.first, plan.hosted.last, head=last and not label_place(plan.labels).on_device)


def spans_of(plan: pb.Plan) -> list[Span]:
    """All that the node holds: its own ends, then what it hosts."""
    hosted = hosted_span(plan)
    return end_spans(plan) + ([hosted] if hosted is not None else [])


def unit_rows(plan: pb.Plan) -> int:
    """The most rows that a micro-batch of the plan has."""
    return -(-plan.batch_size // plan.micro_batches)


def ends_train(plan: pb.Plan) -> Callable[[int | None], bool]:
    """Which of a device's own layers learn: front, middle and back apart, also where no host is.

    What stands outside the layers (None: a task's head) belongs to the back.
    """
    route, lora = plan.routes[0], plan.lora

    def learns(layer: int | None) -> bool:
        if layer is None or layer >= route.back_first:
            return lora.train_back
        return lora.train_front if layer < route.front else lora.train_hosts

    return learns


def hosted_trains(plan: pb.Plan) -> Callable[[int | None], bool]:
    return lambda layer: plan.lora.train_back if layer is None else plan.lora.train_hosts


def unit_seed(plan: pb.Plan, device: str, step: int, micro_batch: int) -> int | None:
    """What a unit's dropout masks are drawn from, the same at every stage of its route; None without dropout."""
    if not plan.lora.dropout:
        return None
    unit = f"{plan.seed}/{device}/{plan.optimizer.step_offset + step}/{micro_batch}"
    return int.from_bytes(hashlib.sha256(unit.encode()).digest()[:8], "little") >> 1
