"""What a node keeps in memory between rounds: its slices of the model, the adapters on them, and the optimizers' moments.

Knows plans and tensors; knows nothing about links or batches. `node.play` trains on what it finds here.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgelam_fl.errors import Mismatch, Refused
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.carry import without_carry
from edgelam_fl.model.identity import difference
from edgelam_fl.model.source import ModelSource, find_model, is_as_found
from edgelam_fl.model.stage import Stage, load_stages
from edgelam_fl.node.private_fronts import PrivateFronts
from edgelam_fl.node.snapshots import Snapshots
from edgelam_fl.plan.modes import host_mode
from edgelam_fl.plan.reading import end_spans, ends_of, ends_train, hosted_span, hosted_trains, is_private, spans_of
from edgelam_fl.privacy.mechanism import secret_generator
from edgelam_fl.split.corrections import read_corrections
from edgelam_fl.split.cut import CutDefence
from edgelam_fl.split.private import private_update
from edgelam_fl.split.snapshot import ENDS, SourceState, site_lane
from edgelam_fl.split.trainee import Trainee, lora_of
from edgelam_fl.wire import edgelam_pb2 as pb

_COLLECT_AGAIN_S = 0.01
_HELD = "held:"  # what arrays of a snapshot at the end of a round are; those of a source have its name in front


class NodeMemory:
    """The memory of one node: at most one `Held` at a time, because there is room for one."""

    def __init__(
        self,
        load: Callable[..., list[Stage]],
        find: Callable[[pb.Plan], ModelSource],
        gone_s: float,
        fronts: PrivateFronts,
        snapshots: Snapshots,
    ) -> None:
        """Holds nothing yet. `load`, `find`, `fronts`, `snapshots`: as of `Held`. `gone_s`: seconds for old slices to leave memory."""
        self._load, self._find, self._gone_s, self._fronts, self._snapshots = load, find, gone_s, fronts, snapshots
        self._held: Held | None = None

    def hold(self, plan: pb.Plan) -> Held:
        """Returns what a plan needs: what is here if the slices are the same, else newly loaded. Raises as `Held`."""
        if self._held is not None and self._held.key == slice_key(plan) and is_as_found(self._held.source):
            return self._held
        before, old = {}, list[weakref.ref[Stage]]()
        if self._held is not None:
            before, old = self._held.known(), [weakref.ref(stage) for stage in self._held.stages()]
        else:
            before = next(map(_tensors_of, self._snapshots.rounds(plan.run)), {})  # of the process before this one
        self._held = None
        _await_gone(old, self._gone_s)
        self._held = Held(plan, self._load, self._find, before, self._fronts, self._snapshots)
        return self._held


class Held:
    """The stages of one node: the ends of its own route, and the layers that it hosts for others."""

    def __init__(
        self,
        plan: pb.Plan,
        load: Callable[..., list[Stage]] = load_stages,
        find: Callable[[pb.Plan], ModelSource] = lambda plan: find_model(plan.model.name),
        before: Mapping[str, np.ndarray] = {},
        fronts: PrivateFronts | None = None,
        snapshots: Snapshots | None = None,
    ) -> None:
        """Loads the slices of a plan. Raises Mismatch if the model here is not the server's, ModelError if there is none.

        `find`: returns the plan's model. `load`: as `load_stages`. `before`: the tensors that the node held until now
        (`known`): the server sends a node only the tensors that it does not hold, whatever layers it had. `fronts`: keeps
        private fronts; None: in memory. `snapshots`: has moments of earlier rounds; None: there are none.
        """
        self.key = slice_key(plan)
        self.source = find(plan).first(plan.model.num_layers)
        if self.source.digest != plan.model.digest:
            digests = f"it is {self.source.digest[:12]} and has to be {plan.model.digest[:12]}"
            raise Mismatch(
                f"model {Path(plan.model.name).name} on node {plan.node} is not the server's: "
                f"{difference(self.source.files, plan.model.files) or digests}. Both must have the same files"
            )
        stages = load(
            self.source, spans_of(plan), plan.model.base, lora_of(plan),
            compute=plan.model.compute, classes=len(plan.task.classes), values=ends_of(plan),
        )  # fmt: skip
        own = len(end_spans(plan))
        self.ends: list[Stage] = stages[:own]
        self.hosted: Stage | None = stages[own] if hosted_span(plan) is not None else None
        for stage in stages:
            stage.set_checkpointing(plan.checkpointing)
        self.ends_trainee = Trainee(self.ends)
        self.update_clipped = False  # whether the update of the newest round was longer than its bound
        self._ends_start: adapters.Adapter = {}  # the ends before the round; only if the update is clipped here
        self._before = adapters.slice_of(before, spans_of(plan))  # empty after the first `start`
        self._fronts = PrivateFronts() if fronts is None else fronts
        self._snapshots = snapshots
        values = ends_of(plan)
        drawn = dict(values.first_values(self.source.hidden_size, plan.seed)) if values is not None else {}
        self._private = {
            name: drawn.get(name.removeprefix(adapters.PREFIX), p.detach().cpu().numpy().copy())
            for name, p in self.ends_trainee.named.items()
            if is_private(plan, name)
        }
        self._cut: tuple[pb.Cut, CutDefence] | None = None
        self._site: dict[str, Trainee] = {}  # per source: the site, or with copies each device

    # ---------------------------------------------------------------- a round

    def asks(self, plan: pb.Plan, given: bytes) -> dict[str, bytes] | None:
        """Returns the SHA-256 of each tensor that is here, if these and those `given` are not what the plan starts from.

        None: they are, or every tensor was given, so that asking for more would be of no use. With differential privacy nothing
        is said of what is here.
        """
        sent = adapters.from_bytes(given) if given else {}
        if adapters.digest(self._together(sent, plan.adapter_digest)) == plan.adapter_digest:
            return None
        wanted = {name for stage in self.stages() for name in stage.adapter_parameters}
        if wanted - self._private.keys() <= sent.keys():
            return None
        here = {} if plan.HasField("privacy") else self.known()
        return {name: bytes.fromhex(adapters.tensor_digest(name, array)) for name, array in here.items()}

    def start(self, plan: pb.Plan, given: bytes, corrections: Sequence[bytes] = ()) -> bool:
        """Takes the adapter that a round starts from. Returns whether the moments of all optimizers are kept.

        `given`: the tensors that were sent; the rest are here already. `corrections`: the tensors of each of the plan's
        corrections. Raises Refused if the adapter or the corrections are not the plan's, ProtocolError if tensors are missing.
        """
        tensors = self._together(adapters.from_bytes(given) if given else {}, plan.adapter_digest)
        digest = adapters.digest(tensors)
        if digest != plan.adapter_digest:
            raise Refused(
                f"node {plan.node} holds adapter {digest[:12]}, the plan starts from {plan.adapter_digest[:12]}"
            )
        tensors |= self._fronts.of(plan.run, self._private)
        mu = plan.lora.prox_mu  # for adapters of one device: its ends, and its copy at a host
        site_mu = mu if host_mode(plan.host_mode).has_copies else 0.0
        adds = read_corrections(plan, corrections)
        own = adds.get(("ends", plan.node), {})
        kept = KeptMoments(plan.run, self._snapshots)
        warm = [self.ends_trainee.start(tensors, ends_train(plan), plan, mu, own, kept.of(ENDS))] if self.ends else []
        for source, trainee in self.site_trainees(plan).items():
            moments, correction = kept.of(self.lane_of(plan, source)), adds.get(("site", source), {})
            warm.append(trainee.start(tensors, hosted_trains(plan), plan, site_mu, correction, moments))
        self._before = {}
        self._ends_start = self.ends_trainee.adapter() if plan.privacy.update_clip else {}
        return all(warm)

    def _together(self, given: adapters.Adapter, digest: str) -> adapters.Adapter:
        """Joins the tensors that are here and `given`; drops the carry factors here if only that gives the digest.

        Such factors are left from a run that is over.
        """
        here = self.known()
        tensors = here | given
        return tensors if adapters.digest(tensors) == digest else without_carry(here) | given

    def site_trainees(self, plan: pb.Plan) -> dict[str, Trainee]:
        """Returns the trainees on the hosted stage per source: one for the site, or with copies one for each device."""
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

    def lane_of(self, plan: pb.Plan, source: str) -> str:
        """Returns the name of a hosted source in snapshots."""
        return site_lane(source if host_mode(plan.host_mode).has_copies else "")

    def sources(self, plan: pb.Plan) -> list[str]:
        """Lists all that this node trains by its name in snapshots."""
        return [ENDS] * bool(self.ends) + [self.lane_of(plan, source) for source in self.site_trainees(plan)]

    def after_round(self, plan: pb.Plan) -> SourceState:
        """Returns what a restarted node needs of a round that has ended: the tensors that it knows, and all moments."""
        each = {ENDS: self.ends_trainee.moments()} if self.ends else {}
        each |= {self.lane_of(plan, source): trainee.moments() for source, trainee in self.site_trainees(plan).items()}
        arrays = {f"{_HELD}{name}": array for name, array in self.known().items()}
        for source, moments in each.items():
            arrays |= {f"{source}:{name}": array for name, array in moments.arrays.items()}
        return SourceState(arrays, {source: dict(moments.numbers) for source, moments in each.items()})

    def finish(self, plan: pb.Plan, own_labels: int, site_labels: Callable[[str, str], int]) -> list[pb.Contribution]:
        """Returns what each source trained, as contributions with the labels that they learned from as weights.

        `site_labels(source, tensor)`: labels that a hosted tensor learned from. A layer that only some routes cross learned
        from their labels alone, so the tensors of a site may differ in weight. With differential privacy every weight is 1,
        and what a device of the plan keeps is what it sends: its update clipped and with noise.
        """
        ends = self.ends_trainee
        self.update_clipped = False
        if plan.privacy.update_clip and own_labels:
            self._protect_update(plan)
        if plan.HasField("privacy"):
            own_labels, site_labels = min(1, own_labels), _as_private(plan, site_labels)
        found = [("ends", plan.node, own_labels, self._finish_ends(plan), ends.lr_sum)] if self.ends else []
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

    def _protect_update(self, plan: pb.Plan) -> None:
        leaves = set(self.ends_trainee.names) - self._private.keys()
        trained = {name: array for name, array in self.ends_trainee.adapter().items() if name in leaves}
        sent, self.update_clipped = private_update(self._ends_start, trained, plan.privacy, secret_generator())
        self.ends_trainee.replace(sent)

    def _finish_ends(self, plan: pb.Plan) -> adapters.Adapter:
        """Returns what the ends trained and may leave the device; keeps the private rest."""
        trained = self.ends_trainee.finish(plan)
        if self._private:
            own = self.ends_trainee.adapter()
            self._fronts.keep(plan.run, {name: own[name] for name in self._private})
        return {name: array for name, array in trained.items() if name not in self._private}

    def cut_defence(self, plan: pb.Plan) -> CutDefence:
        """Returns the defence of the device's cut, the same over the rounds of a run: it has learned who could read it."""
        if self._cut is None or self._cut[0] != plan.cut:
            self._cut = plan.cut, CutDefence(plan.cut, self.ends[0])
        return self._cut[1]

    def current(self) -> adapters.Adapter | None:
        """Returns all tensors that are held and not private, by name; None if there are several versions of a tensor."""
        tensors, several = self._versions()
        return None if several else tensors

    def known(self) -> adapters.Adapter:
        """Returns the tensors that the server need not send: all that are held in one version."""
        return self._versions()[0] | self._before

    def _versions(self) -> tuple[adapters.Adapter, set[str]]:
        """Returns the tensors that are held in one version, and the names of the others (copies that have diverged)."""
        merged: adapters.Adapter = {}
        several: set[str] = set()
        for trainee in [self.ends_trainee, *self._site.values()]:
            for name, array in trainee.adapter().items():
                if name in self._private:
                    continue
                if name in merged and not np.array_equal(merged[name], array):
                    several.add(name)
                merged[name] = array
        for stage in self.stages():
            merged |= stage.carry()
        return {name: array for name, array in merged.items() if name not in several}, several

    def stages(self) -> Iterable[Stage]:
        """Returns all stages: the ends, then the hosted one."""
        return [*self.ends, *([self.hosted] if self.hosted is not None else [])]


class KeptMoments:
    """The moments that were kept at the end of earlier rounds; read at most once, when a trainee asks for them."""

    def __init__(self, run: str, snapshots: Snapshots | None) -> None:
        self._rounds = iter(()) if snapshots is None else snapshots.rounds(run)
        self._read: list[SourceState] = []

    def of(self, source: str) -> Iterator[SourceState]:
        """Yields a source's moments, newest first."""
        number = 0
        while True:
            if number == len(self._read):
                following = next(self._rounds, None)
                if following is None:
                    return
                self._read.append(following)
            state, prefix = self._read[number], f"{source}:"
            arrays = {name.removeprefix(prefix): a for name, a in state.arrays.items() if name.startswith(prefix)}
            yield SourceState(arrays, state.numbers.get(source, {}))
            number += 1


def _tensors_of(state: SourceState) -> adapters.Adapter:
    """Returns the tensors that a node knew at the end of a round."""
    return {name.removeprefix(_HELD): array for name, array in state.arrays.items() if name.startswith(_HELD)}


def _as_private(plan: pb.Plan, site_labels: Callable[[str, str], int]) -> Callable[[str, str], int]:
    """Returns weights that say nothing of counts: 1 for all that a site shares, which learned from noise at least."""
    if host_mode(plan.host_mode).is_shared("site"):
        return lambda source, name: 1
    return lambda source, name: min(1, site_labels(source, name))


def slice_key(plan: pb.Plan) -> tuple[Any, ...]:
    """Returns what two plans have in common if the same loaded slices serve both."""
    model = plan.model
    copies = host_mode(plan.host_mode).has_copies
    return (
        model.digest, model.num_layers, model.base, model.compute, tuple(spans_of(plan)), lora_of(plan), plan.checkpointing, copies,
        len(plan.task.classes), ends_of(plan), plan.cut.private_front, tuple(plan.task.private_modules),
    )  # fmt: skip


def _await_gone(stages: Sequence[weakref.ref[Stage]], most_s: float) -> None:
    """Waits until the stages are no longer in memory, for `most_s` seconds at most.

    Modules hold reference cycles, so a collection is needed. It does nothing while another thread collects, and is repeated.
    """
    end = time.monotonic() + most_s
    while any(stage() is not None for stage in stages):
        gc.collect()
        if time.monotonic() > end:
            return
        time.sleep(_COLLECT_AGAIN_S)
