"""Says whether a new attempt of a round can go on from snapshots of an earlier one, and from which. Pure functions.

A snapshot is what one node has computed after some steps of one attempt. All nodes of a site go on from the same step of the same
attempt, or all begin again: one stage is never set back alone. Knows plans; knows nothing of what a snapshot holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from edgelam_fl.plan.modes import host_mode
from edgelam_fl.wire import edgelam_pb2 as pb


def newest_common(kept: Iterable[Iterable[pb.StepSnapshot]]) -> pb.StepSnapshot | None:
    """Returns the newest snapshot that all nodes of a site have; None: there is no such snapshot.

    `kept`: what each node has, as in its report; for a host that takes a lost one's place, what the hub has of the lost one.
    """
    each = [{(one.steps, one.attempt) for one in of_node} for of_node in kept]
    if not each or not (common := set.intersection(*each)):
        return None
    steps, attempt = max(common)
    return pb.StepSnapshot(attempt=attempt, steps=steps)


def can_resume(before: Sequence[pb.Plan], after: Sequence[pb.Plan]) -> bool:
    """Returns whether the nodes of a site may go on from snapshots of an earlier attempt of the same round.

    `before`, `after`: the plans of the site's nodes in either attempt. Each device and each host in its place in the chain must
    do the same work; devices may be missing, except in sequential mode. With differential privacy an attempt always begins again,
    as noise is paid for.
    """
    earlier = {place(plan): plan for plan in before}
    return bool(after) and all(
        keeps_steps(plan) and (old := earlier.get(place(plan))) is not None and _same_work(old, plan) for plan in after
    )


def keeps_steps(plan: pb.Plan) -> bool:
    """Returns whether snapshots within a round are exact for a plan.

    What a defence of the cut draws and what its reader learns is not kept, and noise of differential privacy is never drawn twice.
    """
    drawn = plan.cut.noise > 0 or plan.cut.disguise > 0
    return bool(plan.steps) and not plan.generate and not plan.HasField("privacy") and not drawn


def work_key(plan: pb.Plan) -> str:
    """Returns a digest of all in a plan that decides what the node computes, whoever carries it out and in whichever attempt."""
    work = pb.Plan(
        run=plan.run, round=plan.round, lora=plan.lora, optimizer=plan.optimizer, task=plan.task, host_mode=plan.host_mode,
        labels=plan.labels, steps=plan.steps, batch_size=plan.batch_size, micro_batches=plan.micro_batches, seed=plan.seed,
        own_steps=plan.own_steps, cursor=plan.cursor, gradient_factor=plan.gradient_factor, evaluate=plan.evaluate,
        activation_codec=plan.activation_codec, gradient_codec=plan.gradient_codec,
    )  # fmt: skip
    work.model.CopyFrom(
        pb.ModelRef(digest=plan.model.digest, num_layers=plan.model.num_layers, own_dropout=plan.model.own_dropout)
    )
    for name in ("hosted", "cut", "lowrank"):
        if plan.HasField(name):
            getattr(work, name).CopyFrom(getattr(plan, name))
    for route in plan.routes:
        work.routes.append(pb.Route(device=route.device, front=route.front, back_first=route.back_first))
    return hashlib.sha256(work.SerializeToString(deterministic=True)).hexdigest()


def _same_work(before: pb.Plan, after: pb.Plan) -> bool:
    before_all, after_all = crossings(before), crossings(after)
    one_for_each = host_mode(
        after.host_mode
    ).steps_in_turn  # then a device that is missing has made steps of the site's adapter
    return work_key(before) == work_key(after) and (
        after_all == before_all if one_for_each else after_all <= before_all
    )


def crossings(plan: pb.Plan) -> set[tuple[str, int, int]]:
    """Returns the layers [first, last) that each device's route computes at a host, by the device's name."""
    position = _position(plan)
    return {(route.device, route.hops[position].first, route.hops[position].last) for route in plan.serves}


def place(plan: pb.Plan) -> tuple[str, int]:
    """Names a node's place in its site: a device by its name, a host by its position in the chain; -1: it is none."""
    return plan.node if plan.routes else "", _position(plan)


def _position(plan: pb.Plan) -> int:
    return [hop.node for hop in plan.serves[0].hops].index(plan.node) if plan.serves else -1
