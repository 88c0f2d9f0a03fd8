"""The low-rank gradient payload: A of the cut adapter learns on the last host as it does in one model with autograd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgelam_fl.config import RunConfig
from edgelam_fl.model.adapter import Adapter, initial_adapter, initial_cut
from edgelam_fl.model.cut import CUT_A, CUT_B, cut_of, without_cut
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.fleet import (
    check_done,
    device_batches,
    joined,
    memory_fleet,
    plain_adapter,
    plain_evaluation,
    plain_model,
    plain_training,
    relative_distance,
    same_bits,
)
from tests.parity.test_generation import PROMPT, greedy, open_session
from tests.support import run_config

LAST = 3  # the last layer before the device's back
LOWRANK = ("wire.gradients=lowrank", "lora.train=back", "lora.rank=4")


def start_of(source: ModelSource, config: RunConfig, *, moved: bool = False) -> Adapter:
    """Returns the adapter of a run's first round; `moved`: with an A that is not zero."""
    cut = RunSpec(config, source).cut
    assert cut is not None
    start = initial_adapter(source, config.lora.targets, config.lora.rank, 1) | initial_cut(source, cut, 1)
    (a,) = (name for name in start if name.endswith(CUT_A))
    if moved:
        start[a] = np.random.default_rng(5).normal(0, 0.1, start[a].shape).astype(np.float32)
    return start


@contextmanager
def with_cut(model: Any, config: RunConfig, start: Adapter) -> Iterator[torch.nn.Parameter]:
    """Adds h' = h + s B (A h) to the whole model, at the cut; yields A, which `plain_training` trains by its name."""
    parts = {name[-len(CUT_A) :]: torch.tensor(array) for name, array in cut_of(start).items()}
    b_DR, scale = parts[CUT_B], config.lora.alpha / config.lora.rank
    layer = model.get_base_model().model.layers[LAST]
    layer.lora_cut = torch.nn.Parameter(parts[CUT_A])

    def add(_module: Any, _inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + scale * (hidden @ layer.lora_cut.T @ b_DR.T)

    hook = layer.register_forward_hook(add)
    yield layer.lora_cut
    hook.remove()


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("devices", [1, 3])
def test_the_gradient_of_a_is_autograds(tiny: ModelSource, data_files: list[Path], hosts: int, devices: int) -> None:
    """One step of plain SGD from A = 0 at lr 1: A is then minus its gradient, to the last bit."""
    config = run_config(tiny.name, *LOWRANK, f"split.hosts={hosts}", "optimizer.name=sgd", "optimizer.lr=1.0")
    start, files = start_of(tiny, config), data_files[:devices]
    with memory_fleet(tiny, config, files) as fleet:
        reports = fleet.run(start, 1)
    check_done(reports)
    (a,) = (array for name, array in joined(reports).items() if name.endswith(CUT_A))
    model = plain_model(tiny, config, without_cut(start))
    with with_cut(model, config, start) as reference:
        steps = [[device_batches(tiny, config, file, f"device-{n}", 1)[0] for n, file in enumerate(files, 1)]]
        plain_training(model, config, steps, learns=lambda name: name.endswith("lora_cut"))
    gradient = -reference.detach().numpy()
    assert np.abs(gradient).max() > 1e-3
    assert np.linalg.norm(-a - gradient) <= 1e-6 * np.linalg.norm(gradient)


def test_rounds_train_like_one_model_with_the_cut_adapter(tiny: ModelSource, data_files: list[Path]) -> None:
    """From an A that is not zero, with the device's back: evaluation, and AdamW's steps over two rounds with warm moments."""
    config = run_config(tiny.name, *LOWRANK)
    start = start_of(tiny, config, moved=True)
    with memory_fleet(tiny, config, data_files[:1]) as fleet:
        first = fleet.run(start, 5)
        check_done(first)
        second = fleet.run(start | joined(first), 5, step_offset=5, send_to=[])
    check_done(second)
    assert {report.moments for report in second.values()} == {"warm"}
    got = joined(second)
    assert {layer_number(name) for name in got} == {LAST, 4, 5}, "A at the cut, and LoRA of the device's back"
    assert not any(name.endswith(CUT_B) for name in got)
    model = plain_model(tiny, config, without_cut(start))
    with with_cut(model, config, start) as reference:
        loss = plain_evaluation(model, tiny, config, data_files[0])
        assert first["device-1"].eval_loss_sum == pytest.approx(loss, rel=1e-6)
        batches = device_batches(tiny, config, data_files[0], "device-1", 10)
        learns = ("lora_cut", ".4.", ".5.")
        plain_training(model, config, [[units] for units in batches], lambda name: any(part in name for part in learns))
        trained = plain_adapter(model) | {next(n for n in got if n.endswith(CUT_A)): reference.detach().numpy()}
    assert relative_distance(got, trained, start) < 1e-5


def test_the_gradient_that_travels_has_rank_numbers_per_token(tiny: ModelSource, data_files: list[Path]) -> None:
    """Bytes per kind, as nodes count them: of GRAD, rank / hidden of the full gradient's; of ACT, the values beside it."""
    sent = {}
    for gradients in ("full", "lowrank"):
        where = "hosts" if gradients == "full" else "back"
        config = run_config(tiny.name, "lora.rank=4", f"wire.gradients={gradients}", f"lora.train={where}")
        start = start_of(tiny, config) if gradients == "lowrank" else initial_adapter(tiny, config.lora.targets, 4, 1)
        with memory_fleet(tiny, config, data_files) as fleet:
            reports = fleet.run(start, 3)
        check_done(reports)
        sent[gradients] = {
            kind: sum(part.payload_bytes for part in parts if part.kind == kind)
            for parts in [[part for name in fleet.devices for part in reports[name].bytes]]
            for kind in ("ACT", "GRAD")
        }
    share = 4 / tiny.hidden_size
    assert sent["full"]["GRAD"] > 100_000
    assert sent["lowrank"]["GRAD"] == share * sent["full"]["GRAD"]
    assert sent["lowrank"]["ACT"] == (1 + share / 2) * sent["full"]["ACT"]


def test_with_copies_each_device_trains_an_a_of_its_own(tiny: ModelSource, data_files: list[Path]) -> None:
    config = run_config(tiny.name, *LOWRANK, "split.host_mode=copies")
    start = start_of(tiny, config)
    with memory_fleet(tiny, config, data_files) as fleet:
        reports = fleet.run(start, 2)
    check_done(reports)
    own = {part.source: part for part in reports["edge-1"].contributions}
    assert set(own) == {"device-1", "device-2", "device-3"}
    with memory_fleet(tiny, config, data_files[:1]) as fleet:
        alone = fleet.run(start, 2)
    assert own["device-1"].adapter == alone["edge-1"].contributions[0].adapter


def test_a_device_refuses_an_answer_without_the_values_of_the_cut_adapter(
    tiny: ModelSource, data_files: list[Path]
) -> None:
    config = run_config(tiny.name, *LOWRANK)
    with memory_fleet(tiny, config, data_files[:1]) as fleet:
        plans = fleet.plans
        fleet.plans = lambda facts: {name: _whole(name, plan) for name, plan in plans(facts).items()}  # type: ignore[method-assign]
        reports = fleet.run(start_of(tiny, config), 1)
    assert "host edge-1 sent torch.float32 [" in reports["device-1"].error
    assert "; expected was torch.float32 [" in reports["device-1"].error
    assert same_bits({}, joined(reports))


def _whole(name: str, plan: pb.Plan) -> pb.Plan:
    if name == "edge-1":
        plan.ClearField("lowrank")
    return plan


def test_a_route_generates_what_the_whole_model_does(tiny: ModelSource, data_files: list[Path]) -> None:
    config = run_config(tiny.name, *LOWRANK, "split.hosts=2")
    adapter = start_of(tiny, config, moved=True)
    with memory_fleet(tiny, config, data_files[:1]) as fleet:
        session, _ = open_session(fleet, adapter)
        tokens, logits = greedy(session)
        session.finish()
    model = plain_model(tiny, config, without_cut(adapter))
    with torch.no_grad():
        without = model(input_ids=torch.tensor([PROMPT])).logits[0, -1]
        with with_cut(model, config, adapter):
            whole = model(input_ids=torch.tensor([[*PROMPT, *tokens[:-1]]])).logits[0, len(PROMPT) - 1 :]
    torch.testing.assert_close(torch.stack(logits), whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(without, whole[0], atol=0.01)
