"""Split federated LoRA as a Flower Strategy: it composes a selection, a bandwidth allocator and an aggregation.

A round, top to bottom: `configure_train` (select -> layout -> shares -> a plan a node), messages, `aggregate_train`
(validate -> contributions -> aggregate per module -> the next round's adapter). Evaluation of an adapter is the first
phase of the round that starts from it; `configure_evaluate` makes the one job after the last round.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from edgelam_fl.errors import RunFailed, TooFewSources
from edgelam_fl.flower import from_record, record_bytes, to_record
from edgelam_fl.model import adapter as adapters
from edgelam_fl.plan.layout import Layout, Site, site_source, who_may_host
from edgelam_fl.plan.making import RoundFacts, make_plans, planned_steps
from edgelam_fl.plan.placement import Placement
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import edgelam_pb2 as pb
from server import hub
from server.corrections import add_corrections
from server.events_of_round import describe_round, describe_timeline
from server.exchange import Ending, Nodes
from server.global_adapter import as_start, complete, starting_point
from server.replies import Fold, Reply, broken_sites, collect, folds, frozen, parts, problem, read_reply
from server.run_folder import RunFolder
from server.schedule import Schedule
from strategies.aggregation.error import aggregation_error
from strategies.api import Aggregated, Contribution, Demand
from strategies.registry import load

_ATTEMPTS = 3
_MESSAGES_S = 120.0  # on top of the round's deadline: Flower polls every few seconds and starts a process a message


@dataclass
class Round:
    """What a round was planned as, until its replies are in."""

    facts: RoundFacts
    layout: Layout
    plans: dict[str, pb.Plan]
    shares: dict[str, float] = field(default_factory=dict)  # of the devices that were chosen
    dropped: list[str] = field(default_factory=list)  # chosen devices that the wireless model makes fail
    fold: Fold | None = None  # of a large round: what its replies come to, instead of their tensors
    sent_bytes: dict[str, int] = field(default_factory=dict)  # adapters, by node
    records: dict[tuple[str, frozenset[str]], ArrayRecord] = field(default_factory=dict)  # of adapters to send
    began: float = field(default_factory=time.monotonic)


class SplitLora(Strategy):
    def __init__(self, spec: RunSpec, nodes: Nodes, folder: RunFolder, run: str) -> None:
        config = spec.config
        self.spec, self.config, self.source = spec, config, spec.source
        self.nodes, self.folder, self.run = nodes, folder, run
        self.schedule = Schedule(spec)
        self.placement = Placement(spec, folder.emit)
        self.aggregation = load("aggregation", config.strategy.aggregation, config.strategy.options)
        self.personal: dict[str, adapters.Adapter] = {}  # source -> tensors it goes on with instead of the global ones
        self._site_of: dict[str, str] = {}  # device -> its newest site, as a source
        self.digests: dict[str, str] = {}  # node -> what it holds, as of its last reply
        self._held: dict[str, dict[str, str]] = {}  # node -> digest of each tensor that is known to be there
        self.step_offset = 0
        self._attempt = 1
        self._open: Round | None = None
        self._missing: dict[str, str] = {}
        self._too_few = ""  # why the newest attempt's contributions could not be aggregated
        self._global: adapters.Adapter = {}

    def start(
        self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, timeout: float = 3600, *_: Any, **__: Any
    ) -> Result:
        """Runs `num_rounds` rounds and the evaluation after the last. Raises RunFailed when no attempt at a round succeeds."""
        result, arrays, config = Result(), initial_arrays, ConfigRecord()
        for number in range(1, num_rounds + 1):
            arrays, metrics = self._round(number, arrays, config, grid, timeout)
            result.arrays = arrays
            result.train_metrics_clientapp[number] = metrics
        self._attempt = 1
        self.nodes.refresh(ask_lost=True)
        replies = self._exchange(self.configure_evaluate(num_rounds + 1, arrays, config, grid), timeout)
        evaluated = self.aggregate_evaluate(num_rounds + 1, replies)
        if evaluated is not None:
            result.evaluate_metrics_clientapp[num_rounds + 1] = evaluated
        return result

    def _round(
        self, number: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid, timeout: float
    ) -> tuple[ArrayRecord, MetricRecord]:
        for attempt in range(1, _ATTEMPTS + 1):
            self._attempt = attempt
            self.nodes.gather(self.config, at_start=number == attempt == 1)
            replies = self._exchange(self.configure_train(number, arrays, config, grid), timeout)
            aggregated, metrics = self.aggregate_train(number, replies)
            if aggregated is not None and metrics is not None:
                return aggregated, metrics
        problems = [f"{name}: {problem}" for name, problem in sorted(self.nodes.problems.items())]
        reasons = "; ".join(problems + [self._too_few] * bool(self._too_few))
        raise RunFailed(f"round {number} failed {_ATTEMPTS} times: {reasons}")

    def summary(self) -> None:
        """Nothing to log: the run's events and report say it all."""

    # ---------------------------------------------------------------- Flower's four hooks

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._configure(server_round, arrays, trains=True)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._configure(server_round, arrays, trains=False)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next adapter, or (None, None) where too few devices came through, or no site with all of its hosts.

        Too few means `min_nodes`, or fewer sources than the aggregation needs.
        """
        round_, replies_by_node = self._read(replies)
        broken = broken_sites(round_.layout, replies_by_node)
        for site, hosts in broken.items():
            self.folder.emit("site_lost", round=round_.facts.round, site=site, missing=hosts)
        devices = [
            name
            for site in round_.layout.sites
            if site.name not in broken
            for name in site.members
            if name in replies_by_node
        ]
        if round_.fold is not None:
            contributions = round_.fold.contributions(broken)
        else:
            contributions = collect(replies_by_node, round_.plans, round_.layout, broken)
        if not contributions or len(devices) < self.config.federation.min_nodes:
            return None, None
        aggregated, error = self._aggregate(contributions, server_round)
        if aggregated is None:
            return None, None
        error = None if round_.fold is not None else error  # it needs each source's factors
        self._global = {**self._global, **aggregated.tensors, **aggregated.carry}
        for name, tensors in aggregated.personal.items():  # who took no part keeps what it had
            self.personal[name] = {**self.personal.get(name, {}), **tensors}
        self._site_of |= {name: site_source(round_.layout.site_of(name).name) for name in devices}
        self.step_offset += round_.facts.steps
        where = self.folder.checkpoint(self._global, server_round, self.step_offset, self._exports())
        virtual = self._virtual(round_, replies_by_node)
        chosen = [*round_.layout.routes, *round_.dropped]
        self.schedule.observe(server_round, chosen, round_.plans, replies_by_node, virtual)
        self.placement.observe(round_.plans, {name: reply.report for name, reply in replies_by_node.items()})
        metrics = self._close(round_, replies_by_node, where, error, aggregated.facts, virtual)
        return to_record(self._global), metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        round_, replies_by_node = self._read(replies)
        if not any(reply.report.eval_labels for reply in replies_by_node.values()):
            raise RunFailed(f"the evaluation after the last round failed: {self.nodes.problems}")
        return self._close(round_, replies_by_node, "adapter")

    def _aggregate(self, contributions: list[Contribution], number: int) -> tuple[Aggregated | None, float | None]:
        """What the aggregation makes of them, and its error against the mean of the products; None: too few sources."""
        start = as_start(self._global, self.config, number)
        try:
            aggregated = self.aggregation.rule.aggregate(contributions, start)
        except TooFewSources as problem:
            self._too_few = str(problem)
            return None, None
        self._too_few = ""
        return aggregated, aggregation_error(contributions, {**aggregated.tensors, **aggregated.carry}, start)

    # ---------------------------------------------------------------- before

    def _configure(self, number: int, arrays: ArrayRecord, trains: bool) -> list[Message]:
        here = [self.nodes.profiles[name] for name in self.nodes.devices()]
        edges = self.nodes.edges()
        chosen = self.schedule.select(number, here, len(edges)) if trains else self.schedule.everyone(here)
        tokens = {name: secrets.token_bytes(16) for name in chosen.names}
        everyone = [self.nodes.profiles[name] for name in chosen.names]
        shares = self.schedule.shares(everyone, number)  # before anyone knows who will drop out
        virtual = self.schedule.virtual if trains else None
        dropped = virtual.dropouts(number, self._attempt, chosen.names) if virtual else []
        devices = [device for device in everyone if device.name not in dropped]
        hosts = who_may_host(self.config, [*edges, *devices])
        if trains:  # an evaluation alone is not worth it
            names = {node.name for node in [*devices, *hosts]}
            self.placement.check_links(devices, hosts, shares, partial(self.nodes.measure_links, names))
        layout = self.placement.layout(number, devices, hosts, shares)
        steps = planned_steps(self.config, devices) if trains else 0
        unequal_ranks = self.aggregation.capabilities.unequal_ranks
        asked = self.aggregation.capabilities.client_settings(number)
        facts = RoundFacts(
            self.run,
            number,
            self._attempt,
            self.step_offset,
            steps,
            asked,
            unequal_ranks,
            hub_port=hub.port(),
            relay_key=hub.secret(),
        )
        plans = make_plans(self.spec, facts, self.nodes.profiles, layout, shares, tokens)
        self._global = complete(from_record(arrays), plans, self.spec, unequal_ranks)
        fold = Fold() if trains and folds(self.aggregation.capabilities, len(plans)) else None
        self._open = Round(facts, layout, plans, shares, dropped, fold)
        self.folder.emit(
            "plan", round=number, attempt=self._attempt, selected=list(chosen.names), why=dict(chosen.why), shares=shares,
            routes=[_picture(route, self.source.num_layers) for route in layout.routes.values()],
            sites=[_site_picture(site) for site in layout.sites if site.hosts],
            nodes={name: _node_picture(plan) for name, plan in plans.items()},
            personal=self.aggregation.capabilities.personal,
            **({"demands": _demands(self.schedule.demands(everyone, number))} if virtual else {}),
        )  # fmt: skip
        return [self._message(name, plan) for name, plan in plans.items()]

    def _message(self, name: str, plan: pb.Plan) -> Message:
        assert self._open is not None
        needed = starting_point(plan, self._global, self.personal)
        plan.adapter_digest = adapters.digest(needed)
        beside = [to_record(tensors) for tensors in add_corrections(plan, self.aggregation.capabilities, self._global)]
        wait = self.config.federation.wait
        content = RecordDict({"plan": ConfigRecord({"plan": plan.SerializeToString(), "wait": wait})})
        for number, record in enumerate(beside):
            content[f"correction-{number}"] = record
        if beside:
            self._open.sent_bytes[name] = sum(map(record_bytes, beside))
        if self.digests.get(name) != plan.adapter_digest:
            known = self._held.get(name, {})
            held = {t for t, array in needed.items() if t in known and known[t] == adapters.digest({t: array})}
            which = plan.adapter_digest, frozenset(held)  # the same for many nodes: made once
            if which not in self._open.records:
                self._open.records[which] = to_record({t: array for t, array in needed.items() if t not in held})
            content["adapter"] = self._open.records[which]
            self._open.sent_bytes[name] = record_bytes(content["adapter"]) + self._open.sent_bytes.get(name, 0)
        return self.nodes.message(name, "train" if plan.steps else "evaluate", content)

    def _exchange(self, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
        """Flower's replies as they arrive; why others did not reply is kept for `_read`.

        With federation.wait = "park" all jobs are handed over first, and then asked for: one ClientApp after the other can
        do that, where a job needs another node's.
        """
        self._missing, limit_s = {}, timeout + _MESSAGES_S
        one_by_one = self._open is not None and self._open.fold is not None
        sites = self._endings()
        if self.config.federation.wait != "park":
            return self.nodes.arriving(messages, limit_s, self._missing, one_by_one, sites)
        replies, self._missing = self.nodes.exchange(messages, limit_s)
        parked = [name for name, reply in replies.items() if read_reply(reply.content).report.state == "running"]
        failed = [reply for name, reply in replies.items() if name not in parked]
        asked = map(self._ask_again, parked)
        return chain(failed, self.nodes.arriving(asked, limit_s, self._missing, one_by_one, sites))

    def _endings(self) -> list[Ending]:
        """The sites whose nodes wait for each other in the open round: a part that began late waits for its peers, too."""
        assert self._open is not None
        deadlines = next(iter(self._open.plans.values())).deadlines
        limit_s = deadlines.ready_s + deadlines.step_s + _MESSAGES_S
        return [
            Ending(frozenset(host.name for host in site.hosts), frozenset(site.members), limit_s)
            for site in self._open.layout.sites
            if site.hosts
        ]

    def _ask_again(self, name: str) -> Message:
        assert self._open is not None
        plan = ConfigRecord({"plan": self._open.plans[name].SerializeToString()})
        return self.nodes.message(name, "train.collect", RecordDict({"plan": plan}))

    # ---------------------------------------------------------------- after

    def _read(self, messages: Iterable[Message]) -> tuple[Round, dict[str, Reply]]:
        """The usable replies by node. Why the others are not is noted and told."""
        assert self._open is not None
        round_ = self._open
        replies: dict[str, Reply] = {}
        problems: dict[str, str] = {}
        for name, reply, wrong in map(self._taken, messages):
            if wrong:
                problems[name] = wrong
            elif name:
                replies[name] = reply
        problems |= self._missing
        for name in round_.plans:
            if name in replies:
                self.digests[name] = replies[name].report.adapter_digest
                held = self._known_held(round_.plans[name], replies[name])
                self._held[name] = {tensor: adapters.digest({tensor: array}) for tensor, array in held.items()}
                self.nodes.problems.pop(name, None)
                continue
            self.digests.pop(name, None)
            self._held.pop(name, None)
            self.nodes.problems[name] = problems.get(name, "no reply")
            self.folder.emit("node_lost", round=round_.facts.round, node=name, reason=self.nodes.problems[name])
            if name in self._missing:
                self.nodes.lose(name)
        return round_, replies

    def _taken(self, message: Message) -> tuple[str, Reply, str]:
        """(node, its reply, why that cannot be used); of a large round without its tensors, which are summed up.

        No node: the message is from none that was asked.
        """
        assert self._open is not None
        name, plans, fold = self.nodes.name_of(message), self._open.plans, self._open.fold
        if name not in plans:
            return "", Reply(pb.JobReport()), ""
        reply = read_reply(message.content)
        wrong = problem(reply, plans[name], self._global)
        if fold is not None and not wrong:
            fold.add(parts(name, reply, plans[name], self._open.layout))
        return name, reply.without_tensors() if fold is not None else reply, wrong

    def _known_held(self, plan: pb.Plan, reply: Reply) -> adapters.Adapter:
        """The tensors that a node holds after its round: all of them, if its digest says so, else those that were frozen."""
        start = starting_point(plan, self._global, self.personal)
        after = {**start, **{name: array for part in reply.tensors for name, array in part.items()}}
        if adapters.digest(after) == reply.report.adapter_digest:
            return after
        return {name: array for name, array in start.items() if frozen(plan, name)}

    def _exports(self) -> dict[str, adapters.Adapter]:
        """What devices go on with instead of the global adapter: their own part and that of their site.

        Of all that ever delivered: what a device shares has moved on also where it took no part in the round.
        """
        own = {
            name: {**self.personal.get(site, {}), **self.personal.get(name, {})} for name, site in self._site_of.items()
        }
        return {name: tensors for name, tensors in own.items() if tensors}

    def _virtual(self, round_: Round, replies: dict[str, Reply]) -> dict[str, Any] | None:
        """The round in virtual time, where there is a wireless model."""
        virtual, number = self.schedule.virtual, round_.facts.round
        return virtual.over(number, round_.shares, round_.dropped, round_.sent_bytes, replies) if virtual else None

    def _close(
        self,
        round_: Round,
        replies: dict[str, Reply],
        checkpoint: str,
        error: float | None = None,
        facts: Mapping[str, float] = {},
        virtual: dict[str, Any] | None = None,
    ) -> MetricRecord:
        """The round's events, and its metrics for Flower."""
        started_from = {name: plan.adapter_digest for name, plan in round_.plans.items()}
        devices, hosts, by_kind = describe_round(round_.sent_bytes, started_from, replies)
        timeline = describe_timeline(replies)
        if timeline:
            self.folder.emit("timeline", round=round_.facts.round, nodes=timeline)
        self.folder.emit(
            "round_done", round=round_.facts.round, attempt=round_.facts.attempt, steps=round_.facts.steps,
            seconds=round(time.monotonic() - round_.began, 3), devices=devices, hosts=hosts, bytes_by_kind=by_kind,
            checkpoint=checkpoint, aggregation_error=error, aggregation=dict(facts),
            **({"virtual": virtual} if virtual else {}),
        )  # fmt: skip
        labels = sum(reply.report.eval_labels for reply in replies.values())
        loss = sum(reply.report.eval_loss_sum for reply in replies.values()) / labels if labels else 0.0
        print(f"round {round_.facts.round}: {len(devices)} devices, held-out loss {loss:.4f} at its start", flush=True)
        return MetricRecord({"eval-loss": loss, "num-examples": labels})


def _picture(route: pb.Route, num_layers: int) -> dict[str, Any]:
    return {
        "device": route.device,
        "front": route.front,
        "back_first": route.back_first,
        "num_layers": num_layers,
        "hops": [{"node": hop.node, "first": hop.first, "last": hop.last} for hop in route.hops],
    }


def _site_picture(site: Site) -> dict[str, Any]:
    return {
        "site": site.name,
        "hosts": [{"node": host.name, "first": host.first, "last": host.last} for host in site.hosts],
        "devices": list(site.members),
    }


def _demands(demands: Iterable[Demand]) -> dict[str, dict[str, Any]]:
    """What the bandwidth strategy saw in virtual time, for `server.virtual.replay`."""
    return {d.name: {"payload_bytes": d.payload_bytes, "compute_s": d.compute_s, "snr": d.snr} for d in demands}


def _node_picture(plan: pb.Plan) -> dict[str, Any]:
    return {"base": plan.model.base, "compute": plan.model.compute, "rank": plan.lora.rank}
