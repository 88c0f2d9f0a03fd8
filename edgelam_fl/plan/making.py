"""Makes one plan per node: what the node does in a round, from the layout, the profiles and the run file. Pure functions.

Chooses no layers (`layout`, `placement`) and no devices; knows nothing of how a plan is sent or carried out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from edgelam_fl.config import PrivacySection, RunConfig
from edgelam_fl.errors import ConfigError
from edgelam_fl.model.base_names import DTYPES
from edgelam_fl.model.lora import OwnTerms
from edgelam_fl.model.memory import weights_bytes
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.bases import choose_base
from edgelam_fl.plan.layout import HostRange, Layout, Site, by_name
from edgelam_fl.plan.modes import host_mode
from edgelam_fl.plan.reading import part_id, spans_of
from edgelam_fl.plan.snapshot_pace import set_pace
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.tasks.kinds import values_of
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.attendance import ATTEND
from edgelam_fl.wire.kept import LEAVE
from edgelam_fl.wire.relay import DIAL, LISTEN, make_token

_READY_DEADLINE_S = 60.0
_SLOW_CARD_BYTES_S = 20e6  # a small board reads its slice from its card before it is ready
_SLOW_LINK_BYTES_S = 0.6e6  # a node that lacks the model downloads its slice over 5 Mbit/s
# A node counts as gone after so long without a sign of life, or this part of federation.step_deadline_s if that is longer:
# a run file that allows long steps may have nodes that answer slowly.
_SILENT_S, _SILENT_PART = 10.0, 12


@dataclass(frozen=True)
class ClientSettings:
    """An aggregation's settings for devices and hosts in a round; by default plain training of both LoRA factors."""

    train_a: bool = True
    train_b: bool = True
    prox_mu: float = (
        0.0  # weight of (mu/2)||w - w_start||^2 in the loss of devices' own layers and of their copies at hosts
    )


@dataclass(frozen=True)
class RoundPrivacy:
    """The differential privacy of a round, as the server decided it: the same for every node."""

    clip: (
        float  # L2 bound of what one device adds: its update of the round, and its gradient in a step of shared layers
    )
    noise: float  # standard deviation of the noise, per unit of the bound
    devices: float  # expected number of devices in a round, by which sums are divided; never how many came
    device_clips: bool = False  # each device clips its update itself, before it leaves
    device_noise: bool = False  # each device adds the noise itself


@dataclass(frozen=True)
class RoundFacts:
    """Facts about a round that are the same for every node."""

    run: str
    round: int
    attempt: int
    step_offset: int
    steps: int  # 0: only evaluate
    settings: ClientSettings = field(default_factory=ClientSettings)
    privacy: RoundPrivacy | None = None  # None: the run has no differential privacy
    unequal_ranks: bool = False  # whether the aggregation accepts them
    hub_port: int = 0  # 0: the server has no hub
    relay_key: bytes = b""  # signs the tokens for the hub's relay and attendance; empty: there is neither
    slices_token: bytes = b""  # lets nodes fetch slices of the run's model from the hub
    alone: bool = False  # whether it is known that no other run of this server goes on
    first_step: int = 0  # steps of the round that are done: all nodes go on from their snapshots of that step; 0: none
    resume_attempt: int = 0  # with first_step: the attempt that the snapshots are of


def make_plans(
    spec: RunSpec,
    facts: RoundFacts,
    profiles: Mapping[str, pb.Profile],
    layout: Layout,
    shares: Mapping[str, float],
    tokens: Mapping[str, bytes],
) -> dict[str, pb.Plan]:
    """Returns the plans by node, hosts first: they should listen by the time the devices dial.

    `shares` of the capacity and `tokens` (a secret between a device and its hosts) are by device. Raises ConfigError if the
    holders of a layer would train different ranks and the aggregation does not accept that.
    """
    routes = _routes(spec.config, facts, layout, shares, tokens)
    common, plans = _common(spec, facts), dict[str, pb.Plan]()
    for site in layout.sites:
        for host in site.hosts:
            plans[host.name] = _plan(common, spec, facts, profiles[host.name])
            _set_hosted(plans[host.name], spec.config, host, site, routes)
            if facts.privacy is not None:
                _set_private_steps(plans[host.name], spec.config, facts.privacy, host, site)
            if facts.relay_key:
                part = part_id(plans[host.name])
                plans[host.name].relay_token = make_token(facts.relay_key, LISTEN, part, host.name)
                plans[host.name].kept_token = make_token(facts.relay_key, LEAVE, part, host.name)
    for name, route in routes.items():
        if name not in plans:
            plans[name] = _plan(common, spec, facts, profiles[name])
        plans[name].routes.append(route)
        _set_batches(plans[name], spec.config, facts, profiles[name].examples)
        if facts.privacy is not None:
            _set_private_update(plans[name], facts.privacy)
    own_terms = spec.kind.own
    for name, plan in plans.items():
        _set_own_terms(plan, own_terms)
        base, compute = layout.bases.get(name) or choose_base(spec, profiles[name], spans_of(plan))
        plan.model.base, plan.model.compute = base, DTYPES[compute]
    computes = {plan.model.compute for plan in plans.values()}
    for plan in plans.values():
        plan.model.wire = "bfloat16" if computes == {"bfloat16"} else "float32"
    if facts.relay_key:
        for name, plan in plans.items():
            plan.attend_token = make_token(facts.relay_key, ATTEND, part_id(plan), name)
    set_pace(spec, plans)
    if facts.hub_port:
        allow_for_downloads(spec.source, plans.values())
    if not facts.unequal_ranks:
        check_equal_ranks(plans)
    return plans


def own_steps(config: RunConfig, examples: int) -> int:
    """Returns the steps that a device has batches for in a round."""
    federation = config.federation
    if not federation.epochs:
        return federation.local_steps
    return math.ceil(federation.epochs * examples / config.step_examples)


def planned_steps(config: RunConfig, devices: Iterable[pb.Profile]) -> int:
    """Returns the steps of a round: as many as the device with the most batches has; local_steps without devices."""
    return max((own_steps(config, device.examples) for device in devices), default=config.federation.local_steps)


def check_warmup(config: RunConfig, steps: int) -> None:
    """Raises ConfigError if the learning rate would rise until the end of a run with rounds of `steps` steps."""
    warmup, planned = config.optimizer.warmup_steps, config.federation.rounds * steps
    if warmup >= planned:
        raise ConfigError(
            f"optimizer.warmup_steps = {warmup} must be below {planned}, the steps of the run ({config.federation.rounds} rounds of "
            f"{steps}): the learning rate would not reach optimizer.lr, nor optimizer.schedule begin"
        )


def learning_rates(config: RunConfig, facts: RoundFacts) -> list[float]:
    """Returns the learning rate of each step of the round: a rise over the run's first steps, then the schedule.

    The schedule ends with the last step of the last round. Raises ConfigError as `check_warmup`: with federation.epochs, the
    number of steps is known when devices are.
    """
    optimizer = config.optimizer
    if facts.round == 1 and facts.steps:
        check_warmup(config, facts.steps)
    rounds_left = max(1, config.federation.rounds - facts.round + 1)
    planned = facts.step_offset + rounds_left * facts.steps
    return [
        learning_rate(optimizer.lr, optimizer.schedule, optimizer.warmup_steps, step, planned)
        for step in range(facts.step_offset, facts.step_offset + facts.steps)
    ]


def learning_rate(lr: float, schedule: str, warmup: int, step: int, planned: int) -> float:
    """Returns the learning rate of one step, counted from 0, of a run of `planned` steps with `warmup` steps of rise."""
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / (planned - warmup)
    if schedule == "linear":
        return lr * (1 - done)
    if schedule == "cosine":
        return lr * (1 + math.cos(math.pi * done)) / 2
    return lr


def check_equal_ranks(plans: Mapping[str, pb.Plan]) -> None:
    """Raises ConfigError if nodes that hold the same layer have different ranks: their factors could not be averaged."""
    ranks: dict[int, dict[str, int]] = {}
    for name, plan in sorted(plans.items()):
        for span in spans_of(plan):
            for layer in range(span.first, span.last):
                ranks.setdefault(layer, {})[name] = plan.lora.rank
    for layer, holders in sorted(ranks.items()):
        if len(set(holders.values())) > 1:
            who = ", ".join(f"{name} with rank {rank}" for name, rank in holders.items())
            raise ConfigError(
                f"layer {layer} is held by {who}: all nodes that hold a layer need the same rank (lora.rank, "
                f"lora.ranks), unless strategy.aggregation is 'flora', 'fedex', 'flexlora' or 'hetlora'"
            )


def _routes(
    config: RunConfig, facts: RoundFacts, layout: Layout, shares: Mapping[str, float], tokens: Mapping[str, bytes]
) -> dict[str, pb.Route]:
    """Copies the layout's routes and adds secrets, shares and tokens for the relay."""
    job, routes = pb.Plan(run=facts.run, round=facts.round, attempt=facts.attempt), {}
    for name, laid_out in layout.routes.items():
        routes[name] = route = pb.Route()
        route.CopyFrom(laid_out)
        route.token, route.share_bps = tokens[name], shares.get(name, 0.0) * config.wire.capacity_bps
    if facts.relay_key:
        _add_relay_tokens(routes, job, facts.relay_key)
    return routes


def _add_relay_tokens(routes: Mapping[str, pb.Route], job: pb.Plan, key: bytes) -> None:
    """Gives every node that dials a host a token for that host, good for as many links as the node's routes need."""
    links = Counter(pair for route in routes.values() for pair in _dialled(route))
    for route in routes.values():
        hops = {hop.node: hop for hop in route.hops}
        for dialler, host in _dialled(route):
            token = make_token(key, DIAL, part_id(job, host), dialler, links[dialler, host])
            hops[host].relay_tokens[dialler] = token


def _dialled(route: pb.Route) -> list[tuple[str, str]]:
    """Lists who dials whom on a route: the device its first and its last host, and each host the next."""
    if not route.hops:
        return []
    hosts = [hop.node for hop in route.hops]
    return [*pairwise([route.device, *hosts]), (route.device, hosts[-1])]


def _plan(common: pb.Plan, spec: RunSpec, facts: RoundFacts, profile: pb.Profile) -> pb.Plan:
    """Makes a node's plan, without routes and hosted layers. `common`: what all plans of the round say."""
    plan = pb.Plan()
    plan.CopyFrom(common)
    plan.node, plan.role = profile.name, profile.role
    plan.lora.CopyFrom(_lora(spec.config, profile.name, facts.settings))
    if profile.role == pb.DEVICE and (cut := _cut(spec.config.privacy)) is not None:
        plan.cut.CopyFrom(cut)
    return plan


def _common(spec: RunSpec, facts: RoundFacts) -> pb.Plan:
    """Makes what the plans of a round say to all nodes."""
    config, source = spec.config, spec.source
    federation, split = config.federation, config.split
    return pb.Plan(
        run=facts.run,
        round=facts.round,
        attempt=facts.attempt,
        alone=facts.alone,
        model=pb.ModelRef(
            name=config.model.name,
            digest=source.digest,
            num_layers=source.num_layers,
            files=source.files,
            weights_digest=source.weights_digest,
            own_dropout=config.model.dropout == "own",
        ),
        optimizer=_optimizer(config, facts),
        task=task_settings(config),
        host_mode=split.host_mode,
        labels=split.labels,
        checkpointing=config.pieces.checkpointing,
        evaluate=not facts.steps or (facts.round - 1) % federation.evaluate_every == 0,
        steps=facts.steps,
        batch_size=config.step_examples,
        micro_batches=config.step_micro_batches,
        window=config.pieces.window,
        min_devices=1,
        deadlines=pb.Deadlines(
            ready_s=max(federation.join_deadline_s, _READY_DEADLINE_S + source.fp32_bytes / _SLOW_CARD_BYTES_S),
            step_s=federation.step_deadline_s,
            round_s=federation.round_deadline_s,
            silent_s=max(_SILENT_S, federation.step_deadline_s / _SILENT_PART),
            reconnect_s=federation.reconnect_deadline_s,
        ),
        seed=config.run.seed,
        gradient_factor=federation.gradient_factor,
        protocol_version=PROTOCOL_VERSION,
        hub_port=facts.hub_port,
        slices_token=facts.slices_token,
        first_step=facts.first_step,
        resume_attempt=facts.resume_attempt,
        front_cache_bytes=config.wire.front_cache_mb * 10**6,
        lowrank=pb.LowRank(layer=spec.cut.layer, rank=spec.cut.rank) if spec.cut else None,
        activation_codec=config.wire.activation_codec,
        gradient_codec=config.wire.gradient_codec,
    )


def allow_for_downloads(source: ModelSource, plans: Iterable[pb.Plan]) -> None:
    """Extends all nodes' time to get ready by the largest download, as only the nodes know whether they have the model."""
    plans = list(plans)
    slices = {(tuple(spans_of(plan)), plan.model.base, plan.model.compute) for plan in plans}
    most = max(weights_bytes(source, spans, base, compute) for spans, base, compute in slices)
    for plan in plans:
        plan.deadlines.ready_s += most / _SLOW_LINK_BYTES_S


def _set_hosted(plan: pb.Plan, config: RunConfig, host: HostRange, site: Site, routes: Mapping[str, pb.Route]) -> None:
    """Makes the plan's node a host of the site."""
    plan.serves.extend(routes[member] for member in site.members)
    plan.hosted.CopyFrom(pb.Slice(first=host.first, last=host.last))
    plan.site = site.name
    # With fewer of its devices the round would have too few, even if all other sites kept theirs.
    elsewhere = len(routes) - len(site.members)
    plan.min_devices = max(1, min(config.federation.min_nodes - elsewhere, len(site.members)))


def _set_private_steps(plan: pb.Plan, config: RunConfig, privacy: RoundPrivacy, host: HostRange, site: Site) -> None:
    """Has a host of shared layers clip each device's gradient and add noise to their sum.

    The hosts of a chain divide the square of the bound by their layers: a device's gradient over the whole chain keeps it.
    """
    plan.privacy.SetInParent()
    plan.gradient_factor = 0.0  # to leave a device out by the size of others' gradients would depend on their data
    mode = host_mode(plan.host_mode)
    if mode.has_copies or not plan.lora.train_hosts:
        return
    layers = sum(other.last - other.first for other in site.hosts)
    plan.privacy.step_clip = privacy.clip * math.sqrt((host.last - host.first) / layers)
    plan.privacy.step_noise = privacy.clip * privacy.noise
    plan.privacy.step_devices = 1.0 if mode.steps_in_turn else privacy.devices / config.split.sites


def _set_private_update(plan: pb.Plan, privacy: RoundPrivacy) -> None:
    """Has a device clip its update and add noise to it, if it is the device that does."""
    plan.privacy.SetInParent()
    if privacy.device_clips:
        plan.privacy.update_clip = privacy.clip
    if privacy.device_noise:
        plan.privacy.update_noise = privacy.clip * privacy.noise


def _set_batches(plan: pb.Plan, config: RunConfig, facts: RoundFacts, examples: int) -> None:
    """Sets how many batches a device draws and where it continues in its data.

    With `federation.epochs` the position counts the device's own steps, else the run's.
    """
    if config.federation.epochs:
        own = own_steps(config, examples)
        plan.own_steps, plan.cursor = min(facts.steps, own), (facts.round - 1) * own
    else:
        plan.own_steps, plan.cursor = facts.steps, facts.step_offset


def _lora(config: RunConfig, node: str, settings: ClientSettings) -> pb.Lora:
    lora = config.lora
    return pb.Lora(
        rank=by_name(lora.ranks, node, lora.rank),
        alpha=lora.alpha,
        targets=lora.targets,
        train_front="front" in lora.train,
        train_hosts="hosts" in lora.train,
        train_back="back" in lora.train,
        dropout=lora.dropout,
        freeze_a=not settings.train_a,
        freeze_b=not settings.train_b,
        prox_mu=settings.prox_mu,
        layers=lora.layers_to_transform,
        rslora=lora.use_rslora,
        dora=lora.use_dora,
        saved=lora.modules_to_save,
    )


def _set_own_terms(plan: pb.Plan, own: Iterable[OwnTerms]) -> None:
    """Names those of the modules with terms of their own that the node holds."""
    spans = spans_of(plan)
    for terms in own:
        here = [module for module in terms.modules if any(span.holds(f"{module}.") for span in spans)]
        if here:
            plan.lora.own.add(modules=here, rank=terms.rank, alpha=terms.alpha)


def _cut(privacy: PrivacySection) -> pb.Cut | None:
    if not privacy.defends_cut:
        return None
    return pb.Cut(
        clip=privacy.cut_clip, noise=privacy.cut_noise, private_front=privacy.private_front, disguise=privacy.disguise
    )


def _optimizer(config: RunConfig, facts: RoundFacts) -> pb.Optimizer:
    optimizer = config.optimizer
    return pb.Optimizer(
        name=optimizer.name,
        step_offset=facts.step_offset,
        lrs=learning_rates(config, facts),
        clip=optimizer.clip,
        max_norm=optimizer.max_norm,
        keep=optimizer.keep,
        weight_decay=optimizer.weight_decay,
        betas=optimizer.betas,
        eps=optimizer.eps,
        momentum=optimizer.momentum,
    )


def task_settings(config: RunConfig) -> pb.TaskSettings:
    """Returns the part of a plan that says how a device makes batches of its data."""
    return pb.TaskSettings(
        kind=config.task.kind,
        max_tokens=config.task.max_tokens,
        template=config.task.template,
        loss_on=config.task.loss_on,
        prompt_field=config.data.fields.prompts[0],
        more_prompt_fields=config.data.fields.prompts[1:],
        answer_field=config.data.fields.answer,
        held_out=config.data.held_out,
        evaluate_examples=config.federation.evaluate_examples,
        bad_lines=config.data.bad_lines,
        classes=config.task.classes,
        weighting=config.task.weighting,
        too_long=config.task.too_long,
        label_smoothing=config.task.label_smoothing,
        packing=config.task.packing,
        metrics=config.task.metrics,
        metrics_examples=config.task.metrics_examples if config.task.metrics else 0,
        metrics_tokens=config.task.metrics_tokens if config.task.metrics else 0,
        private_modules=config.task.private_modules,
        radio=_radio(config) if values_of(config.task.kind) else None,
    )


def _radio(config: RunConfig) -> pb.Radio:
    """Returns what a task of values is told beside the [task] section."""
    return pb.Radio(**config.radio.model_dump(), seed=config.run.seed)
