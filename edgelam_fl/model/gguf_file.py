"""Writes whole models and LoRA adapters as GGUF files, with the names, the order of rows and the values that llama.cpp expects.

`gguf` reads what is written here. Knows no configs and no vocabularies: it is given the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgelam_fl.errors import ConfigError
from edgelam_fl.model.gguf import is_turned, names_in_model
from edgelam_fl.model.gguf_config import ARCHITECTURES

BYTES_PER_NUMBER = {"fp32": 4, "fp16": 2, "bf16": 2}
_FILE_TYPES = {"fp32": 0, "fp16": 1, "bf16": 32}  # values of general.file_type
_PLAIN = {"fp32": "float32", "fp16": "float16", "bf16": "uint16"}  # of numpy, of the same size
_KINDS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_LARGEST_FP16 = 65_504.0
Read = Callable[[str], np.ndarray]
"""Returns a tensor of a model in fp32, by its name there."""


class TensorPlaces:
    """The places of a model's tensors in a file of one architecture."""

    def __init__(self, architecture: str, config: Mapping[str, Any], names: Iterable[str]) -> None:
        """`names`: of all tensors of transformers' model; of a tied head and table of tokens, the table's alone."""
        self._architecture, self._config = architecture, config
        layers = config["num_hidden_layers" if "num_hidden_layers" in config else "n_layer"]
        self.stored = {name: stored for stored, name in names_in_model(architecture, layers, names).items()}
        """The names in the file by those in the model."""
        missing = set(names) - self.stored.keys()
        if missing:
            raise ConfigError(f"a GGUF file of {architecture} has no place for the tensor {min(missing)}")

    def laid_out(self, name: str, weights: np.ndarray) -> np.ndarray:
        """Returns a tensor as the file has it."""
        stored, known = self.stored[name], ARCHITECTURES[self._architecture]
        if is_turned(stored, known.model_type):
            return weights.T
        if known.raised and stored.endswith("norm.weight"):
            return weights + 1
        return self.paired(stored, weights)

    def paired(self, stored: str, rows: np.ndarray) -> np.ndarray:
        """Puts the rows of queries and keys from halves into pairs, if llama.cpp's rotary positions want pairs."""
        if ARCHITECTURES[self._architecture].paired:
            for part, key in ((".attn_q.", "num_attention_heads"), (".attn_k.", "num_key_value_heads")):
                if part in stored:
                    heads = self._config[key]
                    return (
                        rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
                        .swapaxes(1, 2)
                        .reshape(rows.shape)
                    )
        return rows


def write_model(
    path: Path,
    places: TensorPlaces,
    architecture: str,
    keys: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Read,
    dtype: str,
    factors: Mapping[str, np.ndarray],
) -> None:
    """Writes a model, tensor by tensor, with matrices in `dtype` and all else in fp32.

    shapes: of the model's tensors, by their names there; factors: tensors that are no weights, by their names in the file. Raises
    ConfigError for a number that fp16 cannot hold.
    """

    def tensors() -> Iterator[tuple[str, np.ndarray, str]]:
        for stored, numbers in factors.items():
            yield stored, numbers, "fp32"
        for name in shapes:
            weights = np.ascontiguousarray(places.laid_out(name, read(name)), dtype=np.float32)
            yield places.stored[name], weights, dtype if weights.ndim > 1 else "fp32"

    sizes = {stored: numbers.shape for stored, numbers in factors.items()}
    for name, shape in shapes.items():
        turned = is_turned(places.stored[name], ARCHITECTURES[architecture].model_type)
        sizes[places.stored[name]] = shape[::-1] if turned else shape
    kinds = {stored: dtype if len(shape) > 1 and stored not in factors else "fp32" for stored, shape in sizes.items()}
    head = {"general.type": "model", "general.file_type": _FILE_TYPES[dtype], "general.quantization_version": 2}
    _write(path, architecture, {**keys, **head}, sizes, kinds, tensors())


def write_adapter(
    path: Path,
    places: TensorPlaces,
    architecture: str,
    keys: Mapping[str, Any],
    factors: Mapping[str, tuple[np.ndarray, np.ndarray, float]],
    alpha: float,
) -> None:
    """Writes a LoRA adapter in fp32. factors: A [rank, in], B [out, rank] and the scale of B A, by the module's name in the model.

    llama.cpp scales every module by alpha / rank; what a module's own scale is beyond that goes into its B.
    """
    tensors: dict[str, np.ndarray] = {}
    for module, (a_RI, b_OR, scale) in factors.items():
        stored = places.stored[f"{module}.weight"]
        usual = alpha / len(a_RI)
        rows = places.paired(stored, b_OR if scale == usual else b_OR * np.float32(scale / usual))
        tensors[f"{stored}.lora_a"] = np.ascontiguousarray(a_RI, np.float32)
        tensors[f"{stored}.lora_b"] = np.ascontiguousarray(rows, np.float32)
    head = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(alpha)}
    shapes = {name: array.shape for name, array in tensors.items()}
    kinds = dict.fromkeys(tensors, "fp32")
    _write(
        path, architecture, {**keys, **head}, shapes, kinds, ((name, array, "fp32") for name, array in tensors.items())
    )


def _write(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, str],
    tensors: Iterable[tuple[str, np.ndarray, str]],
) -> None:
    """Writes a file; holds one tensor at a time. shapes and kinds: of the tensors in their order, before any of them is made."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        writer.add_key_value(key, value, *_type_of(value))
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType[_KINDS[kinds[name]]]
        numbers = int(np.prod(shape))
        plain = np.dtype(_PLAIN[kinds[name]])
        writer.add_tensor_info(name, shape, plain, numbers * plain.itemsize, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, array, dtype in tensors:
            writer.write_tensor_data(_packed(name, array, dtype))
    finally:
        writer.close()


def _packed(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    import gguf

    if dtype == "fp32":
        return array
    if dtype == "bf16":
        packed: np.ndarray = gguf.quantize(array, gguf.GGMLQuantizationType.BF16)
        return packed
    if np.abs(array).max(initial=0.0) > _LARGEST_FP16:
        raise ConfigError(f"--dtype fp16 cannot hold a number of {name}: {np.abs(array).max():.6g}; take fp32 or bf16")
    return array.astype(np.float16)


def _type_of(value: Any) -> tuple[Any, Any]:
    """Returns the type that llama.cpp's converter gives a key's value, and that of a list's elements."""
    import gguf

    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    if isinstance(value, list):
        element = "INT32" if isinstance(value[0], int) else kinds[type(value[0])]
        return gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[element]
    return gguf.GGUFValueType[kinds[type(value)]], None
