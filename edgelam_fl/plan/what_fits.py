"""What to change in a run file that asks for more memory than the nodes have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import DoesNotFit
from edgelam_fl.plan.bases import BASES
from edgelam_fl.plan.search import best_plan
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.plan.speeds import Costs
from edgelam_fl.wire import edgelam_pb2 as pb


def nearest_that_fits(spec: RunSpec, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile]) -> str:
    """A sentence: of each kind of change the smallest that fits."""
    found = []
    for variants in _variants(spec.config):
        for words, changed in variants:
            if _fits(RunSpec(changed, spec.source), devices, hosts):
                found.append(words)
                break
    found += _more_hosts(spec, devices, hosts)
    return f"It fits with {' or '.join(found)}" if found else "No single change of the run file makes it fit"


def _fits(spec: RunSpec, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile]) -> bool:
    hosts_asked = spec.config.split.hosts
    count = None if hosts_asked == "auto" else hosts_asked
    try:
        for problem in Costs(spec).problems(devices, hosts, {}, 1):
            best_plan(problem.run, problem.members, problem.hosts, count)
    except DoesNotFit:
        return False
    return True


def _variants(config: RunConfig) -> Iterator[Iterator[tuple[str, RunConfig]]]:
    split, bases = config.split, list(BASES)
    ends = ((front, back) for front in range(split.front, 0, -1) for back in (min(split.back, front),))
    smaller = bases[bases.index(config.model.base) + 1 :] if config.model.base in bases else []
    yield (
        (f"split.front = {front} and split.back = {back}", _with(config, "split", front=front, back=back))
        for front, back in ends if (front, back) != (split.front, split.back)
    )  # fmt: skip
    yield ((f"model.base = {base!r}", _with(config, "model", base=base, compute="auto")) for base in smaller)
    lengths = (config.task.max_tokens >> shift for shift in range(1, 12))
    yield (
        (f"task.max_tokens = {tokens}", _with(config, "task", max_tokens=tokens)) for tokens in lengths if tokens >= 8
    )
    if not split.checkpointing:
        yield iter([("split.checkpointing = true", _with(config, "split", checkpointing=True))])


def _with(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _more_hosts(spec: RunSpec, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile]) -> list[str]:
    """How many more like the one with the most memory would do."""
    largest = max(hosts, key=lambda host: (host.memory_available_bytes, host.name))
    changed = RunSpec(_with(spec.config, "split", hosts="auto"), spec.source)
    for more in range(1, 9):
        copies = []
        for number in range(more):
            copies.append(pb.Profile())
            copies[-1].CopyFrom(largest)
            copies[-1].name = f"{largest.name} {number}"
        if _fits(changed, devices, [*hosts, *copies]):
            auto = "" if spec.config.split.hosts == "auto" else " and split.hosts = 'auto'"
            return [f"{more} more {'host' if more == 1 else 'hosts'} like {largest.name}{auto}"]
    return []
