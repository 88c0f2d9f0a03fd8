"""The run on a terminal: a table that is drawn again and again. Without a terminal, one line per milestone, and one every ten seconds
that says what goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edgelam_fl.errors import is_final
from edgelam_fl.telemetry.events import (
    AttemptAborted,
    BestTaken,
    BudgetSpent,
    DataChanged,
    DataCounts,
    DataRead,
    DiskFull,
    Evaluated,
    Event,
    EventsDropped,
    JobDone,
    JobStarted,
    LateUpdate,
    LinkMeasured,
    MessageResent,
    NodeJoined,
    NodeLost,
    NodeReady,
    NodeRefused,
    NodeSetAside,
    NodeSilent,
    PiecesChosen,
    PlacementMade,
    PlanMade,
    PrivacyPromised,
    RoundDone,
    RoundProgress,
    RoundShares,
    RunFailure,
    RunInterrupted,
    RunResumed,
    RunStarted,
    RunWaits,
    StepClosed,
    StepDone,
    StoppedEarly,
    TextReadable,
    TrackerFailed,
)
from edgelam_fl.telemetry.events.progress import CONNECTING, DOINGS, MEASURING, SERVING, TRAINING
from edgelam_fl.telemetry.human import (
    by_name,
    human_bytes,
    human_count,
    human_layers,
    human_seconds,
    total,
)
from edgelam_fl.telemetry.measures import human_measure, measure_of
from edgelam_fl.telemetry.summary import mean_metrics, measured, setting, task_of
from edgelam_fl.telemetry.waiting import DEFAULT_SIGNS, Reminder, SignTiming

NAMES_SHOWN = 8
VALUES_SHOWN = 3
STARTING = "loading PyTorch"
_CONNECTING, _TRAINING, _SERVING = map(DOINGS.index, (CONNECTING, TRAINING, SERVING))
_EVALUATED, _OVER = DOINGS.index(MEASURING) + 0.5, len(DOINGS)


@dataclass
class _Row:
    """One node on the screen."""

    role: str = ""
    doing: str = STARTING
    loss: float | None = None
    quality: list[float] = field(default_factory=list)  # held-out, per round
    bytes_moved: int = 0
    waited: float | None = None  # share of the latest train phase, in [0, 1]
    of_data: tuple[str, ...] = ()  # what was said last of what is not used of its data
    unfit: str = ""  # why it is in no round, as it was said
    place: tuple[float, int] = (0, 0)  # how far it is in the round: its doing's number in DOINGS, steps that are over

    def move_to(self, place: tuple[float, int], doing: str) -> bool:
        """Shows what it does, if it is not farther by now: a node's own events may be faster than its progress. Returns whether it does."""
        if place < self.place:
            return False
        self.place, self.doing = place, doing
        return True


class RunView:
    """The view of one run: takes every event, and is a context manager around the run."""

    def __init__(self, console: Console, rounds: int, steps: int, timing: SignTiming = DEFAULT_SIGNS) -> None:
        """`rounds`, `steps` per round: of the run file, as far as it is known. `timing`: of the lines without a terminal, and the clock."""
        self._console, self._rounds, self._steps = console, rounds, steps
        self._rows: dict[str, _Row] = {}
        self._round = 0
        self._measure = measure_of(None)
        self._max_tokens: int | None = None
        self._batch_size, self._batches = 0, 1  # examples per batch, batches per step
        self._stage = "the server starts the run"
        self._awaited: int | None = None  # devices that the run waits for; None: it does not wait
        self._progress: RoundProgress | None = None  # of the round that is played
        self._round_s: float | None = None  # seconds that the newest round with training took
        self._signs, self._now, self._began = Reminder(timing), timing.now, timing.now()
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._draw)
        self._handlers: dict[type[Event], Callable[[Any, str], None]] = {
            RunWaits: self._on_run_waits,
            RunStarted: self._on_run_started,
            NodeReady: self._on_node_ready,
            NodeJoined: self._on_node_joined,
            NodeRefused: self._on_node_refused,
            LinkMeasured: self._on_link_measured,
            PiecesChosen: self._on_pieces,
            PlacementMade: self._on_placement,
            PlanMade: self._on_plan,
            RoundProgress: self._on_progress,
            TextReadable: self._on_text_readable,
            PrivacyPromised: self._on_privacy_promised,
            BudgetSpent: self._on_budget_spent,
            StoppedEarly: self._on_stopped_early,
            BestTaken: self._on_best_taken,
            RoundDone: self._on_round_done,
            RoundShares: self._on_shares,
            DiskFull: self._on_disk_full,
            EventsDropped: self._on_events_dropped,
            TrackerFailed: self._on_tracker_failed,
            NodeLost: self._on_node_lost,
            AttemptAborted: self._on_attempt_aborted,
            NodeSilent: self._on_node_silent,
            MessageResent: self._on_message_resent,
            NodeSetAside: self._on_node_set_aside,
            LateUpdate: self._on_late_update,
            RunInterrupted: self._on_run_interrupted,
            RunResumed: self._on_run_resumed,
            RunFailure: self._on_run_failed,
            DataRead: self._on_data_read,
            DataChanged: self._on_data_changed,
            JobStarted: self._on_job_started,
            Evaluated: self._on_evaluated,
            StepDone: self._on_step,
            StepClosed: self._on_step_closed,
            JobDone: self._on_job_done,
        }

    def __enter__(self) -> RunView:
        if self._console.is_terminal:
            self._live.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._console.is_terminal:
            self._live.__exit__(None, None, None)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the view was made."""
        return self._now() - self._began

    def say(self, text: str) -> None:
        """Prints a milestone, which stays on the screen above the table."""
        self._signs.postpone()
        self._print(text)

    def expect(self, names: Iterable[str]) -> None:
        """Takes the nodes that were started with this view, before they say anything."""
        for name in names:
            self._row(name)

    def tick(self) -> None:
        """Without a terminal, says what goes on if nothing has been said for a while. Call it often."""
        if not self._console.is_terminal and self._signs.is_due(self.status()):
            self._print(self.status())

    def status(self) -> str:
        """Returns what goes on, in one line."""
        if self._progress is not None:
            return f"{self._stage}: {self._progress.words()}{self._rest_of_run(self._progress)}"
        if self._awaited is not None:
            roles = [row.role for row in self._rows.values()]
            devices = f"{roles.count('device')} of {self._awaited}" if self._awaited else roles.count("device")
            here = f"devices: {devices}, edge servers: {roles.count('edge')}"
            starting = [name for name, row in self._rows.items() if row.doing == STARTING]
            return f"waiting for nodes ({here}){f'; {STARTING}: {_first_of(starting)}' if starting else ''}"
        return self._stage

    def _go_to(self, stage: str) -> None:
        """Shows another stage, in which nothing is waited for or played."""
        self._stage, self._awaited, self._progress = stage, None, None

    def _rest_of_run(self, progress: RoundProgress) -> str:
        """Returns how long the run still takes, as the end of a sentence; empty if that is not known, or the round is its last."""
        rounds = self._rounds - self._round
        if progress.left_s is None or self._round_s is None or rounds <= 0:
            return ""
        return f"; about {human_seconds(progress.left_s + rounds * self._round_s)} left in the run"

    def _print(self, text: str) -> None:
        self._console.print(f"[dim]{self.elapsed_s:5.0f} s[/dim]  {escape(text)}", highlight=False, soft_wrap=True)

    def feed(self, event: Event, node: str = "") -> None:
        """Takes an event of the ServerApp or, with the node's name, of a stage host."""
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event, node)

    # ---------------------------------------------------------------- the ServerApp's events

    def _on_run_waits(self, event: RunWaits, _: str) -> None:
        """Says that the run waits; that it still does is seen below on a terminal, and is said by `tick` elsewhere."""
        if self._stage != event.words():
            self.say(event.words())
        self._stage = event.words()

    def _on_run_started(self, event: RunStarted, _: str) -> None:
        self._measure, self._max_tokens = measure_of(task_of([event])), setting([event], "task", "max_tokens")
        self._batch_size = setting([event], "federation", "batch_size") or 0
        self._batches = setting([event], "optimizer", "gradient_accumulation_steps") or 1
        self._rounds = setting([event], "federation", "rounds") or self._rounds
        wanted = (setting([event], "federation", key) or 0 for key in ("min_nodes", "expect_nodes"))
        self._awaited = max(wanted)

    def _on_node_ready(self, _: NodeReady, node: str) -> None:
        self._row(node).doing = "ready"

    def _on_node_joined(self, event: NodeJoined, _: str) -> None:
        row = self._row(event.node)
        row.role, row.doing = event.role, "joined"
        holds = (
            f"{human_count(event.examples, 'example')}, {event.held_out} held out"
            if row.role == "device"
            else "no data"
        )
        self.say(f"{event.node} joined ({holds})")
        if row.role == "device":
            self._say_counts(event.node, event, event.examples, event.held_out)
            if event.examples < self._batch_size * self._batches:
                times = f" x optimizer.gradient_accumulation_steps = {self._batches}" if self._batches > 1 else ""
                fewer = f"{event.examples} examples are fewer than federation.batch_size = {self._batch_size}{times}"
                self.say(f"{event.node}: {fewer}, so that a step learns some of them more than once")

    def _say_counts(self, name: str, counts: DataCounts, examples: int, held_out: int) -> None:
        """Says what is not used of a device's data, once."""
        row, said = self._row(name), counts.in_words(examples, held_out, self._max_tokens)
        for text in said if said != row.of_data else ():
            self.say(f"{name}: {text}")
        row.of_data = said

    def _on_node_refused(self, event: NodeRefused, _: str) -> None:
        self.say(f"{event.node} cannot take part: {event.reason}{_for_good(event.code)}")

    def _on_link_measured(self, event: LinkMeasured, _: str) -> None:
        up, down = (f"{bps / 1e6:.3g} Mbit/s" for bps in (event.link_up_bps, event.link_down_bps))
        round_trip = f"round trip {1e3 * event.round_trip_s:.3g} ms"
        self.say(f"{event.node}'s link to the server now: {up} up, {down} down, {round_trip}")

    def _on_pieces(self, event: PiecesChosen, _: str) -> None:
        self.say(event.words())

    def _on_placement(self, event: PlacementMade, _: str) -> None:
        for text in event.measured:
            self.say(text)
        if event.changed:
            held = [host for site in event.sites for host in site.hosts]
            layers = ", ".join(f"{host.node} {human_layers((host.first, host.last))}" for host in held)
            self.say(f"{layers}: {event.reason}; a step of training should take {event.step_s:.3g} s")

    def _on_plan(self, event: PlanMade, _: str) -> None:
        self._round = event.round
        for row in self._rows.values():
            row.place = (0, 0)
        self._go_to(f"round {self._round} of {self._rounds}" if self._round <= self._rounds else "last evaluation")
        for name, reason in (event.unfit or {}).items():
            if self._row(name).unfit != reason:
                self.say(f"{name} is in no round: {reason}")
            self._row(name).unfit = reason
        attempt = f", attempt {event.attempt}" if event.attempt > 1 else ""
        attempt += f" from step {event.first_step + 1}" if event.first_step else ""
        if self._round <= self._rounds:
            self.say(f"{self._stage}{attempt}: {_over_sites(event) or 'no device was drawn'}")

    def _on_progress(self, event: RoundProgress, _: str) -> None:
        if event.round != self._round or self._awaited is not None:
            return  # of a round that is over
        self._progress = event
        for name, node in (event.nodes or {}).items():
            row = self._row(name)
            if row.move_to((DOINGS.index(node.doing), node.step), node.words()) and node.loss is not None:
                row.loss = node.loss

    def _on_text_readable(self, event: TextReadable, _: str) -> None:
        self.say(event.words)

    def _on_privacy_promised(self, event: PrivacyPromised, _: str) -> None:
        self.say(
            f"privacy: epsilon {event.epsilon:g} at delta {event.delta:g} over {event.rounds} rounds, noise {event.noise:.3g} x the "
            f"bound {event.clip:g}; protects {event.unit}, against {event.adversary}"
        )

    def _on_budget_spent(self, event: BudgetSpent, _: str) -> None:
        self.say(
            f"the privacy budget is spent after round {event.round} of {event.planned}: epsilon {event.epsilon:.4g}"
        )

    def _on_stopped_early(self, event: StoppedEarly, _: str) -> None:
        self.say(f"the run ends early {event.words()}")

    def _on_best_taken(self, event: BestTaken, _: str) -> None:
        self.say(f"the result is {event.words()}")

    def _on_round_done(self, event: RoundDone, _: str) -> None:
        self._progress = None
        self._round_s = event.seconds if event.steps else self._round_s
        shown = []
        for device in event.devices:
            row = self._row(device.name)
            row.loss = device.loss if device.loss is not None else row.loss
            row.bytes_moved += total((device.bytes_up, device.bytes_down)) or 0
            row.doing = "waits"
            if device.examples is not None and device.held_out is not None:
                self._say_counts(device.name, device, device.examples, device.held_out)
            value = measured(device, self._measure)
            if value is not None:
                row.quality.append(value)
                shown.append(f"{device.name} {self._short(value)}")
        for host in event.hosts:
            self._row(host.name).bytes_moved += total((host.bytes_up, host.bytes_down)) or 0
        when = "at its start" if event.steps else "at the end"
        quality = f"; held-out {self._measure} {when}: {_first_of(shown)}" if shown else ""
        means = mean_metrics(device.metrics for device in event.devices)
        answers = "".join(f"; {name} {value:.3f}" for name, value in means.items())
        self.say(f"{self._stage} took {event.seconds:.0f} s{quality}{answers}")

    def _on_shares(self, event: RoundShares, _: str) -> None:
        for name, shares in event.nodes.items():
            self._row(name).waited = shares.waited_s / (shares.phase_s or 1)

    def _on_events_dropped(self, event: EventsDropped, node: str) -> None:
        self.say(f"{node}: " * bool(node) + f"{event.count} events could not be written: {event.reason}")

    def _on_tracker_failed(self, event: TrackerFailed, _: str) -> None:
        self.say(f"{event.tracker} gets nothing more of this run, which goes on: {event.reason}")

    def _on_disk_full(self, event: DiskFull, _: str) -> None:
        self.say(
            f"the run waits for room on the disk of its folder since {event.waited_s:.0f} s: {human_bytes(event.free_bytes)} are free, "
            f"{human_bytes(event.needed_bytes)} are needed; it goes on by itself once there is room"
        )

    def _on_node_lost(self, event: NodeLost, _: str) -> None:
        self._row(event.node).doing = "lost"
        self.say(f"{event.node} did not finish round {event.round}: {event.reason}{_for_good(event.code)}")

    def _on_attempt_aborted(self, event: AttemptAborted, _: str) -> None:
        self._row(event.node).doing = "lost"
        self.say(f"round {event.round}, attempt {event.attempt} ends: host {event.node} is out: {event.reason}")

    def _on_node_silent(self, event: NodeSilent, _: str) -> None:
        waits = f"it is waited for until {event.limit_s:.0f} s"
        self.say(f"{event.node} has been silent for {event.seconds:.0f} s in round {event.round}; {waits}")

    def _on_message_resent(self, event: MessageResent, _: str) -> None:
        self.say(f"{event.node} is sent its part in round {event.round} again: {event.reason}")

    def _on_node_set_aside(self, event: NodeSetAside, _: str) -> None:
        times = f"{event.failures} failures in a row, the newest: {event.reason}"
        self.say(f"{event.node} sits out until round {event.back_in} if others can do without it: {times}")

    def _on_run_interrupted(self, event: RunInterrupted, _: str) -> None:
        self._go_to("waiting for its ServerApp")
        self.say(f"the ServerApp died ({event.reason}); the server starts it again")

    def _on_run_resumed(self, event: RunResumed, _: str) -> None:
        self._go_to("going on")
        where = f"after round {event.round}" if event.round else "from its start"
        self.say(f"the run goes on {where}{f' ({event.problem})' if event.problem else ''}")

    def _on_late_update(self, event: LateUpdate, _: str) -> None:
        fate = f"counts in round {event.used_in}" if event.used_in else f"is dropped: {event.reason}"
        self.say(f"what {event.node} trained in round {event.round}, for which it was late, {fate}")

    def _on_run_failed(self, _: RunFailure, __: str) -> None:
        """Shows that the run failed; the command that follows the run prints the reason."""
        self._go_to(f"failed in {self._stage}" if self._round else "failed before the first round")
        for row in self._rows.values():
            row.doing = row.doing if row.doing == "lost" else ""

    # ---------------------------------------------------------------- the stage hosts' events

    def _on_job_started(self, event: JobStarted, node: str) -> None:
        is_device = event.role == "device"
        self._row(node).move_to((_CONNECTING if is_device else _SERVING, 0), "evaluates" if is_device else "serves")

    def _on_data_read(self, event: DataRead, node: str) -> None:
        """Says what the events of the run must not hold: names and places."""
        for text in event.places_and_names():
            self.say(f"{node}: {text}")

    def _on_data_changed(self, event: DataChanged, node: str) -> None:
        self.say(f"{node}: {event.words()}")

    def _on_evaluated(self, _: Evaluated, node: str) -> None:
        self._row(node).move_to((_EVALUATED, 0), "evaluated")

    def _on_step(self, event: StepDone, node: str) -> None:
        row = self._row(node)
        if row.move_to((_TRAINING, event.step + 1), f"step {event.step + 1} of {self._steps}"):
            row.loss = event.loss

    def _on_step_closed(self, event: StepClosed, node: str) -> None:
        """Shows the step of a host; a device that hosts too reports its own steps."""
        if self._row(node).role != "device":
            self._row(node).move_to((_SERVING, event.step + 1), f"step {event.step + 1} of {self._steps}")

    def _on_job_done(self, event: JobDone, node: str) -> None:
        self._row(node).move_to((_OVER, 0), "waits" if event.state == "done" else "failed")

    # ---------------------------------------------------------------- drawing

    def _row(self, name: str) -> _Row:
        return self._rows.setdefault(name, _Row())

    def _draw(self) -> RenderableType:
        """Draws the table for 80 columns: a long name takes two lines rather than room from the numbers."""
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("node", overflow="fold")
        table.add_column("does", no_wrap=True)
        table.add_column("loss", justify="right", no_wrap=True)
        table.add_column(self._measure, no_wrap=True)
        for heading in ("moved", "waited"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, row in sorted(self._rows.items(), key=lambda item: by_name(item[0])):
            loss = "" if row.loss is None else f"{row.loss:.3f}"
            quality = " > ".join(map(self._short, row.quality[-VALUES_SHOWN:])).replace(
                " % >", " >"
            )  # one unit for all
            waited = "" if row.waited is None else f"{100 * row.waited:.0f} %"
            table.add_row(escape(name), row.doing, loss, quality, human_bytes(row.bytes_moved), waited)
        return Group(Text(f"{self.status()}, {self.elapsed_s:.0f} s", style="bold"), table)

    def _short(self, value: float) -> str:
        return (
            human_measure(self._measure, value)
            if self._measure != "perplexity"
            else f"{value:.{1 if value < 1000 else 0}f}"
        )


def _over_sites(plan: PlanMade) -> str:
    """Names the selected devices, with their hosts if they train over several sites."""
    ways = {route.device: tuple(hop.node for hop in route.hops) for route in plan.routes}
    if len(set(ways.values())) < 2:
        return _first_of(plan.selected)
    grouped = groupby(sorted(ways, key=lambda name: (ways[name], by_name(name))), key=lambda name: ways[name])
    return "; ".join(f"{_first_of(names)} over {' > '.join(way) or 'no host'}" for way, names in grouped)


def _first_of(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - NAMES_SHOWN} more" if len(shown) > NAMES_SHOWN else ""
    return ", ".join(shown[:NAMES_SHOWN]) + more


def _for_good(code: str) -> str:
    """Returns how a sentence about a refusal ends if the node is out for the rest of the run."""
    return " (not asked again in this run, unless it joins anew)" if is_final(code) else ""
