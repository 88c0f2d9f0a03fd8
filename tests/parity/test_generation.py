"""Generation over a route, greedy, against transformers' own: hosts and device in one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, SmolLM3Config

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import PeerLost
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.adapter import Adapter, initial_adapter
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.stage import load_stages
from edgelam_fl.plan.making import RoundFacts
from edgelam_fl.plan.reading import end_spans, part_id, spans_of
from edgelam_fl.serving.sessions import RouteSession
from edgelam_fl.split.route import new_route, open_route, wire_dtype
from edgelam_fl.split.trainee import lora_of
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from tests.fleet import Fleet, memory_dial, memory_fleet, plain_model
from tests.support import run_config

PROMPT, NEW = [5, 77, 130, 9, 254, 31, 8], 12


def trained_adapter(source: ModelSource, config: RunConfig) -> Adapter:
    start = initial_adapter(source, config.lora.targets, config.lora.rank, 7)
    return {name: array + 0.02 for name, array in start.items()}  # a B of zeros would hide the adapter


def open_session(fleet: Fleet, adapter: Adapter) -> tuple[RouteSession, dict[str, pb.Plan]]:
    """Makes the plans that `server.chat` would make: the fleet's one device is the caller."""
    plans = fleet.plans(RoundFacts("chat", 1, 1, 0, 0))
    for plan in plans.values():
        plan.generate, plan.evaluate, plan.window, plan.micro_batches, plan.batch_size = True, False, 1, 1, 1
    for name, (host, _) in fleet.hosts.items():
        tensors = adapters.slice_of(adapter, spans_of(plans[name]))
        plans[name].adapter_digest = adapters.digest(tensors)
        reply = host.submit(pb.SubmitRequest(plan=plans[name], adapter=adapters.to_bytes(tensors)))
        assert reply.accepted, reply.reason
    plan = plans["device-1"]
    stages = load_stages(fleet.source, end_spans(plan), plan.model.base, lora_of(plan), compute=plan.model.compute)
    route = new_route(plan)
    open_route(memory_dial(fleet), plan, fleet.source, route, ByteCounters(), fleet.emit)
    return RouteSession(stages, adapter, route, wire_dtype(plan), 30.0, plan.cut), plans


def greedy(session: RouteSession) -> tuple[list[int], list[torch.Tensor]]:
    feed, tokens, logits = PROMPT, [], []
    for _ in range(NEW):
        logits.append(session.step(feed))
        feed = [int(logits[-1].argmax())]
        tokens += feed
    return tokens, logits


@pytest.mark.parametrize("base", ["fp32", "bf16"])
@pytest.mark.parametrize(("hosts", "front", "back"), [(1, 2, 2), (3, 1, 1), (2, 2, 0), (1, 0, 0)])
def test_a_route_generates_what_the_whole_model_does(
    tiny: ModelSource, data_files: list[Path], hosts: int, front: int, back: int, base: str
) -> None:
    generates(tiny, data_files, hosts, front, back, base)


SIZES: dict[str, Any] = dict(
    vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=None, sliding_window=4,
)  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(
            **SIZES, head_dim=8, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"] * 2
        ),
        SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1, 0], use_sliding_window=True),
    ],
    ids=["gemma2", "smollm3"],
)
def test_a_route_with_windows_and_without_positions(
    config: Any, tiny_folder: Path, data_files: list[Path], tmp_path: Path
) -> None:
    """Of every other layer, in stages of one layer or two; the window is shorter than the prompt."""
    shutil.copytree(tiny_folder, tmp_path / "model", ignore=lambda *_: ["model.safetensors", "config.json"])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    generates(find_model(str(tmp_path / "model")), data_files, hosts=1, front=1, back=1, base="fp32")


def generates(source: ModelSource, data_files: list[Path], hosts: int, front: int, back: int, base: str) -> None:
    """Judges that a route's answer is the whole model's."""
    config = run_config(
        source.name, f"split.hosts={hosts}", f"split.front={front}", f"split.back={back}", f"model.base={base}"
    )
    adapter = trained_adapter(source, config)
    model = plain_model(source, config, adapter)
    ids = torch.tensor([PROMPT])
    expected = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )  # fmt: skip
    with memory_fleet(source, config, data_files[:1]) as fleet:
        session, plans = open_session(fleet, adapter)
        tokens, logits = greedy(session)
        session.reset()  # a second text on the same links, from an empty cache
        again, _ = greedy(session)
        session.finish()
        for name, (host, _) in fleet.hosts.items():
            report = host.wait(pb.WaitRequest(job=part_id(plans[name]), timeout_s=30))
            assert (report.state, report.error) == ("done", "")
    assert tokens == expected[0, len(PROMPT) :].tolist() == again
    if back:  # without layers behind the cut the last token alone comes back, and another kernel multiplies one row
        for got, wanted in zip(logits, step_by_step(model, tokens), strict=True):
            assert torch.equal(got, wanted)


def step_by_step(model: Any, tokens: list[int]) -> list[torch.Tensor]:
    """Returns the whole model's logits, from one call per step as a route makes them; `generate` itself asks for the last row alone."""
    cache, logits = None, []
    for feed in [PROMPT, *([token] for token in tokens[:-1])]:
        with torch.no_grad():
            output = model(input_ids=torch.tensor([feed]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits[0, -1])
    return logits


def test_a_session_that_does_not_fit_costs_the_caller_only(tiny: ModelSource, data_files: list[Path]) -> None:
    config = run_config(tiny.name)
    with memory_fleet(tiny, config, data_files[:1]) as fleet:
        session, _ = open_session(fleet, trained_adapter(tiny, config))
        session.step(PROMPT)
        assert session.route.entry is not None
        hidden = torch.zeros(1, 1, tiny.hidden_size)
        session.route.entry.send(pb.Header(kind=pb.KV_STEP, kv_step=pb.KvStep(position=3, length=1)), hidden)
        with pytest.raises(PeerLost, match=r"ended the job: .*tokens 3 to 4 of a session that holds 7"):
            session.route.receive(10, "the answer to a position that the session does not have")
