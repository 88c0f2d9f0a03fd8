"""Suggests what to change in a run file that asks for more memory than the nodes have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from edgelam_fl.config import RunConfig
from edgelam_fl.model.base_names import BASES
from edgelam_fl.plan.footprint import Footprints
from edgelam_fl.plan.instance import InstanceMaker
from edgelam_fl.plan.search import shortage
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.plan.speeds import before_rounds
from edgelam_fl.wire import edgelam_pb2 as pb

_LEAST_TOKENS = 8
_MOST_ADDED_HOSTS = 8


def nearest_that_fits(spec: RunSpec, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile]) -> str:
    """Returns a sentence with the smallest change of each kind that fits."""
    found = []
    for variants in _variants(spec.config):
        for words, changed in variants:
            if _fits(RunSpec(changed, spec.source), devices, hosts):
                found.append(words)
                break
    found += _more_hosts(spec, devices, hosts)
    return f"It fits with {' or '.join(found)}" if found else "No single change of the run file makes it fit"


def hosts_wanted(config: RunConfig) -> int | None:
    """Returns the number of hosts per site that the run file asks for; None if the planner chooses it."""
    return None if config.split.hosts == "auto" else config.split.hosts


def _fits(spec: RunSpec, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile]) -> bool:
    """Whether each site has a chain that fits, with one micro-batch of each device in flight."""
    maker = InstanceMaker(Footprints(spec), before_rounds(spec.config), [*devices, *hosts], window=1)
    count = hosts_wanted(spec.config)
    return all(shortage(instance, count) is None for instance in maker.of_sites(devices, hosts))


def _variants(config: RunConfig) -> Iterator[Iterator[tuple[str, RunConfig]]]:
    """Yields one iterator per kind of change, over (words, changed run file), the smallest change first."""
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
        (f"task.max_tokens = {tokens}", _with(config, "task", max_tokens=tokens))
        for tokens in lengths
        if tokens >= _LEAST_TOKENS
    )
    if not config.pieces.checkpointing:
        yield iter([("split.checkpointing = true", _with(config, "split", checkpointing=True))])


def _with(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _more_hosts(spec: RunSpec, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile]) -> list[str]:
    """Says how many more hosts like the one with the most memory would be enough; empty if even the most are not."""
    largest = max(hosts, key=lambda host: (host.memory_available_bytes, host.name))
    changed = RunSpec(_with(spec.config, "split", hosts="auto"), spec.source)
    for more in range(1, _MOST_ADDED_HOSTS + 1):
        copies = []
        for number in range(more):
            copies.append(pb.Profile())
            copies[-1].CopyFrom(largest)
            copies[-1].name = f"{largest.name} {number}"
        if _fits(changed, devices, [*hosts, *copies]):
            auto = "" if spec.config.split.hosts == "auto" else " and split.hosts = 'auto'"
            return [f"{more} more {'host' if more == 1 else 'hosts'} like {largest.name}{auto}"]
    return []
