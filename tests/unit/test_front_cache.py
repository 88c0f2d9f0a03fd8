"""What a host keeps of devices' fronts: within its bounds, checked, each device's own, and gone with the run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.node import front_cache
from edgelam_fl.node.front_cache import FrontCache, RunFronts, front_secret
from edgelam_fl.split.fronts import NAME_BYTES, NamedFronts, SentFronts, put_together
from edgelam_fl.split.inbox import Inbox
from edgelam_fl.split.route import Route
from edgelam_fl.split.step import DeviceStep
from edgelam_fl.split.timeline import Timeline
from edgelam_fl.tasks.base import Unit
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Frame
from tests.support import WAIT_S

HIDDEN = 4
PLENTY = 10**9


def name(number: int) -> bytes:
    return number.to_bytes(NAME_BYTES, "big")


def states(tokens: int, value: float = 1.0) -> torch.Tensor:
    return torch.arange(tokens * HIDDEN, dtype=torch.float32).view(tokens, HIDDEN) + value


@pytest.fixture
def fronts() -> Iterator[RunFronts]:
    with closing(RunFronts("run", None, lambda folder: PLENTY)) as made:
        made.allow(PLENTY, 1)
        yield made


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[FrontCache]:
    with closing(FrontCache(tmp_path)) as made:
        yield made


def is_here(fronts: RunFronts, number: int, tokens: int = 2, device: str = "a") -> bool:
    return fronts.find(device, name(number), (tokens, HIDDEN), torch.float32) is not None


def plan_of(run: str = "run", steps: int = 1, most_bytes: int = PLENTY, round_s: float = 3600.0) -> pb.Plan:
    plan = pb.Plan(run=run, node="edge", steps=steps, front_cache_bytes=most_bytes, batch_size=4, micro_batches=2)
    plan.task.max_tokens, plan.deadlines.round_s = 8, round_s
    plan.serves.add(hops=[pb.Hop(node="edge")])
    return plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_come_back_as_they_were(fronts: RunFronts, dtype: torch.dtype) -> None:
    first, second = states(3).to(dtype), states(2, 9.0).to(dtype)
    fronts.keep("a", name(1), first)
    fronts.keep("a", name(2), second)
    for number, given in ((1, first), (2, second)):
        found = fronts.find("a", name(number), (len(given), HIDDEN), dtype)
        assert found is not None
        assert torch.equal(found, given)


def test_a_name_is_its_devices_own_and_its_states_stay(fronts: RunFronts) -> None:
    fronts.keep("a", name(1), states(2))
    assert not is_here(fronts, 1, device="b")
    fronts.keep("a", name(1), states(2, 5.0))
    found = fronts.find("a", name(1), (2, HIDDEN), torch.float32)
    assert found is not None
    assert torch.equal(found, states(2))
    assert not is_here(fronts, 1, tokens=1)
    assert fronts.find("a", name(1), (2, HIDDEN), torch.bfloat16) is None


def test_a_device_fills_its_own_part_alone(fronts: RunFronts) -> None:
    fronts.allow(8000, 2)
    for number in range(100):
        fronts.keep("a", name(number), states(2))
    assert fronts.used_bytes <= 4000
    assert is_here(fronts, 0), "epochs come by all examples in turn: what is here stays"
    assert not is_here(fronts, 99)
    fronts.keep("b", name(0), states(2))
    assert is_here(fronts, 0, device="b")


def test_many_small_states_count_for_what_they_cost_in_memory(fronts: RunFronts) -> None:
    fronts.allow(100_000, 1)
    for number in range(1000):
        fronts.keep("a", name(number), states(1))
    assert sum(is_here(fronts, number, 1) for number in range(1000)) < 200


def test_half_of_what_was_free_stays_free() -> None:
    disk = {"free": 20_000}
    with closing(RunFronts("run", None, lambda folder: disk["free"])) as fronts:
        fronts.allow(PLENTY, 1)
        for number in range(100):
            before = fronts.used_bytes
            fronts.keep("a", name(number), states(2))
            disk["free"] -= fronts.used_bytes - before
        assert 9_000 < fronts.used_bytes <= 10_000 <= disk["free"]


def test_a_disk_that_takes_nothing_costs_nothing_else(fronts: RunFronts, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(front_cache.os, "pwrite", full)
    fronts.keep("a", name(1), states(2))
    assert not is_here(fronts, 1)


def test_damaged_states_are_missing_and_may_be_kept_again(fronts: RunFronts, monkeypatch: pytest.MonkeyPatch) -> None:
    written, real = list[int](), front_cache.os.pwrite

    def damaged(file: int, data: bytes, offset: int) -> int:
        written.append(offset)
        return real(file, bytes([data[0] ^ 1]) + data[1:] if len(written) == 1 else data, offset)

    monkeypatch.setattr(front_cache.os, "pwrite", damaged)
    fronts.keep("a", name(1), states(2))
    assert not is_here(fronts, 1)
    fronts.keep("a", name(1), states(2))
    assert is_here(fronts, 1)


def test_nothing_has_a_name_on_the_disk(cache: FrontCache, tmp_path: Path) -> None:
    """What has no name is gone when the process ends, whatever ends it."""
    fronts = cache.begin(plan_of())
    assert fronts is not None
    fronts.keep("a", name(1), states(2))
    assert is_here(fronts, 1)
    assert list(tmp_path.iterdir()) == []


def test_states_go_with_their_run(cache: FrontCache) -> None:
    first = cache.begin(plan_of())
    assert first is not None
    first.keep("", name(1), states(2))
    cache.end(plan_of())
    again = cache.begin(plan_of())
    assert again is first
    assert is_here(first, 1, device="")
    other = cache.begin(plan_of("other"))
    assert other is not None
    assert other.number != first.number
    assert not is_here(first, 1, device="")
    first.keep("", name(2), states(2))  # a part that is still at work
    assert first.used_bytes == 0
    other.keep("", name(1), states(2))
    cache.end(plan_of("other", steps=0))
    assert not is_here(other, 1, device=""), "after the evaluation of its result a run is over"
    assert cache.begin(plan_of(most_bytes=0)) is None


def test_states_of_a_run_that_does_not_go_on_go_after_a_rounds_time(cache: FrontCache) -> None:
    fronts = cache.begin(plan_of())
    assert fronts is not None
    fronts.keep("", name(1), states(2))
    cache.end(plan_of(round_s=0.01))
    end = time.monotonic() + WAIT_S
    while is_here(fronts, 1, device="") and time.monotonic() < end:
        pass
    assert not is_here(fronts, 1, device="")


def test_only_the_first_host_of_a_route_keeps_states() -> None:
    plan = plan_of()
    plan.serves[0].hops.insert(0, pb.Hop(node="another"))
    assert FrontCache(None).begin(plan) is None


# ---------------------------------------------------------------- what a device sends


def frame_of(lengths: list[int], here: list[int], **changes: Any) -> Frame:
    """A micro-batch whose row r has the name r; of rows that are not `here`, the states come."""
    came = [length for row, length in enumerate(lengths) if row not in here]
    header = pb.Header(
        kind=pb.ACT, row_lengths=lengths, row_names=[name(row) for row in range(len(lengths))], kept_rows=here
    )
    for field, value in changes.items():
        if field != "tensor":
            header.ClearField(field)
            getattr(header, field).extend(value)
    tensor = torch.cat([states(length, length) for length in came])[None] if came else None
    return Frame(header, changes.get("tensor", tensor))


def put(frame: Frame, fronts: RunFronts, device: str = "a") -> Frame | list[int]:
    return put_together(frame, device, plan_of(), HIDDEN, torch.float32, fronts)


def test_a_micro_batch_is_put_together_of_what_came_and_what_is_here(fronts: RunFronts) -> None:
    first = put(frame_of([2, 3], []), fronts)
    again = put(frame_of([2, 3], [0, 1]), fronts)
    half = put(frame_of([2, 3], [1]), fronts)
    expected = torch.zeros(2, 3, HIDDEN)
    expected[0, :2], expected[1] = states(2, 2), states(3, 3)
    for found in (first, again, half):
        assert isinstance(found, Frame)
        assert found.tensor is not None
        assert torch.equal(found.tensor, expected)


def test_rows_that_are_not_here_are_named(fronts: RunFronts) -> None:
    assert put(frame_of([2, 3], [0, 1]), fronts) == [0, 1]
    put(frame_of([2, 3], []), fronts)
    assert put(frame_of([2, 3], [0, 1]), fronts, device="b") == [0, 1], "another device's names are another's"
    assert put(frame_of([2, 2], [0, 1]), fronts) == [1], "states of another length are not what is meant"


def test_values_that_are_not_finite_are_not_kept(fronts: RunFronts) -> None:
    bad = torch.full((1, 2, HIDDEN), float("nan"))
    assert isinstance(put(frame_of([2], [], tensor=bad), fronts), Frame)
    assert not is_here(fronts, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"row_names": [name(0)]}, "1 names for 2 rows"),
        ({"row_names": [name(0), b"short"]}, "each has one of 16 bytes"),
        ({"row_names": [name(0), b"x" * 1000]}, "each has one of 16 bytes"),
        ({"kept_rows": [1, 1]}, "kept rows"),
        ({"kept_rows": [2]}, "kept rows"),
        ({"kept_rows": [1, 0]}, "kept rows"),
        ({"row_lengths": [2, 9]}, "row lengths"),
        ({"row_lengths": [0, 2]}, "row lengths"),
        ({"row_lengths": [2, 3, 2]}, "row lengths"),
        ({"tensor": None}, "got nothing"),
        ({"tensor": torch.zeros(1, 4, HIDDEN)}, "hidden states must be"),
        ({"tensor": torch.zeros(2, 3, HIDDEN)}, "hidden states must be"),
        ({"tensor": torch.zeros(1, 5, HIDDEN, dtype=torch.bfloat16)}, "hidden states must be"),
        ({"kept_rows": [0, 1], "tensor": torch.zeros(1, 1, HIDDEN)}, "of no row"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused_and_nothing_of_it_kept(
    fronts: RunFronts, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ProtocolError, match=words):
        put(frame_of([2, 3], [], **changes), fronts)
    assert fronts.used_bytes == 0


# ---------------------------------------------------------------- names


def unit_of(*rows: list[int]) -> Unit:
    tokens = max(map(len, rows))
    ids = torch.tensor([row + [0] * (tokens - len(row)) for row in rows])
    return Unit(ids, ids, [len(row) for row in rows], 1)


def test_a_name_follows_from_the_secret_the_tokens_and_what_else_the_states_depend_on() -> None:
    sent = SentFronts()
    own = NamedFronts(b"secret", "run/model/2", sent)
    one, two = own.names(unit_of([5, 6], [5, 6, 0]))
    assert one != two, "padding is no token"
    assert own.names(unit_of([5, 6], [1, 2, 3, 4])) == [one, own.names(unit_of([1, 2, 3, 4]))[0]]
    for other in (NamedFronts(b"another", "run/model/2", sent), NamedFronts(b"secret", "run/model/3", sent)):
        assert other.names(unit_of([5, 6]))[0] != one


def test_a_devices_secret_outlives_its_process(tmp_path: Path) -> None:
    secret = front_secret(tmp_path)
    assert front_secret(tmp_path) == secret
    assert front_secret(tmp_path / "other") != secret
    assert front_secret(None) != front_secret(None)
    (file,) = tmp_path.glob("front-*")
    assert file.stat().st_mode & 0o077 == 0
    file.write_bytes(b"short")
    assert front_secret(tmp_path) != secret


def test_a_device_remembers_few_places() -> None:
    sent = SentFronts()
    sent.at(b"first").sent(name(1))
    assert sent.at(b"first").is_there(name(1))
    assert not sent.at(b"second").is_there(name(1))
    for number in range(50):
        sent.at(name(number))
    assert not sent.at(b"first").is_there(name(1))


def test_a_host_that_lacks_an_example_again_and_again_gets_it_every_time() -> None:
    known = SentFronts().at(b"place")
    for lacked in range(3):
        known.sent(name(1))
        assert known.is_there(name(1)) == (lacked < 2)
        known.lacks(name(1))


# ---------------------------------------------------------------- a device, and a host that says what it lacks


class Recorded:
    """A link that keeps what is sent."""

    def __init__(self) -> None:
        self.name, self.sent = "entry edge", list[Frame]()
        self.terms = SimpleNamespace(front_cache=b"place", window=2)

    def send(self, header: pb.Header, tensor: torch.Tensor | None = None) -> None:
        copied = pb.Header()
        copied.CopyFrom(header)
        self.sent.append(Frame(copied, tensor))


def answered(*lacks: list[int]) -> Recorded:
    """Evaluates a micro-batch of two rows, of which the first was sent before; returns what the device sent.

    `lacks`: the rows that the host says it lacks, each time that it says so; then it answers.
    """
    unit, sent = unit_of([5, 6], [7]), SentFronts()
    names = NamedFronts(b"secret", "meaning", sent)
    sent.at(b"place").sent(names.names(unit)[0])
    ends: Any = SimpleNamespace(
        fronts=names, has_labels=True, hidden_size=HIDDEN, wire=torch.float32, positions=lambda unit: None,
        rows_of_front=lambda unit, rows: torch.ones(1, sum(unit.row_lengths[row] for row in rows), HIDDEN),
        evaluate=lambda unit, inputs: (1.0, {}),
    )  # fmt: skip
    plan = pb.Plan(host_mode="joint", deadlines=pb.Deadlines(step_s=WAIT_S))
    plan.routes.add(device="device", hops=[pb.Hop(node="edge")])
    link: Any = Recorded()
    route = Route(Inbox(WAIT_S), entry=link, exit=link, window=2)
    for rows in lacks:
        route.inbox.on_frame(link, Frame(pb.Header(kind=pb.MISSING, phase=pb.EVAL, kept_rows=rows)))
    route.inbox.on_frame(link, Frame(pb.Header(kind=pb.ACT, phase=pb.EVAL), torch.zeros(2, 2, HIDDEN)))
    DeviceStep(plan, ends, route, Timeline("device"), [unit], phase=pb.EVAL).run()
    return link


def test_a_device_sends_what_a_host_lacks_and_all_beside_it() -> None:
    (alone,) = answered().sent
    assert list(alone.header.kept_rows) == [0]
    assert alone.tensor is not None
    assert alone.tensor.shape == (1, 1, HIDDEN)
    first, again = answered([0]).sent
    assert first.header == alone.header
    assert list(again.header.kept_rows) == []
    assert again.header.row_names == first.header.row_names
    assert again.tensor is not None
    assert again.tensor.shape == (1, 3, HIDDEN)


@pytest.mark.parametrize(
    ("lacks", "words"),
    [
        ([[1]], "lacks rows that it was not taken to have kept"),
        ([[]], "lacks rows that it was not taken to have kept"),
        ([[0], [0]], "MISSING for micro-batch 0, which does not wait for it"),
    ],
)
def test_a_host_cannot_ask_for_what_has_just_come(lacks: list[list[int]], words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        answered(*lacks)
