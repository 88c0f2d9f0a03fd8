"""What the planner predicts of steps that a benchmark measures, from one run of which it learns the nodes' speeds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

import torch

from benchmarks.compared.load import Load
from benchmarks.compared.shaped import UNSHAPED, Shape
from benchmarks.compared.workers import Step
from edgelam_fl.model.layer_speed import measure_layers
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.facts import ChainCost
from edgelam_fl.plan.footprint import Footprints
from edgelam_fl.plan.instance import InstanceMaker
from edgelam_fl.plan.pieces import choose_pieces
from edgelam_fl.plan.search import cost_of
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.plan.speeds import before_rounds, learned
from edgelam_fl.wire import edgelam_pb2 as pb

HOST = "edge-1"


class Predictions:
    """Steps over one host that holds all the layers that devices do not."""

    def __init__(
        self,
        load: Load,
        profiles: Mapping[str, pb.Profile],
        plans: Mapping[str, pb.Plan],
        reports: Mapping[str, pb.JobReport],
    ) -> None:
        """`plans` and `reports`: of a run with device-1 alone, which speaks for all."""
        self._spec, self._profiles = RunSpec(load.config, load.source), profiles
        self._speeds, _ = learned(self._spec, before_rounds(load.config), {}, plans, reports)
        self._window = plans[HOST].window

    def cost(self, devices: int, tokens: float, shape: Shape = UNSHAPED) -> ChainCost:
        """Returns the cost of a step with so many devices, each behind a link of the shape, if each node has a machine of its own.

        `tokens`: of a row, on average over the steps that are compared with it: other steps have longer or shorter examples.
        """
        names = [f"device-{number}" for number in range(1, devices + 1)]
        of_one = {pair: s for (node, pair), s in self._speeds.position_s.items() if node == names[0]}
        known = {(name, pair): s for name in names for pair, s in of_one.items()}
        speeds = replace(self._speeds, tokens=tokens, position_s={**self._speeds.position_s, **known})
        profiles = [_behind(self._profiles[name], shape) for name in names]
        host = _behind(self._profiles[HOST], Shape(0, shape.round_trip_s))
        host.memory_available_bytes = 0  # unknown: it holds all layers in any case
        maker = InstanceMaker(Footprints(self._spec), speeds, [*profiles, host], self._window)
        found = cost_of(maker.of_site(profiles, [host]), ((HOST, 0),))
        assert found is not None, "one host holds all layers"
        return found


def with_layer_times(source: ModelSource, profiles: Mapping[str, pb.Profile]) -> dict[str, pb.Profile]:
    """Returns profiles with the time of a layer on one thread of this machine, as a node measures it if a planner asks."""
    torch.set_num_threads(1)
    times = measure_layers(source)
    found = {}
    for name, profile in profiles.items():
        found[name] = pb.Profile()
        found[name].CopyFrom(profile)
        for tokens, seconds in times.items():
            found[name].layer_times.add(tokens=tokens, seconds=seconds)
    return found


def cut_by_planner(load: Load, profiles: Mapping[str, pb.Profile], shape: Shape) -> Load:
    """Returns the load with batches cut as the planner chooses for devices behind links of the shape, and a host without limits."""
    spec = RunSpec(load.with_settings("split.micro_batches=auto", "split.window=auto").config, load.source)
    nodes = [
        _behind(profile, Shape(0, shape.round_trip_s) if name == HOST else shape) for name, profile in profiles.items()
    ]
    pieces = choose_pieces(spec, nodes).pieces
    return load.with_settings(f"split.micro_batches={pieces.micro_batches}", f"split.window={pieces.window}")


def tokens_per_row(load: Load, steps: Sequence[Step], devices: int) -> float:
    """Returns the tokens of a row, without padding, in the median of steps that so many devices made."""
    return median(step.tokens for step in steps) / (devices * load.config.step_examples)


def on_this_machine(predicted_s: float, cpu_s: float) -> float:
    """Returns how long a step takes at least if all nodes share this machine's cores; `cpu_s`: the work of all."""
    return max(predicted_s, cpu_s / (os.cpu_count() or 1))


def _behind(profile: pb.Profile, shape: Shape) -> pb.Profile:
    shaped = pb.Profile()
    shaped.CopyFrom(profile)
    shaped.link_up_bps = shaped.link_down_bps = shape.mbps * 1e6
    shaped.round_trip_s = shape.round_trip_s
    return shaped
