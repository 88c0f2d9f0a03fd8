"""A run that begins with the adapter of an earlier run, and the adapters that it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgelam_fl.bounds import Bounds
from edgelam_fl.errors import ConfigError, ModelError
from edgelam_fl.model.adapter import PREFIX, Span, slice_of
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.spec import RunSpec
from server.checks import check_config
from server.earlier_adapter import earlier_adapter
from tests.support import run_config
from tests.unit.conftest import MakeFederation

_FACTOR = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.weight"
_EVERYWHERE = Bounds()
Change = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


def test_a_run_begins_with_the_adapter_of_an_earlier_run(federation: MakeFederation) -> None:
    first = federation("ab", "e")
    learned = first.run()
    second = federation("ab", "e", f"model.adapter={first.folder.path}")
    result = second.run()
    at_first = second.nodes["a"].received[0]
    own = slice_of(learned, [Span(0, 2, embed=True), Span(4, 6, head=True)])
    assert at_first.keys() == own.keys()
    assert all(np.array_equal(array, own[name]) for name, array in at_first.items())
    # What two rounds do is the same again, from there.
    again = {name: learned[name] + (array - first.start[name]) for name, array in learned.items()}
    assert all(np.allclose(array, again[name], atol=1e-5) for name, array in result.items())


def test_a_run_that_goes_on_keeps_its_own_adapter(federation: MakeFederation) -> None:
    """After a checkpoint the earlier adapter is read no more, and may be gone."""
    first = federation("ab", "e")
    first.run()
    named = f"model.adapter={first.folder.path}"
    stopped = federation("ab", "e", named, "federation.rounds=3")
    stopped.rounds.round_after(stopped.rounds._first)
    (first.folder.path / "adapter/adapter_config.json").unlink()
    after = federation("ab", "e", "federation.rounds=3")
    after.go_on(stopped)
    assert after.state().round == 3


@pytest.fixture
def ended(federation: MakeFederation) -> Path:
    run = federation("ab", "e", "federation.rounds=1")
    run.run()
    return run.folder.path


def _begin(source: ModelSource, adapter: Path | str, *overrides: str, bounds: Bounds = _EVERYWHERE) -> int:
    config = run_config(source.name, f"model.adapter={adapter}", *overrides)
    return len(earlier_adapter(RunSpec(config, source), bounds))


def _set(key: str, value: Any) -> Change:
    return lambda described, tensors: described.update({key: value})


def _replace(array: np.ndarray | None) -> Change:
    def change(described: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        whole = tensors.pop(_FACTOR)
        if array is not None:
            tensors[_FACTOR] = np.broadcast_to(array, whole.shape).astype(array.dtype)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("peft_type", "LOHA"), "no LoRA that can be trained here: its adapter_config.json has peft_type = 'LOHA'"),
        (_set("bias", "all"), "bias = 'all'"),
        (_set("init_lora_weights", "pissa"), "init_lora_weights = 'pissa', which changes the base model too"),
        (_set("trainable_token_indices", [3]), r"trainable_token_indices = \[3\]"),
        (_set("auto_mapping", {"trained_on": {"model": "other", "sha256": "00"}}), "on those of 'other', SHA-256 00"),
        (_set("lora_alpha", 64.0), r"lora_alpha = 64, use_rslora = False\), this run by 2"),
        (_set("use_rslora", True), "lora.alpha, lora.alpha_pattern and lora.use_rslora must be the adapter's"),
        (_replace(None), "lacks .*layers.1.self_attn.q_proj.lora_B.weight"),
        (_replace(np.array(np.nan, np.float32)), "has numbers that are not finite. Allowed: finite numbers in fp32"),
        (_replace(np.array(0, np.float16)), "is float16. Allowed: finite numbers in fp32"),
    ],
)
def test_an_adapter_that_the_run_could_not_have_made_is_refused(
    tiny: ModelSource, ended: Path, change: Change, message: str
) -> None:
    assert _begin(tiny, ended) > 0
    described = json.loads((ended / "adapter/adapter_config.json").read_text("utf-8"))
    tensors = load_file(ended / "adapter/adapter_model.safetensors")
    change(described, tensors)
    (ended / "adapter/adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    save_file(tensors, ended / "adapter/adapter_model.safetensors")
    with pytest.raises(ConfigError, match=message):
        _begin(tiny, ended)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank=4", r"lora.rank = 4 must be the adapter's"),
        ("lora.targets=q_proj", "has, beside this run's,"),
        ("lora.use_dora=true", "lacks .*lora_magnitude_vector"),
        ("lora.alpha=32", "this run by 4"),
    ],
)
def test_a_run_with_other_settings_is_refused(tiny: ModelSource, ended: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _begin(tiny, ended, override)


def test_a_place_that_is_no_adapter_is_refused(tiny: ModelSource, ended: Path, tmp_path: Path) -> None:
    inside = Bounds(runs=ended.parent, models=())
    assert _begin(tiny, ended / "adapter", bounds=inside) > 0
    assert _begin(tiny, ended.name, bounds=inside) > 0, "a run of the server, by its name"
    with pytest.raises(ConfigError, match="that its operator did not offer"):
        _begin(tiny, ended, bounds=Bounds(runs=tmp_path / "others", models=()))
    with pytest.raises(ConfigError, match="is no folder with an adapter"):
        _begin(tiny, tmp_path / "nothing")
    new = tmp_path / "new"
    new.mkdir()
    (new / "config.toml").touch()
    with pytest.raises(ConfigError, match="has no adapter yet"):
        _begin(tiny, new)
    (ended / "adapter/adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="holds no adapter that can be read"):
        _begin(tiny, ended)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["privacy.mode=central", "privacy.epsilon=8"], "its promise could not cover"),
        (["privacy.private_front=true"], "each device draws its own front"),
        (["lora.ranks={'a'=2}"], "strategy.aggregation = 'fedavg' needs a layer's rank to stay"),
    ],
)
def test_what_cannot_be_combined_with_an_adapter_is_refused_by_name(
    tiny: ModelSource, ended: Path, overrides: list[str], why: str
) -> None:
    config = run_config(tiny.name, f"model.adapter={ended}", *overrides)
    with pytest.raises(ConfigError, match=f"cannot be combined with .*{why}"):
        check_config(config)
