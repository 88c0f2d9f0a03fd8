"""Checks a run file beyond its keys: against the model, against the strategies that exist, and for settings that exclude each other.

Runs before anything is started. Knows nothing of nodes: what they cannot do shows when they join.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgelam_fl.bounds import DEFAULT_BOUNDS, Bounds
from edgelam_fl.config import AUTO, MOST_PIECES, FederationSection, OptimizerSection, RunConfig, TaskSection
from edgelam_fl.errors import ConfigError
from edgelam_fl.model.generation import check_answers
from edgelam_fl.model.limits import check_limits
from edgelam_fl.model.source import BUILT_IN as MODELS
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.fronts import check_trust, with_auto_front
from edgelam_fl.plan.layout import local_hosts, make_layout, who_may_host
from edgelam_fl.plan.making import RoundFacts, check_warmup, make_plans
from edgelam_fl.plan.modes import host_mode, label_place
from edgelam_fl.plan.spec import RunSpec, model_of
from edgelam_fl.tasks.kinds import check_task
from edgelam_fl.telemetry.trackers import check_trackers
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codec_bytes import CODEC_BYTES, RAW
from server.earlier_adapter import earlier_adapter
from server.model_checks import (
    check_carry,
    check_cuts,
    check_dropout,
    check_patterns,
    check_ranks,
    check_something_learns,
)
from server.network_checks import check_network
from server.private_checks import check_privacy
from server.private_terms import check_devices as check_private_devices
from server.value_checks import check_private_modules, check_values
from strategies.registry import BUILT_IN, Capabilities, LoadedStrategy, load_all


def check_config(
    config: RunConfig,
    bounds: Bounds = DEFAULT_BOUNDS,
    *,
    elsewhere: bool = False,
    download: bool = True,
    devices: Sequence[str] = (),
) -> RunSpec:
    """Finds the run's model, and sets split.front if split.fronts is 'auto:...'.

    Raises ConfigError or ModelError with the first problem.

    bounds: what the run file may name on this machine. elsewhere: whether the run takes place on another machine, whose
    operator may allow more strategies; those are then left to that machine's own check, and not imported here. download: whether
    the model may be fetched from a hub. devices: the names of those that take part in a run on this machine; empty: they are not known.
    """
    strategy = config.strategy
    names = {kind: getattr(strategy, kind) for kind in BUILT_IN}
    loaded = load_all(names, strategy.options, bounds, elsewhere=elsewhere)
    check_network(config, loaded["aggregation"].capabilities if "aggregation" in loaded else Capabilities())
    check_together(config)
    check_values(config)
    check_optimizer(config)
    check_lateness(config)
    check_best(config)
    check_low_rank(config)
    check_front_cache(config)
    check_codecs(config)
    check_privacy(config, loaded, elsewhere=elsewhere)
    check_task(config.task)
    check_packing(config)
    check_answered(config)
    if not elsewhere:
        check_trackers(config.run.report_to)
    aggregation = loaded["aggregation"].capabilities if "aggregation" in loaded else Capabilities()
    check_aggregation(config, aggregation)
    check_private_modules(config, aggregation)
    check_dora(config, aggregation)
    check_late_updates(config, aggregation)
    check_cut_defence(config, aggregation)
    if devices:
        check_devices(config, loaded, len(devices))
    check_place_of_model(config.model.name, bounds)
    source = model_of(config, download=download)
    check_head(config, source)
    check_limits(config, source)
    check_answers(config, source)
    spec = RunSpec(with_auto_front(config, source), source)
    check_dropout(spec)
    check_cuts(spec)
    check_ranks(spec)
    check_patterns(spec)
    check_something_learns(spec)
    check_carry(spec, aggregation)
    if devices:
        check_routes(spec, devices, aggregation)
    check_trust(spec.config, source.leakage_key)
    check_beginning(config, aggregation)
    if not elsewhere:
        earlier_adapter(spec, bounds)
    return spec


def check_beginning(config: RunConfig, aggregation: Capabilities) -> None:
    """Raises ConfigError for settings with which no run can begin with an adapter (`model.adapter`)."""
    if not config.model.adapter:
        return
    merged = "a model with the adapter merged into it (`edgelam export --to merged`) as model.name"
    refused = {
        f"privacy.mode = {config.privacy.mode!r}": (
            config.privacy.mode != "none",
            "its promise could not cover what the adapter has learned of the devices' data before",
        ),
        "privacy.private_front = true": (
            config.privacy.private_front, "each device draws its own front, so the adapter's would be lost"
        ),
        f"task.private_modules = {list(config.task.private_modules)}": (
            bool(config.task.private_modules), "each device draws its own modules, so the adapter's would be lost"
        ),
        "lora.ranks": (
            bool(config.lora.ranks) and not aggregation.unequal_ranks,
            f"the adapter has one rank, and strategy.aggregation = {config.strategy.aggregation!r} needs a layer's rank to stay",
        ),
    }  # fmt: skip
    for setting, (is_so, why) in refused.items():
        if is_so:
            raise ConfigError(
                f"model.adapter = {config.model.adapter!r} cannot be combined with {setting}: {why}. Allowed: one of the two, or {merged}"
            )


def check_devices(config: RunConfig, loaded: Mapping[str, LoadedStrategy], devices: int) -> None:
    """Raises ConfigError if so many devices, which have no tags, are too few for a run, or may not take part in it."""
    federation, strategy = config.federation, config.strategy
    here = "1 device" if devices == 1 else f"{devices} devices"
    if federation.min_nodes > devices:
        raise ConfigError(
            f"federation.min_nodes = {federation.min_nodes} and the run has {here}: no round could begin. Allowed: min_nodes of at "
            f"most {devices}, or more data files, one per device"
        )
    if strategy.require_tags:
        raise ConfigError(
            f"strategy.require_tags = {list(strategy.require_tags)} keeps every device of this run out: devices that a command plays "
            f"on this machine have no tags. Allowed: leave require_tags out"
        )
    least = loaded["aggregation"].capabilities.least_sources if "aggregation" in loaded else 1
    drawn = min(devices, federation.devices_per_round or devices)
    if config.lora.train != ("hosts",) and 1 < drawn < least:
        raise ConfigError(
            f"strategy.aggregation = {strategy.aggregation!r} needs at least {least} devices per round, and the run has {drawn}. "
            f"Allowed: more data files, one per device, or another aggregation, for example 'fedavg'"
        )
    if config.privacy.mode != "none" and "selection" in loaded:
        check_private_devices(config, devices, loaded["selection"].capabilities.sampling_rate or 1.0)


def check_routes(spec: RunSpec, devices: Sequence[str], aggregation: Capabilities) -> None:
    """Raises ConfigError if devices of these names would keep layers that leave a host without any, or train unlike ranks of one layer."""
    config = spec.config
    if config.split.hosts and config.split.cuts == "auto":
        return  # the planner lays out when it knows the nodes
    own = config.split.host_on == "any"
    profiles = {name: pb.Profile(name=name, role=pb.DEVICE, address=f"{name}:1" if own else "") for name in devices}
    profiles |= {name: pb.Profile(name=name, role=pb.EDGE, address=f"{name}:1") for name in local_hosts(config)}
    hosts = who_may_host(config, profiles.values())
    if len(hosts) < config.split.least_hosts:
        raise ConfigError(
            f"split.hosts = {config.split.hosts} with split.host_on = 'any' needs as many devices, and the run has {len(devices)}. "
            f"Allowed: split.hosts of at most {len(devices)}, or split.host_on = 'edge'"
        )
    layout = make_layout(spec, [profiles[name] for name in devices], hosts)
    facts = RoundFacts("run", 1, 1, 0, 0, unequal_ranks=aggregation.unequal_ranks)
    make_plans(spec, facts, profiles, layout, {}, dict.fromkeys(devices, b""))


def check_head(config: RunConfig, source: ModelSource) -> None:
    """Raises ConfigError for a task that the model has no head for: it answers with classes, or with text."""
    head = source.family.task_head
    if config.task.classes and head is None:
        raise ConfigError(
            f"task.kind = {config.task.kind!r} needs a model that answers with classes, and {source.name} answers with text. Allowed: a "
            f"BERT model, for example model.name = 'minilm-l6' with lora.targets = ['query', 'value'], or task.kind = 'causal-lm'"
        )
    if head is not None and not config.task.classes:
        raise ConfigError(
            f"task.kind = {config.task.kind!r} needs a model that answers with text, and {source.name} answers with classes. Allowed: another "
            f"model.name, or task.kind = 'classification' with task.classes"
        )


def check_place_of_model(name: str, bounds: Bounds) -> None:
    """Raises ConfigError for a folder or file that this machine's operator did not offer as a model."""
    path = Path(name).expanduser()
    if name not in MODELS and path.exists() and not bounds.allows_model(path):
        raise ConfigError(
            f"model.name = {name!r} is a place on this machine that its operator did not offer: `edgelam server --models DIR` "
            f"offers the models below DIR"
        )


_OF_ROUNDS = (
    "rounds",
    "min_nodes",
    "expect_nodes",
    "evaluate_every",
    "snapshot_every",
    "early_stopping_patience",
    "early_stopping_threshold",
)
_MAY_CHANGE = (*(f"federation.{key}" for key in _OF_ROUNDS), "run.report_to")


def check_changes(then: RunConfig, now: RunConfig) -> None:
    """Raises ConfigError for a key with another value than the run began with, unless it is one that changes no training.

    More rounds may be asked for, except of a private run, whose noise was chosen for so many.
    """
    before, after = then.model_dump(), now.model_dump()
    changed = [
        (section, key, before[section][key], value)
        for section, keys in after.items()
        for key, value in keys.items()
        if value != before[section][key]
    ]
    for section, key, old, new in changed:
        is_wait = section in ("federation", "wire") and key.endswith("_s")
        is_rounds_of_a_promise = key == "rounds" and then.privacy.mode != "none"
        may_change = f"{section}.{key}" in _MAY_CHANGE and not is_rounds_of_a_promise
        if not is_wait and not may_change:
            why = ", because the run's privacy was promised for so many rounds" if is_rounds_of_a_promise else ""
            raise ConfigError(
                f"{section}.{key} was {old!r} when the run began and would be {new!r}: that cannot change while a run goes on{why}. What "
                f"can: {', '.join(_MAY_CHANGE)} and the waits and deadlines (keys that end in _s)"
            )


_MOST_PIECES = 1_000_000  # in the table of a round's steps, about 4 bytes each, which is one header (MAX_HEADER_BYTES)


def check_together(config: RunConfig) -> None:
    """Raises ConfigError for settings that exclude each other."""
    split, model = config.split, config.model
    if model.base in ("fp32", "bf16") and model.compute not in ("auto", model.base):
        raise ConfigError(
            f"model.compute = {model.compute!r} cannot be combined with model.base = {model.base!r}, which is computed as it is kept; "
            f"allowed: 'auto' or {model.base!r}"
        )
    if split.hosts == "auto" and split.cuts != "auto":
        cuts = repr(split.cuts) if split.cuts == "equal" else list(split.cuts)
        raise ConfigError(
            f"split.hosts = 'auto' cannot be combined with split.cuts = {cuts}: the number of hosts and the cuts are one choice. "
            f"Allowed: split.cuts = 'auto', or a number of hosts"
        )
    federation, micro_batches = config.federation, config.step_micro_batches
    if split.micro_batches == AUTO:
        micro_batches = min(federation.batch_size, MOST_PIECES) * config.optimizer.gradient_accumulation_steps
    pieces = federation.local_steps * micro_batches
    if split.hosts and not federation.epochs and pieces > _MOST_PIECES:
        raise ConfigError(
            f"federation.local_steps = {federation.local_steps} of {micro_batches} micro-batches each (split.micro_batches x "
            f"optimizer.gradient_accumulation_steps) are {pieces:,} in a round, all of which a device announces at its beginning. Allowed: "
            f"at most {_MOST_PIECES:,}"
        )
    if split.sites > 1 and not split.hosts:
        raise ConfigError(f"split.sites = {split.sites} needs split.hosts of at least 1: a site is a chain of hosts")
    on_device = label_place(split.labels).on_device
    if not on_device and not split.hosts:
        raise ConfigError("split.labels = 'last-stage' needs split.hosts of at least 1: the last host holds the head")
    backs = {"split.back": split.back} | {f"split.backs.{name}": back for name, back in split.backs.items()}
    for key, back in () if on_device else backs.items():
        if back:
            raise ConfigError(
                f"{key} = {back}: split.back must be 0 with split.labels = 'last-stage', as the last host then holds the "
                f"last layers and the head"
            )


def check_optimizer(config: RunConfig) -> None:
    """Raises ConfigError for a key of the other optimizer, and for a rise of the learning rate that never ends."""
    optimizer, plain = config.optimizer, OptimizerSection()
    others = {"adamw": ("momentum",), "sgd": ("weight_decay", "betas", "eps")}[optimizer.name]
    for key in others:
        value = getattr(optimizer, key)
        if value != getattr(plain, key):
            shown = list(value) if isinstance(value, tuple) else value
            other = "sgd" if optimizer.name == "adamw" else "adamw"
            raise ConfigError(
                f"optimizer.{key} = {shown} has no effect with optimizer.name = {optimizer.name!r}. Allowed: leave it out, or "
                f"optimizer.name = {other!r}"
            )
    if not config.federation.epochs:
        check_warmup(config, config.federation.local_steps)


def check_lateness(config: RunConfig) -> None:
    """Raises ConfigError for a key of another rule of lateness, and for numbers of devices that exclude each other."""
    federation, plain = config.federation, FederationSection()
    used = {"fixed": (), "percentile": ("deadline_factor", "deadline_percentile"), "predicted": ("deadline_factor",)}
    for key in ("deadline_factor", "deadline_percentile"):
        value = getattr(federation, key)
        if key not in used[federation.deadline] and value != getattr(plain, key):
            fitting = " or ".join(repr(rule) for rule, keys in used.items() if key in keys)
            raise ConfigError(
                f"federation.{key} = {value:g} has no effect with federation.deadline = {federation.deadline!r}. Allowed: leave it "
                f"out, or federation.deadline = {fitting}"
            )
    enough, chosen = federation.enough_nodes, federation.devices_per_round
    if enough and enough < federation.min_nodes:
        raise ConfigError(
            f"federation.enough_nodes = {enough} must be at least federation.min_nodes = {federation.min_nodes}, or 0: a round needs "
            f"so many devices"
        )
    if 0 < chosen <= enough:
        raise ConfigError(
            f"federation.enough_nodes = {enough} must be below federation.devices_per_round = {chosen}, or 0: else nobody would be late"
        )


def check_best(config: RunConfig) -> None:
    """Raises ConfigError if held-out losses are to decide about a run that they may not, or cannot, decide about."""
    federation, privacy = config.federation, config.privacy
    patience, threshold = federation.early_stopping_patience, federation.early_stopping_threshold
    if threshold and not patience:
        raise ConfigError(
            f"federation.early_stopping_threshold = {threshold:g} has no effect without early_stopping_patience. Allowed: leave it out, or "
            f"early_stopping_patience of at least 1"
        )
    used = {"early_stopping_patience": patience, "load_best": federation.load_best}
    for key, value in used.items():
        if value and privacy.mode != "none":
            raise ConfigError(
                f"federation.{key} = {_toml(value)} cannot be combined with privacy.mode = {privacy.mode!r}: held-out losses are not "
                f"covered by the promise, and what they decide would tell about them. Allowed: privacy.mode = 'none', or leave it out"
            )
    if federation.load_best and privacy.private_front:
        raise ConfigError(
            "federation.load_best = true cannot be combined with privacy.private_front = true: each device has the newest adapter of "
            "its front alone, which does not fit an earlier one of the others. Allowed: one of the two"
        )


def check_late_updates(config: RunConfig, aggregation: Capabilities) -> None:
    """Raises ConfigError if late updates are to be used where none can come, or where none can be used."""
    federation = config.federation
    if federation.late == "drop":
        return
    who = "federation.late = 'next'"
    if federation.deadline == "fixed" and not federation.enough_nodes:
        raise ConfigError(
            f"{who} has no effect with federation.deadline = 'fixed': a device's part ends at round_deadline_s, too. Allowed: "
            f"federation.deadline = 'percentile' or 'predicted', federation.enough_nodes above 0, or late = 'drop'"
        )
    if config.split.hosts:
        raise ConfigError(
            f"{who} needs split.hosts = 0: hosts end a round for all of their devices, so a late device cannot go on alone. Allowed: "
            f"split.hosts = 0, or late = 'drop'"
        )
    if config.privacy.mode != "none":
        raise ConfigError(
            f"{who} cannot be combined with privacy.mode = {config.privacy.mode!r}: each update is promised to count in one round. "
            f"Allowed: privacy.mode = 'none', or late = 'drop'"
        )
    if not aggregation.takes_late:
        raise ConfigError(
            f"{who} cannot be combined with strategy.aggregation = {config.strategy.aggregation!r}, which takes updates of its own round "
            f"alone. Allowed: 'fedavg', 'fedprox', a class of your own with takes_late = True, or late = 'drop'"
        )


def check_low_rank(config: RunConfig) -> None:
    """Raises ConfigError for what cannot be combined with gradients of a few numbers per token."""
    if config.wire.gradients == "full":
        return
    split, train, who = config.split, config.lora.train, "wire.gradients = 'lowrank'"
    if not split.hosts:
        raise ConfigError(
            f"{who} needs split.hosts of at least 1: the last host learns from these gradients, and split.hosts = 0 has none. "
            f"Allowed: a host, or wire.gradients = 'full'"
        )
    if not label_place(split.labels).on_device:
        raise ConfigError(
            f"{who} cannot be combined with split.labels = {split.labels!r}: no gradient travels to the last host, which computes "
            f"the loss. Allowed: split.labels = 'device', or wire.gradients = 'full'"
        )
    if train != ("back",):
        raise ConfigError(
            f"{who} cannot be combined with lora.train = {list(train)}: from {config.lora.rank} numbers per token (lora.rank) hosts "
            f"learn one matrix at the cut, and neither their own LoRA nor the devices' front. Allowed: lora.train = 'back', or "
            f"wire.gradients = 'full'"
        )
    if config.privacy.mode != "none":
        raise ConfigError(
            f"{who} cannot be combined with privacy.mode = {config.privacy.mode!r}: the matrix that hosts learn at the cut would be "
            f"neither clipped nor noised. Allowed: privacy.mode = 'none', or wire.gradients = 'full'"
        )
    if split.backs:
        raise ConfigError(
            f"{who} cannot be combined with split.backs = {dict(split.backs)}: the matrix that hosts learn belongs to one cut, so "
            f"all devices keep the same last layers. Allowed: split.back alone, or wire.gradients = 'full'"
        )


def check_front_cache(config: RunConfig) -> None:
    """Raises ConfigError if an example's states at the cut would not be the same in every step."""
    size, split, privacy = config.wire.front_cache_mb, config.split, config.privacy
    if not size:
        return
    who = f"wire.front_cache_mb = {size}"
    if not split.hosts:
        raise ConfigError(
            f"{who} needs split.hosts of at least 1: with split.hosts = 0 no hidden state leaves a device"
        )
    if "front" in config.lora.train:
        raise ConfigError(
            f"{who} needs a front that does not learn, and lora.train = {list(config.lora.train)}. Allowed: lora.train without 'front', "
            f"for example ['hosts', 'back'], or front_cache_mb = 0"
        )
    if config.lora.dropout or config.model.dropout == "own":
        key = f"lora.dropout = {config.lora.dropout:g}" if config.lora.dropout else "model.dropout = 'own'"
        raise ConfigError(
            f"{who} cannot be combined with {key}, which drops other numbers in every step. Allowed: no dropout, or front_cache_mb = 0"
        )
    if privacy.cut_clip:
        raise ConfigError(
            f"{who} cannot be combined with privacy.cut_clip = {privacy.cut_clip:g}, whose noise is drawn anew for all that leaves a "
            f"device. Allowed: cut_clip = 0, or front_cache_mb = 0"
        )


def check_packing(config: RunConfig) -> None:
    """Raises ConfigError if something at the cut takes each row for one example."""
    privacy, who = config.privacy, "task.packing = true"
    if not config.task.packing:
        return
    if config.wire.front_cache_mb:
        raise ConfigError(
            f"{who} cannot be combined with wire.front_cache_mb = {config.wire.front_cache_mb}: states are kept per example, each in a row "
            f"of its own. Allowed: one of the two"
        )
    for key in ("cut_clip", "disguise"):
        if getattr(privacy, key):
            raise ConfigError(
                f"{who} cannot be combined with privacy.{key} = {getattr(privacy, key):g}, which knows the first token of a text by its "
                f"place in the row. Allowed: one of the two"
            )


def check_answered(config: RunConfig) -> None:
    """Raises ConfigError if greedy answers are to be measured where a device cannot take the next token, or if none are."""
    task, plain = config.task, TaskSection()
    for key in ("metrics_examples", "metrics_tokens"):
        value = getattr(task, key)
        if not task.metrics and value != getattr(plain, key):
            raise ConfigError(
                f"task.{key} = {value} has no effect without task.metrics. Allowed: leave it out, or metrics = ['exact_match']"
            )
    if task.metrics and not label_place(config.split.labels).on_device:
        raise ConfigError(
            f"task.metrics = {list(task.metrics)} cannot be combined with split.labels = {config.split.labels!r}: a device chooses the "
            f"next token of an answer by the model's head, which the last host has. Allowed: split.labels = 'device', or no metrics"
        )


def check_codecs(config: RunConfig) -> None:
    """Raises ConfigError for a codec that is not known, that nothing would travel in, or that the other settings cannot bear."""
    wire, train = config.wire, config.lora.train
    keys = {"activation_codec": wire.activation_codec, "gradient_codec": wire.gradient_codec}
    for key, codec in keys.items():
        who = f"wire.{key} = {codec!r}"
        if codec not in CODEC_BYTES:
            raise ConfigError(f"{who} is not known. Allowed: {', '.join(map(repr, CODEC_BYTES))}")
        if codec != RAW and not config.split.hosts:
            raise ConfigError(
                f"{who} needs split.hosts of at least 1: with split.hosts = 0 no hidden state leaves a device. Allowed: a host, or "
                f"wire.{key} = 'raw'"
            )
    if wire.gradients == "lowrank" and wire.activation_codec != RAW:
        raise ConfigError(
            f"wire.activation_codec = {wire.activation_codec!r} cannot be combined with wire.gradients = 'lowrank': {config.lora.rank} "
            f"small numbers travel in one row with each hidden state, and would be rounded to its scale. Allowed: "
            f"wire.activation_codec = 'raw' with a wire.gradient_codec, or wire.gradients = 'full'"
        )
    if wire.gradient_codec != RAW and wire.gradients == "full" and train == ("back",):
        raise ConfigError(
            f"wire.gradient_codec = {wire.gradient_codec!r} has no effect with lora.train = ['back']: no gradient leaves a device. "
            f"Allowed: wire.gradient_codec = 'raw', or lora.train with 'front' or 'hosts'"
        )


def check_aggregation(config: RunConfig, aggregation: Capabilities) -> None:
    """Raises ConfigError if an aggregation would have nothing to act on, or could not do what it is for."""
    split, lora, name = config.split, config.lora, config.strategy.aggregation
    mode = host_mode(split.host_mode)
    if split.hosts and mode.has_copies and aggregation.personal:
        raise ConfigError(
            f"strategy.aggregation = {name!r} cannot be combined with split.host_mode = 'copies': hosts start a round from one "
            f"adapter, and each device would need its own there. Allowed: 'joint', 'sequential', or split.hosts = 0"
        )
    if aggregation.restarts_factors and config.optimizer.keep == "always":
        raise ConfigError(
            f"strategy.aggregation = {name!r} starts with new factors in every round, and optimizer.keep = 'always' would keep the "
            f"moments of the old factors. Allowed: optimizer.keep = 'exact'"
        )
    if aggregation.corrects_sgd:
        check_correction(config)
    only_cut = config.wire.gradients == "lowrank" and not split.back and not config.task.classes
    if not split.hosts or mode.has_copies or not (only_cut or lora.train == ("hosts",)):
        return
    settings = "wire.gradients = 'lowrank', split.back = 0" if only_cut else "lora.train = ['hosts']"
    where = f"{settings} and split.host_mode = {split.host_mode!r}: devices train no layer of their own"
    more = "split.back of at least 1" if only_cut else "lora.train with 'front' or 'back'"
    allowed = f"Allowed: {more}, split.host_mode = 'copies'" + ("" if only_cut else ", or split.hosts = 0")
    if aggregation.client_settings(1).prox_mu:
        raise ConfigError(
            f"strategy.aggregation = {name!r} holds devices near the round's start, and has nothing to hold with {where}. {allowed}"
        )
    if aggregation.carries and split.sites == 1:
        raise ConfigError(
            f"strategy.aggregation = {name!r} adds up the updates of several sources, and has one source, the site, with {where}. "
            f"{allowed}, or split.sites of at least 2"
        )
    if aggregation.corrects_sgd and split.sites == 1:
        raise ConfigError(
            f"strategy.aggregation = {name!r} corrects how sources differ, and has one source, the site, with {where}. {allowed}, "
            f"or split.sites of at least 2"
        )
    least = aggregation.least_sources
    if split.sites < least:
        raise ConfigError(
            f"strategy.aggregation = {name!r} needs at least {least} sources, and has split.sites = {split.sites} with {where}. "
            f"{allowed}, or split.sites of at least {least}"
        )


def check_dora(config: RunConfig, aggregation: Capabilities) -> None:
    """Raises ConfigError for an aggregation whose promise does not hold with DoRA's magnitudes."""
    if config.lora.use_dora and aggregation.factors_alone:
        raise ConfigError(
            f"lora.use_dora = true cannot be combined with strategy.aggregation = {config.strategy.aggregation!r}, which is about the "
            f"products B A of LoRA alone; with DoRA a matrix has a magnitude besides. Allowed: rules that take each tensor's mean or "
            f"median, such as 'fedavg', 'fedprox', 'fedadam' or 'fedmedian', or use_dora = false"
        )


def check_cut_defence(config: RunConfig, aggregation: Capabilities) -> None:
    """Raises ConfigError for a defence at the cut that would defend nothing, or that the other settings undo."""
    privacy, split, lora = config.privacy, config.split, config.lora
    keys = {"cut_clip": privacy.cut_clip, "disguise": privacy.disguise, "private_front": privacy.private_front}
    used = next((f"privacy.{key} = {_toml(value)}" for key, value in keys.items() if value), "")
    if not used:
        return
    if not split.hosts:
        raise ConfigError(
            f"{used} needs split.hosts of at least 1: with split.hosts = 0 no hidden state leaves a device"
        )
    if not label_place(split.labels).on_device:
        raise ConfigError(
            f"{used} cannot be combined with split.labels = 'last-stage', which sends the labels themselves to a host. "
            f"Allowed: split.labels = 'device'"
        )
    front_keys = {key: value for key, value in keys.items() if key != "cut_clip" and value}
    if not front_keys:
        return
    used = next(f"privacy.{key} = {_toml(value)}" for key, value in front_keys.items())
    fronts = {"split.front": split.front} | {
        f"split.fronts.{name}": front for name, front in split.named_fronts.items()
    }
    for key, front in fronts.items():
        if not front:
            raise ConfigError(
                f"{used} needs a front that can learn, and {key} = 0 leaves the device none; allowed: at least 1"
            )
    if "front" not in lora.train:
        raise ConfigError(
            f"{used} needs a front that learns, and lora.train = {list(lora.train)} freezes it. Allowed: lora.train with 'front'"
        )
    if privacy.private_front:
        check_private_front(config, aggregation)


def check_private_front(config: RunConfig, aggregation: Capabilities) -> None:
    """Raises ConfigError if the server would need the private adapters, or would be left with nothing to aggregate."""
    split, lora, name = config.split, config.lora, config.strategy.aggregation
    if lora.train == ("front",):
        raise ConfigError(
            "privacy.private_front = true with lora.train = ['front'] leaves nothing to aggregate: all that learns stays on the "
            "devices. Allowed: lora.train with 'hosts' or 'back' as well"
        )
    if split.host_on == "any":
        raise ConfigError(
            "privacy.private_front = true cannot be combined with split.host_on = 'any': a device would train the same layer for "
            "itself alone and for others. Allowed: split.host_on = 'edge'"
        )
    if config.privacy.mode != "none" and split.named_fronts:
        raise ConfigError(
            f"privacy.private_front = true cannot be combined with privacy.mode = {config.privacy.mode!r} and split.fronts: what a "
            f"device keeps to itself would be a part of another's update. Allowed: one split.front for all"
        )
    if aggregation.corrects_sgd:
        raise ConfigError(
            f"privacy.private_front = true cannot be combined with strategy.aggregation = {name!r}, which corrects every layer of "
            f"a device by what the others did. Allowed: the other aggregations, for example 'fedavg'"
        )


def _toml(value: float) -> str:
    return "true" if value is True else f"{value:g}"


def check_correction(config: RunConfig) -> None:
    """Raises ConfigError if a source's update would not be the sum of its corrected gradients."""
    split, optimizer, who = config.split, config.optimizer, f"strategy.aggregation = {config.strategy.aggregation!r}"
    if optimizer.name != "sgd":
        raise ConfigError(
            f"{who} takes gradients from a source's update, which only plain SGD allows; optimizer.name = "
            f"{optimizer.name!r} updates by something else. Allowed: optimizer.name = 'sgd'"
        )
    if optimizer.momentum:
        raise ConfigError(
            f"{who} takes gradients from a source's update, and optimizer.momentum = {optimizer.momentum:g} would mix them with those "
            f"of earlier steps. Allowed: optimizer.momentum = 0"
        )
    if optimizer.clip != "none":
        raise ConfigError(
            f"{who} takes gradients from a source's update, and optimizer.clip = {optimizer.clip!r} would shorten it. "
            f"Allowed: optimizer.clip = 'none'"
        )
    if split.hosts and host_mode(split.host_mode).steps_in_turn:
        raise ConfigError(
            f"{who} cannot be combined with split.host_mode = 'sequential': devices then update one adapter in turn, and "
            f"its update belongs to no single device. Allowed: 'joint', 'copies', or split.hosts = 0"
        )
