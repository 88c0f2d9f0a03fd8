"""Who holds what in a round: from profiles and the run file to one plan a node. Pure functions of their arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from edgelam_fl.config import RunConfig
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.source import ModelSource
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb

_READY_DEADLINE_S = 60.0
_SLOW_CARD_BYTES_S = 20e6  # a small board reads its slice from its card before it is ready
_SILENT_S = 10.0


@dataclass(frozen=True)
class RoundFacts:
    """What is the same for every node of a round."""

    run: str
    round: int
    attempt: int
    step_offset: int
    steps: int  # 0: evaluation only


def make_routes(
    config: RunConfig,
    source: ModelSource,
    devices: Sequence[str],
    hosts: Sequence[pb.Profile],
    tokens: Mapping[str, bytes],
) -> list[pb.Route]:
    """One route a device, over all `hosts` in their order. `tokens`: a secret a device, shared with its hosts."""
    front, back_first = config.split.front, source.num_layers - config.split.back
    borders = cut_layers(config, front, back_first)
    hops = [
        pb.Hop(node=host.name, first=first, last=last, address=host.address)
        for host, (first, last) in zip(hosts, pairwise(borders), strict=True)
    ]
    return [
        pb.Route(device=name, device_index=index, front=front, back_first=back_first, hops=hops, token=tokens[name])
        for index, name in enumerate(sorted(devices))
    ]


def cut_layers(config: RunConfig, first: int, last: int) -> list[int]:
    """The borders of the hosts' slices: `first`, the cuts, `last`. Equal cuts differ by one layer at most."""
    hosts = config.split.hosts
    if not hosts:
        return [first]
    if config.split.cuts != "equal":
        return [first, *config.split.cuts, last]
    return [first + (last - first) * number // hosts for number in range(hosts + 1)]


def held_spans(plan: pb.Plan) -> list[Span]:
    """What the plan's node holds."""
    route = plan.routes[0]
    if plan.role == pb.EDGE:
        return [Span(hop.first, hop.last) for hop in route.hops if hop.node == plan.node]
    if not route.hops:
        return [Span(0, plan.model.num_layers, embed=True, head=True)]
    return [Span(0, route.front, embed=True), Span(route.back_first, plan.model.num_layers, head=True)]


def make_plan(
    config: RunConfig,
    source: ModelSource,
    facts: RoundFacts,
    node: str,
    role: int,
    routes: Sequence[pb.Route],
    share_bps: float,
) -> pb.Plan:
    federation, train = config.federation, config.lora.train
    return pb.Plan(
        run=facts.run,
        round=facts.round,
        attempt=facts.attempt,
        node=node,
        role=role,  # type: ignore[arg-type]
        routes=routes,
        model=pb.ModelRef(
            name=config.model.name, digest=source.digest, base=config.model.base, num_layers=source.num_layers
        ),
        lora=pb.Lora(
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            targets=config.lora.targets,
            train_front="front" in train,
            train_hosts="hosts" in train,
            train_back="back" in train,
        ),
        optimizer=pb.Optimizer(name=config.optimizer.name, lr=config.optimizer.lr, step_offset=facts.step_offset),
        task=task_settings(config),
        host_mode=config.split.host_mode,
        evaluate=True,
        steps=facts.steps,
        batch_size=federation.batch_size,
        micro_batches=config.split.micro_batches,
        window=config.split.window,
        min_devices=min(federation.min_nodes, len(routes)),
        deadlines=pb.Deadlines(
            ready_s=_READY_DEADLINE_S + source.fp32_bytes / _SLOW_CARD_BYTES_S,
            step_s=federation.step_deadline_s,
            round_s=federation.round_deadline_s,
            silent_s=_SILENT_S,
        ),
        seed=config.run.seed,
        share_bps=share_bps,
        protocol_version=PROTOCOL_VERSION,
    )


def task_settings(config: RunConfig) -> pb.TaskSettings:
    return pb.TaskSettings(
        kind=config.task.kind,
        max_tokens=config.task.max_tokens,
        template=config.task.template,
        loss_on=config.task.loss_on,
        prompt_field=config.data.fields.prompt,
        answer_field=config.data.fields.answer,
        held_out=config.data.held_out,
    )
