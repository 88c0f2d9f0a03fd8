"""Runs a whole federation as processes of this machine: a SuperLink, edge servers and devices, for one run.

Knows no console: `federation.runs` shows a run, `run_local` yields its events to a program.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from edgelam_fl.addresses import free_port
from edgelam_fl.bounds import Bounds
from edgelam_fl.config import RunConfig
from edgelam_fl.errors import INTERRUPTED, ConfigError, RunFailed, UsageError
from edgelam_fl.federation.child import Child, end_all
from edgelam_fl.federation.data_check import eval_files, look_into_files
from edgelam_fl.federation.flower_app import app_module
from edgelam_fl.federation.node_process import NodeProcesses
from edgelam_fl.federation.operator import Operator, operator_folder
from edgelam_fl.federation.submission import Submission
from edgelam_fl.federation.superlink import start_superlink
from edgelam_fl.federation.template import warm_template
from edgelam_fl.files import Hold, from_home
from edgelam_fl.plan.layout import local_hosts
from edgelam_fl.tasks.named import local_data
from edgelam_fl.telemetry.events import EVENTS_FILE, Event, RunDone
from edgelam_fl.telemetry.human import human_count
from edgelam_fl.telemetry.progress import NodesProgress, clear_progress, write_progress
from edgelam_fl.telemetry.run_folder import COMMAND_LOCK, end_with, kept
from edgelam_fl.trust.authority import issue
from edgelam_fl.trust.identity import DEVICE, HOST, save_identity
from edgelam_fl.trust.server import ServerTrust, prepare_trust, trust_folder

_POLL_S = 0.25
_IDENTITY = "identity"
_RESULT_LAG_S = 30.0
Begun = TypeVar("Begun")


@dataclass(frozen=True, kw_only=True)
class LocalFederation:
    """The processes of one federation on this machine."""

    config: RunConfig
    """The run's configuration; the run waits at its start for all devices."""
    folder: Path
    operator: Operator
    """Who submits the run to the SuperLink."""
    superlink: Child
    edges: Sequence[NodeProcesses]
    devices: Sequence[NodeProcesses]
    progress: NodesProgress
    """Where the nodes are in a round."""

    @property
    def nodes(self) -> list[NodeProcesses]:
        return [*self.edges, *self.devices]

    def __str__(self) -> str:
        processes = 1 + 2 * len(self.nodes)  # per node a stage host and a SuperNode
        parts = f"{human_count(len(self.edges), 'edge server')} and {human_count(len(self.devices), 'device')}"
        return f"a SuperLink, {parts} as {processes} processes"

    def watch(self) -> list[str]:
        """Restarts processes of nodes that have ended; returns what happened. Raises RunFailed if the SuperLink has ended.

        Also puts where the nodes are in a round into the run's folder, where followers look: without a hub nobody else can.
        """
        if (progress := self.progress.look(time.monotonic())) is not None:
            write_progress(self.folder, progress)
        if problem := self.superlink.ended():
            raise RunFailed(f"{problem}. The run ended with it. {kept(self.folder)}")
        return [news for node in self.nodes if (news := node.watch())]


def bounds_of_a_local_run(run: Path | None = None) -> Bounds:
    """Returns what a run file may name if everything takes place on this machine: modules of the working directory too.

    run: the one folder that the run may use; None: any new one.
    """
    return Bounds(folder=Path.cwd(), run=run)


@contextmanager
def local_federation(
    config: RunConfig,
    data: Sequence[Path],
    folder: Path,
    say: Callable[[str], None] = lambda text: None,
    names: Sequence[str] = (),
    eval_data: Sequence[Path] = (),
) -> Iterator[LocalFederation]:
    """Starts a federation for one run, with one device per file of `data`; ends its processes when the context ends.

    It has an authority of its own, whose keys and those of the nodes are deleted at the end. folder: the run's folder, which
    holds the nodes' logs too, and is held by this process meanwhile; its events say at the end how the run ended. Nothing is left of a
    new folder if a UsageError ends it before it has said anything. say: hears what is begun. names: those of the devices; empty:
    `numbered`. eval_data: what they measure with, as of `eval_files`. Whether the files can be learned from is known before:
    `look_into_files`.
    """
    warm_template()  # it imports while everything else is prepared
    with recorded_end(folder, _federation(config, data, folder, say, names, eval_data)) as here:
        yield here


@contextmanager
def recorded_end(folder: Path, federation: AbstractContextManager[Begun]) -> Iterator[Begun]:
    """Holds a run's folder while `federation` is here; the run's events say at the end how it ended, as `local_federation` has it."""
    is_new = not folder.is_dir() or not any(folder.iterdir())
    reason, exit_code = "it was stopped at its command", INTERRUPTED
    with _held(folder):
        try:
            with federation as here:
                yield here
        except Exception as error:
            if is_new and isinstance(error, UsageError) and not (folder / EVENTS_FILE).exists():
                shutil.rmtree(folder, ignore_errors=True)
            reason, exit_code = from_home(str(error)), getattr(error, "exit_code", RunFailed.exit_code)
            raise
        finally:
            if folder.is_dir():
                end_with(folder, reason, exit_code)


def _held(folder: Path) -> Hold:
    """Makes the run's folder and holds it. Raises ConfigError if another command does."""
    try:
        return Hold(folder, lock=COMMAND_LOCK)
    except BlockingIOError as error:
        raise ConfigError(f"the run in {folder} is alive; `edgelam top {folder}` shows it") from error


@contextmanager
def _federation(
    config: RunConfig,
    data: Sequence[Path],
    folder: Path,
    say: Callable[[str], None],
    names: Sequence[str],
    eval_data: Sequence[Path],
) -> Iterator[LocalFederation]:
    """Starts the processes of `local_federation` and ends them."""
    port = free_port()
    server = f"127.0.0.1:{port}"
    measured = eval_files(len(data), [local_data(file) for file in eval_data])
    each = zip(map(local_data, data), measured, strict=True)
    edges, devices = _local_nodes(config, folder, server, dict(zip(names or numbered(len(data)), each, strict=True)))
    _forget_keys(folder, edges + devices)  # of a run that was killed, and goes on
    trust = prepare_trust(folder / "server", "127.0.0.1", port)
    for node in edges + devices:
        let_in(trust, node)
    expecting = config.federation.model_copy(update={"expect_nodes": len(devices)})
    children: list[Child] = []
    try:
        # Without a hub: all nodes are on this machine and have what it has, the model too.
        say("starting Flower's SuperLink")
        children.append(
            start_superlink("127.0.0.1", port, folder / "server", trust=trust, bounds=bounds_of_a_local_run(folder))
        )
        say("starting the nodes")
        for node in edges + devices:
            node.start()
        yield LocalFederation(
            config=config.model_copy(update={"federation": expecting}),
            folder=folder,
            operator=Operator(server, operator_folder(folder / "server")),
            superlink=children[0],
            edges=edges,
            devices=devices,
            progress=NodesProgress({node.name: node.state for node in edges + devices}),
        )
    finally:
        clear_progress(folder)
        end_all([*(child for node in edges + devices for child in node.children.values()), *children])
        _forget_keys(folder, edges + devices)


def let_in(trust: ServerTrust, node: NodeProcesses) -> None:
    """Makes a node a member, with keys made here: for a server and nodes that one user of this machine starts."""
    identity = issue(trust.authority, node.name, DEVICE if node.data else HOST)
    node.identity = node.state / _IDENTITY
    save_identity(identity, node.identity)
    trust.members.add(identity)


def _forget_keys(folder: Path, nodes: Sequence[NodeProcesses]) -> None:
    """Removes the keys of a federation that has ended: nobody needs them."""
    identities = [node.state / _IDENTITY for node in nodes]
    for keys in (trust_folder(folder / "server"), operator_folder(folder / "server"), *identities):
        shutil.rmtree(keys, ignore_errors=True)


def _local_nodes(
    config: RunConfig, folder: Path, server: str, data: Mapping[str, tuple[Path, Path | None]]
) -> tuple[list[NodeProcesses], list[NodeProcesses]]:
    """Returns edge servers and devices, whose data and evaluation files are by name. There are no edge servers if devices host or if nothing is split."""
    hosts = local_hosts(config)
    edge_threads, threads = shares_of_cores(os.cpu_count() or 1, len(hosts), len(data))
    edge = [NodeProcesses(name, server, folder / "nodes" / name, threads=edge_threads, forked=True) for name in hosts]
    listen = "127.0.0.1:0" if config.split.host_on == "any" else ""
    devices = [
        NodeProcesses(
            name,
            server,
            folder / "nodes" / name,
            file,
            listen,
            threads=threads,
            forked=True,
            metrics=[str(Path.cwd())],
            eval_data=eval_file,
        )
        for name, (file, eval_file) in data.items()
    ]
    return edge, devices


def numbered(devices: int) -> list[str]:
    """Returns the names of devices that have none of their own."""
    return [f"device-{number}" for number in range(1, devices + 1)]


def shares_of_cores(cores: int, edges: int, devices: int) -> tuple[int, int]:
    """Returns the threads of each edge server and of each device.

    Edge servers share all cores, as devices wait for them most of the time; devices leave one share to them, if there are any.
    """
    return max(1, cores // max(1, edges)), max(1, cores // (devices + min(1, edges)))


def run_local(
    config: RunConfig,
    data: Sequence[Path],
    folder: Path,
    names: Sequence[str] = (),
    eval_data: Sequence[Path] = (),
) -> Iterator[Event]:
    """Trains as `config` says, with one device per file of `data`, and yields the run's events as they come.

    All processes of the federation are this machine's; they end with the iterator: after the last event, when the
    iterator is closed, or with an exception. The last event is a `RunDone` or `RunFailure`; after it, `folder` holds the
    whole result (`open_result`). folder: absent or empty. names: of the devices; empty: device-1 and so on.
    eval_data: files of examples that are measured and never learned, one for all devices or one each; empty: a share of each
    device's data is (data.held_out).

    Raises ConfigError, ModelError or DataError before anything starts, and RunFailed if the federation itself ends.
    """
    names = names or numbered(len(data))
    spec = app_module("server.checks").check_config(config, bounds_of_a_local_run(), devices=names)
    data, eval_data = ([local_data(file) for file in files] for files in (data, eval_data))
    folder = folder.absolute()
    look_into_files(config, spec.source, data, eval_data)
    with local_federation(config, data, folder, names=names, eval_data=eval_data) as here:
        submission = Submission(here.operator)
        submission.submit(here.config, folder)
        for event in submission.events(meanwhile=here.watch):
            if isinstance(event, RunDone):
                await_result(folder)
            yield event


def await_result(folder: Path) -> None:
    """Waits for the files of a run that is done, which are written after its last event."""
    end = time.monotonic() + _RESULT_LAG_S
    while not (folder / "report.html").exists() and time.monotonic() < end:
        time.sleep(_POLL_S)
