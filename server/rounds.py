"""Rounds of split federated LoRA. A round, top to bottom: plan -> exchange -> receive -> conclude -> the next state.

An adapter is evaluated in the first phase of the round that starts from it; after the last round one more job evaluates
the result. Everything that changes from round to round is in a `FederationState`, except for the memories of strategies,
placement and roster.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from edgelam_fl.bounds import DEFAULT_BOUNDS, Bounds
from edgelam_fl.errors import Busy, ModelError, PeerLost, Refused, RunFailed
from edgelam_fl.files import say
from edgelam_fl.model.source import why_changed
from edgelam_fl.plan.layout import Layout, site_source, who_may_host
from edgelam_fl.plan.making import RoundFacts, make_plans, planned_steps
from edgelam_fl.plan.placement import Placement
from edgelam_fl.plan.reading import job_id
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.telemetry.events import (
    AggregateRefused,
    BestTaken,
    BudgetSpent,
    ContributionLeftOut,
    Event,
    NodeLost,
    NodeSetAside,
    RoundDone,
    RoundTimeline,
    SiteLost,
    VirtualRound,
)
from edgelam_fl.telemetry.measures import measure_of
from edgelam_fl.telemetry.timeline import shares_in
from edgelam_fl.wire import edgelam_pb2 as pb
from server import unfinished
from server.attempt import MOST_KEPT, Attempt, Beginnings, Tries
from server.best import Best, best_with, check_is_measured, stopped_early
from server.checkpoint import Saved, flatten
from server.earlier_adapter import earlier_adapter
from server.events_of_round import describe_plan, describe_readable, describe_round, describe_timeline
from server.exchange import Arrived, Exchange, Missing, Request
from server.global_adapter import StartingPoints, with_missing_modules
from server.hub import NO_HUB, RunHub
from server.late_updates import LateUpdates
from server.lateness import lateness
from server.log_lines import lines_of
from server.outcome import conclude, receive
from server.parcels import make_parcels
from server.pauses import NodePauses
from server.privacy import PrivateRun, promise_in_words
from server.private_terms import Terms, terms_of
from server.progress import FROM_THE_START, Progress
from server.replies import KEPT_NODES, Reported, read_report, sums_on_arrival
from server.room import Room
from server.roster import Roster
from server.run_folder import RunFolder
from server.run_queue import Ticket
from server.schedule import Lineup, Schedule
from server.state import FederationState, Outcome, Parcel, PlannedRound, Received
from strategies.registry import load

_PRIVACY = "privacy"
_KEPT_S = 10.0  # for the nodes' answers about what they keep; each waits a part of it for the end of its part
_BUSY_S = 10.0  # between two attempts while nodes play for a run of another server
_OTHERS_FAULT = (PeerLost.code, Refused.code, Busy.code)  # codes of failures that another node is the reason of


class Rounds:
    """Runs the rounds of one run: with its strategies, over the nodes of a roster, and with all events in its folder."""

    def __init__(
        self,
        spec: RunSpec,
        exchange: Exchange,
        roster: Roster,
        folder: RunFolder,
        run: str,
        *,
        hub: RunHub = NO_HUB,
        kept_nodes: int = KEPT_NODES,
        bounds: Bounds = DEFAULT_BOUNDS,
        generator: np.random.Generator | None = None,
        saved: Saved | None = None,
        attempts_before: int = 0,
        ticket: Ticket | None = None,
    ) -> None:
        """`run`: a name that no other run has. `hub`: what nodes are told about it. `kept_nodes`: the most nodes of a round whose replies are kept. `bounds`: the
        modules that the run's strategies may come from. `generator`: of the noise of a private run; None: one that nobody can repeat.
        `saved`: the checkpoint that the run goes on from; None: it begins. `attempts_before`: attempts at the first round that an earlier
        process began, whose jobs nodes may still know. Raises ConfigError for a strategy whose memory no checkpoint can hold. `ticket`:
        in the queue of the server's runs, whose turn it is; None: nobody knows of other runs.
        """
        self.spec, self.config = spec, spec.config
        self.roster, self.folder, self._hub = roster, folder, hub
        self.schedule = Schedule(spec, bounds)
        self.placement = Placement(spec, folder.emit)
        strategy = self.config.strategy
        self.aggregation = load("aggregation", strategy.aggregation, strategy.options, bounds)
        self._readable = ""  # what hosts can read, as it was said last
        self.privacy: PrivateRun | None = None
        self._exchange, self._timing, self._run, self._kept_nodes = exchange, exchange.timing, run, kept_nodes
        self._generator, self._ticket = generator, ticket
        self.pauses = NodePauses()
        self._beginnings = Beginnings()
        self._late = LateUpdates(exchange, folder.emit, self.config.federation.update_factor)
        self._room = Room(folder.path, folder.emit, exchange.timing)
        earlier = earlier_adapter(spec, bounds) if saved is None else {}
        self._first, self._attempts_before = FederationState(adapter=earlier), attempts_before
        self._left_over = FROM_THE_START  # what an earlier process of the run leaves to its next attempt
        if saved is not None:
            self.restore(saved)
        self.check_memory()

    def run(self) -> FederationState:
        """Runs the rounds that the privacy budget and the patience of early stopping allow, then evaluates the result.

        Raises RunFailed if no attempt at a round succeeds, and ConfigError if held-out losses are to decide and no device has any.
        """
        state = self._first
        while state.round < self.config.federation.rounds and self._affords_a_round() and not self._stops_early(state):
            self._room.await_bytes(self.folder.round_bytes())
            state = self.round_after(state)
        if self.privacy is not None and state.round < self.config.federation.rounds:
            self._end_early(self.privacy, state)
        unfinished.forget(self.folder.path)
        state = self.evaluate(state)
        if self.config.federation.load_best and state.best is not None:
            self._take_best(state.best, state)
        return state

    def end_earlier_attempts(self) -> None:
        """Tells the nodes that may still play for an earlier process of this run that nobody waits for them."""
        for attempt in range(1, self._attempts_before + 1):
            job = job_id(pb.Plan(run=self._run, round=self._first.round + 1, attempt=attempt))
            self._hub.attendance.look(job, "the server was started again", {})

    def look_for_snapshots(self) -> None:
        """Asks the nodes of the attempt that an earlier process of this run had begun what they keep of it, to go on from there."""
        before = unfinished.read(self.folder.path)
        if before is None or (before.round, before.attempt) != (self._first.round + 1, self._attempts_before):
            return
        asked = [
            self.roster.request(
                name, "query.kept", RecordDict({"plan": ConfigRecord({"plan": plan.SerializeToString()})})
            )
            for name, plan in before.plans.items()
            if name in self.roster.profiles
        ]
        answers = self._exchange.replies(asked, _KEPT_S)
        kept = {
            one.name: read_report(one.content).snapshots[-MOST_KEPT:] for one in answers if isinstance(one, Arrived)
        }
        self._left_over = Progress(before.plans, before.sites, kept)

    def round_after(self, state: FederationState) -> FederationState:
        """Returns the state after the next round: of its first attempt that comes to an aggregate. The state stays as it is if
        failed attempts have spent the privacy budget. Raises RunFailed if no attempt succeeds, or if those that are here cannot keep
        the run's privacy.
        """
        number, refused = state.round + 1, ""
        progress, self._left_over = self._left_over, FROM_THE_START
        tries = Tries(self._timing.now, self.config.federation.round_deadline_s)
        for attempt in tries:
            self._check_model()
            self.roster.gather(self.config, at_start=number == attempt == 1)
            if number == 1:
                check_is_measured(self.config, (profile.held_out for profile in self._devices()))
            if self.config.privacy.mode != "none" and self.privacy is None:
                self.privacy = self._promise()
            if not self._affords_a_round():
                return state
            aside = self._sitting_out(number, progress)
            if self.privacy is not None:
                self.privacy.check_present(len(self._fit() - aside.keys()))
            lineup = self.schedule.lineup(number, attempt, self._devices(), len(self.roster.edges()), aside)
            planned = self._plan(number, attempt, lineup, state, progress=progress)
            unfinished.note(self.folder.path, planned)
            trial = self._attempt(planned)
            received = self._receive(planned, trial)
            planned = replace(planned, supplied_bytes=trial.supplied_bytes)
            self._note(planned, received, trial)
            received = self._late.add_to(planned, received)
            outcome = conclude(planned, received, self.aggregation.rule, self.spec)
            best, state = self._best(planned, received), state.after(outcome)
            if outcome.aggregated is not None:
                state = replace(state, best=best)
                self._late.end_round(planned, self._going_on(trial))
                self._finish(outcome, state)
                return state
            if outcome.problem:
                refused = outcome.problem
                self.folder.emit(AggregateRefused(round=number, attempt=attempt, reason=refused))
            if is_busy := Busy.code in received.codes.values():
                self._timing.sleep(_BUSY_S)
            by_chance = trial.lost_a_host or is_busy or outcome.spoiled  # the next one is without those who spoiled it
            progress = progress.after(planned, trial.kept, by_chance=trial.lost_a_host)
            if outcome.spoiled:
                progress = FROM_THE_START  # snapshots are spoiled as well
                unfinished.forget(self.folder.path)
            tries.failed(by_chance=by_chance and self.privacy is None)  # a private one is paid for
        problems = [f"{name}: {problem}" for name, problem in sorted(self.roster.problems.items())]
        raise RunFailed(
            f"round {number} failed {tries.number} times: {'; '.join(problems + [refused] * bool(refused))}"
        )

    def _check_model(self) -> None:
        """Raises ModelError if files of the model have changed since the run began: its nodes must go on with the same."""
        if changes := why_changed(self.spec.source):
            raise ModelError(
                f"the files of model {self.spec.source.name} have changed since the run began: {changes}. Start the run again"
            )

    def _receive(self, planned: PlannedRound, trial: Attempt) -> Received:
        """Has an attempt's jobs done. A private run pays for it first, whatever comes of it: nodes see what others trained
        while they train. It judges no update by the others': who is left out would tell about them, and clipping bounds all.
        """
        if self.privacy is None:
            return receive(planned, self._answers(trial), self.config.federation.update_factor)
        self.privacy.ledger.spend_a_round()
        sites = [site_source(site.name) for site in planned.layout.sites]
        sums = self.privacy.sums(planned.facts.round, planned.start.adapter, planned.facts.settings, sites)
        received = receive(planned, self._answers(trial), private=sums)
        reports = [reply.report for reply in received.replies.values()]
        self.folder.emit(self.privacy.spent(planned.facts.round, planned.facts.attempt, sums, reports))
        channel_noise = self.privacy.channel_noise(planned.facts.attempt, sums)
        if channel_noise is not None:
            self.folder.emit(channel_noise)
        return received

    # ---------------------------------------------------------------- memory

    def saved(self, state: FederationState, closing: Sequence[Event] = ()) -> Saved:
        """Returns all that another `Rounds` needs to go on after the round of `state`. `closing`: the round's last events, which
        are emitted after this was stored.
        """
        return Saved(run=self._run, state=state, memory=self._memory(), closing=closing)

    def restore(self, saved: Saved) -> None:
        """Goes on from a checkpoint: `run` then begins with the round after it."""
        memory = saved.memory
        self._first = saved.state
        for owner, (_, restore) in self._owners().items():
            restore(memory[owner])
        if memory[_PRIVACY]:
            terms = Terms.restored(memory[_PRIVACY]["terms"])
            self.privacy = PrivateRun(
                self.spec, terms, self.folder.path, generator=self._generator, saved=memory[_PRIVACY]
            )

    def check_memory(self) -> None:
        """Raises ConfigError for a strategy whose state no checkpoint can hold."""
        for owner, state in self._memory().items():
            flatten(state, f"the state() of {owner}")

    def _memory(self) -> dict[str, Any]:
        private = self.privacy.state() if self.privacy is not None else {}
        return {owner: state() for owner, (state, _) in self._owners().items()} | {_PRIVACY: private}

    def _owners(self) -> dict[str, tuple[Callable[[], Mapping[str, Any]], Callable[[Mapping[str, Any]], None]]]:
        """Returns everything that remembers from round to round, as (state, restore)."""
        aggregation, selection, bandwidth = (
            loaded.capabilities for loaded in (self.aggregation, self.schedule.selection, self.schedule.bandwidth)
        )
        return {
            "strategy.aggregation": (aggregation.state, aggregation.restore),
            "strategy.selection": (selection.state, selection.restore),
            "strategy.bandwidth": (bandwidth.state, bandwidth.restore),
            "schedule": (self.schedule.state, self.schedule.restore),
            "pauses": (self.pauses.state, self.pauses.restore),
            "placement": (self.placement.state, self.placement.restore),
        }

    # ---------------------------------------------------------------- privacy

    def _promise(self) -> PrivateRun:
        """Settles the terms of the run's privacy, now that the devices are known, and says them."""
        terms = terms_of(self.config, self.schedule.selection.capabilities.sampling_rate, len(self._fit()))
        privacy = PrivateRun(self.spec, terms, self.folder.path, generator=self._generator)
        promised = privacy.promise()
        self.folder.emit(promised)
        say(promise_in_words(promised, self.config.federation.rounds))
        return privacy

    def _fit(self) -> set[str]:
        """Returns the devices that are here and may take part."""
        return set(self.schedule.everyone(self._devices()).names)

    def _affords_a_round(self) -> bool:
        return self.privacy is None or self.privacy.ledger.affords_a_round

    def _end_early(self, privacy: PrivateRun, state: FederationState) -> None:
        """Says that the budget is spent. Raises RunFailed if failed attempts took all of it, so that there is no result."""
        if not state.round:
            raise RunFailed("the privacy budget is spent, and no attempt at round 1 succeeded: there is no result")
        rounds, epsilon = self.config.federation.rounds, privacy.ledger.epsilon
        self.folder.emit(BudgetSpent(round=state.round, planned=rounds, epsilon=epsilon, budget=privacy.terms.epsilon))
        say(f"the privacy budget is spent after round {state.round} of {rounds}: epsilon {epsilon:.4g}")

    # ---------------------------------------------------------------- evaluation

    def _stops_early(self, state: FederationState) -> bool:
        """Returns whether the run's patience has ended, and says so."""
        stopped = stopped_early(state, self.config)
        if stopped is None:
            return False
        self.folder.emit(stopped)
        say(f"the run ends early {stopped.words()}")
        return True

    def _best(self, planned: PlannedRound, received: Received) -> Best | None:
        """Returns what the run's evaluations have shown, with that of the adapter which the round started from."""
        return best_with(planned.start, (reply.report for reply in received.replies.values()), self.config)

    def _take_best(self, best: Best, state: FederationState) -> None:
        """Makes the best adapter the run's result, and says which it is. `state`: after the last evaluation."""
        self._room.store(lambda: self.folder.export(best.adapter, best.exports), self.folder.round_bytes())
        taken = BestTaken(round=best.round, loss=best.finite_loss, last_round=state.round)
        self.folder.emit(taken)
        say(f"the result is {taken.words()}")

    def evaluate(self, state: FederationState) -> FederationState:
        """Has every device that may take part measure the adapter; returns the state with what that has shown.

        Raises RunFailed if none has, unless none holds examples out.
        """
        number = state.round + 1
        tries = Tries(self._timing.now, self.config.federation.round_deadline_s)
        for attempt in tries:
            self.roster.revisit()
            lineup = self.schedule.lineup_for_evaluation(number, self._devices())
            planned = self._plan(number, attempt, lineup, state, trains=False)
            can_measure = any(self.roster.profiles[name].held_out for name in lineup.names)
            trial = self._attempt(planned)
            received = receive(planned, self._answers(trial))
            self._note(planned, received, trial)
            if not can_measure or any(reply.report.eval_labels for reply in received.replies.values()):
                self._close(self._last_events(planned, received, "adapter"))
                return replace(state, best=self._best(planned, received))
            tries.failed(by_chance=trial.lost_a_host)
        raise RunFailed(f"the evaluation after the last round failed: {self.roster.problems}")

    # ---------------------------------------------------------------- plan

    def _devices(self) -> list[pb.Profile]:
        return [self.roster.profiles[name] for name in self.roster.devices()]

    def _plan(
        self,
        number: int,
        attempt: int,
        lineup: Lineup,
        state: FederationState,
        trains: bool = True,
        progress: Progress = FROM_THE_START,
    ) -> PlannedRound:
        """Plans one attempt: layers per node, a plan per node, and the tensors to send. Emits `plan`."""
        layout = self._layout(number, lineup, state, trains) if lineup.names else Layout((), {})
        devices = [self.roster.profiles[name] for name in lineup.names]
        capabilities = self.aggregation.capabilities
        facts = RoundFacts(
            run=self._run,
            round=number,
            attempt=attempt + (self._attempts_before if number == self._first.round + 1 else 0),
            step_offset=state.step_offset,
            steps=planned_steps(self.config, devices) if trains else 0,
            settings=capabilities.client_settings(number),
            privacy=self.privacy.for_plans() if self.privacy is not None and trains else None,
            unequal_ranks=capabilities.unequal_ranks,
            hub_port=self._hub.port,
            relay_key=self._hub.relay_key,
            slices_token=self._hub.slices_token,
            alone=self._ticket is not None,
        )
        tokens = {name: secrets.token_bytes(16) for name in lineup.names}
        plans = make_plans(self.spec, facts, self.roster.profiles, layout, lineup.shares, tokens)
        lent = progress.go_on(plans, layout.sites, self._hub.kept)
        known = state.adapter if self.privacy is None else {**self.privacy.starts, **state.adapter}
        start = replace(state, adapter=with_missing_modules(known, plans, self.spec, capabilities.unequal_ranks))
        starts = StartingPoints(start.adapter, start.personal)
        planned = PlannedRound(
            began_s=self._timing.now(),
            facts=facts,
            lineup=lineup,
            layout=layout,
            plans=plans,
            start=start,
            starts=starts,
            parcels=make_parcels(plans, start.holdings, starts, capabilities, lent),
            sums_on_arrival=trains
            and (self.privacy is not None or sums_on_arrival(capabilities, len(plans), self._kept_nodes)),
        )
        if self._ticket is not None:
            self._ticket.uses(plans, job_id(next(iter(plans.values()))) if plans else "")
        self.folder.emit(describe_plan(planned, self.spec.source.num_layers, capabilities.personal))
        self._say_what_is_readable(planned)
        return planned

    def _say_what_is_readable(self, planned: PlannedRound) -> None:
        found = describe_readable(planned.facts.round, planned.layout.routes.values(), self.spec)
        if found and found.words != self._readable:
            self._readable = found.words
            self.folder.emit(found)

    def _layout(self, number: int, lineup: Lineup, state: FederationState, trains: bool) -> Layout:
        devices = [self.roster.profiles[name] for name in lineup.names]
        hosts = self._hosts(number, devices, state)
        if trains:  # an evaluation alone is not worth it
            names = {node.name for node in [*devices, *hosts]}
            measure = partial(self.roster.measure_links, names)
            self.placement.check_links(devices, hosts, lineup.shares, measure)
        return self.placement.layout(number, devices, hosts, lineup.shares)

    def _sitting_out(self, number: int, progress: Progress) -> dict[str, str]:
        """Returns why devices are not in the next attempt at a round, by name."""
        devices, least = self.roster.devices(), self.config.federation.min_nodes
        aside = self.pauses.sitting_out(number, devices, least)
        return aside | progress.newcomers([name for name in devices if name not in aside], least)

    def _hosts(self, number: int, devices: Sequence[pb.Profile], state: FederationState) -> list[pb.Profile]:
        """Returns the nodes that may host in a round of these devices, but for those that sit out: first those that hosted last."""
        hosts = {host.name: host for host in who_may_host(self.config, [*self.roster.edges(), *devices])}
        aside = self.pauses.sitting_out(number, [*hosts], self.config.split.least_hosts)
        fit = [host for name, host in hosts.items() if name not in aside]
        return sorted(fit, key=lambda host: host.name not in state.hosts)

    # ---------------------------------------------------------------- exchange

    def _attempt(self, planned: PlannedRound) -> Attempt:
        hosting = {host.name for site in planned.layout.sites for host in site.hosts}
        devices = [self.roster.profiles[name] for name in planned.lineup.names]
        others = {host.name for host in self._hosts(planned.facts.round, devices, planned.start)} - hosting
        return Attempt(
            planned,
            self._exchange,
            self._hub.attendance,
            self.folder.emit,
            message_to=partial(self._job, planned),
            beginnings=self._beginnings,
            can_replace=bool(others) or (self.config.split.hosts == "auto" and len(hosting) > 1),
            limit_s=self.config.federation.round_deadline_s + self._timing.messages_s,
            lateness=lateness(self.config, self.schedule.candidates(devices, planned.facts.round)),
            waits_for_late=self.config.federation.late == "next",
            tell=self.folder.tell,
        )

    def _answers(self, trial: Attempt) -> Iterator[Reported | Missing]:
        """Hands every node its job, and yields the nodes' answers as they arrive.

        With federation.wait = "park", all jobs are handed over first, and their reports asked for afterwards: a simulation
        can play one ClientApp after the other in this way, though jobs need each other.
        """
        planned = trial.planned
        if not planned.plans:
            return
        requests = [self._job(planned, name, parcel) for name, parcel in planned.parcels.items()]
        for last in (False, False, True):  # a node that asks for tensors is handed its job once more
            parked = []
            for answer in trial.answers(requests):
                if not last and isinstance(answer, Reported) and answer.report.state == "running":
                    parked.append(answer.name)
                else:
                    yield answer
                del answer
            if not parked:
                break
            requests = [self._collect(planned, name) for name in parked]
        trial.close()

    def _going_on(self, trial: Attempt) -> dict[str, Sequence[str]]:
        """Returns the ids of the messages to each late device whose update may be used in the next round."""
        if self.config.federation.late != "next":
            return {}
        return {name: self._exchange.unanswered(name) for name in trial.late}

    def _job(self, planned: PlannedRound, name: str, parcel: Parcel) -> Request:
        plan, wait = planned.plans[name], self.config.federation.wait
        content = RecordDict({"plan": ConfigRecord({"plan": plan.SerializeToString(), "wait": wait})})
        for number, record in enumerate(parcel.corrections):
            content[f"correction-{number}"] = record
        if parcel.adapter is not None:
            content["adapter"] = parcel.adapter
        if parcel.snapshot:
            content["snapshot"] = ConfigRecord({"states": parcel.snapshot})
        return self.roster.request(name, "train" if plan.steps else "evaluate", content)

    def _collect(self, planned: PlannedRound, name: str) -> Request:
        plan = ConfigRecord({"plan": planned.plans[name].SerializeToString()})
        return self.roster.request(name, "train.collect", RecordDict({"plan": plan}))

    # ---------------------------------------------------------------- after the exchange

    def _note(self, planned: PlannedRound, received: Received, trial: Attempt) -> None:
        """Notes which nodes and sites were lost, in the roster and as events."""
        number = planned.facts.round
        for name in planned.plans:
            if name in received.replies:
                self.roster.delivered(name)
                if name not in received.spoilers:
                    self.pauses.delivered(name)
            elif trial.is_bystander(name):
                self.roster.problems[name] = received.problems[name]
            else:
                reason, code = received.problems[name], received.codes.get(name, "")
                is_silent = name in received.silent and not trial.is_back(name)
                self.roster.failed(name, reason, code, silent=is_silent, tardy=name in trial.silent)
                self.folder.emit(NodeLost(round=number, node=name, reason=reason, code=code))
                is_its_own = code not in _OTHERS_FAULT and (code or not is_silent)  # the silent are not asked anyway
                if is_its_own and name not in received.spoilers:
                    self._set_aside(name, number, reason)
        for name, reason in sorted(received.spoilers.items()):
            self._set_aside(name, number, reason)
        found_out = {name: reason for name, reason in received.spoilers.items() if name in received.replies}
        for source, reason in sorted({**found_out, **received.left_out}.items()):
            self.folder.emit(ContributionLeftOut(round=number, source=source, reason=reason))
        if planned.facts.steps:
            for site, hosts in received.broken.items():
                self.folder.emit(SiteLost(round=number, site=site, missing=tuple(hosts)))

    def _set_aside(self, name: str, number: int, reason: str) -> None:
        """Notes a node's own failure in an attempt at round `number`; after the second in a row it sits out the next rounds."""
        pause = self.pauses.failed(name, number, reason)
        if pause.last > number:
            back_in = pause.last + 1
            self.folder.emit(
                NodeSetAside(round=number, node=name, failures=pause.failures, back_in=back_in, reason=reason)
            )

    def _finish(self, outcome: Outcome, state: FederationState) -> None:
        """Stores the new adapter, and lets strategies and placement learn from a round that came to one."""
        planned, received = outcome.planned, outcome.received
        assert outcome.aggregated is not None
        replies, lineup, number = received.replies, planned.lineup, planned.facts.round
        virtual = None
        if self.schedule.virtual is not None and lineup.names:
            virtual = self.schedule.virtual.over(number, lineup.shares, lineup.dropped, planned.received_bytes, replies)
        self.schedule.observe(number, [*planned.layout.routes, *lineup.dropped], planned.plans, replies, virtual)
        if self.config.split.cuts == "auto":  # reports of a large round are kept packed, and unpacked for this alone
            self.placement.observe(planned.plans, {name: reply.report for name, reply in replies.items()})
        checkpoint = "adapter" if state.adapter else ""
        events = self._last_events(planned, received, checkpoint, outcome.error, outcome.aggregated.facts, virtual)
        saved = self.saved(state, events[1:])
        self._room.store(lambda: self.folder.checkpoint(saved), self.folder.round_bytes())
        self._close(events)

    def _last_events(
        self,
        planned: PlannedRound,
        received: Received,
        checkpoint: str,
        error: float | None = None,
        facts: Mapping[str, float] = {},
        virtual: VirtualRound | None = None,
    ) -> tuple[RoundTimeline, RoundDone]:
        """Makes the round's last events."""
        started_from = {name: plan.adapter_digest for name, plan in planned.plans.items()}
        measure = measure_of(self.config.task.kind)
        devices, hosts, by_kind = describe_round(planned.received_bytes, started_from, received.replies, measure)
        number = planned.facts.round
        timeline = RoundTimeline(round=number, nodes=describe_timeline(received.replies))
        done = RoundDone(
            round=number, attempt=planned.facts.attempt, steps=planned.facts.steps,
            seconds=round(self._timing.now() - planned.began_s, 3), devices=devices, hosts=hosts, bytes_by_kind=by_kind,
            checkpoint=checkpoint, aggregation_error=error, aggregation=dict(facts), virtual=virtual,
        )  # fmt: skip
        return timeline, done

    def _close(self, events: tuple[RoundTimeline, RoundDone]) -> None:
        """Emits the round's last events."""
        timeline, done = events
        if timeline.nodes:
            self.folder.timelines(timeline)
            self.folder.emit(shares_in(timeline))
        self.folder.emit(done)
        for line in lines_of(done, self.config.federation.rounds):
            say(line)
