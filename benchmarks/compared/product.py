"""The product's own stage hosts, in processes of their own over gRPC, by plans as the server makes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from benchmarks.compared.load import Load
from benchmarks.compared.shaped import UNSHAPED, Shape
from benchmarks.compared.workers import Step, peak_bytes
from edgelam_fl.federation.child import end_all
from edgelam_fl.plan.making import RoundFacts
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.fleet import Fleet, check_done
from tests.parity.daemons import Daemon
from tests.support import cpu_seconds

_DATA = 0.97  # of a link's rate, so that no queue builds up before it; the rest is for headers


class Product:
    """Stage hosts that make a round of one step at a time. The time of a step is the slowest device's, without the round's messages."""

    def __init__(self, fleet: Fleet, daemons: Mapping[str, Daemon], load: Load) -> None:
        self._fleet, self._daemons, self._load, self._start = fleet, daemons, load, load.start()
        self.reports: dict[str, pb.JobReport] = {}
        """Of the newest step, by node."""

    def step(self, number: int, steps: int = 1) -> Step:
        """Makes a round, usually of one step; all numbers are of the whole round."""
        pids = [daemon.child.pid for daemon in self._daemons.values()]
        before = sum(map(cpu_seconds, pids))
        self.reports = self._fleet.run(self._start, steps, step_offset=number)
        check_done(self.reports)
        cpu_s = sum(map(cpu_seconds, pids)) - before
        devices = [self.reports[name] for name in self._fleet.devices]
        seconds = max(report.train_seconds for report in devices)
        return Step(seconds, cpu_s, sum(report.tokens_trained for report in devices))

    def peak_bytes(self) -> list[int]:
        return [peak_bytes(daemon.child.pid) for daemon in self._daemons.values()]

    def of_devices(self, count: int) -> Product:
        """Returns the same processes with the first devices alone."""
        fleet = self._fleet
        few = {name: fleet.devices[name] for name in list(fleet.devices)[:count]}
        daemons = {name: one for name, one in self._daemons.items() if name in few or name in fleet.hosts}
        return Product(replace(fleet, devices=few, name=f"{fleet.name}-{count}", events=[]), daemons, self._load)

    def cut_as(self, load: Load) -> Product:
        """Returns the same processes, which cut batches as this load says."""
        pieces = load.config.pieces
        name = f"{self._fleet.name}-{pieces.micro_batches}-{pieces.window}"
        return Product(replace(self._fleet, config=load.config, name=name, events=[]), self._daemons, load)

    def behind(self, addresses: Sequence[str], shape: Shape) -> Product:
        """Returns the same processes, whose devices reach the host at these addresses, and keep to the rate of their links."""
        lines = dict(zip(self._fleet.devices, addresses, strict=True))
        given = {field.name: getattr(self._fleet, field.name) for field in fields(Fleet)}
        name = f"{self._fleet.name}-{shape.mbps:g}"
        return Product(_Shaped(**given | {"name": name}, lines=lines, shape=shape), self._daemons, self._load)

    def host_address(self) -> str:
        """Returns where devices reach the only host."""
        ((_, address),) = self._fleet.hosts.values()
        return address

    def profiles(self) -> dict[str, pb.Profile]:
        return {name: daemon.profile() for name, daemon in self._daemons.items()}

    def plans(self) -> dict[str, pb.Plan]:
        """Returns the plans of a round of one step."""
        return self._fleet.plans(RoundFacts(self._fleet.name, 1, 1, 0, 1))

    def tensor_bytes(self) -> int:
        """Returns the bytes of tensors that devices sent and received in the newest step."""
        return sum(row.payload_bytes for name in self._fleet.devices for row in self.reports[name].bytes)


@dataclass
class _Shaped(Fleet):
    """A fleet whose devices each reach the host by a line of their own."""

    lines: Mapping[str, str] = field(default_factory=dict)
    shape: Shape = UNSHAPED

    def plans(self, facts: RoundFacts) -> dict[str, pb.Plan]:
        plans = super().plans(facts)
        for plan in plans.values():
            for route in (*plan.routes, *plan.serves):
                route.share_bps = _DATA * self.shape.mbps * 1e6
                for hop in route.hops:
                    hop.address = self.lines[route.device]
        return plans


@contextmanager
def product(load: Load, folder: Path, *, device_threads: int = 1, host_threads: int = 1) -> Iterator[Product]:
    """Starts a device for each file of the load, and the hosts that its settings ask for."""
    names = [f"edge-{number}" for number in range(1, load.config.split.least_hosts + 1)]
    daemons = {name: Daemon(name, folder / name, threads=host_threads) for name in names}
    for number, file in enumerate(load.files, 1):
        name = f"device-{number}"
        daemons[name] = Daemon(name, folder / name, file, threads=device_threads)
    try:
        hosts = {name: (daemons[name], daemons[name].address()) for name in names}
        devices = {name: daemon for name, daemon in daemons.items() if name not in hosts}
        yield Product(Fleet(load.source, load.config, dict(devices), dict(hosts), folder.name), daemons, load)
    finally:
        for daemon in daemons.values():
            daemon.close()
        end_all([daemon.child for daemon in daemons.values()])


def in_turn(ways: Sequence[str], turn: int) -> list[str]:
    """Returns the order of a turn: each way is first once, so that none always runs on a machine that another has warmed."""
    first = turn % len(ways)
    return [*ways[first:], *ways[:first]]
