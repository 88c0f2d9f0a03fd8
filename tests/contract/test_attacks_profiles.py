"""What hostile nodes say of themselves: refused with one line each, while the run goes on with the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from edgelam_fl.errors import ProtocolError
from edgelam_fl.model.source import ModelSource
from edgelam_fl.names import RESERVED, printable, why_no_name
from edgelam_fl.trust.authority import Authority, issue
from edgelam_fl.trust.identity import DEVICE, HOST
from edgelam_fl.trust.members import MEMBERS, Members
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from server.membership import Owner, owners
from server.profiles import read_profile
from server.roster import Roster
from tests.by_hand import ByHand, FederationByHand
from tests.unit.conftest import flower_identity  # noqa: F401 - a fixture

MARKUP = "<img src=x onerror=alert(1)>"


def answer(data: Any) -> RecordDict:
    return RecordDict({"profile": ConfigRecord({"profile": data})})


def device(**fields: Any) -> pb.Profile:
    given: dict[str, Any] = {"protocol_version": PROTOCOL_VERSION, "name": "b", "role": pb.DEVICE, "examples": 9}
    return pb.Profile(**given | fields)


@pytest.fixture
def run(tiny: ModelSource, tmp_path: Path, flower_identity: None) -> FederationByHand:  # noqa: F811
    return FederationByHand(tiny, tmp_path / "run", "ab", "e", "federation.rounds=1", "strategy.aggregation=fedsa")


def answering(run: FederationByHand, number: int, content: RecordDict) -> None:
    """Has node `number` answer each query with `content`."""
    honest: Callable[[Message], Message] = run.grid._answer
    run.grid._answer = lambda message: (
        Message(content, reply_to=message)
        if message.metadata.dst_node_id == number and "query" in message.content
        else honest(message)
    )


GARBLED = {
    "no record": RecordDict({"x": ConfigRecord({"y": 1})}),
    "another key": RecordDict({"profile": ConfigRecord({"y": 1})}),
    "a text": answer("x"),
    "garbage": answer(b"\xff\xff\xff"),
    "too long": answer(device(problem="A" * (1 << 20)).SerializeToString()),
    "role 9": answer(device(role=9).SerializeToString()),
}


@pytest.mark.parametrize("content", GARBLED.values(), ids=GARBLED)
def test_s12_a_garbled_profile_is_a_refused_node_and_the_run_goes_on(
    run: FederationByHand, content: RecordDict
) -> None:
    answering(run, 2, content)
    run.run()
    (refused,) = run.events("node_refused")
    assert refused["node"] == "a node that has not said its name (number 2)"
    assert len(refused["reason"]) < 200
    assert [device["name"] for done in run.events("round_done") for device in done["devices"]] == ["a", "a"]


NUMBERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "NaN": ("link_up_bps = nan must be 0 to 1e\\+13", {"link_up_bps": math.nan}),
    "infinity": ("link_down_bps = inf", {"link_down_bps": math.inf}),
    "negative": ("round_trip_s = -1 must be 0", {"round_trip_s": -1.0}),
    "negative layer": ("base_seconds = -5", {"base_seconds": {"fp32/fp32": -5.0}}),
    "NaN layer": ("layer_times.seconds = nan", {"layer_times": [pb.LayerTime(tokens=1, seconds={"fp32/fp32": math.nan})]}),
    "memory": ("memory_available_bytes = 1.84467e\\+19", {"memory_available_bytes": 2**64 - 1}),
    "threads": ("cpu_threads", {"cpu_threads": 2**32 - 1}),
    "examples": ("examples = 4.29497e\\+09", {"examples": 2**32 - 1}),
    "many tags": ("tags has 65 entries", {"tags": ["x"] * 65}),
}  # fmt: skip


@pytest.mark.parametrize(("reason", "fields"), NUMBERS.values(), ids=NUMBERS)
def test_s12_numbers_of_a_profile_have_a_range(reason: str, fields: Mapping[str, Any]) -> None:
    with pytest.raises(ProtocolError, match=reason):
        read_profile(answer(device(**fields).SerializeToString()))


WORDS: Mapping[str, Mapping[str, Any]] = {
    "no name": {"name": ""},
    "a way out of the folder": {"name": "../../../tmp/x"},
    "dots": {"name": ".."},
    "1 MB": {"name": "n" * (200 << 10)},
    "markup": {"name": MARKUP},
    "a newline": {"name": "a\nb"},
    "a terminal's escape": {"name": "a\x1b[2J"},
    "letters that look alike": {"name": "аnn"},  # noqa: RUF001 - the attack
    "the caller of a conversation": {"name": "chat"},
    "a folder of a run, in capitals": {"name": "Adapters"},
    "a tag": {"tags": [MARKUP]},
    "a trust": {"trust": MARKUP},
    "a version": {"versions": {"torch": "<script>alert(2)</script>"}},
    "a package": {"versions": {MARKUP: "1"}},
    "a base": {"bases": ["\x1b[2J"]},
    "a codec": {"codecs": ["x" * 1000]},
    "a pair of formats": {"base_seconds": {MARKUP: 1.0}},
}


@pytest.mark.parametrize("fields", WORDS.values(), ids=WORDS)
def test_s5_words_of_a_profile_keep_the_one_pattern(fields: Mapping[str, Any]) -> None:
    with pytest.raises(ProtocolError) as refused:
        read_profile(answer(device(**fields).SerializeToString()))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254:80", "[::ffff:169.254.169.254]:80", "[fe80::1]:80", "2852039166:80", "0xa9fea9fe:80",
        "169.254.43518:80", "169.254.169.254.:80", "0.0.0.0:80", "[::]:80", "224.0.0.1:80", "255.255.255.255:80",
        "unix:/run/docker.sock:1", "dns:///x:1", "host", "host:0", "host:70000", "a b:1", "x" * 300 + ":1",
        "relay:somebody-else", "[fe80::1%eth0]:80",
    ],
)  # fmt: skip
def test_s12_no_node_sends_others_to_such_an_address(address: str) -> None:
    with pytest.raises(ProtocolError, match="its address"):
        read_profile(answer(device(address=address).SerializeToString()))


@pytest.mark.parametrize(
    "address", ["", "127.0.0.1:5000", "10.0.0.2:1", "edge-1.lan:7000", "my_edge:7000", "[2001:db8::1]:7000", "relay:b"]
)
def test_an_honest_address_passes(address: str) -> None:
    assert read_profile(answer(device(address=address).SerializeToString())).address == address


def test_s5_a_name_that_leaves_the_run_folder_writes_nothing(run: FederationByHand, tmp_path: Path) -> None:
    """The name of a device is the name of the folder of its own adapter, with aggregation = "fedsa"."""
    run.nodes["b"].profile.name = "../../TRAVERSED"
    run.run()
    assert not list(tmp_path.rglob("*TRAVERSED*"))
    assert {path.name for path in (tmp_path / "run" / "adapters").iterdir()} == {"a"}
    (refused,) = run.events("node_refused")
    assert refused["node"] == "a node that has not said its name (number 2)"
    assert "its name '../../TRAVERSED' may hold letters" in refused["reason"]


def test_s17_names_that_differ_in_case_alone_are_one_name(run: FederationByHand) -> None:
    run.roster.refresh()
    run.grid.nodes[9] = ByHand(device(name="A"))
    run.roster.refresh()
    assert run.roster.devices() == ["a", "b"]
    assert "this run knows a" in run.roster.problems["A"]


def test_s17_a_node_keeps_its_name(run: FederationByHand) -> None:
    run.roster.refresh()
    run.roster.lose("b")
    run.nodes["b"].profile.name = "somebody"
    run.roster.refresh(ask_lost=True)
    assert run.roster.devices() == ["a"]
    assert run.roster.problems["somebody"].startswith("was b a moment ago")


def test_s17_a_name_belongs_to_a_key(run: FederationByHand) -> None:
    """The first to answer does not own the name of a member with a key."""
    exchange, request = run.rounds._exchange, pb.ProfileRequest(protocol_version=PROTOCOL_VERSION)
    run.nodes["b"].profile.name = "a"
    book = {1: Owner("zoe", pb.DEVICE), 2: Owner("a", pb.DEVICE), 3: Owner("e", pb.EDGE)}
    roster = Roster(exchange, run.folder, request, owner_of=book.get)
    roster.refresh()
    assert roster.devices() == ["a"]
    assert roster.request("a", "train", RecordDict()).node_id == 2
    assert roster.problems == {
        "a": "calls itself a, and its key belongs to zoe; start it with the state folder and name that it joined with"
    }


def test_a_device_cannot_take_part_as_a_host(run: FederationByHand) -> None:
    """The role is the one that the operator invited the node in; a key of nobody takes part in nothing."""
    request = pb.ProfileRequest(protocol_version=PROTOCOL_VERSION)
    book = {1: Owner("a", pb.DEVICE), 3: Owner("e", pb.DEVICE)}
    roster = Roster(run.rounds._exchange, run.folder, request, owner_of=book.get)
    roster.refresh()
    assert (roster.devices(), roster.edges()) == (["a"], [])
    assert roster.problems["b"].startswith("its key belongs to no member of this federation")
    assert roster.problems["e"].startswith("joined as a device (with --data) and takes part as an edge server")


def test_members_are_found_by_the_number_that_flower_gave_them(tmp_path: Path) -> None:
    authority, members = Authority.open(tmp_path), Members(tmp_path)
    for number, (name, role) in enumerate({"ann": DEVICE, "edge-1": HOST}.items(), 7):
        members.add(issue(authority, name, role))
        members.note_registered(members.find(name), number)
    owner_of = owners({MEMBERS: str(tmp_path)})
    assert owner_of is not None
    assert [owner_of(number) for number in (7, 8, 9)] == [Owner("ann", pb.DEVICE), Owner("edge-1", pb.EDGE), None]
    members.revoke("ann")
    assert owner_of(7) is None
    assert owners({}) is None


def test_s12_a_garbled_measurement_changes_nothing(run: FederationByHand) -> None:
    run.roster.refresh()
    answering(run, 2, answer(b"\xff"))
    run.roster.measure_links(["a", "b"])
    assert run.roster.devices() == ["a", "b"]
    assert not run.events("link_measured")


def test_names_of_people_pass() -> None:
    assert [why_no_name(name) for name in ("ann", "pi-3", "Zero.2", "a" * 63)] == [""] * 4
    assert all(why_no_name(name) for name in [*RESERVED, "-x", ".x", "a" * 64])


def test_words_from_elsewhere_are_one_printable_line() -> None:
    assert printable("a\nb\x1b[2J\u202ec") == "a b\\x1b[2J\\u202ec"
    assert len(printable("x" * 10**6)) == 300
