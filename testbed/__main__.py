"""`python -m testbed`: runs the demo on a testbed of containers that are as small and as slow as boards.

`run`, which `make testbed` calls, builds the image, starts the containers, trains, copies the run's folder here and
removes the containers. `compose` only writes the Compose file. Both need no rights beyond those of `docker` itself.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from edgelam_fl.cli.main import run_commands
from edgelam_fl.config import read_run_file, to_toml
from edgelam_fl.errors import ConfigError, RunFailed
from edgelam_fl.tasks.docstrings import write_device_files
from edgelam_fl.telemetry.human import human_bytes
from testbed.compose import (
    RUNS,
    SERVER,
    SERVER_ADDRESS,
    STATE,
    compose_file,
    cpu_limit,
    join_variable,
    write_compose_file,
)
from testbed.engine import ROOT, Project, build, check_engine
from testbed.shapes import Testbed, read_testbed

IMAGE = "edgelam:testbed"
_FILES = ROOT / "docker"
_SERVES = "test -f /state/endpoint.json && echo yes"  # a node writes this file when its stage host listens

_ANSWERS = "python -IS /opt/edgelam/health.py && echo yes"  # a new server has made its certificate authority by then

app = typer.Typer(
    help="Testbeds of containers.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
FileOption = Annotated[Path, typer.Option("--file", metavar="TOML", help="The machines to play.")]
DevicesOption = Annotated[
    int | None, typer.Option("--devices", help="Number of devices, of the file's shapes in turn; by default as listed.")
]


@app.command()
def compose(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder for the file and the devices' data.")],
    file: FileOption = _FILES / "devices.toml",
    devices: DevicesOption = None,
    image: Annotated[str, typer.Option("--image", help="The image of all containers.")] = IMAGE,
) -> None:
    """Writes FOLDER/docker-compose.yml, and the devices' data beside it; starts nothing, needs no engine."""
    print(write_testbed(read_testbed(file, devices), new_folder(out), image))


@app.command()
def run(
    file: FileOption = _FILES / "devices.toml",
    devices: DevicesOption = None,
    run_file: Annotated[Path, typer.Option("--run", metavar="TOML", help="The run file.")] = _FILES / "run.toml",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="By default runs/testbed-<time>.")] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key of the run file; may be repeated.")
    ] = [],  # noqa: B006
    project: Annotated[str, typer.Option("--project", help="Name of the Compose project.")] = "edgelam-testbed",
    image: Annotated[str, typer.Option("--image", help="Use this local image instead of building one.")] = "",
    base_image: Annotated[str, typer.Option("--base-image", help="Image that the build starts from.")] = "",
) -> None:
    """Builds the image, starts the testbed, trains on it, copies the run's folder here, and removes the containers."""
    console = Console()
    testbed = read_testbed(file, devices)
    read_run_file(run_file, overrides)
    check_engine()
    folder = new_folder(out or Path("runs") / f"testbed-{time.strftime('%Y%m%d-%H%M%S')}")
    if not image:
        console.print("building the image (minutes the first time, seconds after that)")
        build(IMAGE, base_image)
    with started(testbed, folder, project, console, image=image or IMAGE, lend=True) as containers:
        train(containers, testbed, folder, run_file, overrides)
        memory = memory_table(containers, testbed)
    console.print(memory)
    console.print(f"run: {folder}\npage: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def new_folder(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"the folder {folder} exists; choose another one (nothing is ever overwritten)")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.absolute()


def write_testbed(
    testbed: Testbed,
    folder: Path,
    image: str,
    data: Sequence[Path] = (),
    mounts: Mapping[str, str] = MappingProxyType({}),
    *,
    server_alone: bool = False,
) -> Path:
    """Writes the Compose file and returns its path.

    `data`: one file per device, by default the demo's docstrings. The other arguments are those of `compose_file`.
    """
    files = data or write_device_files(folder / "data", len(testbed.devices))
    of_device = {node.name: file for node, file in zip(testbed.devices, files, strict=True)}
    return write_compose_file(
        folder / "docker-compose.yml", compose_file(testbed, of_device, image, mounts, server_alone=server_alone)
    )


@contextmanager
def started(
    testbed: Testbed,
    folder: Path,
    name: str,
    console: Console,
    data: Sequence[Path] = (),
    mounts: Mapping[str, str] = MappingProxyType({}),
    image: str = IMAGE,
    lend: bool = False,
    server_alone: bool = False,
) -> Iterator[Project]:
    """Starts the containers, yields them, and removes them. If something fails, their output is kept in containers.log.

    `mounts`, `server_alone`: as in `compose_file`.
    `lend`: each container may use all cores until all nodes serve, and its shape's share from then on. PyTorch takes
    half a minute to load on a fifth of a core, which a testbed is not meant to measure.
    """
    as_started = unlimited(testbed) if lend else testbed
    file = write_testbed(as_started, folder, image, data, mounts, server_alone=server_alone)
    containers = Project(name, file)
    containers.down()  # leftovers of an earlier call that was killed
    try:
        console.print(f"starting {1 + len(testbed.nodes)} containers: {SERVER}, {_listed(testbed)}", highlight=False)
        containers.up(SERVER)
        containers.up(**invite_all(containers, testbed))
        if lend:
            wait_until_all_serve(containers, testbed)
            for service, shape in testbed.services():
                containers.limit_cpus(service, **cpu_limit(shape.cpus))
        yield containers
    except BaseException:
        (folder / "containers.log").write_text(containers.logs(), encoding="utf-8")
        console.print(f"output of the containers: {folder / 'containers.log'}", highlight=False, soft_wrap=True)
        raise
    finally:
        containers.down()


def invite_all(containers: Project, testbed: Testbed, deadline_s: float = 300.0) -> dict[str, str]:
    """Waits until the server answers and has it invite every node; returns the variables of the Compose file with the texts."""
    end = time.monotonic() + deadline_s
    while not containers.ask(SERVER, _ANSWERS):
        if time.monotonic() > end:
            raise RunFailed(f"the server of the testbed does not answer after {deadline_s:.0f} s")
        time.sleep(1.0)
    texts = {}
    for node in testbed.nodes:
        role = "device" if node.role == "device" else "host"
        command = f"edgelam invite {node.name} --role {role} --expires 1d --state {STATE} --json"
        said = containers.ask(SERVER, command)
        if not said:
            raise RunFailed(f"the server of the testbed invites nobody: `{command}` failed in its container")
        texts[join_variable(node.name)] = json.loads(said)["text"]
    return texts


def unlimited(testbed: Testbed) -> Testbed:
    """Returns the testbed with all cores of this machine for each container."""
    cores = float(os.cpu_count() or 1)
    shapes = {name: shape.model_copy(update={"cpus": cores}) for name, shape in testbed.shapes.items()}
    return testbed.model_copy(update={"shapes": shapes, "timed": False})


def wait_until_all_serve(containers: Project, testbed: Testbed, deadline_s: float = 300.0) -> None:
    """Waits until every node's stage host listens. Raises RunFailed with the names of those that do not in time."""
    waiting, end = [node.name for node in testbed.nodes], time.monotonic() + deadline_s
    while waiting := [name for name in waiting if not containers.ask(name, _SERVES)]:
        if time.monotonic() > end:
            raise RunFailed(f"nodes of the testbed that do not serve after {deadline_s:.0f} s: {', '.join(waiting)}")
        time.sleep(1.0)


def _listed(testbed: Testbed) -> str:
    return ", ".join(node.name for node in testbed.nodes)


def train(
    containers: Project, testbed: Testbed, folder: Path, run_file: Path, overrides: Sequence[str] = (), name: str = ""
) -> None:
    """Runs `edgelam run` on the server and copies the run's folder here. Raises RunFailed if its exit status is not 0."""
    inside = f"{RUNS}/{name or 'testbed'}"
    config = read_run_file(run_file, [*overrides, f"federation.expect_nodes={len(testbed.devices)}"])
    containers.put(SERVER, to_toml(config), f"{inside}.toml")
    command = ["edgelam", "run", f"{inside}.toml", "--server", SERVER_ADDRESS, "--operator", f"{STATE}/operator"]
    command += ["--out", inside]
    try:
        status = containers.follow(SERVER, command)
    finally:
        containers.copy_out(SERVER, inside, folder)
    if status:
        raise RunFailed(f"the run on the testbed ended with status {status}; its folder is {folder}")


def memory_table(containers: Project, testbed: Testbed) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for heading in ("container", "shape", "memory limit", "peak with file pages", "killed for memory"):
        table.add_column(heading, justify="left" if heading in ("container", "shape") else "right")
    names = {SERVER: testbed.server} | {node.name: node.shape for node in testbed.nodes}
    for service, shape in testbed.services():
        peak, kills = containers.peak_memory_bytes(service), containers.memory_kills(service)
        known = human_bytes(peak), "-" if kills is None else str(kills)
        table.add_row(service, names[service], human_bytes(shape.memory_bytes), *known)
    return table


if __name__ == "__main__":
    run_commands(app, "edgelam testbed")
