"""What a node keeps in memory between rounds: its slices of the model, the adapters on them, and the optimizers' moments.

Knows plans and tensors; knows nothing about links or batches. `split.stage_host` keeps one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from edgelam_fl.errors import Refused
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.carry import without_carry
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.stage import Stage, load_stages
from edgelam_fl.plan.modes import host_mode
from edgelam_fl.plan.reading import end_spans, ends_train, hosted_span, hosted_trains, spans_of
from edgelam_fl.split.corrections import read_corrections
from edgelam_fl.split.trainee import Trainee, lora_of
from edgelam_fl.wire import edgelam_pb2 as pb


class Held:
    """The stages of one node: the ends of its own route, and what it hosts for others."""

    def __init__(
        self,
        plan: pb.Plan,
        load: Callable[..., list[Stage]] = load_stages,
        find: Callable[[pb.Plan], ModelSource] = lambda plan: find_model(plan.model.name),
        before: Mapping[str, np.ndarray] = {},
    ) -> None:
        """Loads the slices, by `load`, of what `find` finds. Raises Refused where the model here is not the server's.

        `before`: what the node held until now (`known`). The server sends it only what it does not hold, also of other layers.
        """
        self.key = slice_key(plan)
        self.source = find(plan)
        if self.source.digest != plan.model.digest:
            raise Refused(
                f"model {plan.model.name} is {self.source.digest[:12]} on node {plan.node} and {plan.model.digest[:12]} at the "
                f"server: they must be the same files"
            )
        stages = load(
            self.source, spans_of(plan), plan.model.base, lora_of(plan),
            compute=plan.model.compute, classes=len(plan.task.classes),
        )  # fmt: skip
        own = len(end_spans(plan))
        self.ends: list[Stage] = stages[:own]
        self.hosted: Stage | None = stages[own] if hosted_span(plan) is not None else None
        for stage in stages:
            stage.set_checkpointing(plan.checkpointing)
        self.ends_trainee = Trainee(self.ends)
        self._before = adapters.slice_of(before, spans_of(plan))  # until the first adapter has come
        self._site: dict[str, Trainee] = {}  # by source: the site, or with copies each device

    # ---------------------------------------------------------------- a round

    def start(self, plan: pb.Plan, given: bytes, corrections: Sequence[bytes] = ()) -> bool:
        """Takes the round's first adapter: what is `given`, and what is here for the rest. Returns whether all moments go on.

        `corrections`: the tensors of each of the plan's. Raises Refused where together they are not what the plan starts
        from, or the corrections not the plan's, ProtocolError where tensors are missing.
        """
        tensors = self._together(adapters.from_bytes(given) if given else {}, plan.adapter_digest)
        digest = adapters.digest(tensors)
        if digest != plan.adapter_digest:
            raise Refused(
                f"node {plan.node} holds adapter {digest[:12]}, the plan starts from {plan.adapter_digest[:12]}"
            )
        mu = plan.lora.prox_mu  # of a device's: its ends, and its copies here
        site_mu = mu if host_mode(plan.host_mode).has_copies else 0.0
        adds = read_corrections(plan, corrections)
        own = adds.get(("ends", plan.node), {})
        warm = [self.ends_trainee.start(tensors, ends_train(plan), plan, mu, own)] if self.ends else []
        for source, trainee in self.site_trainees(plan).items():
            warm.append(trainee.start(tensors, hosted_trains(plan), plan, site_mu, adds.get(("site", source), {})))
        self._before = {}
        return all(warm)

    def _together(self, given: adapters.Adapter, digest: str) -> adapters.Adapter:
        """What is here and what is `given`; without the carry factors here where they are of a run that is over."""
        here = self.known()
        tensors = here | given
        return tensors if adapters.digest(tensors) == digest else without_carry(here) | given

    def site_trainees(self, plan: pb.Plan) -> dict[str, Trainee]:
        """What trains on the hosted stage, by source: one for the site, or with copies one for each device."""
        if self.hosted is None:
            return {}
        mode = host_mode(plan.host_mode)
        routes = sorted(plan.serves, key=lambda route: route.device_index)
        sources = mode.sources(plan.site, [route.device for route in routes])
        for source in sources:
            if source not in self._site:
                self._site[source] = Trainee([self.hosted], own=mode.has_copies)
        self._site = {source: self._site[source] for source in sources}
        return self._site

    def finish(self, plan: pb.Plan, own_labels: int, site_labels: Callable[[str, str], int]) -> list[pb.Contribution]:
        """What each source trained. `site_labels(source, tensor)`: labels that a hosted tensor learned from.

        A layer that only some routes cross learned from their labels alone, so a site's tensors may differ in weight.
        """
        ends = self.ends_trainee
        found = [("ends", plan.node, own_labels, ends.finish(plan), ends.lr_sum)] if self.ends else []
        for source, trainee in self._site.items() if self.hosted is not None else []:
            tensors = trainee.finish(plan)
            for weight in sorted({site_labels(source, name) for name in tensors}):
                part = {name: array for name, array in tensors.items() if site_labels(source, name) == weight}
                found.append(("site", source, weight, part, trainee.lr_sum))
        return [
            pb.Contribution(
                scope=scope, source=source, weight=weight, adapter=adapters.to_bytes(tensors), lr_sum=lr_sum
            )
            for scope, source, weight, tensors, lr_sum in found
            if weight and tensors
        ]

    def current(self) -> adapters.Adapter | None:
        """All that is held, by name; None where several versions of a tensor are."""
        tensors, several = self._versions()
        return None if several else tensors

    def known(self) -> adapters.Adapter:
        """What the server may take to be here: all tensors that are held in one version."""
        return self._versions()[0] | self._before

    def _versions(self) -> tuple[adapters.Adapter, set[str]]:
        """What is held in one version alone, and the names of the rest (copies that went apart)."""
        merged: adapters.Adapter = {}
        several: set[str] = set()
        for trainee in [self.ends_trainee, *self._site.values()]:
            for name, array in trainee.adapter().items():
                if name in merged and not np.array_equal(merged[name], array):
                    several.add(name)
                merged[name] = array
        for stage in self.stages():
            merged |= stage.carry()
        return {name: array for name, array in merged.items() if name not in several}, several

    def stages(self) -> Iterable[Stage]:
        return [*self.ends, *([self.hosted] if self.hosted is not None else [])]


def slice_key(plan: pb.Plan) -> tuple[Any, ...]:
    """What would make it another slice."""
    model = plan.model
    copies = host_mode(plan.host_mode).has_copies
    return (
        model.digest, model.base, model.compute, tuple(spans_of(plan)), lora_of(plan), plan.checkpointing, copies,
        len(plan.task.classes),
    )  # fmt: skip
