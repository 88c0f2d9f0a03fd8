"""Clipping and noise where the training happens: sums of a host's steps, updates of devices, and the plans that ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.source import ModelSource
from edgelam_fl.node import held
from edgelam_fl.plan.making import RoundFacts, RoundPrivacy
from edgelam_fl.plan.reading import spans_of
from edgelam_fl.split import host
from edgelam_fl.split.private import PrivateSum, private_update
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.fleet import Fleet, check_done, memory_fleet, relative_distance, same_bits
from tests.support import run_config

CLIP, SIGMA, DEVICES = 2.0, 3.0, 50.0
DRAWS = 10_000
WRONG = 0.05  # a deviation that is wrong by this share fails; the tolerance is half of it, and 3.5 deviations of the estimate


def summing(*, clip: float = CLIP, noise: float = 0.0, devices: float = 1.0, seed: int = 0) -> PrivateSum:
    privacy = pb.Privacy(step_clip=clip, step_noise=noise, step_devices=devices)
    return PrivateSum(privacy, np.random.default_rng(seed))


def of_norm(norm: float, seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Returns random tensors that together have this norm."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [norm / length(drawn) * tensor for tensor in drawn]


def length(tensors: list[torch.Tensor]) -> float:
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


# ---------------------------------------------------------------- the sum of a host's step

SHAPES = (4, 3), (7,)
PARAMETERS = [torch.zeros(shape) for shape in SHAPES]


@pytest.mark.parametrize("times", [0.5, 1.0, 100.0])
def test_one_device_moves_the_sum_by_the_bound_at_most(times: float) -> None:
    small, other = of_norm(0.3 * CLIP, 1, *SHAPES), of_norm(times * CLIP, 2, *SHAPES)
    sums = summing()
    without, together = sums.of([small], PARAMETERS), sums.of([small, other], PARAMETERS)
    moved = [b - a for a, b in zip(without, together, strict=True)]
    assert length(moved) == pytest.approx(min(1.0, times) * CLIP, rel=1e-5)
    cosine = sum(float((a * b).sum()) for a, b in zip(moved, other, strict=True)) / length(moved) / length(other)
    assert cosine == pytest.approx(1.0), "a bound on each tensor alone would turn the gradient"
    assert (sums.measured, sums.clipped) == (3, int(times > 1))


def test_the_divisor_is_a_constant_and_who_is_missing_adds_zeros() -> None:
    one = of_norm(1.0, 1, *SHAPES)
    missing: list[list[list[torch.Tensor | None]]] = [[], [[]], [[None, None]]]
    for others in missing:
        got = summing(devices=DEVICES).of([one, *others], PARAMETERS)
        assert all(torch.allclose(a, b / DEVICES) for a, b in zip(got, one, strict=True))
    assert not any(tensor.any() for tensor in summing().of([], PARAMETERS))


def test_a_layer_that_some_devices_cross_is_not_scaled_by_counts() -> None:
    first, second = of_norm(1.0, 1, *SHAPES), of_norm(1.0, 2, *SHAPES)
    got = summing(devices=2).of([first, [second[0], None]], PARAMETERS)
    assert torch.allclose(got[0], (first[0] + second[0]) / 2)
    assert torch.allclose(got[1], first[1] / 2)


def of_a_sum(*gradients: list[torch.Tensor]) -> tuple[np.ndarray, float]:
    """Returns the noise on each number of one step, and the deviation that it must have."""
    parameters = [torch.zeros(DRAWS // 2), torch.zeros(DRAWS // 4, 2)]
    clean, noisy = (summing(noise=noise, devices=DEVICES).of(gradients, parameters) for noise in (0.0, SIGMA))
    return torch.cat([(b - a).flatten() for a, b in zip(clean, noisy, strict=True)]).numpy(), SIGMA / DEVICES


def of_many_steps() -> tuple[np.ndarray, float]:
    one, sums = [torch.zeros(())], summing(noise=SIGMA, devices=DEVICES)
    return np.array([sums.of([], one)[0] for _ in range(DRAWS)]), SIGMA / DEVICES


def of_an_update() -> tuple[np.ndarray, float]:
    start = {"a": np.ones((DRAWS // 2,), np.float32), "b": np.ones((DRAWS // 4, 2), np.float32)}
    trained = {name: array + np.float32(0.5) for name, array in start.items()}
    clean, noisy = (
        private_update(start, trained, pb.Privacy(update_clip=CLIP, update_noise=noise), np.random.default_rng(1))[0]
        for noise in (0.0, SIGMA)
    )
    return np.concatenate([(noisy[name] - clean[name]).ravel() for name in start]), SIGMA


NOISY: dict[str, Callable[[], tuple[np.ndarray, float]]] = {
    "a step that counts nobody": of_a_sum,
    "a step": lambda: of_a_sum(of_norm(9 * CLIP, 1, (DRAWS // 2,), (DRAWS // 4, 2))),
    "one number over many steps": of_many_steps,
    "an update": of_an_update,
}


def assert_is_noise(draws: np.ndarray, sigma: float) -> None:
    assert len(draws) == DRAWS
    assert draws.std() == pytest.approx(sigma, rel=WRONG / 2)
    assert abs(draws.mean()) < 3.5 * sigma / DRAWS**0.5
    assert np.mean(np.abs(draws) < sigma) == pytest.approx(0.6827, abs=0.02)  # of a normal distribution
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.05


@pytest.mark.parametrize("what", NOISY)
def test_the_noise_has_the_deviation_that_the_plan_says(what: str) -> None:
    draws, sigma = NOISY[what]()
    assert_is_noise(draws, sigma)
    for wrong in (1 - WRONG, 1 + WRONG):
        with pytest.raises(AssertionError):
            assert_is_noise(wrong * draws, sigma)


def test_noise_does_not_follow_from_the_runs_seed(tiny: ModelSource, data_files: list[Path]) -> None:
    """Everybody knows the seed: two runs that are equal in all else differ by their noise."""
    results = [run(tiny, data_files[:1], RoundPrivacy(1.0, 1.0, 1), "lora.train=hosts", steps=1)[0] for _ in range(2)]
    assert results[0]
    assert not any(np.array_equal(results[0][name], results[1][name]) for name in results[0])


# ---------------------------------------------------------------- rounds over a fleet


def run(
    source: ModelSource, files: list[Path], privacy: RoundPrivacy | None, *overrides: str, steps: int = 2
) -> tuple[adapters.Adapter, dict[str, pb.JobReport]]:
    """Runs a round; returns all that was trained, by "source/tensor", and the reports."""
    config = run_config(source.name, *overrides)
    start = adapters.initial_adapter(source, config.lora.targets, config.lora.rank, config.run.seed)
    with memory_fleet(source, config, files) as fleet:
        fleet.privacy = privacy
        reports = fleet.run(start, steps)
    check_done(reports)
    parts = [part for report in reports.values() for part in report.contributions]
    assert privacy is None or {part.weight for part in parts} == {1.0}
    return {
        f"{part.source}/{name}": array for part in parts for name, array in adapters.from_bytes(part.adapter).items()
    }, reports


WIDE = RoundPrivacy(clip=1e9, noise=0.0, devices=2)


@pytest.mark.parametrize(("mode", "most"), [("joint", 1e-5), ("sequential", 0.0), ("copies", 0.0)])
def test_without_noise_and_with_a_wide_bound_the_steps_are_those_of_always(
    tiny: ModelSource, data_files: list[Path], mode: str, most: float
) -> None:
    """Weighted by examples, all devices count the same, and the constant is their number."""
    same = ("split.hosts=2", f"split.host_mode={mode}", "task.weighting=examples", "split.front=1", "split.back=1")
    expected, _ = run(tiny, data_files[:2], None, *same)
    got, reports = run(tiny, data_files[:2], WIDE, *same)
    assert got.keys() == expected.keys()
    start = adapters.initial_adapter(tiny, ("q_proj", "v_proj"), 8, 1)
    began = {name: start[name.partition("/")[2]] for name in got}
    assert relative_distance(got, expected, began) <= most
    shared = mode != "copies"
    assert [reports[f"edge-{n}"].host.gradients for n in (1, 2)] == [4 * shared] * 2  # 2 devices in 2 steps
    assert not any(report.host.gradients_clipped for report in reports.values())


def test_what_a_device_computes_does_not_depend_on_how_many_labels_others_have(
    tiny: ModelSource, data_files: list[Path]
) -> None:
    same = ("split.front=1", "split.back=1", "lora.train=['front', 'back']")
    many, few = (run(tiny, files, WIDE, *same)[0] for files in (data_files, data_files[:2]))
    assert few
    assert same_bits({name: many[name] for name in few}, few)


DEVICE_CLIP = 0.01


def update_norms(reports: dict[str, pb.JobReport], start: adapters.Adapter) -> dict[str, float]:
    """Returns how far each device's contribution is from the start, over all its tensors."""
    norms = {}
    for name, report in reports.items():
        sent = [adapters.from_bytes(part.adapter) for part in report.contributions]
        moved = [(array.astype(np.float64) - start[n]).ravel() for one in sent for n, array in one.items()]
        norms[name] = float(np.linalg.norm(np.concatenate(moved)))
    return norms


@pytest.mark.parametrize("planted", [False, True])
def test_no_update_leaves_a_device_longer_than_the_bound(
    tiny: ModelSource, data_files: list[Path], planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also shows that the check would find a device that sends what it trained."""
    if planted:
        monkeypatch.setattr(held, "private_update", lambda start, trained, *_: (trained, False))
    start = adapters.initial_adapter(tiny, ("q_proj", "v_proj"), 8, 1)
    privacy = RoundPrivacy(DEVICE_CLIP, 0.0, 3, device_clips=True, device_noise=True)
    _, reports = run(tiny, data_files, privacy, "split.hosts=0")
    norms = update_norms(reports, start)
    assert len(norms) == len(data_files)
    assert (max(norms.values()) > DEVICE_CLIP * 1.001) == planted
    if not planted:
        assert min(norms.values()) == pytest.approx(DEVICE_CLIP, rel=1e-3), "they were longer before"
        assert all(report.update_clipped for report in reports.values())


STEP_CLIP = 0.01


class PlainSum(PrivateSum):
    """The sum as it would be without privacy."""

    def of(self, gradients: Sequence[Sequence[Any]], parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.stack(parts).sum(0) for parts in zip(*gradients, strict=True)]


@pytest.mark.parametrize("planted", [False, True])
def test_no_step_of_a_chain_of_hosts_goes_beyond_the_bound(
    tiny: ModelSource, data_files: list[Path], planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of plain SGD, a step is the mean gradient. Also shows that the check would find hosts that do not clip."""
    if planted:
        monkeypatch.setattr(host, "PrivateSum", PlainSum)
    same = ("split.hosts=2", "optimizer.name=sgd", "optimizer.lr=1.0", "lora.train=hosts")
    start = adapters.initial_adapter(tiny, ("q_proj", "v_proj"), 8, 1)
    privacy = RoundPrivacy(STEP_CLIP, noise=0.0, devices=2)
    got, reports = run(tiny, data_files[:2], privacy, *same, steps=1)
    moved = [(array - start[name.partition("/")[2]]).ravel() for name, array in got.items()]
    assert (float(np.linalg.norm(np.concatenate(moved))) > STEP_CLIP * 1.001) == planted
    if not planted:
        assert [(r.host.gradients, r.host.gradients_clipped) for n, r in reports.items() if "edge" in n] == [(2, 2)] * 2


def test_a_device_keeps_what_it_sent(tiny: ModelSource, data_files: list[Path]) -> None:
    """The next round starts from it without a tensor being sent, and what it trained in truth is nowhere left."""
    config = run_config(tiny.name, "split.hosts=0")
    start = adapters.initial_adapter(tiny, config.lora.targets, config.lora.rank, config.run.seed)
    with memory_fleet(tiny, config, data_files[:1]) as fleet:
        fleet.privacy = RoundPrivacy(1.0, 1.0, 1, device_clips=True, device_noise=True)
        report = fleet.run(start, 2)["device-1"]
        sent = start | adapters.from_bytes(report.contributions[0].adapter)
        assert report.adapter_digest == adapters.digest(sent)
        reports = fleet.run(sent, 1, step_offset=2, send_to=())
        check_done(reports)
        assert reports["device-1"].moments == "warm"


def test_a_restarted_device_does_not_draw_the_noise_of_an_attempt_anew(
    tiny: ModelSource, data_files: list[Path], tmp_path: Path
) -> None:
    """Its first update may be on the way already: two of one attempt, with noise of their own, say more than is accounted for."""
    config = run_config(tiny.name, "split.hosts=0")
    start = adapters.initial_adapter(tiny, config.lora.targets, config.lora.rank, config.run.seed)
    for privacy in (RoundPrivacy(1.0, 1.0, 1, device_clips=True, device_noise=True), None):
        with memory_fleet(tiny, config, data_files[:1], state=tmp_path) as fleet:
            fleet.privacy, fleet.name = privacy, f"private {privacy is not None}"
            check_done(fleet.run(start, 1))
            fleet.restart("device-1")
            fleet.round = 0
            if privacy is None:
                check_done(fleet.run(start, 1))
                continue
            with pytest.raises(AssertionError, match="a second update with new noise would give away more"):
                fleet.run(start, 1)
            fleet.round = 0
            check_done(fleet.run(start, 1, attempt=2))


def test_an_update_that_is_not_finite_counts_as_zeros() -> None:
    start = {"a": np.ones(3, np.float32)}
    trained = {"a": np.array([1, np.inf, np.nan], np.float32)}
    sent, clipped = private_update(start, trained, pb.Privacy(update_clip=1.0), np.random.default_rng(1))
    assert same_bits(sent, start)
    assert not clipped


# ---------------------------------------------------------------- plans


def plans(source: ModelSource, privacy: RoundPrivacy | None, *overrides: str) -> dict[str, pb.Plan]:
    devices = {f"device-{number}": None for number in range(4)}
    hosts = {f"edge-{number}": (None, f"edge-{number}") for number in range(4)}
    fleet = Fleet(source, run_config(source.name, *overrides), devices, hosts)  # type: ignore[arg-type]
    return fleet.plans(RoundFacts("run", 1, 1, 0, 2, privacy=privacy))


@pytest.mark.parametrize("cuts", ["[3]", "[2]"])
def test_the_hosts_of_a_chain_share_one_bound(tiny: ModelSource, cuts: str) -> None:
    privacy = RoundPrivacy(clip=2.0, noise=1.5, devices=3.0)
    found = plans(
        tiny, privacy, "split.hosts=2", "split.front=1", "split.back=1", f"split.cuts={cuts}", "split.sites=2"
    )
    hosts = [plan for plan in found.values() if plan.serves]
    chains = {plan.site: [p for p in hosts if p.site == plan.site] for plan in hosts}
    assert len(chains) == 2
    for chain in chains.values():
        assert sum(plan.privacy.step_clip**2 for plan in chain) == pytest.approx(2.0**2)
    for plan in hosts:
        (span,) = spans_of(plan)
        assert plan.privacy.step_clip**2 == pytest.approx(2.0**2 * (span.last - span.first) / 4)
        assert (plan.privacy.step_noise, plan.privacy.step_devices) == (3.0, 1.5), (
            "the noise of the whole bound; 2 sites"
        )
        assert plan.gradient_factor == 0, "whom a host leaves out must not depend on others' gradients"
    assert all(
        found[f"device-{n}"].privacy == pb.Privacy() and found[f"device-{n}"].HasField("privacy") for n in range(4)
    )


@pytest.mark.parametrize(
    ("overrides", "clip", "devices"),
    [
        (("split.host_mode=sequential",), 2.0, 1.0),
        (("split.host_mode=copies",), 0.0, 0.0),
        (("lora.train=front",), 0.0, 0.0),
    ],
)
def test_a_host_clips_only_what_devices_share(
    tiny: ModelSource, overrides: tuple[str, ...], clip: float, devices: float
) -> None:
    (host,) = (plan for plan in plans(tiny, RoundPrivacy(2.0, 1.5, 3.0), *overrides).values() if plan.serves)
    assert (host.privacy.step_clip, host.privacy.step_devices) == (clip, devices)


def test_a_run_without_privacy_says_nothing_of_it(tiny: ModelSource) -> None:
    assert not any(plan.HasField("privacy") or not plan.gradient_factor for plan in plans(tiny, None).values())
