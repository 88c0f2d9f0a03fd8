"""Generation over a route, greedy, against transformers' own: hosts and device in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import PeerLost
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.adapter import Adapter, initial_adapter
from edgelam_fl.model.source import ModelSource
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
    open_route(memory_dial(fleet), plan, fleet.source, route, ByteCounters())
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
    config = run_config(
        tiny.name, f"split.hosts={hosts}", f"split.front={front}", f"split.back={back}", f"model.base={base}"
    )
    adapter = trained_adapter(tiny, config)
    model = plain_model(tiny, config, adapter)
    ids = torch.tensor([PROMPT])
    expected = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )  # fmt: skip
    with memory_fleet(tiny, config, data_files[:1]) as fleet:
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
