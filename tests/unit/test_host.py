"""A joint host gets hand-made frames over memory links: the sums that it makes, the devices that it lets in or leaves out."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from typing import Any, TypeVar

import pytest
import torch

from edgelam_fl.errors import EdgelamError, PeerLost, ProtocolError
from edgelam_fl.model.adapter import Span, initial_adapter
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import LoraSettings, Stage, load_stages
from edgelam_fl.node.front_cache import RunFronts
from edgelam_fl.plan.layout import make_layout
from edgelam_fl.plan.making import RoundFacts, RoundPrivacy, make_plans
from edgelam_fl.plan.reading import hosted_trains
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.split.group import Group
from edgelam_fl.split.host import AroundPass, Host
from edgelam_fl.split.trainee import Trainee
from edgelam_fl.split.workers import Work, Workers, workers_of
from edgelam_fl.telemetry.events import JobEvent, LinkLost, NodeLeftOut, StepClosed, of_kind
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.link import Frame, Link
from edgelam_fl.wire.memory import MemoryLink, memory_pair
from tests.links import make_terms
from tests.support import run_config

LABELS = {0: 3, 1: 17, 2: 1}  # so unequal that a mean of means would be far off
TOKENS, LR = 20, 1.0
WAIT_S = 6.0
_Kind = TypeVar("_Kind", bound=JobEvent)


def dials_nobody(*_: Any) -> Link:
    raise AssertionError("the last host of a route dials nobody")


class Site:
    """A host of layers [2, 4) on a thread of its own, and the events that it emitted."""

    def __init__(
        self,
        source: ModelSource,
        devices: int = 3,
        *overrides: str,
        steps: int = 1,
        privacy: RoundPrivacy | None = None,
        fronts: RunFronts | None = None,
        workers: int = 1,
        around_pass: AroundPass = nullcontext,
        **deadlines: Any,
    ) -> None:
        self.source, self.events = source, list[JobEvent]()
        config = run_config(source.name, f"optimizer.lr={LR}", *overrides)
        names = [f"device-{number}" for number in range(devices)]
        edge, members = pb.Profile(name="edge-1", role=pb.EDGE), [pb.Profile(name=n, role=pb.DEVICE) for n in names]
        layout = make_layout(RunSpec(config, source), members, [edge])
        facts, tokens = RoundFacts("run", 1, 1, 0, steps, privacy=privacy), {n: n.encode() for n in names}
        profiles = {profile.name: profile for profile in [edge, *members]}
        self.plan = make_plans(RunSpec(config, source), facts, profiles, layout, {}, tokens)["edge-1"]
        for name, seconds in deadlines.items():
            setattr(self.plan.deadlines, name, seconds)
        self.stage = middle(source)
        self.start = {name: p.detach().clone() for name, p in self.stage.adapter_parameters.items()}
        emit = self.events.append
        self.group = Group(self.plan, source.hidden_size, torch.float32, self.plan.window, dials_nobody, emit, fronts)
        trainee = Trainee([self.stage])
        trainee.start(self.stage.adapter(), hosted_trains(self.plan), self.plan)
        trainee.optimizer = torch.optim.SGD(trainee.parameters, lr=LR) if trainee.parameters else None
        views = [self.stage, *(self.stage.view() for _ in range(workers - 1))]
        self.host = Host(self.plan, views, self.group, [trainee], None, emit, around_pass=around_pass)
        self.problem: Exception | None = None
        self.ended_by: BaseException | None = None  # what is nobody's to catch
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.host.run()
        except EdgelamError as error:
            self.problem = error
        except SystemExit as error:
            self.ended_by = error

    def open(self, devices: int = 3) -> list[Device]:
        self._thread.start()
        return [Device(self, index) for index in range(devices)]

    def end(self) -> None:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "the host is still at work"

    def moved(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() - self.start[name] for name, p in self.stage.adapter_parameters.items()}

    def event(self, kind: type[_Kind]) -> _Kind:
        return next(of_kind(self.events, kind))


def middle(source: ModelSource) -> Stage:
    (stage,) = load_stages(source, [Span(2, 4)], "fp32", LoraSettings(8, 16.0, ("q_proj", "v_proj")))
    stage.load_adapter(initial_adapter(source, ("q_proj", "v_proj"), 8, 1))
    stage.set_trainable(lambda layer: True)
    return stage


def hello(site: Site, index: int, side: int, **other: Any) -> pb.Hello:
    fields = {
        "version": 1, "job": "run/1/1", "node": f"device-{index}", "device_index": index, "link": side,
        "route_token": f"device-{index}".encode(), "model_digest": site.source.digest, "window": 2, "codecs": ["raw"],
    }  # fmt: skip
    return pb.Hello(**{**fields, **other})


class Device:
    """A device whose two links are used by hand. Its loss on one row: the sum over its labels of hidden[t] . target."""

    def __init__(self, site: Site, index: int) -> None:
        self.site, self.index, self.labels = site, index, LABELS[index]
        self.frames = list[Frame]()
        self.news = threading.Condition()
        self.entry, self.exit = self._link(pb.ENTRY), self._link(pb.EXIT)
        generator = torch.Generator().manual_seed(index)
        self.hidden = torch.randn(1, TOKENS, site.source.hidden_size, generator=generator)
        self.target = torch.randn(site.source.hidden_size, generator=generator)

    def _link(self, side: int) -> MemoryLink:
        ours, theirs = memory_pair(str(side), ByteCounters(), ByteCounters())
        with theirs.holding_back():
            answer = self.site.group.admit(hello(self.site, self.index, side), theirs)
            assert isinstance(answer, pb.Ready), answer
            ours.open(make_terms(on_frame=self._heard)(str(side), ByteCounters(), answer))
        return ours

    def _heard(self, _: Any, frame: Frame) -> None:
        with self.news:
            self.frames.append(frame)
            self.news.notify_all()

    def await_frame(self, kind: int, step: int = 0) -> Frame:
        def found() -> Frame | None:
            return next((f for f in self.frames if f.header.kind == kind and f.header.step == step), None)

        with self.news:
            assert self.news.wait_for(found, WAIT_S), f"device {self.index} heard only {self.heard()}"
            frame = found()
        assert frame is not None
        return frame

    def heard(self) -> list[str]:
        return [pb.Kind.Name(frame.header.kind) for frame in self.frames]

    def table(self, steps: int = 1, units: int = 1) -> None:
        row = pb.StepRow(labels=self.labels, rows=[1] * units, tokens=[TOKENS] * units)
        self.exit.send(pb.Header(kind=pb.TABLE, table=pb.Table(steps=[row] * steps)))

    def act(self, step: int = 0, unit: int = 0, phase: int = pb.TRAIN, **other: Any) -> None:
        """Sends hidden states, the device's own by default; None: a frame without any."""
        sent = other.pop("hidden", self.hidden)
        fields = {"row_lengths": [TOKENS], "micro_batch": unit, "step": step, "phase": phase, **other}
        self.entry.send(pb.Header(kind=pb.ACT, device_index=self.index, **fields), sent)

    def loss(self, output: torch.Tensor) -> torch.Tensor:
        return (output[0, : self.labels] @ self.target).sum()

    def grad(self, union: int, step: int = 0, unit: int = 0, spoil: Callable[[torch.Tensor], Any] = id) -> None:
        output = self.await_frame(pb.ACT, step).tensor.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.loss(output) / union, output)
        spoil(gradient)
        fields: dict[str, Any] = {
            "phase": pb.TRAIN, "step": step, "micro_batch": unit, "device_index": self.index,
        }  # fmt: skip
        self.exit.send(pb.Header(kind=pb.GRAD, **fields), gradient)

    def step(self, union: int, step: int = 0) -> None:
        self.act(step)
        self.grad(union, step)

    def done(self) -> None:
        for link in (self.exit, self.entry):
            link.send(pb.Header(kind=pb.DONE))
            link.close()


def expected_move(source: ModelSource, devices: list[Device]) -> dict[str, torch.Tensor]:
    """Returns -lr * gradient of (sum of the losses) / (sum of the labels), by plain torch on a stage of its own."""
    stage = middle(source)
    total: Any = sum(device.loss(stage(device.hidden, [TOKENS])) for device in devices)
    (total / sum(device.labels for device in devices)).backward()
    return {name: -LR * p.grad for name, p in stage.adapter_parameters.items()}


def assert_moved(site: Site, expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(site.moved(), expected, rtol=1e-4, atol=1e-7)
    assert any(move.abs().max() > 1e-4 for move in expected.values()), "the test would not see a missing step"


def test_a_joint_step_is_the_gradient_of_the_union(tiny: ModelSource) -> None:
    site = Site(tiny)
    devices = site.open()
    for device in devices:
        device.table()
    union = sum(LABELS.values())
    for device in devices:
        (total,) = device.await_frame(pb.TABLE_ALL).header.table_all.steps
        assert (total.labels, list(total.members)) == (union, [0, 1, 2])
        device.step(union)
    for device in devices:
        close = device.await_frame(pb.STEP_CLOSE).header.step_close
        assert (list(close.counted), close.labels_counted) == ([0, 1, 2], union)
        device.done()
    site.end()
    assert_moved(site, expected_move(tiny, devices))
    assert site.host.labels_trained == union


def test_the_gradient_for_the_device_is_plain_torchs(tiny: ModelSource) -> None:
    site = Site(tiny, 1)
    (device,) = site.open(1)
    device.table()
    device.step(device.labels)
    got = device.await_frame(pb.GRAD).tensor
    device.done()
    site.end()
    hidden = device.hidden.clone().requires_grad_(True)
    (device.loss(middle(tiny)(hidden, [TOKENS])) / device.labels).backward()
    assert torch.equal(got, hidden.grad)


def test_positions_alone_come_back_and_their_gradient_is_the_whole_ones(tiny: ModelSource) -> None:
    """A gradient of some positions is one that is zero at all others."""
    site = Site(tiny, 1)
    (device,) = site.open(1)
    device.table()
    wanted = [1, 4, TOKENS - 1]
    device.act(positions=wanted)
    frame = device.await_frame(pb.ACT)
    assert not frame.header.positions
    hidden = device.hidden.clone().requires_grad_(True)
    stage = middle(tiny)
    states = stage(hidden, [TOKENS])
    assert torch.equal(frame.tensor, states[:, wanted])
    gradient = torch.randn(1, 3, hidden.shape[2], generator=torch.Generator().manual_seed(9)) * 0.01
    device.exit.send(pb.Header(kind=pb.GRAD, phase=pb.TRAIN), gradient)
    got = device.await_frame(pb.GRAD).tensor
    device.await_frame(pb.STEP_CLOSE)
    device.done()
    site.end()
    whole = torch.zeros_like(states)
    whole[:, wanted] = gradient
    states.backward(whole)
    assert torch.equal(got, hidden.grad)
    assert_moved(site, {name: -LR * p.grad for name, p in stage.adapter_parameters.items()})


@pytest.mark.parametrize("positions", [[3, 3], [4, 2], [TOKENS], [0, 2**32 - 1]])
def test_positions_that_a_micro_batch_does_not_have_cost_their_sender_only(
    tiny: ModelSource, positions: list[int]
) -> None:
    site = Site(tiny, 2)
    bad, good = site.open(2)
    bad.act(phase=pb.EVAL, positions=positions)
    assert "positions to send back" in bad.await_frame(pb.CANCEL).header.cancel.reason
    good.table()
    good.step(LABELS[1])
    assert list(good.await_frame(pb.STEP_CLOSE).header.step_close.counted) == [1]
    good.done()
    site.end()


def test_states_that_a_host_is_to_keep_come_once_or_when_it_asks(tiny: ModelSource) -> None:
    with closing(RunFronts("run", None, lambda folder: 10**9)) as fronts:
        fronts.allow(10**9, 1)
        site = Site(tiny, 1, steps=2, fronts=fronts)
        (device,) = site.open(1)
        assert device.entry.terms.front_cache == fronts.number
        assert not device.exit.terms.front_cache
        device.table(steps=2)
        own, names = device.hidden, [b"n" * 16]
        device.act(phase=pb.EVAL, hidden=None, kept_rows=[0], row_names=names)
        assert list(device.await_frame(pb.MISSING).header.kept_rows) == [0]
        device.act(phase=pb.EVAL, row_names=names)
        whole = device.await_frame(pb.ACT).tensor
        device.frames.clear()
        device.act(hidden=None, kept_rows=[0], row_names=names)
        assert torch.equal(device.await_frame(pb.ACT).tensor, whole)
        device.grad(device.labels)
        device.await_frame(pb.STEP_CLOSE)
        device.act(step=1, hidden=own + 1.0, row_names=names)
        assert not torch.equal(device.await_frame(pb.ACT, 1).tensor, whole), "what comes counts, whatever is kept"
        device.grad(device.labels, 1)
        device.done()
        site.end()
    assert site.problem is None


@pytest.mark.parametrize(
    ("asked", "keeps", "words"),
    [
        (1, False, "names of states, and this host keeps none"),
        (2, True, "came without states that it was asked for"),
    ],
)
def test_a_device_that_keeps_on_naming_states_that_it_never_sent_is_out(
    tiny: ModelSource, asked: int, keeps: bool, words: str
) -> None:
    with closing(RunFronts("run", None, lambda folder: 10**9)) as fronts:
        fronts.allow(10**9, 1)
        site = Site(tiny, 1, fronts=fronts if keeps else None)
        (device,) = site.open(1)
        for _ in range(asked):
            device.act(phase=pb.EVAL, hidden=None, row_names=[b"n" * 16], kept_rows=[0])
        assert words in device.await_frame(pb.CANCEL).header.cancel.reason
        site.end()


def test_a_device_cannot_ask_for_more_micro_batches_than_its_window(tiny: ModelSource) -> None:
    with closing(RunFronts("run", None, lambda folder: 10**9)) as fronts:
        fronts.allow(10**9, 1)
        site = Site(tiny, 1, fronts=fronts)
        (device,) = site.open(1)
        for unit in range(3):
            device.act(phase=pb.EVAL, unit=unit, hidden=None, row_names=[b"n" * 16], kept_rows=[0])
        assert "more than 2 micro-batches in flight" in device.await_frame(pb.CANCEL).header.cancel.reason
        site.end()


@pytest.mark.parametrize(("train", "kind"), [("hosts", pb.GRAD_END), ("front", pb.GRAD), ("back", pb.GRAD_END)])
def test_a_gradient_goes_to_the_previous_node_only_if_something_learns_there(
    tiny: ModelSource, train: str, kind: int
) -> None:
    site = Site(tiny, 1, f"lora.train={train}")
    (device,) = site.open(1)
    device.table()
    device.step(device.labels)
    assert (device.await_frame(kind).tensor is not None) == (kind == pb.GRAD)
    device.done()
    site.end()


def test_a_device_lost_in_mid_step_costs_only_its_own_part(tiny: ModelSource) -> None:
    site = Site(tiny, step_s=60.0)
    devices = site.open()
    for device in devices:
        device.table()
    union = sum(LABELS.values())
    devices[1].act()
    devices[1].await_frame(pb.ACT)
    devices[1].entry.close()
    rest = [devices[0], devices[2]]
    for device in rest:
        device.step(union)
    for device in rest:
        close = device.await_frame(pb.STEP_CLOSE).header.step_close
        assert (list(close.counted), close.labels_counted) == ([0, 2], 3 + 1)
        assert [left.device_index for left in close.left_out] == [1]
        device.done()
    site.end()
    assert site.problem is None
    assert_moved(site, expected_move(tiny, rest))
    reason = "link entry device-1: the other end closed the link"
    assert site.event(LinkLost) == LinkLost(link="device-1", reason=reason)
    assert site.event(StepClosed).left_out == (NodeLeftOut(node="device-1", reason=reason),)


def test_a_private_step_divides_by_a_constant_whoever_came(tiny: ModelSource) -> None:
    """Each device's gradient is the mean over its own labels: no device's counts matter to the others."""
    site = Site(tiny, privacy=RoundPrivacy(clip=1e9, noise=0.0, devices=8))
    devices = site.open()
    for device in devices:
        device.table()
    for device in devices[:2]:
        device.step(device.labels)
    devices[2].act()
    devices[2].grad(1, spoil=lambda gradient: gradient.fill_(float("nan")))
    for device, counted in zip(devices, ([0], [1], []), strict=True):
        totals, close = (device.await_frame(kind).header for kind in (pb.TABLE_ALL, pb.STEP_CLOSE))
        own = pb.StepTotal(labels=device.labels, members=[device.index])
        assert list(totals.table_all.steps) == [own], "nobody learns who else takes part"
        assert list(close.step_close.counted) == counted
        assert [left.device_index for left in close.step_close.left_out] == [device.index] * (not counted)
        assert not close.step_close.labels_counted
        device.done()
    site.end()
    stage = middle(tiny)
    means: Any = sum(device.loss(stage(device.hidden, [TOKENS])) / device.labels for device in devices[:2])
    means.backward()
    assert_moved(site, {name: -LR * p.grad / 8 for name, p in stage.adapter_parameters.items()})


def test_a_device_without_labels_is_a_gradient_of_zeros_in_a_private_step(tiny: ModelSource) -> None:
    """The steps are the same whether it has any: its data must not decide what is stepped."""
    site = Site(tiny, 2, privacy=RoundPrivacy(clip=1e9, noise=0.0, devices=4))
    devices = site.open(2)
    devices[1].labels = 0
    devices[0].table()
    devices[1].table(units=0)
    devices[0].step(devices[0].labels)
    for device in devices:
        assert list(device.await_frame(pb.STEP_CLOSE).header.step_close.counted) == [device.index]
        device.done()
    site.end()
    assert_moved(site, {name: move / 4 for name, move in expected_move(tiny, devices[:1]).items()})


def test_a_private_step_that_counts_nobody_is_one_of_noise(tiny: ModelSource) -> None:
    """To stay where it was would say that nobody was counted."""
    site = Site(tiny, 1, privacy=RoundPrivacy(clip=0.5, noise=4.0, devices=10))
    (device,) = site.open(1)
    device.table()
    device.act()
    device.grad(1, spoil=lambda gradient: gradient.fill_(float("nan")))
    assert list(device.await_frame(pb.STEP_CLOSE).header.step_close.counted) == []
    device.done()
    site.end()
    moved = torch.cat([move.flatten() for move in site.moved().values()])
    assert all(move.any() for move in site.moved().values())
    assert moved.std().item() == pytest.approx(
        LR * 0.5 * 4.0 / 10, rel=0.2
    )  # unseeded: 5 % is 8 deviations off already


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_out_that_device_alone(tiny: ModelSource, value: float) -> None:
    site = Site(tiny)
    devices = site.open()
    for device in devices:
        device.table()
    union = sum(LABELS.values())
    devices[0].step(union)
    devices[1].act()
    devices[1].grad(union, spoil=lambda gradient: gradient[0, 3, 5].fill_(value))
    devices[2].step(union)
    for device in devices:
        close = device.await_frame(pb.STEP_CLOSE).header.step_close
        assert list(close.counted) == [0, 2]
        device.done()
    site.end()
    assert close.left_out[0].reason == "a gradient that is not finite"
    assert_moved(site, expected_move(tiny, [devices[0], devices[2]]))


def test_a_late_device_is_left_out_and_goes_on_with_the_next_step(tiny: ModelSource) -> None:
    site = Site(tiny, 2, steps=2, step_s=1.0)
    prompt, late = site.open(2)
    for device in (prompt, late):
        device.table(steps=2)
    union = LABELS[0] + LABELS[1]
    late.act()
    prompt.step(union)
    close = late.await_frame(pb.STEP_CLOSE).header.step_close
    assert list(close.counted) == [0]
    assert [(left.device_index, left.reason) for left in close.left_out] == [(1, "later than 1 s")]
    late.grad(union)  # of the closed step: dropped
    for device in (prompt, late):
        device.step(union, step=1)
    close = late.await_frame(pb.STEP_CLOSE, step=1).header.step_close
    assert list(close.counted) == [0, 1]
    for device in (prompt, late):
        device.done()
    site.end()
    assert site.problem is None


def test_a_device_late_in_three_steps_is_out_of_the_round(tiny: ModelSource) -> None:
    site = Site(tiny, 2, steps=4, step_s=0.3)
    prompt, late = site.open(2)
    for device in (prompt, late):
        device.table(steps=4)
    for step in range(4):
        prompt.step(LABELS[0] + LABELS[1], step)
        prompt.await_frame(pb.STEP_CLOSE, step)
    prompt.done()
    site.end()
    assert late.await_frame(pb.CANCEL).header.cancel.reason == "left out of 3 steps in a row: later than 0 s"
    assert site.problem is None


class Held:
    """Holds a device's passes, from one on, until they are let go, and notes when the first of them has begun."""

    def __init__(self, index: int, error: BaseException | None = None, number: int = 1) -> None:
        self.began, self.let_go = threading.Event(), threading.Event()
        self._index, self._error, self._free = index, error, number - 1

    @contextmanager
    def __call__(self, header: pb.Header) -> Iterator[None]:
        self._free -= header.device_index == self._index
        if header.device_index == self._index and self._free < 0:
            self.began.set()
            assert self.let_go.wait(WAIT_S)
            if self._error is not None:
                raise self._error
        yield


def test_two_workers_compute_at_once_and_share_all_weights(tiny: ModelSource) -> None:
    held = Held(0)
    site = Site(tiny, 2, workers=2, around_pass=held)
    slow, fast = site.open(2)
    union = LABELS[0] + LABELS[1]
    for device in (slow, fast):
        device.table()
    slow.act()
    assert held.began.wait(WAIT_S)
    fast.step(union)
    fast.await_frame(pb.GRAD)  # both passes of `fast`, while one of `slow` is being computed
    assert slow.heard() == ["TABLE_ALL"]
    held.let_go.set()
    slow.grad(union)
    for device in (slow, fast):
        device.await_frame(pb.STEP_CLOSE)
        device.done()
    site.end()
    assert_moved(site, expected_move(tiny, [slow, fast]))
    view = site.stage.view()
    assert all(one is other for one, other in zip(site.stage.parameters(), view.parameters(), strict=True))


def test_what_a_worker_computes_for_a_lost_device_is_dropped(tiny: ModelSource) -> None:
    """The step is not closed before the worker is through, and counts the others alone."""
    held = Held(1)
    site = Site(tiny, workers=2, around_pass=held, step_s=60.0)
    devices = site.open()
    union = sum(LABELS.values())
    for device in devices:
        device.table()
    devices[1].act()
    assert held.began.wait(WAIT_S)
    devices[1].entry.close()
    rest = [devices[0], devices[2]]
    for device in rest:
        device.step(union)
        device.await_frame(pb.GRAD)
    assert "STEP_CLOSE" not in devices[0].heard()
    held.let_go.set()
    for device in rest:
        assert list(device.await_frame(pb.STEP_CLOSE).header.step_close.counted) == [0, 2]
        device.done()
    site.end()
    assert "ACT" not in devices[1].heard()
    assert_moved(site, expected_move(tiny, rest))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ProtocolError("odd"), "broke the protocol: odd"),
        (ValueError("x"), "a frame that host edge-1 cannot work on: ValueError"),
    ],
)
def test_an_error_of_a_worker_costs_the_device_whose_pass_it_was(
    tiny: ModelSource, error: Exception, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    held = Held(1, error)
    site = Site(tiny, 2, workers=2, around_pass=held)
    good, bad = site.open(2)
    for device in (good, bad):
        device.table()
    held.let_go.set()
    bad.act()
    assert bad.await_frame(pb.CANCEL).header.cancel.reason == reason
    good.step(LABELS[0] + LABELS[1])
    assert list(good.await_frame(pb.STEP_CLOSE).header.step_close.counted) == [0]
    good.done()
    site.end()
    assert site.problem is None
    capsys.readouterr()  # the error in full


def test_an_error_that_is_nobodys_frame_ends_the_part(tiny: ModelSource) -> None:
    held = Held(0, SystemExit("the interpreter ends"))
    site = Site(tiny, 1, workers=2, around_pass=held)
    (device,) = site.open(1)
    device.table()
    held.let_go.set()
    device.act()
    site.end()
    assert isinstance(site.ended_by, SystemExit)


def test_nobody_is_late_while_a_worker_computes(tiny: ModelSource) -> None:
    held = Held(0, number=2)  # the backward pass
    site = Site(tiny, 2, workers=2, around_pass=held)
    slow, fast = site.open(2)
    union = LABELS[0] + LABELS[1]
    for device in (slow, fast):
        device.table()
    slow.step(union)
    assert held.began.wait(WAIT_S)
    site.plan.deadlines.step_s = 1e-6  # it has passed
    fast.step(union)
    fast.await_frame(pb.GRAD)
    held.let_go.set()
    assert list(fast.await_frame(pb.STEP_CLOSE).header.step_close.counted) == [0, 1]
    for device in (slow, fast):
        device.done()
    site.end()


def test_units_of_a_closed_step_do_not_count_against_the_window(tiny: ModelSource) -> None:
    """A device that was left out drops its open micro-batches and sends those of the next step: at most `window` are open."""
    site = Site(tiny, 2, steps=2)
    bad, good = site.open(2)
    union = LABELS[0] + LABELS[1]
    bad.table(steps=2, units=2)
    good.table(steps=2)
    plain = site.stage.forward
    calls: list[int] = []

    def forward(inputs: torch.Tensor, row_lengths: list[int], **how: Any) -> torch.Tensor:
        calls.append(len(calls))
        if len(calls) == 3:  # `good` in step 1: the host computes while these come in
            bad.act(0, 1)
            bad.act(1, 0)
            bad.act(1, 1)
        return plain(inputs, row_lengths, **how)

    site.stage.forward = forward  # type: ignore[method-assign]
    bad.act(0, 0)
    bad.grad(union, spoil=lambda gradient: gradient.fill_(float("nan")))
    good.step(union)
    good.await_frame(pb.STEP_CLOSE)
    good.act(1)
    good.await_frame(pb.ACT, 1)
    bad.done()
    good.done()
    site.end()
    assert list(of_kind(site.events, LinkLost)) == []


def test_a_window_overrun_is_dismissed(tiny: ModelSource) -> None:
    site = Site(tiny, 1)
    (device,) = site.open(1)
    for unit in range(3):  # training has not begun: all three would have to be kept
        device.act(unit=unit)
    reason = device.await_frame(pb.CANCEL).header.cancel.reason
    assert reason.endswith("broke the protocol: more than 2 micro-batches in flight (split.window)"), (
        "in the inbox or later"
    )
    site.end()
    assert isinstance(site.problem, PeerLost)


def _reshape(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Callable[[Device], None]:
    def change(device: Device) -> None:
        device.hidden = torch.zeros(shape, dtype=dtype)

    return change


@pytest.mark.parametrize(
    ("change", "lengths", "words"),
    [
        (_reshape((1, 4, 32)), [4], "hidden states must be"),
        (_reshape((4, 64)), [4], "hidden states must be"),
        (_reshape((1, 4, 64), torch.bfloat16), [4], "got torch.bfloat16"),
        (_reshape((1, 4, 64)), [5], "row lengths [5] do not fit"),
        (_reshape((1, 4, 64)), [0], "row lengths [0] do not fit"),
        (_reshape((2, 4, 64)), [4], "row lengths [4] do not fit 2 rows"),
        (_reshape((0, 4, 64)), [], "broke the protocol"),
    ],
)
def test_an_activation_of_a_wrong_form_costs_its_sender_only(
    tiny: ModelSource, change: Callable[[Device], None], lengths: list[int], words: str
) -> None:
    site = Site(tiny, 2)
    bad, good = site.open(2)
    change(bad)
    bad.act(phase=pb.EVAL, row_lengths=lengths)
    assert words in bad.await_frame(pb.CANCEL).header.cancel.reason
    good.table()
    good.step(LABELS[1])
    assert list(good.await_frame(pb.STEP_CLOSE).header.step_close.counted) == [1]
    good.done()
    site.end()
    assert site.problem is None


@pytest.mark.parametrize(
    ("phase", "rows", "tokens", "words"),
    [
        (pb.EVAL, 16, 20, ""),
        (pb.TRAIN, 16, 20, "the plan allows 1 to 4 rows of 1 to 128 tokens"),
        (pb.EVAL, 9, 128, "a tensor of 294912 bytes; this link's plan allows 262144"),
        (pb.EVAL, 1, 129, "the plan allows rows of 1 to 128 tokens, together at most 1024"),
    ],
)
def test_a_micro_batch_of_evaluation_is_bounded_by_its_positions(
    tiny: ModelSource, phase: pb.Phase, rows: int, tokens: int, words: str
) -> None:
    """It may have more rows than one of training, but not more positions than two."""
    site = Site(tiny, 1, "task.max_tokens=128", "federation.batch_size=8", "split.micro_batches=2")
    (device,) = site.open(1)
    device.hidden = torch.zeros(rows, tokens, 64)
    device.act(phase=phase, row_lengths=[tokens] * rows)
    if words:
        assert words in device.await_frame(pb.CANCEL).header.cancel.reason
    else:
        assert device.await_frame(pb.ACT).tensor.shape == device.hidden.shape
        device.done()
    site.end()


def test_a_gradient_of_another_shape_leaves_its_device_out(tiny: ModelSource) -> None:
    site = Site(tiny, 1)
    (device,) = site.open(1)
    device.table()
    device.act()
    device.await_frame(pb.ACT)
    device.exit.send(pb.Header(kind=pb.GRAD, phase=pb.TRAIN), torch.zeros(1, 1, 64))
    left = device.await_frame(pb.STEP_CLOSE).header.step_close.left_out
    assert left[0].reason == "a gradient of another shape or dtype than the activation"
    device.done()
    site.end()
    assert {move.abs().max().item() for move in site.moved().values()} == {0.0}


@pytest.mark.parametrize(
    "rows",
    [
        [pb.StepRow(labels=1, rows=[1], tokens=[8])] * 2,
        [pb.StepRow(labels=1, rows=[])],
        [pb.StepRow(labels=1, rows=[1, 1, 1], tokens=[8, 8, 8])],
        [pb.StepRow(labels=1, rows=[5], tokens=[8])],
        [pb.StepRow(labels=129, rows=[1], tokens=[128])],
        [pb.StepRow(labels=1, rows=[1], tokens=[129])],
        [pb.StepRow(labels=1, rows=[1], tokens=[0])],
        [pb.StepRow(labels=1, rows=[0], tokens=[8])],
        [pb.StepRow(labels=1, rows=[1])],
    ],
)
def test_a_table_beyond_the_plan_is_refused(tiny: ModelSource, rows: list[pb.StepRow]) -> None:
    site = Site(tiny, 1)
    (device,) = site.open(1)
    device.exit.send(pb.Header(kind=pb.TABLE, table=pb.Table(steps=rows)))
    assert "broke the protocol: a TABLE" in device.await_frame(pb.CANCEL).header.cancel.reason
    site.end()


def test_whatever_fails_on_a_frame_costs_its_sender_alone(tiny: ModelSource) -> None:
    """No check foresees everything: an error of any kind is the sender's, not the job's."""
    site = Site(tiny, 2)
    bad, good = site.open(2)
    plain = site.stage.forward

    def forward(inputs: torch.Tensor, row_lengths: list[int], **how: Any) -> torch.Tensor:
        if torch.equal(inputs, bad.hidden):
            raise IndexError("a private value")
        return plain(inputs, row_lengths, **how)

    site.stage.forward = forward  # type: ignore[method-assign]
    bad.act(phase=pb.EVAL)
    reason = bad.await_frame(pb.CANCEL).header.cancel.reason
    assert reason == "a frame that host edge-1 cannot work on: IndexError"
    good.table()
    good.step(LABELS[1])
    assert list(good.await_frame(pb.STEP_CLOSE).header.step_close.counted) == [1]
    good.done()
    site.end()
    assert site.problem is None
    (left,) = site.host.left_out()
    assert (left.device, left.reason, left.out) == ("device-0", reason, True)


# ---------------------------------------------------------------- the door


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"route_token": b"device-1"}, "a wrong route token"),
        ({"route_token": b""}, "a wrong route token"),
        ({"device_index": 7}, "has no route here in run/1/1"),
        ({"node": "device-1"}, "dialled by 'device-0', not by 'device-1'"),
        ({"node": "edge-0"}, "dialled by 'device-0', not by 'edge-0'"),
        ({"model_digest": "0" * 64}, "has another model (000000000000)"),
        (
            {"codecs": ["int3"]},
            "the plan asks for codec 'raw'; node 'device-0' knows ['int3'], and host edge-1 ['raw', ",
        ),
        ({"codecs": []}, "the plan asks for codec 'raw'; node 'device-0' knows [], and host edge-1"),
        ({"resumes": True}, "no entry link of 'device-0' is open here"),
    ],
)
def test_the_door_says_why_not(tiny: ModelSource, wrong: dict[str, Any], words: str) -> None:
    site = Site(tiny)
    _, theirs = memory_pair("x", ByteCounters(), ByteCounters())
    answer = site.group.admit(hello(site, 0, pb.ENTRY, **wrong), theirs)
    assert isinstance(answer, pb.Refuse)
    assert words in answer.reason


@pytest.mark.parametrize("wrong", [{"route_token": b""}, {"device_index": 7}, {"node": "edge-0"}])
def test_who_has_no_route_here_is_refused_without_the_lock_of_those_who_have(
    tiny: ModelSource, wrong: dict[str, Any]
) -> None:
    """Whoever knocks at a host keeps no member waiting at its door, however many do, and waits for none itself."""
    site = Site(tiny)
    _, theirs = memory_pair("x", ByteCounters(), ByteCounters())
    with ThreadPoolExecutor(1) as door, site.group._door:
        answer = door.submit(site.group.admit, hello(site, 0, pb.ENTRY, **wrong), theirs).result(timeout=WAIT_S)
    assert isinstance(answer, pb.Refuse)


def test_a_host_without_memory_for_one_micro_batch_refuses(tiny: ModelSource) -> None:
    site = Site(tiny)
    site.group.window = 0
    answer = site.group.admit(hello(site, 0, pb.ENTRY), memory_pair("x", ByteCounters(), ByteCounters())[1])
    assert isinstance(answer, pb.Refuse)
    assert answer.reason.startswith("host edge-1 has no memory for a micro-batch of each of 3 devices")


def test_a_link_that_is_opened_twice_is_refused(tiny: ModelSource) -> None:
    site = Site(tiny)
    first, second = (memory_pair("x", ByteCounters(), ByteCounters())[1] for _ in range(2))
    assert isinstance(site.group.admit(hello(site, 0, pb.ENTRY), first), pb.Ready)
    answer = site.group.admit(hello(site, 0, pb.ENTRY), second)
    assert answer == pb.Refuse(reason="the entry link of 'device-0' was opened before")
    assert isinstance(site.group.admit(hello(site, 0, pb.EXIT), second), pb.Ready)


def test_a_device_that_is_out_of_the_round_does_not_get_its_link_back(tiny: ModelSource) -> None:
    site = Site(tiny)
    link, newcomer = (memory_pair("x", ByteCounters(), ByteCounters())[1] for _ in range(2))
    assert isinstance(site.group.admit(hello(site, 0, pb.ENTRY), link), pb.Ready)
    site.group.dismiss(site.group.members[0], "late")
    answer = site.group.admit(hello(site, 0, pb.ENTRY, resumes=True), newcomer)
    assert answer == pb.Refuse(reason="device-0 is out of the round: late")


def test_a_host_gives_up_when_too_few_devices_come(tiny: ModelSource) -> None:
    site = Site(tiny, 3, "federation.min_nodes=2", ready_s=0.2)
    site.open(1)
    site.end()
    assert str(site.problem) == "1 of 3 devices came; at least 2 are needed"


def test_a_host_does_not_wait_for_a_device_that_never_came(tiny: ModelSource) -> None:
    site = Site(tiny, 2, ready_s=0.2)
    (device,) = site.open(1)
    device.table()
    device.step(device.labels)
    device.await_frame(pb.STEP_CLOSE)
    device.done()
    site.end()
    assert site.event(LinkLost) == LinkLost(link="device-1", reason="not here after 0 s")


@pytest.mark.parametrize(
    ("devices", "window", "micro_batches", "threads", "workers"),
    [
        (3, 2, 2, 2, 2),
        (3, 2, 2, 8, 2),  # of four threads each: three workers would leave two threads without work
        (1, 2, 2, 2, 1),  # a second worker would make the pipeline's passes slow, and have nothing to do
        (1, 4, 8, 2, 2),
        (8, 4, 1, 16, 4),
        (3, 2, 2, 1, 1),
    ],
)
def test_a_host_has_workers_for_what_can_be_under_way(
    devices: int, window: int, micro_batches: int, threads: int, workers: int
) -> None:
    plan = pb.Plan(host_mode="joint", micro_batches=micro_batches, serves=[pb.Route()] * devices)
    assert workers_of(plan, window, threads) == workers
    plan.host_mode = "sequential"  # one device's micro-batches at a time
    assert workers_of(plan, window, threads) <= max(1, window // 2)


def test_a_worker_has_its_share_of_the_threads_and_others_keep_theirs(tiny: ModelSource) -> None:
    before, found, over = torch.get_num_threads(), list[int](), queue.SimpleQueue[Work]()
    torch.set_num_threads(4)
    try:
        with (workers := Workers([middle(tiny)] * 2, over.put)):
            workers.start(Work(lambda view: torch.get_num_threads(), found.append))
            over.get(timeout=WAIT_S).conclude()
            new = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
            new.start()
            new.join(WAIT_S)
        assert [*found, torch.get_num_threads()] == [2, 4, 4]
    finally:
        torch.set_num_threads(before)
