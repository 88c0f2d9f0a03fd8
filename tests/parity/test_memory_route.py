"""Split equals whole, to the bit: stage hosts in one process against transformers and peft alone."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ModelError
from edgelam_fl.model.adapter import Adapter, initial_adapter
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import LoraSettings, Span, Stage, load_stages
from edgelam_fl.node.answers import evenly
from edgelam_fl.node.held import Held
from edgelam_fl.node.part import Part
from edgelam_fl.node.play import NodeHooks
from edgelam_fl.plan.making import RoundFacts
from edgelam_fl.tasks.base import Unit
from edgelam_fl.tasks.causal_lm import CausalLm, question
from edgelam_fl.tasks.data import read_pairs
from edgelam_fl.tasks.held_out import set_aside
from edgelam_fl.tasks.metrics import BUILT_IN
from edgelam_fl.telemetry.events import Event, StepClosed, StepDone, of_kind
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.fleet import (
    check_done,
    device_batches,
    forward,
    joined,
    memory_fleet,
    plain_adapter,
    plain_evaluation,
    plain_model,
    plain_training,
    relative_distance,
    same_bits,
    union_batches,
)
from tests.support import run_config

STEPS = 4  # each device begins its data for the second time


class OneDevice:
    """The training of one device over a split model, and the same as one plain loop."""

    def __init__(self, source: ModelSource, config: RunConfig, data_files: list[Path], steps: int) -> None:
        self._source, self._config = source, config
        self.start = initial_adapter(source, config.lora.targets, config.lora.rank, 1)
        self._batches = device_batches(source, config, data_files[0], "device-1", steps)
        with memory_fleet(source, config, data_files[:1]) as fleet:
            self.reports = fleet.run(self.start, steps)
        check_done(self.reports)

    def plain(self, config: RunConfig) -> Adapter:
        """The adapter after the plain loop."""
        model = plain_model(self._source, config, self.start)
        plain_training(model, config, [[units] for units in self._batches])
        return plain_adapter(model)

    def check(self) -> None:
        assert same_bits(joined(self.reports), self.plain(self._config))


@pytest.fixture(scope="module")
def unsplit() -> dict[str, Adapter]:
    """Keeps the plain loop's adapter per base: the number of hosts is nothing to it."""
    return {}


@pytest.mark.parametrize("base", ["fp32", "bf16"])
@pytest.mark.parametrize("hosts", [0, 1, 2, 3])
def test_one_device_trains_like_the_plain_loop(
    tiny: ModelSource, data_files: list[Path], unsplit: dict[str, Adapter], base: str, hosts: int
) -> None:
    config = run_config(tiny.name, f"model.base={base}", f"split.hosts={hosts}", "split.front=1")
    split = OneDevice(tiny, config, data_files, STEPS)
    if base not in unsplit:
        unsplit[base] = split.plain(config)
    assert same_bits(joined(split.reports), unsplit[base])


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_back_without_layers_gets_what_carries_loss_alone(
    tiny: ModelSource, data_files: list[Path], hosts: int
) -> None:
    """Split as the plain loop that selects the same positions, and no other state comes back to the device."""
    config = run_config(tiny.name, "split.back=0", f"split.hosts={hosts}")
    split = OneDevice(tiny, config, data_files, 5)
    split.check()
    report, before = split.reports["device-1"], plain_model(tiny, config, split.start)
    assert report.eval_loss_sum == plain_evaluation(before, tiny, config, data_files[0])
    state_bytes = tiny.hidden_size * torch.float32.itemsize
    payload = {(one.link, one.direction, one.kind): one.payload_bytes for one in report.bytes}
    in_all = report.labels_trained + report.eval_labels
    assert payload[f"exit edge-{hosts}", "received", "ACT"] == in_all * state_bytes
    assert payload[f"exit edge-{hosts}", "sent", "GRAD"] == report.labels_trained * state_bytes


def test_a_device_takes_no_gradient_of_a_front_that_does_not_learn(tiny: ModelSource, data_files: list[Path]) -> None:
    """The host's plan says that the front learns, and the device's does not."""
    config = run_config(tiny.name, "lora.train=['hosts','back']")
    with memory_fleet(tiny, config, data_files[:1]) as fleet:
        plans = fleet.plans

        def unlike(facts: RoundFacts) -> dict[str, pb.Plan]:
            made = plans(facts)
            made["edge-1"].lora.train_front = True
            return made

        fleet.plans = unlike  # type: ignore[method-assign]
        reports = fleet.run(initial_adapter(tiny, config.lora.targets, config.lora.rank, 1), 1)
    assert "host edge-1 sent a gradient for a front that does not learn" in reports["device-1"].error


def test_losses_by_example_need_the_same_positions(tiny: ModelSource, data_files: list[Path]) -> None:
    results = []
    for hosts in (0, 1):
        config = run_config(tiny.name, "split.back=0", f"split.hosts={hosts}", "task.weighting=examples")
        results.append(OneDevice(tiny, config, data_files, 3).reports)
    assert same_bits(*map(joined, results))


@pytest.mark.parametrize("hosts", [0, 1])
def test_plain_sgd_trains_like_the_plain_loop(tiny: ModelSource, data_files: list[Path], hosts: int) -> None:
    config = run_config(tiny.name, f"split.hosts={hosts}", "optimizer.name=sgd", "optimizer.lr=0.5")
    OneDevice(tiny, config, data_files, 5).check()


@pytest.mark.parametrize("labels", ["device", "last-stage"])
@pytest.mark.parametrize(
    "optimizer",
    [
        ["optimizer.weight_decay=0.3", "optimizer.betas=[0.8, 0.95]", "optimizer.eps=1e-3", "optimizer.lr=0.01"],
        ["optimizer.name=sgd", "optimizer.momentum=0.9", "optimizer.lr=0.5"],
    ],
    ids=["adamw", "sgd"],
)
def test_the_optimizers_settings_and_smoothed_labels_are_torchs(
    tiny: ModelSource, data_files: list[Path], optimizer: list[str], labels: str
) -> None:
    """Split as unsplit with torch's AdamW, SGD and cross_entropy alone; what is measured has no smoothing."""
    ends = [f"split.labels={labels}", *(["split.back=0"] if labels == "last-stage" else [])]
    config = run_config(tiny.name, "split.hosts=2", "task.label_smoothing=0.2", *optimizer, *ends)
    split = OneDevice(tiny, config, data_files, 5)
    before = plain_model(tiny, config, split.start)
    assert split.reports["device-1"].eval_loss_sum == plain_evaluation(before, tiny, config, data_files[0])
    split.check()
    keys = {"optimizer": type(config.optimizer)(name=config.optimizer.name, lr=config.optimizer.lr)}
    usual = split.plain(config.model_copy(update=keys))
    assert not same_bits(joined(split.reports), usual)


def test_accumulated_batches_are_one_larger_batch(tiny: ModelSource, data_files: list[Path]) -> None:
    """To the bit with as many pieces, split and unsplit; in one piece, which has other padding, within rounding."""
    accumulated = ["optimizer.gradient_accumulation_steps=3", "federation.batch_size=2", "split.micro_batches=1"]
    one_step = ["federation.batch_size=6", "split.micro_batches=3"]
    found = []
    for settings in (["split.hosts=0", *accumulated], ["split.hosts=2", *accumulated], ["split.hosts=2", *one_step]):
        one = OneDevice(tiny, run_config(tiny.name, *settings), data_files, 3)
        one.check()
        found.append(joined(one.reports))
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])
    piece = ["federation.batch_size=6", "split.micro_batches=1", "split.hosts=0"]
    whole = OneDevice(tiny, run_config(tiny.name, *piece), data_files, 3)
    assert relative_distance(joined(whole.reports), found[0], whole.start) < 1e-4


@pytest.mark.parametrize("settings", [[], ["split.back=0"], ["split.labels=last-stage", "split.back=0"]])
def test_packed_examples_train_as_in_rows_of_their_own(
    tiny: ModelSource, data_files: list[Path], settings: list[str]
) -> None:
    """Split as the plain loop over the same packed rows, to the bit; as without packing, within rounding; over fewer positions."""
    config = run_config(tiny.name, "split.hosts=2", "task.max_tokens=400", "task.packing=true", *settings)
    packed = OneDevice(tiny, config, data_files[2:], 3)
    packed.check()
    before = plain_model(tiny, config, packed.start)
    assert packed.reports["device-1"].eval_loss_sum == plain_evaluation(before, tiny, config, data_files[2])
    alone = run_config(tiny.name, "split.hosts=0", "task.max_tokens=400")
    apart = OneDevice(tiny, alone, data_files[2:], 3)
    assert relative_distance(joined(packed.reports), joined(apart.reports), packed.start) < 1e-4
    losses = [[step.loss_sum for step in one.reports["device-1"].steps] for one in (packed, apart)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    sizes = [
        sum(unit.inputs.numel() for units in device_batches(tiny, of, data_files[2], "device-1", 3) for unit in units)
        for of in (config, alone)
    ]
    assert sizes[0] < sizes[1]


def test_packed_rows_are_dropped_from_and_computed_again_alike_wherever_they_are_cut(
    tiny: ModelSource, data_files: list[Path]
) -> None:
    settings = ["task.packing=true", "task.max_tokens=400", "lora.dropout=0.2", "split.checkpointing=true"]
    found = []
    for hosts in (0, 2):
        config = run_config(tiny.name, *settings, f"split.hosts={hosts}")
        found.append(joined(OneDevice(tiny, config, data_files[2:], 2).reports))
    assert same_bits(*found)


@pytest.mark.parametrize(
    "settings",
    [
        ["split.hosts=0"],
        ["split.hosts=2"],
        ["split.hosts=1", "split.back=0"],
        ["wire.front_cache_mb=9", "lora.train=['hosts', 'back']"],
    ],
)
def test_greedy_answers_over_a_route_are_those_of_the_whole_model(
    tiny: ModelSource, data_files: list[Path], settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, str]] = []

    def noted(answer: str, truth: str) -> float:
        said.append((answer, truth))
        return 1.0

    monkeypatch.setitem(cast("dict[str, Any]", BUILT_IN), "exact_match", noted)
    asked = ["task.metrics=exact_match", "task.metrics_examples=3", "task.metrics_tokens=6", "data.held_out=0.3"]
    config = run_config(tiny.name, *settings, *asked)
    start = initial_adapter(tiny, config.lora.targets, config.lora.rank, 1)
    with memory_fleet(tiny, config, data_files[:1]) as fleet:
        reports = fleet.run(start, 0)
    check_done(reports)
    assert dict(reports["device-1"].eval_sums) == {"answers": 3, "answers/exact_match": 3}
    task, model = CausalLm(tiny.folder, config.task), plain_model(tiny, config, start)
    _, held_out = set_aside(read_pairs(data_files[0], "question", "answer"), 0.3)
    expected = []
    for example, (_, truth) in zip(evenly(task.examples(held_out).examples, 3), evenly(held_out, 3), strict=True):
        prompt, _ = question(example) or ([], [])
        whole = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=6, eos_token_id=[*task.stop_ids], pad_token_id=1,
        )[0, len(prompt) :].tolist()  # fmt: skip
        text = task.tokenizer.decode([token for token in whole if token not in task.stop_ids], skip_special_tokens=True)
        expected.append((text.strip(), truth))
    assert said == expected


class FrozenEnds:
    """Three devices of which hosts alone learn: the training over hosts, once per number of them, and plain loops."""

    def __init__(self, source: ModelSource, data_files: list[Path]) -> None:
        self._source, self._files, self._over = source, data_files, dict[int, Adapter]()
        self._config = run_config(source.name, "lora.train=hosts")
        self.start = initial_adapter(source, self._config.lora.targets, self._config.lora.rank, 1)
        self.devices = [
            device_batches(source, self._config, file, f"device-{n}", STEPS) for n, file in enumerate(data_files, 1)
        ]

    def over(self, hosts: int) -> Adapter:
        if hosts not in self._over:
            config = run_config(self._source.name, "lora.train=hosts", f"split.hosts={hosts}")
            with memory_fleet(self._source, config, self._files) as fleet:
                reports = fleet.run(self.start, STEPS)
            check_done(reports)
            self._over[hosts] = joined(reports)
        return self._over[hosts]

    def plain(self, steps: Sequence[Sequence[Sequence[Unit]]]) -> Adapter:
        model = plain_model(self._source, self._config, self.start)
        plain_training(model, self._config, steps, learns=lambda name: name in _middle(name))
        return plain_adapter(model)

    @cached_property
    def in_pieces(self) -> Adapter:
        """The plain loop over the pieces of all devices."""
        return self.plain(list(zip(*self.devices, strict=True)))


@pytest.fixture(scope="module")
def frozen_ends(tiny: ModelSource, data_files: list[Path]) -> FrozenEnds:
    return FrozenEnds(tiny, data_files)


@pytest.mark.parametrize("hosts", [1, 2])
def test_three_devices_with_frozen_ends_train_like_the_plain_loop(frozen_ends: FrozenEnds, hosts: int) -> None:
    got, reference = frozen_ends.over(hosts), frozen_ends.in_pieces
    assert set(got) < set(reference)
    assert same_bits(got, {name: reference[name] for name in got})


def _middle(name: str) -> str:
    """Returns the name itself for layers 2 and 3, the host's; an empty text for the devices' layers."""
    return name if any(f".layers.{layer}." in name for layer in (2, 3)) else ""


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_the_route_are_the_models(
    tiny: ModelSource, tied: bool, tmp_path: Path, data_files: list[Path]
) -> None:
    from edgelam_fl.model.source import find_model
    from tests.support import write_tiny_llama

    source = tiny if tied else find_model(str(write_tiny_llama(tmp_path, tied=False)))
    config = run_config(source.name)
    start = initial_adapter(source, config.lora.targets, config.lora.rank, 1)
    unit = device_batches(source, config, data_files[2], "device-3", 1)[0][1]
    assert len(set(unit.row_lengths)) > 1, "the test needs padding"
    stages = load_stages(
        source,
        [Span(0, 2, embed=True), Span(2, 4), Span(4, 6, head=True)],
        "fp32",
        LoraSettings(8, 16.0, config.lora.targets),
    )
    hidden = unit.inputs
    for stage in stages:
        stage.load_adapter(start)
        hidden = stage(hidden, unit.row_lengths)
    assert torch.equal(hidden, forward(plain_model(source, config, start), unit))


def test_union_batch_is_within_tolerance(frozen_ends: FrozenEnds) -> None:
    """Joint training against one concatenated, padded batch per step: the same update within 1e-5."""
    whole = frozen_ends.plain(union_batches(frozen_ends.devices))
    assert relative_distance(frozen_ends.over(1), whole, frozen_ends.start) < 1e-5


@pytest.mark.parametrize("base", ["fp32", "bf16", "int8", "int8 bf16", "nf4", "nf4 bf16"])
def test_a_route_over_a_host_equals_the_route_over_none(tiny: ModelSource, data_files: list[Path], base: str) -> None:
    """Each tensor is quantized alone, so a slice holds the whole model's numbers; two rounds, so that moments are kept too."""
    results = []
    kept, _, computed = base.partition(" ")
    for hosts in (0, 1):
        settings = [f"model.base={kept}", f"model.compute={computed or 'auto'}", f"split.hosts={hosts}"]
        config = run_config(tiny.name, *settings)
        start = initial_adapter(tiny, config.lora.targets, config.lora.rank, 1)
        with memory_fleet(tiny, config, data_files[:1]) as fleet:
            first = fleet.run(start, 3)
            check_done(first)
            second = fleet.run(joined(first), 3, step_offset=3, send_to=[])
        check_done(second)
        assert {report.moments for report in second.values()} == {"warm"}
        results.append((joined(second), second["device-1"].eval_loss_sum))
    assert same_bits(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_a_change_of_cuts_between_rounds_changes_no_number(tiny: ModelSource, data_files: list[Path]) -> None:
    """Layers move from one host to the other, their adapters with them; those of layers that stay are not sent again.

    Plain SGD: AdamW's moments do not travel.
    """
    results = []
    for second in (2, 4):
        settings = ["split.hosts=2", "split.front=1", "split.back=1", "optimizer.name=sgd", "optimizer.lr=0.5"]
        config = run_config(tiny.name, *settings, "split.cuts=[2]")
        start = initial_adapter(tiny, config.lora.targets, config.lora.rank, 1)
        with memory_fleet(tiny, config, data_files) as fleet:
            first = fleet.run(start, 3)
            check_done(first)
            fleet.config = run_config(tiny.name, *settings, f"split.cuts=[{second}]")
            known = {name: joined({name: report}) for name, report in first.items() if report.role == pb.EDGE}
            reports = fleet.run(joined(first), 3, step_offset=3, known=known)
        check_done(reports)
        assert (reports["edge-1"].host.first_layer, reports["edge-1"].host.last_layer) == (1, second)
        results.append(joined(reports))
    assert same_bits(*results)


def test_a_host_that_gave_up_its_part_is_not_waited_for(tiny: ModelSource, data_files: list[Path]) -> None:
    def fail(*_: Any, **__: Any) -> list[Stage]:
        raise ModelError("no such slice here")

    config = run_config(tiny.name)
    start = initial_adapter(tiny, config.lora.targets, config.lora.rank, 1)
    with memory_fleet(tiny, config, data_files[:1], {"edge-1": NodeHooks(load=fail)}) as fleet:
        reports = fleet.run(start, 1)
    assert "cannot be found, read or cut as asked" in reports["edge-1"].error
    assert "node edge-1 has given up its part of test/1/1" in reports["device-1"].error


def test_a_slice_is_gone_before_another_one_is_loaded(tiny: ModelSource, data_files: list[Path]) -> None:
    """A host has memory for one of them."""
    config = run_config(tiny.name, "split.hosts=2", "split.front=1", "split.back=1", "split.cuts=[2]")
    start = initial_adapter(tiny, config.lora.targets, config.lora.rank, 1)
    seen: list[weakref.ref[Stage]] = []
    left: list[int] = []

    def load(*arguments: Any, **options: Any) -> list[Stage]:
        left.append(sum(stage() is not None for stage in seen))
        stages = load_stages(*arguments, **options)
        seen.extend(map(weakref.ref, stages))
        return stages

    with memory_fleet(tiny, config, data_files[:1], {"edge-1": NodeHooks(load=load)}) as fleet:
        first = fleet.run(start, 3)
        check_done(first)
        fleet.config = run_config(tiny.name, "split.hosts=2", "split.front=1", "split.back=1", "split.cuts=[4]")
        check_done(fleet.run(joined(first), 3, step_offset=3))
    assert left == [0, 0]


def test_a_device_lost_in_a_chain_costs_its_own_micro_batches(tiny: ModelSource, data_files: list[Path]) -> None:
    """Three devices train over two hosts; one leaves after its third step. Both hosts finish, with the same members in every step."""
    config = run_config(tiny.name, "split.hosts=2")
    start = initial_adapter(tiny, config.lora.targets, config.lora.rank, 1)
    parts: list[Part] = []

    @contextmanager
    def around(part: Part, held: Held) -> Iterator[None]:
        parts.append(part)
        yield

    def watch(event: Event) -> None:
        if isinstance(event, StepDone) and (event.job, event.step) == ("test/1/1/device-3", 2):
            parts[0].cancel("unplugged")

    with memory_fleet(tiny, config, data_files, {"device-3": NodeHooks(around_play=around)}) as fleet:
        fleet.watch = watch
        reports = fleet.run(start, 8)
    assert reports["device-3"].error == "unplugged"
    check_done({name: report for name, report in reports.items() if name != "device-3"})
    stayed = sum(step.labels for name in ("device-1", "device-2") for step in reports[name].steps)
    done = [step.labels for step in of_kind(fleet.events, StepDone) if step.job == "test/1/1/device-3"]
    assert len(done) == 3
    assert reports["edge-1"].host.labels_trained == reports["edge-2"].host.labels_trained >= stayed + sum(done)
    closed = list(of_kind(fleet.events, StepClosed))
    assert {event.job.split("/")[-1] for event in closed} == {"edge-1", "edge-2"}
    assert all(event.left_out[0].node == "device-3" for event in closed)
