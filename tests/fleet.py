"""A fleet of stage hosts, planned as the server would, and the plain loop of transformers and peft to compare with."""

from __future__ import annotations

import copy
import fcntl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from edgelam_fl.config import RunConfig
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.chip import CPU
from edgelam_fl.model.source import ModelSource
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.node.play import NodeHooks
from edgelam_fl.node.service import StageHost
from edgelam_fl.plan.layout import make_layout, who_may_host
from edgelam_fl.plan.making import ClientSettings, RoundFacts, RoundPrivacy, make_plans, task_settings
from edgelam_fl.plan.reading import part_id, spans_of
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.split import route
from edgelam_fl.split.driver import evaluation_batches
from edgelam_fl.split.route import Dial
from edgelam_fl.tasks.base import Example, Unit
from edgelam_fl.tasks.causal_lm import IGNORED, CausalLm, labelled, make_units
from edgelam_fl.tasks.data import batch_indices, read_pairs
from edgelam_fl.tasks.held_out import set_aside
from edgelam_fl.tasks.kinds import device_data
from edgelam_fl.telemetry.events import Event
from edgelam_fl.wire import edgelam_pb2 as pb
from server.parcels import add_corrections
from strategies.aggregation.fedavg import FedAvg
from strategies.api import Contribution, Start
from strategies.registry import Capabilities
from tests.support import WAIT_S, run_folder

# ---------------------------------------------------------------- a fleet of stage hosts


class TakesPlans(Protocol):
    """A stage host: in this process, or another process's."""

    def submit(self, request: pb.SubmitRequest) -> pb.SubmitReply: ...

    def wait(self, request: pb.WaitRequest) -> pb.JobReport: ...


@dataclass
class Fleet:
    """Devices and hosts, and the plans to run them as the server would."""

    source: ModelSource
    config: RunConfig
    devices: dict[str, TakesPlans]
    hosts: dict[str, tuple[TakesPlans, str]]  # edge servers, with the address of each one's data plane
    name: str = "test"
    listening: dict[str, str] = field(default_factory=dict)  # devices that may host: the address of the data plane
    examples: dict[str, int] = field(default_factory=dict)  # of each device; matters with epochs only
    events: list[Event] = field(default_factory=list)
    watch: Callable[[Event], None] = lambda event: None  # called with each event, on the thread that emits it
    round: int = 0
    adapter: adapters.Adapter = field(default_factory=dict)  # that a test goes on from
    settings: ClientSettings = field(default_factory=ClientSettings)  # what an aggregation would ask of the nodes
    aggregation: Capabilities = field(default_factory=Capabilities)  # of the rule that corrects gradients, if any
    privacy: RoundPrivacy | None = None
    hub: tuple[int, bytes] = (0, b"")  # port on this machine, and its key; for snapshots that hosts leave there
    restart: Callable[[str], None] = lambda name: None  # ends a node of a fleet in memory, and begins it anew
    stop: Callable[[str], None] = lambda name: None  # ends the part of a node of a fleet in memory

    def run(
        self, adapter: adapters.Adapter, steps: int, *, step_offset: int = 0, send_to: Sequence[str] | None = None,
        known: Mapping[str, adapters.Adapter] = {}, attempt: int = 1, resumed: pb.StepSnapshot | None = None,
        snapshots: Mapping[str, bytes] = {},
    ) -> dict[str, pb.JobReport]:  # fmt: skip
        """One round; returns the reports by node. `send_to`: who is sent tensors (default: everyone), but for those `known`.

        `attempt`: above 1, of the round before. `resumed`: what all nodes go on from. `snapshots`: what is sent beside plans.
        """
        self.round += attempt == 1
        facts = RoundFacts(
            self.name, self.round, attempt, step_offset, steps, self.settings, self.privacy,
            hub_port=self.hub[0], relay_key=self.hub[1], first_step=resumed.steps if resumed else 0, resume_attempt=resumed.attempt if resumed else 0,
        )  # fmt: skip
        plans = self.plans(facts)
        nodes = self.devices | {name: node for name, (node, _) in self.hosts.items()}
        for name, plan in plans.items():
            tensors = adapters.slice_of(adapter, spans_of(plan))
            plan.adapter_digest = adapters.digest(tensors)
            missing = {tensor: array for tensor, array in tensors.items() if tensor not in known.get(name, {})}
            data = adapters.to_bytes(missing) if send_to is None or name in send_to else b""
            beside = map(adapters.to_bytes, add_corrections(plan, self.aggregation, adapter))
            reply = nodes[name].submit(
                pb.SubmitRequest(plan=plan, adapter=data, corrections=beside, snapshot=snapshots.get(name, b""))
            )
            assert reply.accepted, reply.reason
        return {
            name: nodes[name].wait(pb.WaitRequest(job=part_id(plan), timeout_s=WAIT_S)) for name, plan in plans.items()
        }

    def plans(self, facts: RoundFacts) -> dict[str, pb.Plan]:
        """As the server makes them, without the adapters' digests."""
        edges = [pb.Profile(name=name, role=pb.EDGE, address=address) for name, (_, address) in self.hosts.items()]
        devices = [
            pb.Profile(
                name=name,
                role=pb.DEVICE,
                address=self.listening.get(name, ""),
                examples=self.examples.get(name, 0),
            )
            for name in self.devices
        ]
        layout = make_layout(RunSpec(self.config, self.source), devices, who_may_host(self.config, edges + devices))
        profiles = {profile.name: profile for profile in edges + devices}
        tokens = {name: name.encode() * 4 for name in self.devices}
        return make_plans(RunSpec(self.config, self.source), facts, profiles, layout, {}, tokens)

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self.watch(event)


def _as_all(dial: Dial) -> Dial:
    return dial


@contextmanager
def memory_fleet(
    source: ModelSource,
    config: RunConfig,
    data: Sequence[Path],
    hooks: Mapping[str, NodeHooks] = {},
    dials: Mapping[str, Callable[[Dial], Dial]] = {},
    state: Path | None = None,
    chips: Mapping[str, torch.device] = {},
    examples: Callable[[Path], DeviceExamples] = DeviceExamples,
) -> Iterator[Fleet]:
    """Makes one device per file and the edge servers that the run file wants; with host_on = "any" the devices are the hosts.

    `hooks`: of some of the nodes, by name. `dials`: how some of the nodes dial, by name, from how all others do. `state`: for a
    folder per node; None: nothing is kept over restarts. `chips`: what some of the nodes
    compute on, by name, if not on the CPU. `examples`: makes what reads a device's file.
    """
    fleet = Fleet(source, config, {}, {})
    nodes: dict[str, StageHost] = {}
    dial = route.memory_dial(nodes)
    devices_host = config.split.host_on == "any"

    def begin(name: str, file: Path | None, address: str) -> None:
        nodes[name] = StageHost(
            name, dials.get(name, _as_all)(dial), fleet.emit, examples=examples(file) if file else None,
            address=address, hooks=hooks.get(name, NodeHooks()), state=state / name if state else None,
            server="127.0.0.1" if state else "", chip=chips.get(name, CPU),
        )  # fmt: skip
        if file is None:
            fleet.hosts[name] = (nodes[name], name)
        else:
            fleet.devices[name] = nodes[name]

    def restart(name: str) -> None:
        nodes[name].stop()
        begin(name, files.get(name), nodes[name].address)

    files = {f"device-{number}": file for number, file in enumerate(data, 1)}
    fleet.restart, fleet.stop = restart, lambda name: nodes[name].stop()
    for number in range(1, 0 if devices_host else config.split.least_hosts * config.split.sites + 1):
        begin(f"edge-{number}", None, f"edge-{number}")
    for name, file in files.items():
        address = name if devices_host else ""
        begin(name, file, address)
        fleet.listening[name] = address
        fleet.examples[name] = len(device_data(file, task_settings(config)).training)
    yield fleet
    for node in nodes.values():
        node.stop()


def memory_dial(fleet: Fleet) -> Dial:
    """How somebody else reaches the hosts of a fleet in memory."""
    return route.memory_dial({name: cast(StageHost, host) for name, (host, _) in fleet.hosts.items()})


def check_done(reports: dict[str, pb.JobReport]) -> None:
    problems = {name: report.error for name, report in reports.items() if report.state != "done"}
    assert not problems, problems


def joined(reports: dict[str, pb.JobReport]) -> adapters.Adapter:
    """All nodes' trained tensors; of several sources' versions of a tensor, the last one's."""
    return {
        name: array
        for report in reports.values()
        for contribution in report.contributions
        for name, array in adapters.from_bytes(contribution.adapter).items()
    }


def averaged(start: adapters.Adapter, reports: Mapping[str, pb.JobReport]) -> adapters.Adapter:
    """Returns the adapter that FedAvg makes of all contributions of a round that began with `start`."""
    contributions = [
        Contribution(f"{name} {part.scope} {part.source}", part.weight, adapters.from_bytes(part.adapter))
        for name, report in sorted(reports.items())
        for part in report.contributions
    ]
    return {**start, **FedAvg().aggregate(contributions, Start(start)).tensors}


# ---------------------------------------------------------------- the plain loop: transformers and peft, nothing of ours


def plain_model(source: ModelSource, config: RunConfig, adapter: adapters.Adapter) -> Any:
    """The whole model with peft's adapter on it, by transformers and peft alone; in eval mode. `adapter`: {}: peft's own start."""
    model, lora = copy.deepcopy(plain_base(source.folder, source.gguf, config.model.base)), config.lora
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        task_type="CAUSAL_LM",
        layers_to_transform=list(lora.layers_to_transform) or None,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=list(lora.modules_to_save) or None,
    )
    model = get_peft_model(model, settings)
    if adapter:
        set_peft_model_state_dict(model, {name: torch.from_numpy(array.copy()) for name, array in adapter.items()})
    return model.train(False)


@lru_cache(maxsize=2)
def plain_base(folder: Path, gguf: Path | None, base: str) -> Any:
    """Reads a model by transformers alone, once per process."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[base]
    if gguf is not None:
        return torch.load(read_by_transformers(gguf, dtype), weights_only=False)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def read_by_transformers(gguf: Path, dtype: torch.dtype) -> Path:
    """Returns a file with the model that transformers reads from a GGUF file, which takes it many seconds.

    All workers of a test run share the file, which is torch's; the first that asks makes it.
    """
    made = run_folder() / f"{gguf.stem}-{dtype}.pt"
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
            torch.save(model, made.with_suffix(".part"))
            made.with_suffix(".part").rename(made)
    return made


def plain_adapter(model: Any) -> adapters.Adapter:
    return {
        _as_saved(name): p.detach().float().numpy().copy() for name, p in model.named_parameters() if is_of_peft(name)
    }


def is_of_peft(name: str) -> bool:
    """Returns whether a parameter of a plain model is one that peft trains and saves."""
    return ".lora_" in name or ".modules_to_save." in name


def _as_saved(name: str) -> str:
    """Returns the name under which peft saves a parameter."""
    saved = name.replace(".modules_to_save.default.", ".").replace(".default.", ".")
    return saved.removesuffix(".weight") if "magnitude" in saved else saved


def forward(model: Any, unit: Unit) -> torch.Tensor:
    tokens = unit.shape[1]
    if unit.segments:  # without a mask, transformers tells texts of one row apart by their positions
        rows = [[place for length in lengths for place in range(length)] for lengths in unit.segments]
        positions = torch.tensor([row + [0] * (tokens - len(row)) for row in rows])
        return model(input_ids=unit.inputs, position_ids=positions, use_cache=False).logits
    mask = (torch.arange(tokens)[None, :] < torch.tensor(unit.row_lengths)[:, None]).long()
    return model(input_ids=unit.inputs, attention_mask=mask, use_cache=False).logits


def device_batches(source: ModelSource, config: RunConfig, file: Path, name: str, steps: int) -> list[list[Unit]]:
    """The micro-batches that a device draws."""
    training, _ = set_aside(read_pairs(file, "question", "answer"), config.data.held_out)
    task = _task(source, config)
    examples = task.examples(training).examples
    return [
        task.units(
            [examples[i] for i in batch_indices(len(examples), config.step_examples, step, config.run.seed, name)],
            config.step_micro_batches,
        )
        for step in range(steps)
    ]


def _task(source: ModelSource, config: RunConfig) -> CausalLm:
    return CausalLm(source.folder, config.task)


def union_batches(devices: Sequence[Sequence[Sequence[Unit]]]) -> list[list[list[Unit]]]:
    """`devices`' batches, of each step the rows of all devices in one padded batch: steps for `plain_training`."""
    return [
        [make_units([row for units in step for unit in units for row in _rows(unit)], 1)]
        for step in zip(*devices, strict=True)
    ]


def _rows(unit: Unit) -> list[Example]:
    return [
        Example(ids[:length].tolist(), labels[:length].tolist(), labelled(labels[:length].tolist()))
        for ids, labels, length in zip(unit.inputs, unit.labels, unit.row_lengths, strict=True)
    ]


def plain_evaluation(model: Any, source: ModelSource, config: RunConfig, file: Path) -> float:
    """Loss sum over a device's held-out examples, in the pieces that the device makes of them."""
    _, held_out = set_aside(read_pairs(file, "question", "answer"), config.data.held_out)
    task = _task(source, config)
    examples = task.examples(held_out).examples
    rows = -(-config.federation.batch_size // config.pieces.micro_batches)
    pieces = evaluation_batches(examples, 2 * rows * config.task.max_tokens, config.pieces.window)
    with torch.no_grad():
        return sum(float(plain_loss(model, unit)) for piece in pieces for unit in task.units(piece, 1))


def plain_training(
    model: Any,
    config: RunConfig,
    steps: Sequence[Sequence[Sequence[Unit]]],
    learns: Callable[[str], bool] = lambda name: True,
) -> None:
    """AdamW over `steps`: of each, the devices' pieces in device order, loss sums over the union's label count."""
    parameters = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_of_peft(name) and learns(name))
        if parameter.requires_grad:
            parameters.append(parameter)
    optimizer = plain_optimizer(parameters, config)
    for devices in steps:
        union = sum(unit.count for units in devices for unit in units)
        totals: list[torch.Tensor | None] = [None] * len(parameters)
        for units in devices:
            for unit in units:
                (plain_loss(model, unit, config.task.label_smoothing) / union).backward()
            for number, parameter in enumerate(parameters):
                part, parameter.grad = parameter.grad, None
                totals[number] = part if totals[number] is None else totals[number] + part
        for parameter, total in zip(parameters, totals, strict=True):
            parameter.grad = total
        optimizer.step()
        optimizer.zero_grad()


def plain_loss(
    model: Any, unit: Unit, smoothing: float = 0.0, forward: Callable[[Any, Unit], torch.Tensor] = forward
) -> torch.Tensor:
    """Sums torch's cross entropy over the labelled positions alone: the head sees no others."""
    targets_BT = unit.labels[:, 1:]
    labelled_BT = targets_BT != IGNORED
    head = model.get_output_embeddings()
    selection = head.register_forward_pre_hook(lambda _, states: (states[0][:, :-1][labelled_BT],))
    try:
        logits_NV = forward(model, unit)
    finally:
        selection.remove()
    return torch.nn.functional.cross_entropy(
        logits_NV.float(), targets_BT[labelled_BT], reduction="sum", label_smoothing=smoothing
    )


def plain_optimizer(parameters: list[torch.nn.Parameter], config: RunConfig) -> torch.optim.Optimizer:
    if config.optimizer.name == "sgd":
        return torch.optim.SGD(parameters, lr=config.optimizer.lr, momentum=config.optimizer.momentum)
    lr, betas, eps, decay = (getattr(config.optimizer, key) for key in ("lr", "betas", "eps", "weight_decay"))
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=decay)


def same_bits(left: adapters.Adapter, right: adapters.Adapter) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def relative_distance(got: adapters.Adapter, reference: adapters.Adapter, start: adapters.Adapter) -> float:
    """||got - reference|| / ||reference - start|| over the names of `got`."""
    apart = sum(float(np.sum((got[n].astype(np.float64) - reference[n]) ** 2)) for n in got)
    moved = sum(float(np.sum((reference[n].astype(np.float64) - start[n]) ** 2)) for n in got)
    return (apart / moved) ** 0.5
