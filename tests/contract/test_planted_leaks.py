"""What a device's frames may hold, on the frames of a training in this process; a leak that somebody plants in them is found.

The same search in the bytes of real connections: tests/integration/test_privacy_tap.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.hostile import Change, dishonest, on
from edgelam_fl.model.adapter import initial_adapter, initial_cut
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.tasks.causal_lm import CausalLm
from edgelam_fl.tasks.data import read_pairs
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Frame
from tests.fleet import memory_fleet
from tests.integration.tap import TOKENS, Secrets
from tests.support import run_config

OF_EVERY_FRAME = {"kind", "job_token", "seq", "send_ns", "last_chunk"}
OF_A_MICRO_BATCH = {"phase", "step", "micro_batch", "device_index"}
LISTED = {  # what docs/protocol.md names for the kinds that a device sends in a training
    pb.TABLE: {"device_index", "phase", "table"},
    pb.ACT: {*OF_A_MICRO_BATCH, "row_lengths", "tensor", "positions", "row_names", "kept_rows", "segment_lengths"},
    pb.GRAD: {*OF_A_MICRO_BATCH, "tensor"},
    pb.DONE: {"device_index", "done"},
}


@pytest.fixture(scope="module")
def secrets(tiny: ModelSource, data_files: list[Path]) -> Secrets:
    made, task = Secrets(), CausalLm(tiny.folder, run_config(tiny.name).task)
    for pair in read_pairs(data_files[0], "question", "answer"):
        (example,) = task.examples([pair]).examples
        prompt, answer = pair
        made.add_text(str(prompt), "a prompt")
        made.add_text(answer, "an answer")
        made.add_numbers(example.ids, "tokens")
        made.add_numbers([label for label in example.labels if label >= 0], "tokens")
    return made


@pytest.fixture(scope="module")
def labels(tiny: ModelSource, data_files: list[Path]) -> list[int]:
    """Six labels in a row, as the device learns them."""
    pair = read_pairs(data_files[0], "question", "answer")[3]
    (example,) = CausalLm(tiny.folder, run_config(tiny.name).task).examples([pair]).examples
    return [label for label in example.labels if label >= 0][2 : 2 + TOKENS]


def sent_in_a_training(tiny: ModelSource, file: Path, plant: Change, *settings: str) -> list[Frame]:
    """Returns the frames that a device sends in a round of two steps, as they leave after `plant`."""
    config, sent = run_config(tiny.name, *settings), list[Frame]()

    def record(header: pb.Header, tensor: torch.Tensor | None) -> tuple[pb.Header, torch.Tensor | None]:
        copied = pb.Header()
        copied.CopyFrom(header)
        sent.append(Frame(copied, None if tensor is None else tensor.detach().clone()))
        return header, tensor

    start = initial_adapter(tiny, config.lora.targets, config.lora.rank, 1)
    cut = RunSpec(config, tiny).cut
    start |= initial_cut(tiny, cut, 1) if cut else {}
    with memory_fleet(
        tiny, config, [file], dials={"device-1": lambda dial: dishonest(dishonest(dial, record), plant)}
    ) as fleet:
        fleet.run(start, 2)
    return sent


def leaks(frames: Iterable[Frame], secrets: Secrets) -> set[str]:
    """Returns what a device's frames hold that they must not: secrets, and what the protocol does not list."""
    found, everything = set(), b""
    for frame in frames:
        header, tensor = frame.header, frame.tensor
        kind = pb.Kind.Name(header.kind)
        fields = {field.name for field, _ in header.ListFields()}
        if header.kind not in LISTED:
            found.add(f"{kind}: no kind of a device's training")
        found |= {f"{kind}.{name}" for name in fields - OF_EVERY_FRAME - LISTED.get(header.kind, set())}
        if header.kind == pb.ACT and rows_of(header, tensor) != len(header.row_lengths):
            found.add(f"{kind}.row_lengths: not one per row")
        read = pb.Header.FromString(header.SerializeToString())
        read.DiscardUnknownFields()
        if read.ByteSize() != header.ByteSize():
            found.add(f"{kind}: fields of no name")
        everything += header.SerializeToString()
        if tensor is not None:
            everything += tensor.contiguous().numpy().tobytes()
            if not tensor.is_floating_point():
                found.add(f"{kind}: a tensor of {tensor.dtype}")
    return found | secrets.found_in(everything)


def rows_of(header: pb.Header, tensor: torch.Tensor | None) -> int:
    """Counts a micro-batch's rows: those of the tensor, or if each has a name, the names."""
    if header.row_names or tensor is None:
        return len({name for name in header.row_names if len(name) == 16})
    return len(tensor)


def honest(header: pb.Header, tensor: torch.Tensor | None) -> tuple[pb.Header, torch.Tensor | None]:
    return header, tensor


WAYS = {
    "full": (),
    "lowrank": ("wire.gradients=lowrank", "lora.train=back"),
    "positions and names": ("split.back=0", "wire.front_cache_mb=1", "lora.train=['hosts','back']"),
}


@pytest.fixture(scope="module", params=[*WAYS])
def frames(request: pytest.FixtureRequest, tiny: ModelSource, data_files: list[Path]) -> list[Frame]:
    settings = WAYS[request.param]
    return sent_in_a_training(tiny, data_files[0], honest, *settings)


def test_an_honest_devices_frames_hold_what_the_protocol_lists(frames: list[Frame], secrets: Secrets) -> None:
    assert {frame.header.kind for frame in frames} == set(LISTED)
    assert leaks(frames, secrets) == set()


def test_positions_are_not_named_where_noise_hides_them(tiny: ModelSource, data_files: list[Path]) -> None:
    settings = ("split.back=0", "privacy.cut_clip=8", "privacy.cut_noise=0.1")
    frames = sent_in_a_training(tiny, data_files[0], honest, *settings)
    assert frames
    assert not any(frame.header.positions for frame in frames)


def with_numbers(numbers: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns what hides numbers among a tensor's values."""

    def hidden_in(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.flatten()[5 : 5 + len(numbers)] = torch.tensor(numbers, dtype=tensor.dtype)
        return changed

    return hidden_in


def unnamed(header: pb.Header, tensor: torch.Tensor | None) -> tuple[pb.Header, torch.Tensor | None]:
    """Adds a field that the protocol does not have."""
    header.MergeFromString(b"\xca\x3e\x02hi")  # field 1001, two bytes
    return header, tensor


def relabelled(header: pb.Header, tensor: torch.Tensor | None) -> tuple[pb.Header, torch.Tensor | None]:
    """Sends a gradient as a frame of labels."""
    if header.kind == pb.GRAD:
        header.kind = pb.LABELS
    return header, tensor


def test_what_is_planted_in_a_frame_is_found(frames: list[Frame], secrets: Secrets, labels: list[int]) -> None:
    def lengths(header: pb.Header, tensor: torch.Tensor | None) -> tuple[pb.Header, torch.Tensor | None]:
        if header.kind == pb.ACT:
            header.row_lengths.extend(labels)
        return header, tensor

    def text(header: pb.Header, tensor: torch.Tensor | None) -> tuple[pb.Header, torch.Tensor | None]:
        if header.kind == pb.DONE:
            header.sums["What is 0.3?"] = 1.0
        return header, tensor

    planted: dict[str, tuple[Change, str]] = {
        "labels among a gradient's values": (on(pb.GRAD, with_numbers(labels)), "tokens"),
        "labels among hidden states": (on(pb.ACT, with_numbers(labels)), "tokens"),
        "a label in a field of another kind": (on(pb.GRAD, loss_sum=float(labels[0])), "GRAD.loss_sum"),
        "a tensor of labels in a gradient's place": (on(pb.GRAD, lambda _: torch.tensor(labels)), "GRAD: a tensor"),
        "labels as lengths of rows": (lengths, "ACT.row_lengths"),
        "a prompt as the name of a metric": (text, "a prompt"),
        "a kind that the training does not need": (relabelled, "LABELS: no kind"),
        "a field that the protocol does not have": (unnamed, "fields of no name"),
    }
    for what, (plant, word) in planted.items():
        changed = []
        for frame in frames:
            header = pb.Header()
            header.CopyFrom(frame.header)
            after = plant(header, frame.tensor)
            assert after is not None
            changed.append(Frame(*after))
        assert any(word in line for line in leaks(changed, secrets)), f"{what} went unnoticed"


def test_a_training_with_a_planted_leak_does_not_pass(
    tiny: ModelSource, data_files: list[Path], secrets: Secrets, labels: list[int]
) -> None:
    """The device hides labels among its gradients' values, which every host takes: nothing but this search sees it."""
    sent = sent_in_a_training(tiny, data_files[0], on(pb.GRAD, with_numbers(labels)))
    assert any("tokens" in line for line in leaks(sent, secrets))
