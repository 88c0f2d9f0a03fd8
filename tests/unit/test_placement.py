"""Makes layouts from profiles with split.cuts = "auto"; the tiny model has 6 layers, of which hosts get 2 to 4."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, DoesNotFit, RunFailed
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.memory import unit_bytes, weights_bytes
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.bases import host_pairs
from edgelam_fl.plan.footprint import GROWTH_BYTES, IDLE_BYTES, LEARNING_BYTES, Footprints
from edgelam_fl.plan.instance import InstanceMaker
from edgelam_fl.plan.layout import Layout
from edgelam_fl.plan.placement import Placement
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.plan.speeds import before_rounds, layer_s, measured_layer_s, tokens_per_row
from edgelam_fl.wire import edgelam_pb2 as pb
from server.checks import check_config
from tests.support import run_config

AUTO = ("split.cuts=auto", "split.hosts=auto", "split.front=1", "split.back=1")
GIB = 2**30


def edge(name: str, seconds: float = 1.0, *, free: int = GIB, pair: str = "fp32/fp32") -> pb.Profile:
    return pb.Profile(
        name=name, role=pb.EDGE, address=f"{name}:1", memory_available_bytes=free, base_seconds={pair: seconds}
    )  # fmt: skip


def device(name: str, seconds: float = 0.01, free: int = GIB) -> pb.Profile:
    return pb.Profile(name=name, role=pb.DEVICE, memory_available_bytes=free, base_seconds={"fp32/fp32": seconds})


class Placed:
    def __init__(self, source: ModelSource, *overrides: str) -> None:
        self.events: list[Any] = []
        self.config: RunConfig = run_config(source.name, *AUTO, *overrides)
        self.placement = Placement(RunSpec(self.config, source), self.events.append)
        self.devices = [device("d1"), device("d2")]

    def layout(self, *hosts: pb.Profile) -> Layout:
        return self.placement.layout(len(self.events) + 1, self.devices, hosts)

    def held(self, *hosts: pb.Profile) -> dict[str, int]:
        (site,) = self.layout(*hosts).sites
        return {host.name: host.last - host.first for host in site.hosts}


def test_cuts_follow_what_nodes_measured(tiny: ModelSource) -> None:
    assert Placed(tiny).held(edge("a"), edge("b")) == {"a": 2, "b": 2}
    assert Placed(tiny).held(edge("a"), edge("b", 3.0)) == {"a": 3, "b": 1}
    assert Placed(tiny).held(edge("a"), edge("b", 100.0)) == {"a": 4}


def test_a_number_of_hosts_is_kept(tiny: ModelSource) -> None:
    assert Placed(tiny, "split.hosts=2").held(edge("a"), edge("b", 100.0), edge("c", 200.0)) == {"a": 3, "b": 1}
    with pytest.raises(
        RunFailed, match=r"a site needs 2 hosts \(split.hosts\), and only 1 of the nodes can be one: a "
    ):
        Placed(tiny, "split.hosts=2").layout(edge("a"))


def test_routes_and_the_event_say_the_same(tiny: ModelSource) -> None:
    placed = Placed(tiny)
    layout = placed.layout(edge("a"), edge("b", 3.0))
    (event,) = placed.events
    (site,) = event.sites
    told = [(host.node, host.first, host.last) for host in site.hosts]
    assert told == [(hop.node, hop.first, hop.last) for hop in layout.routes["d1"].hops]
    assert layout.routes["d2"].hops[0].address == f"{told[0][0]}:1"
    assert (event.round, event.changed, event.reason) == (1, True, "the first plan")
    assert layout.bases == {"a": ("fp32", "fp32"), "b": ("fp32", "fp32")}


def test_sites_share_out_hosts_by_speed_and_devices_by_name(tiny: ModelSource) -> None:
    layout = Placed(tiny, "split.sites=2").layout(edge("a", 2.5), edge("b", 1.0), edge("c", 2.0))
    assert [site.members for site in layout.sites] == [("d1",), ("d2",)]
    assert [{host.name for host in site.hosts} for site in layout.sites] == [{"b"}, {"a", "c"}]


def test_nodes_that_measured_nothing_are_as_slow_as_the_slowest(tiny: ModelSource) -> None:
    unknown = pb.Profile(name="u", role=pb.EDGE, address="u:1")
    assert Placed(tiny).held(edge("a"), edge("b", 3.0), unknown) == Placed(tiny).held(
        edge("a"), edge("b", 3.0), edge("u", 3.0)
    )
    assert sum(Placed(tiny).held(unknown).values()) == 4


def test_the_fastest_measured_base_that_fits_is_settled_in_the_layout(tiny: ModelSource) -> None:
    both = edge("a", 1.0)
    both.base_seconds["int8/bf16"] = 0.5
    both.base_seconds["gold/fp32"] = 0.1
    placed = Placed(tiny, "model.base=auto")
    assert host_pairs(placed.config, both) == ["int8/bf16", "fp32/fp32"]
    assert placed.layout(both).bases == {"a": ("int8", "bf16")}
    assert host_pairs(run_config("x", "model.base=auto", "model.compute=fp32"), both) == ["fp32/fp32"]


def test_a_whole_layer_of_similar_size_counts_before_matrices(tiny: ModelSource) -> None:
    spec = RunSpec(run_config(tiny.name), tiny)
    speeds = before_rounds(spec.config)
    positions = 2 * 128
    times = [SimpleNamespace(tokens=tokens, seconds={"fp32/fp32": s}) for tokens, s in ((200, 3.0), (512, 50.0))]
    whole: Any = SimpleNamespace(name="n", base_seconds={"fp32/fp32": 1.0}, layer_times=times)
    assert layer_s(spec, speeds, whole, "fp32/fp32", []) == pytest.approx(3.0 * positions / 200)
    assert layer_s(spec, speeds, edge("n"), "fp32/fp32", []) == pytest.approx(1.0 * positions / 128)


# ---------------------------------------------------------------- memory


def test_a_hosts_memory_is_what_the_library_computes(tiny: ModelSource) -> None:
    placed = Placed(tiny, "split.window=2")
    placed.layout(edge("a"))
    (host,) = placed.events[0].sites[0].hosts
    units = unit_bytes(tiny.config, 4, 2, 128, 4)
    adapters = 4 * 8 * ((64 + 64) + (64 + 32))  # of queries and values, with two groups of keys
    kept = adapters * (4 + LEARNING_BYTES * 2)
    process = IDLE_BYTES + GROWTH_BYTES
    assert host.memory_bytes == process + weights_bytes(tiny, [Span(1, 5)], "fp32") + kept + 2 * units  # in flight


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_footprint_is_unit_bytes_for_any_number_of_layers(tiny: ModelSource, checkpointing: bool) -> None:
    config = run_config(tiny.name, f"split.checkpointing={str(checkpointing).lower()}")
    footprint = Footprints(RunSpec(config, tiny)).of_host("fp32/fp32", devices=1, window=3)
    for layers in (1, 2, 5):
        unit = unit_bytes(tiny.config, layers, 2, 128, 4, checkpointing=checkpointing)
        assert footprint.unit_bytes + layers * footprint.unit_layer_bytes == 3 * unit


def test_less_memory_means_fewer_layers_then_a_smaller_window_then_a_message(tiny: ModelSource) -> None:
    free = GROWTH_BYTES + 10_000_000
    placed = Placed(tiny)
    assert placed.held(edge("a", free=free), edge("b", 3.0)) == {"a": 2, "b": 2}
    assert placed.events[0].sites[0].memory_limit.startswith("memory of a: with more, a step would take ")
    assert placed.held(edge("a", free=free)) == {"a": 4}
    assert [event.window for event in placed.events] == [2, 1]


def test_the_message_names_changes_that_would_fit(tiny: ModelSource) -> None:
    small = edge("a", free=GROWTH_BYTES + 3_500_000)
    with pytest.raises(DoesNotFit) as caught:
        Placed(tiny).layout(small)
    words = str(caught.value)
    assert words.startswith("no split fits: the hosts have to hold 4 layers (1 to 5) and have memory for ")
    assert "It fits with " in words
    assert "task.max_tokens = " in words
    assert "more hosts like a" in words
    assert caught.value.missing_bytes > 0


def test_the_message_advises_a_small_device_to_keep_fewer_layers(tiny: ModelSource) -> None:
    placed = Placed(tiny, "split.front=2", "split.back=2")
    devices, hosts = [device("d1")], [edge("a")]
    maker = InstanceMaker(
        Footprints(RunSpec(placed.config, tiny)), before_rounds(placed.config), [*devices, *hosts], window=1
    )
    need = maker.of_site(devices, hosts).devices[0].node.ends_bytes
    placed.devices = [device("d1", free=GROWTH_BYTES + need - 10_000)]
    with pytest.raises(
        DoesNotFit, match=r"device d1 keeps layers 0 to 2 .* It fits with split.front = 1 and split.back = 1"
    ):
        placed.layout(edge("a"))


# ---------------------------------------------------------------- from round to round


def report(plan: pb.Plan, layer_s: float, units: int = 4) -> pb.JobReport:
    """Makes the report of a host that took `layer_s` seconds per layer for each unit of its devices."""
    found = pb.JobReport(node=plan.node, role=pb.EDGE)
    layers = plan.hosted.last - plan.hosted.first
    for number in range(units):
        for kind, part in (("forward", 1 / 3), ("backward", 2 / 3)):
            found.timeline.add(
                kind=kind, role="host", micro_batch=number, peer="d1", seconds=part * layer_s * layers,
            )  # fmt: skip
    return found


def host_plan(layout: Layout, name: str) -> pb.Plan:
    plan = pb.Plan(
        node=name, serves=layout.routes.values(), model=pb.ModelRef(base="fp32", compute="float32", num_layers=6)
    )
    (hop,) = [hop for hop in layout.routes["d1"].hops if hop.node == name]
    plan.hosted.first, plan.hosted.last = hop.first, hop.last
    return plan


def test_a_host_that_slows_down_gives_layers_away(tiny: ModelSource) -> None:
    placed, hosts = Placed(tiny), [edge("a"), edge("b"), edge("c", 30.0)]
    layout = placed.layout(*hosts)
    plans = {name: host_plan(layout, name) for name in "ab"}
    placed.placement.observe(plans, {"a": report(plans["a"], 1.0), "b": report(plans["b"], 8.0)})
    assert {name: last - first for name, first, last in _ranges(placed.layout(*hosts))} == {"a": 4}
    last = placed.events[-1]
    assert last.changed
    assert last.reason.endswith("faster than the old plan")
    assert any(text.startswith("b took ") for text in last.measured)


def test_small_differences_change_nothing(tiny: ModelSource) -> None:
    placed, hosts = Placed(tiny), [edge("a"), edge("b")]
    first = placed.layout(*hosts)
    assert _ranges(placed.layout(*hosts)) == _ranges(first)
    assert (placed.events[-1].changed, placed.events[-1].reason) == (False, "nothing has changed")
    plans = {name: host_plan(first, name) for name in "ab"}
    placed.placement.observe(plans, {name: report(plan, 2.0 if name == "a" else 2.1) for name, plan in plans.items()})
    assert _ranges(placed.layout(*hosts)) == _ranges(first)
    assert (placed.events[-1].changed, placed.events[-1].measured) == (False, ())


def test_a_link_that_passed_the_relay_counts_in_the_next_plan(tiny: ModelSource) -> None:
    placed, hosts = Placed(tiny, "split.hosts=1", "wire.capacity=1 kbit/s"), [edge("a"), edge("b")]
    (held,) = _ranges(first := placed.layout(*hosts))
    taken, other = held[0], {"a": "b", "b": "a"}[held[0]]
    plan = pb.Plan(node="d1", labels="device", routes=[first.routes["d1"]])
    round_ = pb.JobReport(node="d1", bytes=[pb.KindBytes(link=f"{end} {taken} by relay") for end in ("entry", "exit")])
    placed.placement.observe({"d1": plan}, {"d1": round_})
    assert placed.held(*hosts) == {other: 4}
    assert placed.events[-1].measured == (f"d1 reaches {taken} through the server's relay alone",)

    for count in round_.bytes:
        count.link = count.link.removesuffix(" by relay")
    placed.placement.observe({"d1": plan}, {"d1": round_})
    placed.layout(*hosts)
    assert placed.events[-1].measured == (f"d1 reaches {taken} without the relay again",)


def test_a_host_that_computes_several_units_at_once_takes_its_share_of_their_time_for_each(tiny: ModelSource) -> None:
    placed = Placed(tiny)
    plan = host_plan(placed.layout(edge("a"), edge("b")), "a")
    assert measured_layer_s(RunSpec(placed.config, tiny), plan, report(plan, 1.0), workers=2) == pytest.approx(0.5)


def test_the_first_units_of_a_round_count_as_the_others(tiny: ModelSource) -> None:
    placed = Placed(tiny)
    plan = host_plan(placed.layout(edge("a"), edge("b")), "a")
    slow_at_first = report(plan, 1.0, units=7)
    for interval in slow_at_first.timeline[:4]:
        interval.seconds *= 3
    assert measured_layer_s(RunSpec(placed.config, tiny), plan, slow_at_first) == pytest.approx(1.0)


def test_links_are_measured_again_once_if_layers_do_not_explain_the_steps(tiny: ModelSource) -> None:
    placed, hosts, asked = Placed(tiny), [edge("a"), edge("b")], list[str]()

    def round_takes(times_as_long: float, *, then: float | None = None) -> str:
        """Returns what the next plan says it learned; `then`: the rate of d1's link when measured again, in bit/s."""

        def measure() -> None:
            asked.append("asked")
            placed.devices[0].link_up_bps = placed.devices[0].link_down_bps = then or 0.0

        placed.layout(*hosts)
        steps = [pb.StepReport(counted=True, seconds=times_as_long * placed.events[-1].step_s * k) for k in (3, 1, 1)]
        placed.placement.observe({"d1": pb.Plan(batch_size=1)}, {"d1": pb.JobReport(steps=steps)})
        placed.placement.check_links(placed.devices, hosts, {}, measure)
        placed.placement.check_links(placed.devices, hosts, {}, lambda: pytest.fail("a round is looked at once"))
        placed.layout(*hosts)
        return "".join(placed.events[-1].measured)

    assert (round_takes(1.4), asked) == ("", [])
    assert round_takes(4.0).startswith("a step took 4.0 times as long as predicted, so links were")
    assert len(asked) == 1, "what no link explains is usual from now on"
    assert (round_takes(4.0), len(asked)) == ("", 1)
    assert (round_takes(1.0), len(asked)) == ("", 1)
    before_s = placed.events[-1].step_s
    assert round_takes(4.0, then=8e3)
    assert placed.events[-1].step_s > before_s, "the link that was found is planned with"


def test_links_are_not_measured_for_less_than_measuring_takes(tiny: ModelSource) -> None:
    placed, hosts = Placed(tiny), [edge("a", 1e-6), edge("b", 1e-6)]
    placed.layout(*hosts)
    steps = [pb.StepReport(counted=True, seconds=0.01)]
    placed.placement.observe({"d1": pb.Plan(batch_size=1)}, {"d1": pb.JobReport(steps=steps)})
    placed.placement.check_links(placed.devices, hosts, {}, lambda: pytest.fail("nothing to find"))


def test_hosts_that_come_and_go(tiny: ModelSource) -> None:
    placed = Placed(tiny)
    assert placed.held(edge("a")) == {"a": 4}
    assert placed.held(edge("a"), edge("b")) == {"a": 2, "b": 2}
    assert placed.events[-1].reason.endswith("faster than the old plan")
    assert placed.held(edge("b")) == {"b": 4}
    assert placed.events[-1].reason == "the old plan is no longer possible"


def test_the_length_of_examples_is_what_was_trained() -> None:
    reply = pb.JobReport(tokens_trained=240)
    for _ in range(3):
        reply.steps.add(counted=True)
    assert tokens_per_row({"d": pb.Plan(batch_size=4)}, {"d": reply}) == 240 / (3 * 4)
    assert tokens_per_row({"d": pb.Plan(batch_size=4)}, {"d": pb.JobReport()}) == 0


def _ranges(layout: Layout) -> list[tuple[str, int, int]]:
    return [(host.name, host.first, host.last) for site in layout.sites for host in site.hosts]


# ---------------------------------------------------------------- the run file


def test_hosts_are_chosen_only_together_with_cuts(tiny: ModelSource) -> None:
    with pytest.raises(ConfigError, match=r"split.hosts = 'auto' cannot be combined with split.cuts = 'equal'"):
        check_config(run_config(tiny.name, "split.hosts=auto"))
    assert check_config(run_config(tiny.name, *AUTO)).source.digest == tiny.digest


@pytest.mark.parametrize("value", ["many", "-1", "65", "true", "1.5"])
def test_invalid_numbers_of_hosts(value: str) -> None:
    with pytest.raises(ConfigError, match=r"split.hosts = .* must be 0 to 64, or 'auto'"):
        run_config("x", f"split.hosts={value}")


def test_a_device_that_hosts_has_its_own_work_too(tiny: ModelSource) -> None:
    """Compares two equally fast hosts: the one that is also a device gets fewer layers."""
    busy = edge("d1", 1.0)
    busy.role = pb.DEVICE
    placed = Placed(tiny, "split.host_on=any", "split.micro_batches=4")
    placed.devices = [busy, device("d2")]
    held = placed.held(edge("a", 1.0), busy)
    assert held.get("d1", 0) < held["a"]
