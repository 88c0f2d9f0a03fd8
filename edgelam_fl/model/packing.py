"""Finds the tensors of a folder that are quantized, and refuses by name what is not read. Imports no torch.

Read are fine-grained fp8 (transformers' and DeepSeek's: a scale per block or per tensor) and bitsandbytes' 4 and 8 bits.
Neighbour: `model.unpack` computes the numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgelam_fl.errors import ModelError
from edgelam_fl.model.index import Packing, TensorEntry, tensor_bytes

FLOATS = ("F64", "F32", "F16", "BF16")
FP8 = ("F8_E4M3", "F8_E5M2")
FP8_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_WAY_OUT = (
    "Set model.name to the model that it was made from, unquantized (model.base quantizes it: 'int8', 'nf4'), or to a GGUF "
    "file of it"
)
_OTHER_FILES = {  # left by tools that quantize; config.json need not say it
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
    "quanto_qmap.json": "quanto",
}
_OTHER_KEYS = {"compression_config": "compressed-tensors", "quantization": "MLX"}  # in config.json
_IDLE_ENDS = (".activation_scale", ".input_scale")  # fp8: of activations, which are not quantized here
_FP8_SCALE = "_scale_inv"
_ABSMAX, _CODES, _STATE = ".absmax", ".quant_map", ".quant_state.bitsandbytes__"
_NESTED = (".nested_absmax", ".nested_quant_map")
_INT8_SCALE, _INT8_FORMAT = "SCB", "weight_format"  # in place of "weight"


def packed_tensors(
    config: Mapping[str, Any], folder: Path, stored: Mapping[str, TensorEntry]
) -> dict[str, TensorEntry]:
    """Returns the tensors of the model: a quantized one with its packing, and without the tensors that unpack it.

    Raises ModelError for a quantization that is not read, whether config.json or a file beside it says so.
    """
    for name, tool in _OTHER_FILES.items():
        if (folder / name).is_file():
            raise ModelError(f"{folder} is quantized by {tool} ({name}), which is not read. {_WAY_OUT}")
    for key, tool in _OTHER_KEYS.items():
        if config.get(key):
            raise ModelError(
                f"config.json of {folder} has {key}: the model is quantized by {tool}, which is not read. {_WAY_OUT}"
            )
    settings = config.get("quantization_config")
    if settings is None:
        return dict(stored)
    if not isinstance(settings, dict):
        raise ModelError(f"quantization_config in config.json of {folder} is {settings!r}; it must be an object")
    method = str(settings.get("quant_method") or _old_method(settings))
    if method not in _READERS:
        raise ModelError(
            f"quantization_config in config.json of {folder}: quant_method = {method!r} is not read; read are {', '.join(_READERS)}. "
            f"{_WAY_OUT}"
        )
    return _READERS[method](settings, folder, stored)


def _old_method(settings: Mapping[str, Any]) -> str:
    """Returns bitsandbytes for settings as old versions of transformers wrote them, without quant_method."""
    return "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else "(not said)"


# ---------------------------------------------------------------- fp8


def _fp8(settings: Mapping[str, Any], folder: Path, stored: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    index = {}
    for name, entry in stored.items():
        if name.endswith(_IDLE_ENDS) or (name.endswith(_FP8_SCALE) and name.removesuffix(_FP8_SCALE) in stored):
            continue
        scale = stored.get(name + _FP8_SCALE)
        index[name] = entry
        if scale is not None:
            if entry.stored_type not in FP8 or scale.stored_type not in FP8_SCALES:
                raise ModelError(
                    f"{name} of {folder} is {entry.stored_type} with a scale in {scale.stored_type}; read are {' and '.join(FP8)} with "
                    f"{', '.join(FP8_SCALES)}. {_WAY_OUT}"
                )
            block = _block(entry.shape, scale.shape, settings.get("weight_block_size"))
            if block is None:
                raise ModelError(
                    f"{name}_scale_inv of {folder} has the shape {list(scale.shape)}, which does not fit weights {list(entry.shape)} in "
                    f"blocks of {settings.get('weight_block_size')} (quantization_config.weight_block_size). Fetch the folder again"
                )
            index[name] = replace(entry, packing=Packing("fp8", _beside(name, [_FP8_SCALE], stored), block))
    return index


def _block(weights: tuple[int, ...], scales: tuple[int, ...], given: Any) -> tuple[int, int] | None:
    """Returns the rows and columns that share a scale; None if weights and scales do not fit.

    The last block of a row or column may be a part of one, as in DeepSeek's; without such a block size, blocks of equal size.
    """
    if len(weights) != 2:
        return None
    if all(size == 1 for size in scales):
        return weights[0], weights[1]
    if len(scales) != 2 or 0 in scales:
        return None
    sizes = isinstance(given, list) and len(given) == 2 and all(type(size) is int and size > 0 for size in given)
    if sizes and tuple(-(size // -block) for size, block in zip(weights, given, strict=True)) == scales:
        return given[0], given[1]
    if any(size % parts for size, parts in zip(weights, scales, strict=True)):
        return None
    return weights[0] // scales[0], weights[1] // scales[1]


# ---------------------------------------------------------------- bitsandbytes


def _bitsandbytes(
    settings: Mapping[str, Any], folder: Path, stored: Mapping[str, TensorEntry]
) -> dict[str, TensorEntry]:
    index, used = {}, set()
    for name, entry in stored.items():
        state = next((key for kind in ("nf4", "fp4") if (key := f"{name}{_STATE}{kind}") in stored), None)
        scale = name.removesuffix("weight") + _INT8_SCALE
        if state is not None:
            ends = [_ABSMAX, _CODES, state.removeprefix(name)]
            nested = [end for end in _NESTED if name + end in stored]
            index[name] = _four_bits(folder, name, entry, stored[state], _beside(name, [*ends, *nested], stored))
            used |= {name + end for end in (*ends, *nested)}
        elif name.endswith(".weight") and entry.stored_type == "I8" and scale in stored:
            layout = name.removesuffix("weight") + _INT8_FORMAT
            if layout in stored and any(tensor_bytes(stored[layout])):
                raise ModelError(
                    f"{layout} of {folder}: the layout is that of one kind of GPU and not of rows. Load the model with the bitsandbytes "
                    f"that saved it and save it again. {_WAY_OUT}"
                )
            beside = {_INT8_SCALE: (stored[scale].file, stored[scale].stored_name)}
            index[name] = replace(entry, packing=Packing("bnb-8bit", beside))
            used |= {scale, layout}
    return {name: index.get(name, entry) for name, entry in stored.items() if name not in used}


def _four_bits(
    folder: Path, name: str, entry: TensorEntry, state: TensorEntry, beside: Mapping[str, tuple[str, str]]
) -> TensorEntry:
    """Returns the entry with its packing and the shape of its weights, which the state says."""
    if entry.stored_type != "U8":
        raise ModelError(
            f"{name} of {folder}: quantization_config.bnb_4bit_quant_storage put the bytes into {entry.stored_type}; read is 'uint8'. "
            f"{_WAY_OUT}"
        )
    try:
        shape = tuple(int(size) for size in json.loads(tensor_bytes(state))["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{state.stored_name} of {folder} is damaged ({error}). Fetch the folder again") from error
    return replace(entry, shape=shape, packing=Packing("bnb-4bit", beside))


def _beside(name: str, ends: Iterable[str], stored: Mapping[str, TensorEntry]) -> dict[str, tuple[str, str]]:
    for end in ends:
        if name + end not in stored:
            raise ModelError(
                f"{stored[name].file}: {name} is quantized, and {name}{end} is missing. Fetch the folder again"
            )
    return {end: (stored[name + end].file, stored[name + end].stored_name) for end in ends}


_READERS: dict[str, Callable[[Mapping[str, Any], Path, Mapping[str, TensorEntry]], dict[str, TensorEntry]]] = {
    "fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
}
