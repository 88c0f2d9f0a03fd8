"""Reads a node's plan: the names of its job and links, the layers that it holds, and which of them learn. Imports no torch.

The server slices adapters with these functions, the stage host loads its slices with them. Makes no plans (`making`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

from google.protobuf.message import Message

from edgelam_fl.model.adapter import Span
from edgelam_fl.model.cut import CutAdapter
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.lora import LoraKind, OwnTerms
from edgelam_fl.model.value_ends import ValueModel, is_of_module
from edgelam_fl.plan.modes import label_place
from edgelam_fl.tasks.kinds import values_of
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codec_bytes import RAW


def job_id(plan: pb.Plan) -> str:
    """Returns the name of a round's attempt, the same at all nodes, which HELLO carries."""
    return f"{plan.run}/{plan.round}/{plan.attempt}"


def part_id(plan: pb.Plan, node: str = "") -> str:
    """Returns the name of one node's part in a job, by default of the plan's own node.

    Submit and Wait name a part by it, and a relay connects links that name the same part.
    """
    return f"{job_id(plan)}/{node or plan.node}"


def round_of(part: str) -> tuple[str, int]:
    """Returns the run and the round of a part by its name; ("", 0) for a text that is none."""
    run, number, _attempt, _node = (["", "", "", "", *part.rsplit("/", 3)])[-4:]
    return (run, int(number)) if number.isdecimal() else ("", 0)


def link_name(plan: pb.Plan, route: pb.Route, number: int, side: pb.LinkRole) -> str:
    """Returns the name of the link to a route's hop `number`, as its dialling node calls it and counts bytes under it."""
    name = f"{'entry' if side == pb.ENTRY else 'exit'} {route.hops[number].node}"
    return name if route.device == plan.node else f"{name} for {route.device}"


def dialled_links(plan: pb.Plan) -> dict[str, str]:
    """Returns the host at the other end of each link that the node dials, by the link's name."""
    dialled = [(route, number, side) for route in plan.routes if route.hops
               for number, side in ((0, pb.ENTRY), (len(route.hops) - 1, pb.EXIT))]  # fmt: skip
    for route in plan.serves:
        own = [hop.node for hop in route.hops].index(plan.node)
        if own + 1 < len(route.hops):
            dialled.append((route, own + 1, pb.ENTRY))
    return {link_name(plan, route, number, side): route.hops[number].node for route, number, side in dialled}


def end_spans(plan: pb.Plan) -> list[Span]:
    """Lists the spans of its own route that a device holds, in the route's order; none for an edge server."""
    if not plan.routes:
        return []
    route, layers = plan.routes[0], plan.model.num_layers
    if not route.hops:
        return [Span(0, layers, embed=True, head=True)]
    front = Span(0, route.front, embed=True)
    back = [Span(route.back_first, layers, head=True)] if label_place(plan.labels).on_device else []
    return [front, *back]


def hosted_span(plan: pb.Plan) -> Span | None:
    """Returns the span that a host holds for the routes that cross it; None if the node is not a host."""
    if not plan.serves:
        return None
    last = plan.serves[0].hops[-1].node == plan.node
    return Span(plan.hosted.first, plan.hosted.last, head=last and not label_place(plan.labels).on_device)


def spans_of(plan: pb.Plan) -> list[Span]:
    """Lists all spans that a node holds: its own ends, then the hosted span."""
    hosted = hosted_span(plan)
    return end_spans(plan) + ([hosted] if hosted is not None else [])


def cut_adapter_of(plan: pb.Plan) -> CutAdapter | None:
    """Returns the cut adapter of the plan's route; None: gradients go back whole (wire.gradients = "full")."""
    if not plan.HasField("lowrank"):
        return None
    return CutAdapter(plan.lowrank.layer, plan.lowrank.rank, plan.lora.alpha / plan.lowrank.rank)


def ends_of(plan: pb.Plan) -> ValueModel | None:
    """Returns what stands in the places of embedding and head for a task of values; None for a task of texts."""
    values = values_of(plan.task.kind)
    return values.ends(plan.task.radio) if values is not None else None


def input_trains(plan: pb.Plan) -> bool:
    """Returns whether what stands in the place of the embedding learns, so that a gradient has to reach it; a table of tokens never."""
    return plan.lora.train_back and values_of(plan.task.kind) is not None


def kind_of(plan: pb.Plan) -> LoraKind:
    """Returns the kind of LoRA on the layers that the plan's node holds."""
    lora = plan.lora
    own = tuple(OwnTerms(tuple(terms.modules), terms.rank, terms.alpha) for terms in lora.own)
    return LoraKind(tuple(lora.layers), lora.rslora, lora.dora, tuple(lora.saved), own)


def not_finite(message: Message, place: str = "") -> str:
    """Returns the place of the first number in a message that is infinite or none, as in "lora.alpha"; empty: there is none.

    Maps are not looked at: those of a plan hold no numbers.
    """
    for field, value in message.ListFields():
        name = f"{place}{field.name}"
        values = value if field.is_repeated else [value]
        if field.cpp_type == field.CPPTYPE_MESSAGE:
            found = next(
                filter(None, (not_finite(each, f"{name}.") for each in values if isinstance(each, Message))), ""
            )
        else:
            wrong = any(isinstance(each, float) and not math.isfinite(each) for each in values)
            found = name if wrong else ""
        if found:
            return found
    return ""


def codecs_of(plan: pb.Plan) -> tuple[str, str]:
    """Returns the codecs of hidden states and of their gradients on every link of the run."""
    return plan.activation_codec or RAW, plan.gradient_codec or RAW


def unit_rows(plan: pb.Plan) -> int:
    """Returns the most rows in a micro-batch: ceil(batch_size / micro_batches)."""
    return -(-plan.batch_size // plan.micro_batches)


def unit_positions(plan: pb.Plan, phase: pb.Phase) -> int:
    """Returns the most positions in a micro-batch, rows times its longest example.

    In evaluation, twice those of training: nothing is kept for a backward pass, so a layer's passing results are all that it takes.
    """
    return unit_rows(plan) * plan.task.max_tokens * (2 if phase == pb.EVAL else 1)


def allows_unit(plan: pb.Plan, phase: pb.Phase, rows: int, tokens: int) -> bool:
    """Returns whether a micro-batch may have so many rows, the longest of so many tokens. In evaluation, only positions count."""
    most_rows = rows if phase == pb.EVAL else unit_rows(plan)
    return (
        1 <= rows <= most_rows and 1 <= tokens <= plan.task.max_tokens and rows * tokens <= unit_positions(plan, phase)
    )


def allowed_unit(plan: pb.Plan, phase: pb.Phase) -> str:
    """Says which micro-batches `allows_unit` allows."""
    if phase == pb.EVAL:
        return f"rows of 1 to {plan.task.max_tokens} tokens, together at most {unit_positions(plan, phase)}"
    return f"1 to {unit_rows(plan)} rows of 1 to {plan.task.max_tokens} tokens"


def ends_train(plan: pb.Plan) -> Callable[[int | None], bool]:
    """Returns a test of whether one of a device's own layers learns: front, middle and back apart, also without hosts.

    The test takes a layer number, or None for a task's head outside the layers, which counts as the back.
    """
    route, lora = plan.routes[0], plan.lora

    def learns(layer: int | None) -> bool:
        if layer is None or layer >= route.back_first:
            return lora.train_back
        return lora.train_front if layer < route.front else lora.train_hosts

    return learns


def is_private(plan: pb.Plan, name: str) -> bool:
    """Returns whether a tensor of a device's own never leaves it: of its front, or of a module of values, if the plan keeps it private."""
    if not plan.routes:
        return False
    layer = layer_number(name)
    if layer is None:
        return is_of_module(name, plan.task.private_modules)
    return plan.cut.private_front and layer < plan.routes[0].front


def hosted_trains(plan: pb.Plan) -> Callable[[int | None], bool]:
    """Returns a test of whether a hosted layer learns, by its number, or None for a task's head."""
    return lambda layer: plan.lora.train_back if layer is None else plan.lora.train_hosts


def unit_seed(plan: pb.Plan, device: str, step: int, micro_batch: int) -> int | None:
    """Returns the seed of a unit's dropout masks, the same at every stage of its route; None without dropout."""
    if not (plan.lora.dropout or plan.model.own_dropout):
        return None
    unit = f"{plan.seed}/{device}/{plan.optimizer.step_offset + step}/{micro_batch}"
    return int.from_bytes(hashlib.sha256(unit.encode()).digest()[:8], "little") >> 1
