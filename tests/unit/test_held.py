"""What a node keeps between rounds: an adapter that comes in parts."""

from __future__ import annotations

import numpy as np
import pytest

from edgelam_fl.errors import Refused
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.source import ModelSource
from edgelam_fl.node.held import Held
from edgelam_fl.plan.layout import make_layout
from edgelam_fl.plan.making import ClientSettings, RoundFacts, make_plans
from edgelam_fl.plan.reading import spans_of
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.support import run_config

FROZEN = ".lora_A.weight"


def host_plan(source: ModelSource, mode: str) -> tuple[pb.Plan, adapters.Adapter]:
    """A host of two devices whose A stays as it is, and what it starts from."""
    config = run_config(source.name, f"split.host_mode={mode}")
    devices = [pb.Profile(name=name, role=pb.DEVICE) for name in "ab"]
    edge = pb.Profile(name="e", role=pb.EDGE, address="e:1")
    layout, profiles = make_layout(RunSpec(config, source), devices, [edge]), {p.name: p for p in (*devices, edge)}
    facts = RoundFacts("run", 1, 1, 0, 1, ClientSettings(train_a=False))
    plan = make_plans(RunSpec(config, source), facts, profiles, layout, {}, dict.fromkeys("ab", b"t"))["e"]
    start = adapters.initial_adapter(source, config.lora.targets, config.lora.rank, 1)
    return plan, adapters.slice_of(start, spans_of(plan))


@pytest.mark.parametrize("mode", ["joint", "copies"])
def test_what_is_not_sent_is_what_is_here(tiny: ModelSource, mode: str) -> None:
    """After the copies went apart, in B alone, the mean of B is enough; A was the same in all."""
    plan, start = host_plan(tiny, mode)
    held = Held(plan)
    plan.adapter_digest = adapters.digest(start)
    held.start(plan, adapters.to_bytes(start))
    for number, trainee in enumerate(held.site_trainees(plan).values(), 1):
        for name in trainee.names:
            trainee.named[name].data.add_(float(number))
    assert (held.current() is None) == (mode == "copies")
    trained = {
        name: array
        for part in held.finish(plan, 0, lambda *_: 1)
        for name, array in adapters.from_bytes(part.adapter).items()
    }
    assert trained
    assert not any(name.endswith(FROZEN) for name in trained)

    following = {name: array if name.endswith(FROZEN) else array + np.float32(0.5) for name, array in start.items()}
    plan.adapter_digest = adapters.digest(following)
    parts = {name: array for name, array in following.items() if not name.endswith(FROZEN)}
    missing = dict(list(parts.items())[1:])
    with pytest.raises(Refused, match=r"node e holds adapter .*, the plan starts from"):
        held.start(plan, adapters.to_bytes(missing))
    held.start(plan, adapters.to_bytes(parts))
    for trainee in held.site_trainees(plan).values():
        assert adapters.digest(trainee.adapter()) == plan.adapter_digest
