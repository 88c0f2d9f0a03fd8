"""Files of arrays as a device's data: what is read, and by which words a file is refused that does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgelam_fl.array_files import Array, read_arrays
from edgelam_fl.errors import DataError
from edgelam_fl.tasks.arrays import SAMPLES, Sample, device_samples
from edgelam_fl.wire import edgelam_pb2 as pb

ARRAYS = (
    Array("up", (SAMPLES, "slots", "ports")),
    Array("down", (SAMPLES, "slots", "ports"), required=False),
    Array("speed_kmh", (SAMPLES,), is_complex=False, required=False),
)
MEANT = "Meant are: 'up' [samples, slots, ports], complex (or real, with real and imaginary part as a last axis of 2)"


def channels(samples: int = 8, seed: int = 0, slots: int = 3, ports: int = 2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    parts = rng.standard_normal((2, samples, slots, ports))
    return (parts[0] + 1j * parts[1]).astype(np.complex64)


def halves(array: np.ndarray) -> np.ndarray:
    return np.stack([array.real, array.imag], -1).astype(np.float16)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def settings(**more: Any) -> pb.TaskSettings:
    return pb.TaskSettings(held_out=0.25, bad_lines="refuse") if not more else pb.TaskSettings(held_out=0.25, **more)


def numbers(samples: list[Sample]) -> list[int]:
    return [one.number for one in samples]


def test_complex_arrays_and_pairs_of_halves_are_read_alike(tmp_path: Path) -> None:
    up = halves(channels()).astype(np.float32)
    as_complex = up[..., 0] + 1j * up[..., 1]
    first = device_samples(npz(tmp_path / "a.npz", up=as_complex, speed_kmh=np.arange(8), extra=up), settings(), ARRAYS)
    save_file({"up": up.astype(np.float16)}, tmp_path / "b.safetensors")
    second = device_samples(tmp_path / "b.safetensors", settings(), ARRAYS)
    assert first.unread == ("extra",)
    assert first.read == ("up", "speed_kmh")
    assert second.read == ("up",)
    for one, other in zip(first.training[:1] + second.training[:1], [as_complex] * 2, strict=True):
        assert one.arrays["up"].dtype == np.complex64
        assert np.array_equal(one.arrays["up"], other[one.number])
    assert first.training[0].arrays["speed_kmh"] == np.float32(first.training[0].number)


def test_the_content_alone_decides_which_samples_are_held_out(tmp_path: Path) -> None:
    up = channels(16)
    up[5] = up[4]
    order = np.random.default_rng(1).permutation(16)
    sides = device_samples(npz(tmp_path / "a.npz", up=up), settings(), ARRAYS)
    again = device_samples(npz(tmp_path / "b.npz", up=up[order]), settings(), ARRAYS)
    assert sorted(order[numbers(again.held_out)]) == numbers(sides.held_out)
    assert len(sides.held_out) == pytest.approx(4, abs=1)
    assert {4, 5} <= set(numbers(sides.held_out)) or {4, 5} <= set(numbers(sides.training)), (
        "equal ones are on one side"
    )
    few = device_samples(tmp_path / "a.npz", settings(evaluate_examples=2), ARRAYS)
    assert (len(few.held_out), few.unmeasured) == (2, len(sides.held_out) - 2)
    beside = npz(tmp_path / "c.npz", up=np.concatenate([up[:1], channels(2, seed=9)]))
    measured = device_samples(tmp_path / "a.npz", settings(), ARRAYS, beside)
    assert (len(measured.training), len(measured.held_out), measured.also_learned) == (16, 3, 1)


def test_a_sample_that_cannot_be_used_is_named_or_left_out(tmp_path: Path) -> None:
    up = channels()
    up[2, 0, 0], up[6] = np.nan, 0
    file = npz(tmp_path / "a.npz", up=up)
    with pytest.raises(DataError, match=r"sample 2: 'up' holds a number that is not finite \(data.bad_lines") as caught:
        device_samples(file, settings(), ARRAYS)
    assert (caught.value.fault, caught.value.place) == ("numbers", "sample 2")
    found = device_samples(file, settings(bad_lines="skip"), ARRAYS)
    assert found.bad == ("sample 2", "sample 6")
    assert len(found.training) + len(found.held_out) == 6
    with pytest.raises(DataError, match="holds no sample that can be used"):
        device_samples(npz(tmp_path / "b.npz", up=0 * up), settings(bad_lines="skip"), ARRAYS)


UNFIT: Mapping[str, tuple[dict[str, np.ndarray], str]] = {
    "no such array": ({"ups": channels()}, f"has no array 'up' (did you mean 'ups'?). {MEANT}"),
    "an axis too few": ({"up": channels()[0]}, f"'up' is complex64 [3, 2]. {MEANT}"),
    "real numbers": ({"up": channels().real}, f"'up' is float32 [8, 3, 2]. {MEANT}"),
    "texts": ({"up": np.array(["a"])}, f"'up' is <U1 [1]. {MEANT}"),
    "complex speeds": ({"up": channels(), "speed_kmh": channels()[:, 0, 0]}, "'speed_kmh' is complex64 [8]"),
    "unlike axes": ({"up": channels(), "down": channels(ports=4)}, "'down' is [8, 3, 4], with 2 ports in another array"),
    "no sample": ({"up": channels(0)}, "'up' is [0, 3, 2], with no samples"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_arrays_that_do_not_fit_are_refused_with_the_axes_that_are_meant(tmp_path: Path, name: str) -> None:
    arrays, words = UNFIT[name]
    with pytest.raises(DataError) as caught:
        device_samples(npz(tmp_path / "a.npz", **arrays), settings(), ARRAYS)
    assert words in str(caught.value)
    assert "speed_kmh' [samples], real (may be absent)" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.npz", None, "no data file at"),
        ("a.jsonl", b"{}", "is no file of arrays: a .npz or .safetensors file of arrays is read here"),
        ("a.npz", b"PK\x03\x04 and no more", "cannot be read as arrays"),
        ("a.safetensors", b"\xff" * 64, "cannot be read as arrays"),
        ("b.npz", b"", "cannot be read as arrays"),
    ],
)
def test_files_that_hold_no_arrays_are_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_arrays(tmp_path / name)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_whatever_is_damaged_nothing_but_a_data_error_comes_out(tmp_path: Path, suffix: str) -> None:
    whole, file, rng = tmp_path / f"whole.{suffix}", tmp_path / f"damaged.{suffix}", np.random.default_rng(1)
    up = halves(channels(2))
    np.savez_compressed(whole, up=up) if suffix == "npz" else save_file({"up": up}, whole)
    content, refused = np.frombuffer(whole.read_bytes(), np.uint8), 0
    for _ in range(150):
        damaged = content.copy()
        damaged[rng.integers(0, len(damaged), 3)] = rng.integers(0, 256, 3)
        file.write_bytes(damaged[: rng.integers(1, len(damaged) + 1) if rng.random() < 0.2 else None].tobytes())
        try:
            device_samples(file, settings(bad_lines="skip"), ARRAYS)
        except DataError:
            refused += 1
    assert refused > 20
