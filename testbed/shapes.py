"""Reads and checks a testbed's file: machines of named shapes. Knows nothing of containers."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from edgelam_fl.config import Section, WireSection, parse_toml
from edgelam_fl.errors import ConfigError, nearest

MOST_NODES = 64  # a container takes a third of a GiB before it holds a layer
SERVER = "server"
_SHARE_OF_CORES = 0.9  # of this machine, at most, for a timed testbed: the engine and this command need the rest
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # a host name, which Docker's DNS answers
_UNITS = {"MiB": 2**20, "GiB": 2**30}


class MachineShape(Section):
    memory: str = Field(description="limit, with no swap beside it, as '512 MiB' or '8 GiB'")
    cpus: float = Field(gt=0, le=1024, description="cores of this machine; may be a fraction")
    up: str = Field("", description="rate of sending at most, as '5 Mbit/s'; '': unlimited")
    down: str = Field("", description="rate of receiving at most, as '5 Mbit/s'; '': unlimited")
    delay_ms: int = Field(0, ge=0, le=10_000, description="delay of sending; needs netem in the kernel")

    @field_validator("memory")
    @classmethod
    def a_size(cls, value: str) -> str:
        number, _, unit = value.partition(" ")
        if unit not in _UNITS or not number.isdigit() or not int(number):
            raise ValueError("must be a size such as '512 MiB' or '8 GiB'")
        return value

    @field_validator("up", "down")
    @classmethod
    def a_rate(cls, value: str) -> str:
        try:
            bps = WireSection(capacity=value).capacity_bps
        except ValidationError:
            bps = -1.0
        if not (value == "" or bps >= 1000):
            raise ValueError("must be a rate such as '5 Mbit/s' (kbit/s, Mbit/s or Gbit/s; 1 kbit/s at least), or ''")
        return value

    @property
    def memory_bytes(self) -> int:
        number, _, unit = self.memory.partition(" ")
        return int(number) * _UNITS[unit]

    @property
    def up_kbit(self) -> int:
        return int(WireSection(capacity=self.up).capacity_bps / 1000)

    @property
    def down_kbit(self) -> int:
        return int(WireSection(capacity=self.down).capacity_bps / 1000)


class TestbedNode(Section):
    shape: str = Field(description="one of [shapes]")
    name: str = Field("", description="unique; by default the shape's name and a number")
    role: Literal["device", "edge"] = Field("device", description="a device has data; an edge server lends compute")


class Testbed(Section):
    shapes: dict[str, MachineShape] = Field(description="kinds of machines, by name")
    server: str = Field(description="the server's shape")
    nodes: tuple[TestbedNode, ...] = Field(description="the machines that join the server")
    timed: bool = Field(True, description="refuse more CPU than this machine has: seconds would mean nothing")

    @field_validator("nodes", mode="before")
    @classmethod
    def nodes_as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @property
    def devices(self) -> list[TestbedNode]:
        return [node for node in self.nodes if node.role == "device"]

    def shape_of(self, node: TestbedNode) -> MachineShape:
        return self.shapes[node.shape]

    def services(self) -> list[tuple[str, MachineShape]]:
        """Returns name and shape of every container, the server's first."""
        return [(SERVER, self.shapes[self.server]), *((node.name, self.shape_of(node)) for node in self.nodes)]


def read_testbed(file: Path, devices: int | None = None, cores: int = os.cpu_count() or 1) -> Testbed:
    """Reads a testbed from its file and names each node.

    `devices`: number of devices, of the shapes of the file's devices in turn; None: the file's own devices. `cores`: of
    this machine. Raises ConfigError with the value, what is allowed, and the file.
    """
    try:
        testbed = Testbed.model_validate(parse_toml(file.read_text(encoding="utf-8"), str(file)))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the testbed's file {file} cannot be read: {error}") from error
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, file) for problem in error.errors())) from error
    if devices is not None:
        testbed = _with_devices(testbed, devices, file)
    testbed = testbed.model_copy(update={"nodes": tuple(_named(testbed.nodes))})
    for problem in _problems(testbed, cores):
        raise ConfigError(f"{problem} (in {file})")
    return testbed


def _with_devices(testbed: Testbed, devices: int, file: Path) -> Testbed:
    _check_count(devices, file)
    if not testbed.devices:
        raise ConfigError(
            f"--devices = {devices}, but {file} has no device whose shape to use; add one under [[nodes]]"
        )
    shapes = islice(cycle(node.shape for node in testbed.devices), devices)
    edges = [node for node in testbed.nodes if node.role == "edge"]
    return testbed.model_copy(update={"nodes": (*edges, *(TestbedNode(shape=shape) for shape in shapes))})


def _check_count(devices: int, file: Path) -> None:
    if not 1 <= devices <= MOST_NODES:
        raise ConfigError(f"a testbed has 1 to {MOST_NODES} devices, got {devices} (in {file} or --devices)")


def _named(nodes: Sequence[TestbedNode]) -> Iterator[TestbedNode]:
    numbers: Counter[str] = Counter()
    for node in nodes:
        numbers[node.shape] += 1
        yield node if node.name else node.model_copy(update={"name": f"{node.shape}-{numbers[node.shape]}"})


def _problems(testbed: Testbed, cores: int) -> Iterator[str]:
    """Yields what is wrong with a testbed, the most basic problem first."""
    for where, shape in [("server", testbed.server), *((node.name, node.shape) for node in testbed.nodes)]:
        if shape not in testbed.shapes:
            yield f"{where}: shape {shape!r} is unknown: {nearest(shape, testbed.shapes)}"
    count = len(testbed.devices)
    if not 1 <= count <= MOST_NODES:
        yield f"a testbed has 1 to {MOST_NODES} devices, got {count}"
    for name, times in Counter(node.name for node in testbed.nodes).items():
        if times > 1:
            yield f"{times} nodes are named {name!r}; names must be unique in a federation"
        if not _NAME.fullmatch(name) or name == SERVER:
            yield f"the node's name {name!r} must be a host name of small letters, digits and '-', and not {SERVER!r}"
    yield from _too_much_cpu(testbed, cores)


def _too_much_cpu(testbed: Testbed, cores: int) -> Iterator[str]:
    asked = testbed.shapes[testbed.server].cpus + sum(testbed.shape_of(node).cpus for node in testbed.nodes)
    allowed = _SHARE_OF_CORES * cores
    if testbed.timed and asked > allowed + 1e-9:
        yield (
            f"the containers ask for {asked:.2f} CPUs, but a timed testbed may have {allowed:.2f} of this machine's {cores}; "
            f"lower `cpus`, or set timed = false and do not trust its seconds"
        )


def _explain(problem: Any, file: Path) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = {**Testbed.model_fields, **MachineShape.model_fields, **TestbedNode.model_fields}
        return f"unknown key {key} in {file}: {nearest(key.rpartition('.')[2], known)}"
    if problem["type"] == "missing":
        return f"{key} is missing in {file}"
    rule = problem.get("ctx", {}).get("error") or problem["msg"].replace("Input should be", "must be")
    return f"{key} = {problem['input']!r} {rule} (in {file})"
