"""Codecs on a route: what travels is as large as their codec says, and what is learned is what is learned without them, nearly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from edgelam_fl.model.adapter import Adapter, initial_adapter
from edgelam_fl.model.source import ModelSource
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codec_bytes import CODEC_BYTES
from tests.fleet import check_done, joined, memory_fleet, relative_distance
from tests.parity.test_generation import greedy, open_session, trained_adapter
from tests.parity.test_lowrank import LOWRANK, start_of
from tests.support import run_config

SGD = (
    "optimizer.name=sgd",
    "optimizer.lr=0.1",
    "lora.rank=4",
)  # AdamW would make all of a gradient as large as the rest


def trained(
    source: ModelSource, files: list[Path], *settings: str, steps: int = 2
) -> tuple[Adapter, Adapter, dict[str, pb.JobReport]]:
    """Returns the adapter before and after a round, and the reports."""
    config = run_config(source.name, *SGD, *settings)
    start = initial_adapter(source, config.lora.targets, config.lora.rank, 1)
    with memory_fleet(source, config, files) as fleet:
        reports = fleet.run(start, steps)
    check_done(reports)
    return start, joined(reports), reports


def payloads(reports: Mapping[str, pb.JobReport]) -> dict[str, int]:
    """Returns the bytes of tensors on the devices' links, by kind."""
    parts = [part for report in reports.values() if report.role == pb.DEVICE for part in report.bytes]
    return {kind: sum(part.payload_bytes for part in parts if part.kind == kind) for kind in ("ACT", "GRAD")}


@pytest.mark.parametrize(
    ("activations", "gradients", "settings", "most"),
    [
        ("fp16", "fp16", ["split.hosts=1"], 0.01),
        ("bf16", "raw", ["split.hosts=2"], 0.05),
        ("raw", "int8", ["split.host_mode=copies"], 0.05),
        ("int8", "int8", ["split.hosts=2", "split.host_mode=sequential"], 0.15),
        ("int4", "int4", ["split.labels=last-stage", "split.back=0"], 0.5),
        ("fp16", "int4", ["model.base=bf16"], 0.5),
    ],
)
def test_training_over_codecs(
    tiny: ModelSource, data_files: list[Path], activations: str, gradients: str, settings: list[str], most: float
) -> None:
    codecs = [f"wire.activation_codec={activations}", f"wire.gradient_codec={gradients}"]
    start, without, plain = trained(tiny, data_files[:2], *settings)
    _, learned, reports = trained(tiny, data_files[:2], *settings, *codecs)
    item = 2 if "model.base=bf16" in settings else 4
    for kind, codec in (("ACT", activations), ("GRAD", gradients)):
        share = CODEC_BYTES[codec].bytes_of_row(tiny.hidden_size, item) / (tiny.hidden_size * item)
        assert payloads(reports)[kind] == share * payloads(plain)[kind] > 0
    assert 0 < relative_distance(learned, without, start) < most


def test_gradients_of_a_cut_adapter_have_a_codec(tiny: ModelSource, data_files: list[Path]) -> None:
    sent = {}
    for codec in ("raw", "int8"):
        config = run_config(tiny.name, *LOWRANK, f"wire.gradient_codec={codec}")
        with memory_fleet(tiny, config, data_files[:1]) as fleet:
            reports = fleet.run(start_of(tiny, config), 2)
        check_done(reports)
        sent[codec] = payloads(reports)
    assert sent["int8"]["GRAD"] == (4 + 2) / (4 * 4) * sent["raw"]["GRAD"] > 0
    assert sent["int8"]["ACT"] == sent["raw"]["ACT"]


def test_a_conversation_uses_the_codec_of_hidden_states(tiny: ModelSource, data_files: list[Path]) -> None:
    def first_logits(codec: str) -> list[float]:
        config = run_config(tiny.name, "split.hosts=2", f"wire.activation_codec={codec}", "wire.gradient_codec=int4")
        with memory_fleet(tiny, config, data_files[:1]) as fleet:
            session, _ = open_session(fleet, trained_adapter(tiny, config))
            _, logits = greedy(session)
            session.finish()
        return logits[0].tolist()

    exact, rounded = first_logits("raw"), first_logits("int8")
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.1 * max(map(abs, exact)))
