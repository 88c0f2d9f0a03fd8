"""Runs `edgelam client`: this machine as a node, watched until Ctrl-C. Knows the node's processes, but no run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console

from edgelam_fl.addresses import answers, check_plain_text, split_address
from edgelam_fl.array_files import holds_arrays, read_arrays
from edgelam_fl.bounds import check_modules
from edgelam_fl.config import most_read_by_hosts
from edgelam_fl.errors import INTERRUPTED, ConfigError, EnvironmentProblem
from edgelam_fl.federation.child import pause
from edgelam_fl.federation.discovery import AUTO, find_server
from edgelam_fl.federation.node_line import node_line
from edgelam_fl.federation.node_process import NodeProcesses
from edgelam_fl.federation.server_probe import ServerProblem, problem_at
from edgelam_fl.federation.standing import NodeOptions, Standing, find_standing
from edgelam_fl.files import Hold, holder_of
from edgelam_fl.machine import since_boot_s
from edgelam_fl.names import why_no_tag
from edgelam_fl.privacy.limits import percent
from edgelam_fl.tasks.files import check_readable
from edgelam_fl.telemetry.events import (
    EVENTS_FILE,
    DataChanged,
    DataRead,
    Event,
    EventTail,
    NodeReady,
    TextReadableHere,
)
from edgelam_fl.telemetry.human import human_count, human_seconds
from edgelam_fl.telemetry.waiting import waiting
from edgelam_fl.trust.identity import load_identity
from edgelam_fl.trust.join import Membership, clock_words, renew
from edgelam_fl.wire.relay import RELAY

_LOCK = ".client.lock"
_POLL_S = 0.25
_WATCH_S = 1.0  # between two looks at what there is to say
_LONGEST_PAUSE_S = 10.0  # between two looks for a server
_SIGN_S, _SIGN_PART = (
    10.0,
    1 / 60,
)  # between two signs of life, and of the time waited once that is longer: it may be days
_LOOK_S = 10.0  # between two looks whether the server is still there
_RENEWAL_S = 6 * 3600.0  # between two questions whether the certificate still lasts
_RETRY_S = 600.0  # after a question that nobody answered


def join(
    console: Console,
    options: NodeOptions,
    *,
    join_text: str,
    name: str,
    state: Path | None,
    insecure: bool,
    wait: bool,
) -> int:
    """Joins if asked to, starts the node and watches it until Ctrl-C; returns the exit code.

    join_text, name, state: as for `find_standing`. wait: wait for a server that does not answer yet, instead of refusing. Once
    it has answered, the node rejoins whenever the server comes back. Raises UsageError for what cannot be used,
    EnvironmentProblem if another process uses the state folder or, without `wait`, if no server answers, Refused if the server does
    not let the node in.
    """
    standing = find_standing(options, join_text, name, state, insecure)
    options = standing.options
    _check_data_plane(options)
    _check_trust(standing.name, options)
    check_modules("--metrics", options.metrics)
    for tag in options.tags:
        if problem := why_no_tag(tag):
            raise ConfigError(f"--tag {tag!r} {problem}")
    with lock_state(standing.state):
        if options.server == AUTO:
            standing = find_waiting(console, standing, wait)
        return _start(console, standing, insecure=insecure, wait=wait)


def find_waiting(
    console: Console,
    standing: Standing,
    wait: bool,
    find: Callable[[str], str] = find_server,
    sleep: Callable[[float], None] = time.sleep,
) -> Standing:
    """Returns the standing at the server that announces itself. wait: looks again until there is one.

    find, sleep: stand-ins for tests. Raises as `find_server`.
    """
    pause_s = 1.0
    while True:
        try:
            with waiting(console, "looking for the server on this network"):
                server = find(standing.authority)
        except EnvironmentProblem as error:
            if not wait:
                raise
            if pause_s == 1.0:
                _say(console, f"{error}. Looking again")
            sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, 1.5 * pause_s)
        else:
            _say(console, f"found the server at {server}")
            return standing.at(server)


def _start(console: Console, standing: Standing, *, insecure: bool, wait: bool) -> int:
    options = standing.options
    if options.eval_data is not None and options.data is None:
        raise ConfigError(
            f"--eval-data {options.eval_data} is measured by a device, and --data is missing: its examples to learn"
        )
    for file in filter(None, (options.data, options.eval_data)):
        _check_data(console, file)
    if standing.identity is None:
        check_plain_text(split_address(options.server, "--server")[0], "--server", insecure)
    await_server(options.server, tls=standing.identity is not None, patient=wait, say=partial(_say, console))
    if standing.identity is None:
        _say(
            console,
            "WARNING: --insecure. This node has no keys, and all that it sends is plain text: whoever is on the way reads and changes it",
        )
    membership = _enter(console, standing)
    offset_s = (
        None if membership is None or membership.clock_is_right else time.time() - membership.ahead_s - since_boot_s()
    )
    node = NodeProcesses(
        standing.name, options.server, standing.state, options.data, options.listen, options.advertise, options.threads,
        options.tags, options.trust, identity=standing.identity, insecure=insecure, device=options.device or "auto",
        clock_offset_s=offset_s, eval_data=options.eval_data, metrics=options.metrics,
    )  # fmt: skip
    return _watch(console, node)


def lock_state(state: Path) -> Hold:
    """Makes a node's state folder this process's own.

    Raises EnvironmentProblem if another process has it: two nodes in one folder would take each other's socket and keys.
    """
    try:
        return Hold(state, lock=_LOCK)
    except BlockingIOError as error:
        raise EnvironmentProblem(
            f"another `edgelam client` (process number {holder_of(state, _LOCK)}) uses the state folder {state}: end that one, or start "
            "this node with a folder of its own (--state, or another --name)"
        ) from error


def _check_data(console: Console, data: Path) -> None:
    """Raises DataError for a file that no run could read; says which examples none can."""
    if holds_arrays(data):
        read_arrays(data)  # what its samples hold, a run's task says
    elif bad := check_readable(data):
        places = f"{', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}"
        _say(
            console,
            f"WARNING: {human_count(len(bad), 'example')} of {data} cannot be read ({places}): runs refuse this node, unless they have "
            f"data.bad_lines = 'skip'",
        )


def _check_data_plane(options: NodeOptions) -> None:
    """Raises ConfigError for addresses that are none or contradict each other."""
    if options.listen and options.listen != RELAY:
        split_address(options.listen, "--listen")
    if options.advertise:
        split_address(options.advertise, "--advertise")
        if options.listen == RELAY:
            raise ConfigError(
                f"--listen {RELAY} means that nobody can dial this node, so it has no --advertise {options.advertise}"
            )


def _check_trust(name: str, options: NodeOptions) -> None:
    """Raises ConfigError for a trust that is none, or that a node without text has no use for."""
    if not options.trust:
        return
    try:
        most_read_by_hosts(options.trust)
    except ValueError as error:
        raise ConfigError(f"--trust {options.trust!r} {error}") from error
    if options.data is None:
        raise ConfigError(
            f"--trust {options.trust} says what hosts may read of a device's text, and {name} has no data"
        )


def await_server(
    server: str,
    *,
    tls: bool,
    patient: bool,
    say: Callable[[str], None],
    probe: Callable[..., ServerProblem | None] = problem_at,
    sleep: Callable[[float], object] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Waits until a server answers at `server` (HOST:PORT), and says why it waits: at once, when that changes, and now and then.

    tls: as of `problem_at`, which is `probe`. Raises EnvironmentProblem in place of waiting unless `patient`.
    """
    began, said, next_sign, pause_s = now(), "", 0.0, 1.0
    while (problem := probe(server, tls=tls)) is not None:
        if not patient:
            raise EnvironmentProblem(f"{problem.words}; start one with `edgelam server`, or give another --server")
        waited_s = now() - began
        if problem.words != said or waited_s >= next_sign:
            for_s = f" for {human_seconds(waited_s)}" if said else ""
            say(f"{problem.words}; trying on{for_s}, Ctrl-C ends it")
            said, next_sign = problem.words, waited_s + max(_SIGN_S, _SIGN_PART * waited_s)
        sleep(min(pause_s, max(1.0, next_sign - waited_s)))
        pause_s = min(_LONGEST_PAUSE_S, 1.5 * pause_s)
    if said:
        say(f"a server answers at {server}")


def _enter(console: Console, standing: Standing) -> Membership | None:
    """Joins by the invitation, or asks whether this machine still is a member; says how far its clock is off.

    Returns None for a node without keys.
    """
    if standing.identity is None:
        return None
    if standing.invitation is None:
        membership = renew(standing.options.server, standing.identity)
    else:
        membership = standing.join()
        _say(
            console,
            f"{standing.name} has joined the federation at {standing.options.server} as {membership.identity.role}; its keys are in "
            f"{standing.identity}. From now on it starts by:  edgelam client --state {standing.state}",
        )
    if words := clock_words(membership.ahead_s):
        _say(console, f"{words}; the node works all the same, but its logs have wrong times (timedatectl set-ntp true)")
    return membership


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _say_event(console: Console, event: Event) -> None:
    """Prints an event of the stage host that its owner should hear of."""
    match event:
        case NodeReady():
            if event.chip:
                _say(console, f"{event.name} {event.chip}")
        case TextReadableHere():
            _say(console, f"by this run's plan, {event.words}")
        case DataChanged():
            _say(console, event.words())
        case DataRead():
            for words in event.words():
                _say(console, words)


def trust_words(trust: str) -> str:
    """Says what hosts may read of a device's text, before any plan is here."""
    if trust == "none":
        return "no host gets anything of its text (--trust none): it takes part only in runs with split.hosts = 0"
    if trust.startswith("measured"):
        return f"plans by which hosts can read more than {percent(most_read_by_hosts(trust))} of its text are refused (--trust {trust})"
    return "the bytes of its text stay here; hosts can read most of the content. --trust limits that, and PRIVACY.md says more"


@dataclass
class Renewals:
    """Asks now and then whether a node's certificate still lasts."""

    server: str
    identity: Path
    due: float = field(default_factory=lambda: time.monotonic() + _RENEWAL_S)
    """On the monotonic clock."""

    def check(self, now: bool = False) -> bool:
        """Asks if it is time to, or if `now`; returns whether there is a new certificate.

        Raises Refused if the node is no member any more. A server that does not answer is asked again later.
        """
        if not now and time.monotonic() < self.due:
            return False
        before = load_identity(self.identity).certificate
        try:
            current = renew(self.server, self.identity).identity.certificate
        except EnvironmentProblem:
            self.due = time.monotonic() + _RETRY_S
            return False
        self.due = time.monotonic() + _RENEWAL_S
        return current != before


@dataclass
class ServerInSight:
    """Says when a node's server is gone, and when it is back."""

    server: str
    say: Callable[[str], None]
    answers: Callable[[str, int], bool] = answers
    now: Callable[[], float] = time.monotonic
    _gone_since: float | None = None
    _next: float = 0.0

    def look(self) -> None:
        """Sees whether the server answers, if it is time to."""
        if self.now() < self._next:
            return
        is_here = self.answers(*split_address(self.server, "--server"))
        self._next = self.now() + _LOOK_S
        if not is_here and self._gone_since is None:
            self._gone_since = self.now()
            self.say(f"no server answers at {self.server}; the node tries on and joins again when it is back")
        elif is_here and self._gone_since is not None:
            self.say(f"the server at {self.server} answers again, after {human_seconds(self.now() - self._gone_since)}")
            self._gone_since = None


def _watch(console: Console, node: NodeProcesses) -> int:
    renewals = Renewals(node.server, node.identity) if node.identity else None
    tail = EventTail(node.state / EVENTS_FILE)
    tail.poll()  # what was said before
    try:
        node.start()
        with waiting(console, f"{node.name}: loading PyTorch"):
            while not node.ready():
                time.sleep(_POLL_S)
        role = "device" if node.data else "edge server"
        _say(console, f"{node.name} is here as {role}; logs in {node.state}. Ctrl-C ends it.")
        if node.data:
            _say(console, trust_words(node.trust))
        in_sight = ServerInSight(node.server, partial(_say, console))
        with node_line(console, node.name, node.state) as look:
            while True:
                pause(_WATCH_S, node.children.values())
                look()
                in_sight.look()
                for event in tail.poll():
                    _say_event(console, event)
                news = node.watch()
                if news:
                    _say(console, news)
                if renewals is not None and renewals.check(now=bool(news)):
                    node.restart_stage_host()
                    _say(console, f"the certificate of {node.name} was renewed")
    except KeyboardInterrupt:
        console.print(f"{node.name} has left; a run in progress goes on without it")
        return INTERRUPTED
    finally:
        node.end()
