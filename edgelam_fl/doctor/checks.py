"""Checks whether this machine can run EdgeLAM-FL, and suggests fixes.

Each check is a function of the things that it looks at, with the real ones as defaults, and returns findings; it changes
nothing and raises nothing. Knows nothing about runs.
"""

from __future__ import annotations

import http.client
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import ssl
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from rich.markup import escape
from rich.table import Table

from edgelam_fl.addresses import answers, check_port_free, is_every_interface, is_loopback, join_address
from edgelam_fl.errors import EdgelamError
from edgelam_fl.federation.environment import child_environment, proxies_set
from edgelam_fl.files import cache_folder
from edgelam_fl.machine import Heat, disk_free_bytes, heat, memory_free_bytes
from edgelam_fl.model.base_names import BASES
from edgelam_fl.model.limits import check_tokens
from edgelam_fl.model.source import BUILT_IN, find_model

PACKAGE = "edgelam-fl"
DEFAULT_PORT = 8000
MEMORY_NEEDED_BYTES = 1200 << 20  # a node of the demo's model at its peak
DISK_NEEDED_BYTES = 1 << 30  # the demo's model, unpacked and converted, twice
PYTHONS = (3, 11), (3, 13)
TOOL = "flwr"
_HTTP_DEADLINE_S = 5.0
_MAX_ANSWER_BYTES = 4 << 20


@dataclass(frozen=True)
class Finding:
    """The result of one check. A note is not a fault: only some runs need what is missing."""

    check: str
    state: Literal["ok", "note", "problem"]
    found: str
    fix: str = ""  # what to do; empty if nothing


def _ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def _problem(check: str, found: str, fix: str) -> Finding:
    return Finding(check, "problem", found, fix)


def examine(
    server: tuple[str, int] | None,
    hub: tuple[str, int] | None,
    model: str,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Finding]:
    """Runs all checks, one after the other; those of a server, a hub or a model only if it is named. say: hears of each that may take
    seconds, before it begins.
    """
    yield check_python()
    yield check_userland()
    yield from check_packages()
    yield from check_tools()
    yield check_own_name()
    yield from check_proxies(*server[:1] if server else ())
    say("checking the way to the server" if server else "checking the port")
    yield from check_server(*server) if server else [check_port()]
    if hub:
        yield check_hub(*hub)
    yield check_memory()
    yield from check_heat(heat())
    for place, folder in (("cache", cache_folder()), ("this folder", Path.cwd())):
        yield check_disk(place, folder)
    yield check_cache_writable(cache_folder())
    for base in BASES:
        say(f"trying the kernels of base {base}")
        yield check_base(base)
    say("trying accelerators")
    yield from check_chips()
    if model:
        say(f"reading model {model}")
        yield check_model(model)


# ---------------------------------------------------------------- what is installed


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Finding:
    found, low, high = (".".join(map(str, each)) for each in (version, *PYTHONS))
    if PYTHONS[0] <= version <= PYTHONS[1]:
        return _ok("Python", found)
    fix = f"tested are {low} to {high}; uv brings one: `uv venv --python {high}`"
    return _problem("Python", found, fix) if version < PYTHONS[0] else Finding("Python", "note", found, fix)


def check_userland(bits: int = 8 * struct.calcsize("P"), machine: str = platform.machine()) -> Finding:
    """Checks the programs' bits: Raspberry Pi OS also comes with 32, even over a 64-bit kernel, which `machine` names."""
    if bits >= 64:
        return _ok("system", f"{bits}-bit, {machine}")
    fix = "install the 64-bit system (Raspberry Pi OS 64-bit, or Debian arm64): there is no PyTorch for 32 bits"
    return _problem("system", f"programs have {bits} bits on {machine}; 64 are needed", fix)


def check_packages(
    requires: Sequence[str] | None = None,
    version_of: Callable[[str], str] = importlib.metadata.version,
    package: str = PACKAGE,
) -> list[Finding]:
    """Checks the installed versions against pyproject.toml's ranges: a finding per package outside, or one for all."""
    if requires is None:
        try:
            requires = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:
            fix = "install it, so that its parts find each other: `pip install edgelam-fl`, in a clone `make setup`"
            return [_problem("packages", f"{package} itself is not installed", fix)]
    needed = [each for each in map(Requirement, requires) if not each.marker or each.marker.evaluate({"extra": ""})]
    problems = [finding for each in needed for finding in _check_package(each, version_of)]
    return problems or [_ok("packages", f"all {len(needed)} within {package}'s ranges")]


def _check_package(needed: Requirement, version_of: Callable[[str], str]) -> list[Finding]:
    try:
        version = version_of(needed.name)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version and needed.specifier.contains(version, prereleases=True):
        return []
    found = f"{version}, needed {needed.specifier}" if version else "is not installed"
    return [
        _problem(
            f"package {needed.name}", found, f"pip install '{needed.name}{needed.specifier}'; in a clone `make setup`"
        )
    ]


def check_tools(path: str | None = None) -> list[Finding]:
    """Checks that Flower's command, which submits runs, is on PATH."""
    path = child_environment()["PATH"] if path is None else path
    if shutil.which(TOOL, path=path):
        return [_ok("Flower's command", TOOL)]
    fix = f"it comes with Flower, into the folder of {sys.executable}: pip install --force-reinstall flwr"
    return [_problem("Flower's command", f"not found: {TOOL}", fix)]


# ---------------------------------------------------------------- names and ports


def check_own_name(name: str = "") -> Finding:
    """Checks that this machine's own name resolves."""
    name = name or socket.gethostname()
    address = _resolve(name)
    if address:
        return _ok("own name", f"{name} is {address}")
    return _problem(
        "own name", f"{name} does not resolve on this machine", f"add the line `127.0.1.1 {name}` to /etc/hosts"
    )


def _resolve(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):
        return ""


def check_proxies(*hosts: str, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Checks for a proxy, which this program goes around: to this machine and to its server it connects directly."""
    found = proxies_set(environment)
    if not found:
        return []
    where = " and ".join(["this machine", *hosts])
    fix = "if the server can only be reached through the proxy, let this machine connect to it directly (firewall, VPN)"
    return [Finding("proxy", "note", f"{', '.join(found)} set; connections to {where} go around it", fix)]


def check_server(host: str, port: int) -> list[Finding]:
    """Checks name and port, and that a SuperLink answers there; stops at the first problem."""
    if is_every_interface(host):
        fix = "give the server's own address, as `ip -brief address` on the server shows it: --server ADDRESS:PORT"
        return [_problem("server's name", f"{host} is where a server listens, not an address to reach it", fix)]
    address = _resolve(host)
    if not address:
        fix = f"check its spelling; else give the server's IP address, or add a line `ADDRESS {host}` to /etc/hosts"
        return [_problem("server's name", f"{host} does not resolve", fix)]
    name = _ok("server's name", f"{host} is {address}")
    if not answers(host, port):
        listen = join_address(host, port) if is_loopback(host) else f"{join_address(address, port)} --insecure"
        fix = (
            f"start it there with `edgelam server --listen {listen}`; if it runs, let its firewall pass TCP port {port}"
        )
        return [name, _problem("server", f"nothing answers at {join_address(host, port)}", fix)]
    return [name, _check_superlink(host, port)]


def check_hub(host: str, port: int) -> Finding:
    """Checks that the server's end of the data plane answers."""
    if answers(host, port):
        return _ok("hub", f"{join_address(host, port)} answers")
    fix = f"on the server, let the firewall pass TCP port {port} too, or start it with `edgelam server --data-plane HOST:PORT`"
    return _problem("hub", f"nothing answers at {join_address(host, port)}, the server's data plane", fix)


def _check_superlink(host: str, port: int) -> Finding:
    version, ours = superlink_version(host, port), _installed("flwr")
    if not version:
        fix = f"another program has port {port} there; give the port that `edgelam server --listen HOST:PORT` printed"
        return _problem("server", f"what answers at {join_address(host, port)} is no Flower SuperLink", fix)
    if version != ours:
        fix = f"the same version on every machine: pip install flwr=={version} here, or =={ours or '...'} there"
        return _problem("server", f"a SuperLink of Flower {version}, here is {ours or 'none'}", fix)
    return _ok("server", f"a SuperLink of Flower {version} at {join_address(host, port)}")


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def superlink_version(host: str, port: int) -> str:
    """Returns the Flower version of the SuperLink that answers there; empty if something else or nothing does."""
    unverified = ssl.create_default_context()  # nothing secret is sent, and the answer is not relied on
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    return _version_over(http.client.HTTPSConnection(host, port, timeout=_HTTP_DEADLINE_S, context=unverified)) or (
        _version_over(http.client.HTTPConnection(host, port, timeout=_HTTP_DEADLINE_S))
    )


def _version_over(connection: http.client.HTTPConnection) -> str:
    try:
        connection.request("GET", "/v1/edgelam/about")
        return str(json.loads(connection.getresponse().read(_MAX_ANSWER_BYTES))["flwr"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return ""
    finally:
        connection.close()


def check_port(port: int = DEFAULT_PORT, host: str = "127.0.0.1") -> Finding:
    """Checks the port that `edgelam server` opens by default; all others are chosen freely."""
    try:
        check_port_free(host, port, "--listen")
        return _ok("port", f"{port} is free for `edgelam server`")
    except EdgelamError:
        version = superlink_version(host, port)
    if version:
        return Finding(
            "port",
            "note",
            f"{port} is taken by a SuperLink of Flower {version}",
            f"check it: --server {join_address(host, port)}",
        )
    fix = f"end what uses it (`ss -ltnp 'sport = :{port}'` names it), or choose another: edgelam server --listen {join_address(host, port + 1)}"
    return _problem("port", f"{port} is in use by another program", fix)


# ---------------------------------------------------------------- memory, disk


def check_memory(free: int | None = None, needed: int = MEMORY_NEEDED_BYTES) -> Finding:
    """Checks free memory, in bytes, against what a node of the demo's model needs."""
    free = memory_free_bytes() if free is None else free
    found = f"{_gib(free)} free"
    if free >= needed:
        return _ok("memory", found)
    fix = (
        "end another program, add swap, raise the container's limit, or take less: a smaller model, model.base = 'int8', "
        "split.checkpointing = true"
    )
    return _problem("memory", f"{found}; a node of the demo's model takes {_gib(needed)}", fix)


def check_heat(now: Heat) -> list[Finding]:
    """Checks whether the processor is slowed down; no finding on a machine that tells neither that nor a temperature."""
    found = "" if now.celsius is None else f"{now.celsius:.0f} °C"
    if not now.slowed:
        return [_ok("heat", f"{found}, not slowed down")] if found else []
    fix = "cool it (a fan, a heat sink, another place), and give a board the power supply that its maker names"
    return [Finding("heat", "note", ", ".join(filter(None, (found, now.slowed))), fix)]


def check_disk(place: str, folder: Path, free: int | None = None, needed: int = DISK_NEEDED_BYTES) -> Finding:
    """Checks the free space, in bytes, where `folder` is; `place` names the folder's purpose."""
    free = disk_free_bytes(folder) if free is None else free
    found = f"{_gib(free)} free in {folder}"
    if free >= needed:
        return _ok(f"disk, {place}", found)
    fix = "remove something there, " + (
        "or set EDGELAM_CACHE to a folder with more room" if place == "cache" else "or work in a folder with more room"
    )
    return _problem(f"disk, {place}", f"{found}; {_gib(needed)} are needed", fix)


def check_cache_writable(folder: Path) -> Finding:
    """Checks the cache by writing a file: permissions look right on a card that has become read-only."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        fix = f"give it to this user (`sudo chown -R $USER {folder}`), or set EDGELAM_CACHE to a folder that can be written"
        return _problem("cache", f"{folder} cannot be written: {error.strerror}", fix)
    return _ok("cache", f"{folder} can be written")


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


# ---------------------------------------------------------------- computing


def check_base(
    base: str,
    problem_of: Callable[[str], str] | None = None,
    find_module: Callable[[str], object] = importlib.util.find_spec,
) -> Finding:
    """Checks a base by running its kernels on a small matrix, forward and backward."""
    if base == "nf4" and problem_of is None and find_module("bitsandbytes") is None:
        fix = "only model.base = 'nf4' needs it: pip install bitsandbytes"
        return Finding("base nf4", "note", "bitsandbytes is not installed", fix)
    if problem_of is None:
        from edgelam_fl.model.bases import base_problem  # brings torch

        problem_of = base_problem
    problem = problem_of(base)
    if not problem:
        return _ok(f"base {base}", "its kernels run")
    package = "bitsandbytes" if base == "nf4" else "torch"
    fix = (
        f"reinstall {package} for this processor (constraints/torch.txt has the builds); until then another model.base"
    )
    return _problem(f"base {base}", problem, fix)


@dataclass(frozen=True)
class Chip:
    """An accelerator that PyTorch finds here: its name on the command line, its driver's name, and each base's problem."""

    name: str
    called: str
    problems: Mapping[str, str]  # by base; empty: its kernels run


def check_chips(
    chips: Sequence[Chip] | None = None, has_nvidia: bool | None = None, torch_version: str = ""
) -> list[Finding]:
    """Checks the accelerators of this machine, by the kernels of each base; and for an NVIDIA GPU that PyTorch was not built for."""
    if chips is None:
        import torch

        chips, torch_version = _chips_here(), torch.__version__
    has_nvidia = any(Path(place).exists() for place in _NVIDIA) if has_nvidia is None else has_nvidia
    findings = [_check_chip(chip) for chip in chips]
    if has_nvidia and not any(chip.name.startswith("cuda") for chip in chips):
        found = f"an NVIDIA GPU is here, and PyTorch {torch_version} cannot use it: nodes compute on the CPU"
        fix = "install a build of torch for its CUDA (on a Jetson, NVIDIA's or the jetson index's wheel for its JetPack: docs/boards/jetson.md)"
        findings.append(Finding("chips", "note", found, fix))
    return findings or [_ok("chips", "the CPU alone")]


_NVIDIA = ("/dev/nvidia0", "/dev/nvhost-gpu", "/etc/nv_tegra_release")  # of a driver; the last two: of a Jetson


def _chips_here() -> list[Chip]:
    from edgelam_fl.model.bases import base_problem
    from edgelam_fl.model.chip import CPU, chip_name, chips_here

    return [
        Chip(str(chip), chip_name(chip), {base: base_problem(base, chip) for base in BASES})
        for chip in chips_here()
        if chip != CPU
    ]


def _check_chip(chip: Chip) -> Finding:
    check, broken = f"chip {chip.name}", {base: problem for base, problem in chip.problems.items() if problem}
    runs = ", ".join(base for base in chip.problems if base not in broken)
    if not broken:
        return _ok(check, f"{chip.called}; the kernels of {runs} run")
    why = "; ".join(f"{base}: {problem}" for base, problem in broken.items())
    if "fp32" in broken:
        fix = "install a build of torch for this chip; until then: edgelam client --device cpu"
        return _problem(check, f"{chip.called}: {why}", fix)
    fix = (
        f"runs with model.base = {' or '.join(broken)} need a build of bitsandbytes for this chip, or --device cpu here"
    )
    return Finding(check, "note", f"{chip.called}; the kernels of {runs} run; {why}", fix)


def check_model(name: str) -> Finding:
    """Checks that a model is on this machine and can be read."""
    try:
        source = find_model(name)
        check_tokens(source)
    except EdgelamError as error:
        fix = f"set model.name to one that is here: {', '.join(BUILT_IN)}, a folder or a .gguf file"
        return _problem("model", str(error), fix)
    return _ok("model", f"{name}: {source.num_layers} layers, {_gib(source.fp32_bytes)} in fp32")


# ---------------------------------------------------------------- showing


def finding_row(finding: Finding) -> Table:
    """Draws one finding as a row, with the fix below what was found; the rows of several are in line."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for width in (7, 18):
        table.add_column(min_width=width, overflow="fold")
    table.add_column(overflow="fold")
    marks = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "problem": "[bold red]problem[/bold red]"}
    found = finding.found if not finding.fix else f"{finding.found}\n-> {finding.fix}"
    table.add_row(marks[finding.state], escape(finding.check), escape(found))
    return table
