"""`edgelam plan`: profiles from files, and what is printed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgelam_fl.cli import runs as cli
from edgelam_fl.errors import ConfigError, RunFailed
from edgelam_fl.federation.plan_view import ForeseenPlan, plan_of_profiles, plan_view, read_profiles
from edgelam_fl.model.source import ModelSource
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.support import run_config

NODES: list[dict[str, Any]] = [
    {"name": "pi", "role": "device", "base_seconds": {"fp32/fp32": 0.01}, "memory_available_bytes": 2**30},
    {"name": "fast", "role": "edge", "address": "fast:1", "base_seconds": {"fp32/fp32": 1.0}, "tags": ["desk"]},
    {"name": "slow", "role": "edge", "address": "slow:1", "base_seconds": {"fp32/fp32": 3.0}, "of tomorrow": 1},
    {"name": "pi-2", "role": "device", "base_seconds": {"fp32/fp32": 0.01}},
]
ENDS = ("split.front=1", "split.back=1")


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    file = tmp_path / "profiles.json"
    file.write_text(json.dumps([{"findings": [], "profile": node} for node in NODES]), encoding="utf-8")
    return file


def test_profiles_of_the_doctor_and_of_a_run_are_the_same(profiles: Path, tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    joined = [
        {"event": "node_joined", "time": 1.0, **{k: v for k, v in n.items() if k != "name"}, "node": n["name"]}
        for n in NODES
    ]
    events.write_text(
        "".join(json.dumps(line) + "\n" for line in [{"event": "run_started"}, *joined]), encoding="utf-8"
    )
    found = read_profiles(profiles)
    assert found == read_profiles(events)
    assert found[1] == pb.Profile(
        name="fast", role=pb.EDGE, address="fast:1", base_seconds={"fp32/fp32": 1.0}, tags=["desk"]
    )  # fmt: skip


def test_what_the_doctor_measures_is_a_host_where_it_is_said(tmp_path: Path) -> None:
    file = tmp_path / "doctor.json"
    profile = {
        "name": "pi", "memory_free_bytes": 5, "cpu_threads": 4, "disk_free_bytes": 9,
        "layer_seconds": {"256": {"fp32/fp32": 1.0}, "2048": {"fp32/fp32": 9.0}}, "link": None,
    }  # fmt: skip
    file.write_text(json.dumps({"findings": [], "role": "edge", "profile": profile}), encoding="utf-8")
    (found,) = read_profiles(file)
    assert (found.role, found.address, found.memory_available_bytes, found.cpu_threads) == (pb.EDGE, "pi:0", 5, 4)
    assert dict(found.base_seconds) == {"fp32/fp32": 1.0 * 128 / 256}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "holds no profile"),
        ("[1]", "1 is not a profile"),
        ('[{"role": "edge"}]', "it has no name"),
        ("{", "cannot be read"),
        ('[{"name": "a", "role": "toaster"}]', "role = 'toaster'"),
        ('[{"name": "a", "memory_available_bytes": -1}]', "the profile of a cannot be read"),
    ],
)
def test_what_is_no_profile(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "profiles.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        read_profiles(file)


def shown(plan: ForeseenPlan) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(plan_view(plan), soft_wrap=True)
    return console.export_text()


def test_what_the_planner_would_choose(tiny: ModelSource, profiles: Path) -> None:
    plan = plan_of_profiles(run_config(tiny.name, *ENDS, "split.cuts=auto", "split.hosts=auto"), profiles)
    (site,) = plan.placement.sites
    layers = {host.node: host.last - host.first for host in site.hosts}
    assert layers == {"fast": 3, "slow": 1}
    printed = json.loads(json.dumps(plan.to_json()))
    assert (printed["sites"][0]["hosts"][0]["node"], printed["num_layers"]) == (site.hosts[0].node, tiny.num_layers)
    text = shown(plan)
    (picture,) = [line for line in text.splitlines() if "embedding" in line]
    assert picture.startswith("pi, pi-2 [embedding, layer 0] ─▶ ")
    assert picture.rstrip().endswith("─▶ pi, pi-2 [layer 5, head]")
    assert f"{plan.placement.step_s:.3g} s and waits for {site.limit}" in text
    assert "2 layers at its ends" in text
    assert f"not measured for {tiny.name}" in " ".join(text.split())
    assert printed["readable"] == [{"front": 1, "back": 1, "text": None, "labels": None}]


def test_equal_cuts_are_rated_by_the_same_rule(tiny: ModelSource, profiles: Path) -> None:
    equal = plan_of_profiles(run_config(tiny.name, *ENDS, "split.hosts=2"), profiles)
    auto = plan_of_profiles(run_config(tiny.name, *ENDS, "split.cuts=auto", "split.hosts=2"), profiles)
    assert [host.last - host.first for host in equal.placement.sites[0].hosts] == [2, 2]
    assert auto.placement.step_s < equal.placement.step_s


def test_nothing_to_plan(tiny: ModelSource, profiles: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"split.hosts = 0: each device trains the whole model"):
        plan_of_profiles(run_config(tiny.name, "split.hosts=0"), profiles)
    alone = tmp_path / "edges.json"
    alone.write_text(json.dumps(NODES[1:3]), encoding="utf-8")
    with pytest.raises(RunFailed, match="no device is among the nodes"):
        plan_of_profiles(run_config(tiny.name, *ENDS), alone)


def test_the_command_needs_to_know_the_nodes(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="either --profiles FILE or --server HOST:PORT"):
        cli.plan(file)
