"""Reads the adapter that a run begins with (`model.adapter`), and refuses one that the run's own rounds could not have made.

It may come from an earlier run or from peft. Knows files and shapes; knows nothing of nodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgelam_fl.bounds import Bounds
from edgelam_fl.errors import ConfigError, ModelError
from edgelam_fl.model.adapter import PREFIX, Adapter, base_shapes, read_peft_folder, target_modules
from edgelam_fl.model.carry import modules_of
from edgelam_fl.model.folder import listed
from edgelam_fl.model.identity import ALL_WEIGHTS
from edgelam_fl.model.lora import A, LoraKind, own_terms
from edgelam_fl.plan.spec import RunSpec
from server.global_adapter import drawn_adapter

# Keys of peft's LoraConfig by what becomes of them here. The shapes of the tensors say the same as the first ones.
_IN_SHAPES = {"r", "target_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "use_dora", "modules_to_save",
              "exclude_modules", "task_type", "value_ends", "cut_adapter"}  # fmt: skip
_READ = {"peft_type", "bias", "lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights", "auto_mapping"}
_WITHOUT_EFFECT = {"base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "peft_version", "megatron_core",
                   "qalora_group_size", "fan_in_fan_out"}  # fmt: skip
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # of init_lora_weights: others change the base too


def earlier_adapter(spec: RunSpec, bounds: Bounds) -> Adapter:
    """Returns the adapter that a run begins with; empty if the run file names none.

    Raises ConfigError for a folder that the operator did not offer, and for an adapter of other weights, modules, ranks or scales
    than the run's; ModelError for one that cannot be read.
    """
    name = spec.config.model.adapter
    if not name:
        return {}
    folder = _find(name, bounds)
    adapter = read_peft_folder(folder)
    described = _described(folder)
    _check_described(name, described)
    _check_weights(name, described, spec)
    _check_tensors(name, adapter, spec)
    _check_scales(name, adapter, described, spec)
    return adapter


def _find(name: str, bounds: Bounds) -> Path:
    found = bounds.find_run(name)
    folder = found / "adapter" if (found / "adapter").is_dir() else found
    if not bounds.allows_adapter(folder):
        raise ConfigError(
            f"model.adapter = {name!r} is a place on this machine that its operator did not offer: folders of runs and the models of "
            f"`edgelam server --models DIR` may be named"
        )
    if not (folder / "adapter_config.json").is_file():
        what = "has no adapter yet" if (found / "config.toml").is_file() else "is no folder with an adapter"
        raise ConfigError(
            f"model.adapter = {name!r} {what}. Allowed: the folder of a run with a finished round, or one with adapter_config.json and "
            f"adapter_model.safetensors"
        )
    return folder


def _described(folder: Path) -> dict[str, Any]:
    try:
        described = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'adapter_config.json'} cannot be read: {error}") from error
    assert isinstance(described, dict)  # read_peft_folder took keys of it
    return described


def _check_described(name: str, described: Mapping[str, Any]) -> None:
    """Raises ConfigError for an adapter that computes otherwise than LoRA does here."""
    wrong = [
        f"{key} = {value!r}"
        for key, value in described.items()
        if value and key not in _IN_SHAPES | _READ | _WITHOUT_EFFECT
    ]
    if (kind := described.get("peft_type")) != "LORA":
        wrong.append(f"peft_type = {kind!r}")
    if (bias := described.get("bias") or "none") != "none":
        wrong.append(f"bias = {bias!r}")
    if (start := described.get("init_lora_weights")) not in _PLAIN_STARTS:
        wrong.append(f"init_lora_weights = {start!r}, which changes the base model too")
    if wrong:
        raise ConfigError(
            f"model.adapter = {name!r} is no LoRA that can be trained here: its adapter_config.json has {'; '.join(sorted(wrong))}"
        )


def _check_weights(name: str, described: Mapping[str, Any], spec: RunSpec) -> None:
    """Raises ConfigError for an adapter of other weights. One that peft wrote does not say which weights it belongs to."""
    trained_on = (described.get("auto_mapping") or {}).get("trained_on", {})
    if trained_on.get("sha256", spec.source.files[ALL_WEIGHTS]) != spec.source.files[ALL_WEIGHTS]:
        raise ConfigError(
            f"model.adapter = {name!r} was trained on other weights than model.name = {spec.config.model.name!r} has: on those of "
            f"{trained_on.get('model')!r}, SHA-256 {trained_on['sha256']}"
        )


def _check_tensors(name: str, adapter: Adapter, spec: RunSpec) -> None:
    if modules_of(adapter):
        raise ConfigError(
            f"model.adapter = {name!r} has carry factors, which its aggregation added to the adapter: a run begins without them. "
            f"Allowed: the adapter of an aggregation such as 'fedavg'; or a model that `edgelam export --to merged` wrote, as model.name"
        )
    kind = spec.kind
    shapes = {tensor: array.shape for tensor, array in drawn_adapter(spec, kind, spec.config.lora.rank).items()}
    shapes |= base_shapes(spec.source, spec.config.lora.targets, kind)
    for what, names in (
        ("lacks", shapes.keys() - adapter.keys()),
        ("has, beside this run's,", adapter.keys() - shapes.keys()),
    ):
        if names:
            raise ConfigError(
                f"model.adapter = {name!r} {what} {listed(sorted(names))}: this run's [lora] and [task] must be those that the adapter was "
                f"trained with, and all parts of it must be in the folder"
            )
    for tensor, shape in shapes.items():
        array = adapter[tensor]
        if array.shape != shape:
            rank = f": lora.rank = {spec.config.lora.rank} must be the adapter's" if ".lora_" in tensor else ""
            raise ConfigError(
                f"model.adapter = {name!r} has {tensor} as {list(array.shape)}, this run as {list(shape)}{rank}"
            )
        if array.dtype != np.float32 or not np.isfinite(array).all():
            what = f"is {array.dtype}" if array.dtype != np.float32 else "has numbers that are not finite"
            raise ConfigError(f"model.adapter = {name!r}: {tensor} {what}. Allowed: finite numbers in fp32")


def _check_scales(name: str, adapter: Adapter, described: Mapping[str, Any], spec: RunSpec) -> None:
    """Raises ConfigError for modules whose updates are scaled otherwise in the run, which would then begin with another model."""
    lora, kind = spec.config.lora, spec.kind
    modules = target_modules(spec.source, lora.targets, kind.layers)
    own = own_terms(modules, {}, described.get("alpha_pattern") or {})
    theirs = LoraKind(rslora=bool(described.get("use_rslora")), own=own)
    for module in modules:
        rank = len(adapter[f"{PREFIX}{module}{A}"])
        there, here = theirs.scale_of(module, rank, described["lora_alpha"]), kind.scale_of(module, rank, lora.alpha)
        if not np.isclose(there, here):
            raise ConfigError(
                f"model.adapter = {name!r} scales the update of {module} by {there:g} (lora_alpha = {described['lora_alpha']:g}, "
                f"use_rslora = {theirs.rslora}), this run by {here:g}: lora.alpha, lora.alpha_pattern and lora.use_rslora must be the adapter's"
            )
