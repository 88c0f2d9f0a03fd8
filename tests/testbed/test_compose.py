"""The testbed's file and its Compose file; and, where there is a Docker engine, a run on three devices in containers."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from edgelam_fl.errors import ConfigError
from testbed.__main__ import IMAGE, memory_table, new_folder, started, train, write_testbed
from testbed.compose import SERVER, compose_file
from testbed.engine import ROOT, build, engine_problem
from testbed.shapes import MOST_NODES, read_testbed

FILE = ROOT / "docker" / "devices.toml"
SMALL = """
server = "box"
shapes = { box = { memory = "512 MiB", cpus = 0.1 }, slow = { memory = "1 GiB", cpus = 0.2, up = "5 Mbit/s", down = "20 Mbit/s" } }
nodes = [{ shape = "box", role = "edge", name = "edge-1" }, { shape = "slow" }, { shape = "slow" }]
"""
MIB = 2**20
# User and effective capabilities of the stage host's process.
RIGHTS = """for p in /proc/[0-9]*; do grep -qs node.daemon $p/cmdline && ! grep -qs 'sh' $p/comm &&
  awk '/^Uid/ { print $2 } /^CapEff/ { print $2 }' $p/status; done; true"""


def written(folder: Path, text: str) -> Path:
    file = folder / "devices.toml"
    file.write_text(text, encoding="utf-8")
    return file


def services(folder: Path, devices: int | None = None) -> dict:
    testbed = read_testbed(written(folder, SMALL), devices, cores=64)
    data = {node.name: folder / f"{node.name}.jsonl" for node in testbed.devices}
    return compose_file(testbed, data, IMAGE)["services"]


# ---------------------------------------------------------------- what is written


def test_the_shapes_become_limits_without_swap(tmp_path: Path) -> None:
    found = services(tmp_path)
    assert list(found) == ["server", "edge-1", "slow-1", "slow-2"]
    assert {name: service["mem_limit"] for name, service in found.items()} == {
        "server": 512 * MIB, "edge-1": 512 * MIB, "slow-1": 1024 * MIB, "slow-2": 1024 * MIB,
    }  # fmt: skip
    assert all(service["memswap_limit"] == service["mem_limit"] for service in found.values())
    assert [service["cpu_quota"] / service["cpu_period"] for service in found.values()] == [0.1, 0.1, 0.2, 0.2]


def test_a_link_is_limited_from_inside_and_only_there_are_rights(tmp_path: Path) -> None:
    found = services(tmp_path)
    shaped = found["slow-1"]
    assert (shaped["environment"]["EDGELAM_UP_KBIT"], shaped["environment"]["EDGELAM_DOWN_KBIT"]) == ("5000", "20000")
    assert (shaped["user"], shaped["cap_add"]) == ("root", ["NET_ADMIN"])
    for plain in (found["server"], found["edge-1"]):
        assert not {"user", "cap_add"} & set(plain)
        assert "EDGELAM_UP_KBIT" not in plain["environment"]


def test_each_device_has_its_own_data_and_one_thread(tmp_path: Path) -> None:
    found = services(tmp_path)
    assert found["slow-2"]["volumes"] == [f"{tmp_path}/slow-2.jsonl:/data/examples.jsonl:ro"]
    assert "volumes" not in found["edge-1"]
    assert "--data" not in found["edge-1"]["command"]
    for name in ("edge-1", "slow-1", "slow-2"):
        command = found[name]["command"]
        assert command[command.index("--threads") + 1] == "1"
        assert found[name]["environment"]["OMP_NUM_THREADS"] == "1"
        assert found[name]["depends_on"] == {"server": {"condition": "service_healthy"}}


def test_each_node_joins_by_an_invite_of_its_own_and_nothing_is_plain_text(tmp_path: Path) -> None:
    found = services(tmp_path)
    commands = {name: service["command"] for name, service in found.items()}
    texts = {name: command[command.index("--join") + 1] for name, command in commands.items() if name != SERVER}
    assert texts == {"edge-1": "${JOIN_EDGE_1:-}", "slow-1": "${JOIN_SLOW_1:-}", "slow-2": "${JOIN_SLOW_2:-}"}
    assert commands[SERVER][commands[SERVER].index("--address") + 1] == SERVER
    assert not any("--insecure" in command for command in commands.values())


@pytest.mark.parametrize("devices", [1, 5, MOST_NODES])
def test_so_many_devices_of_the_shapes_in_turn(tmp_path: Path, devices: int) -> None:
    assert len(services(tmp_path, devices)) == 2 + devices


@pytest.mark.parametrize("server_alone", [False, True])
def test_who_reads_what_is_mounted(tmp_path: Path, server_alone: bool) -> None:
    testbed = read_testbed(written(tmp_path, SMALL), cores=64)
    data = {node.name: tmp_path / "examples.jsonl" for node in testbed.devices}
    content = compose_file(testbed, data, IMAGE, {"/here": "/models"}, server_alone=server_alone)["services"]
    readers = {name for name, service in content.items() if "/here:/models:ro" in service.get("volumes", [])}
    assert readers == ({SERVER} if server_alone else set(content))


def test_the_files_that_come_with_it_are_sound(tmp_path: Path) -> None:
    testbed = read_testbed(FILE, cores=2)
    assert [node.name for node in testbed.devices] == ["zero-1", "pi4-1", "pi5-1"]
    zero = testbed.shapes["zero"]
    assert (zero.memory_bytes, zero.cpus, zero.up_kbit, zero.down_kbit) == (1024 * MIB, 0.2, 5000, 5000)
    content = json.loads(write_testbed(testbed, new_folder(tmp_path / "new"), IMAGE).read_text(encoding="utf-8"))
    for service in content["services"].values():
        for volume in service.get("volumes", []):
            assert Path(volume.partition(":")[0]).is_file()
    assert tomllib.loads((ROOT / "docker" / "run.toml").read_text(encoding="utf-8"))


def test_the_build_sends_little_and_the_image_is_no_roots() -> None:
    kept = re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(encoding="utf-8"), flags=re.MULTILINE)
    files = [file for pattern in kept for found in ROOT.glob(pattern) for file in (found, *found.rglob("*"))]
    sent = sum(file.stat().st_size for file in files if file.is_file() and "__pycache__" not in file.parts)
    assert 0 < sent < 5_000_000
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"^USER (\S+)", dockerfile, flags=re.MULTILINE) == ["edgelam"]
    assert "HEALTHCHECK" in dockerfile


# ---------------------------------------------------------------- bad input: one message each


@pytest.mark.parametrize("devices", [0, 500])
def test_none_or_too_many_devices(tmp_path: Path, devices: int) -> None:
    with pytest.raises(ConfigError, match=rf"^a testbed has 1 to {MOST_NODES} devices, got {devices} "):
        read_testbed(written(tmp_path, SMALL), devices)


BAD = {
    "an unknown shape": (
        ('{ shape = "slow" }]', '{ shape = "slwo" }]'),
        "shape 'slwo' is unknown: did you mean 'slow'",
    ),
    "one name twice": (('{ shape = "slow" }]', '{ shape = "slow", name = "slow-1" }]'), "2 nodes are named 'slow-1'"),
    "no host name": (('"edge-1"', '"Edge 1"'), "'Edge 1' must be a host name"),
    "the server's name": (('"edge-1"', '"server"'), "not 'server'"),
    "no device": ((', { shape = "slow" }, { shape = "slow" }]', "]"), "got 0"),
    "no size": (('"1 GiB"', '"1 GB"'), "memory = '1 GB' must be a size"),
    "no rate": (('"5 Mbit/s"', '"5 mbps"'), "up = '5 mbps' must be a rate"),
    "an unknown key": (("cpus = 0.1", "cpu = 0.1"), "unknown key shapes.box.cpu"),
    "no TOML": (("nodes =", "nodes"), "is not TOML"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, kind: str) -> None:
    (right, wrong), message = BAD[kind]
    assert SMALL.count(right) == 1
    with pytest.raises(ConfigError) as caught:
        read_testbed(written(tmp_path, SMALL.replace(right, wrong)))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_timed_testbed_stays_within_the_machine(tmp_path: Path) -> None:
    asked = 0.1 + 0.1 + 2 * 0.2
    with pytest.raises(ConfigError, match=rf"ask for {asked:.2f} CPUs, but a timed testbed may have 0\.45 of"):
        read_testbed(written(tmp_path, SMALL), cores=0.5)  # type: ignore[arg-type]
    assert read_testbed(written(tmp_path, "timed = false\n" + SMALL), cores=0.5)  # type: ignore[arg-type]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    written(tmp_path, SMALL)
    with pytest.raises(ConfigError, match="exists; choose another"):
        new_folder(tmp_path)


# ---------------------------------------------------------------- the real thing


@pytest.mark.processes
@pytest.mark.real_model
@pytest.mark.timeout(1800)
def test_three_devices_in_containers_train_and_leave_a_report(tmp_path: Path) -> None:
    problem = engine_problem()
    if problem:
        pytest.skip(f"no Docker engine here: {problem}")
    build(IMAGE)
    testbed = read_testbed(FILE, cores=64)
    folder = new_folder(tmp_path / "run")
    with started(testbed, folder, "edgelam-testbed-test", Console(), lend=True) as containers:  # all nodes serve then
        nodes = [node.name for node in testbed.nodes]
        for name in nodes:
            rights = containers.ask(name, RIGHTS).split()
            assert rights == ["1000", "0000000000000000"], (name, rights)
        train(
            containers,
            testbed,
            folder,
            ROOT / "docker" / "run.toml",
            ["federation.rounds=1", "federation.local_steps=1"],
        )
        memory_table(containers, testbed)
        kills = {name: containers.memory_kills(name) for name in nodes}
    assert kills == dict.fromkeys(nodes, 0)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["state"] == "done"
    assert [device["name"] for device in summary["devices"]] == sorted(node.name for node in testbed.devices)
    assert summary["devices"]
    assert all(device["perplexity_after"] < device["perplexity_before"] for device in summary["devices"])
    assert (folder / "report.html").stat().st_size > 0
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
