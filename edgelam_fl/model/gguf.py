"""Reads GGUF files: config, tokenizer and tensor index from the metadata, tensors one by one from the data.

What the keys mean is known to `gguf_config` and `gguf_tokenizer`; here tensors get their names in transformers, and back the
order of rows and the values that llama.cpp's converter changed. Where transformers' own reader of GGUF files differs from
llama.cpp (Gemma's norms, rotary scalings, special tokens), llama.cpp is followed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgelam_fl.errors import ModelError
from edgelam_fl.files import write_atomically
from edgelam_fl.model.families import family_of
from edgelam_fl.model.generation import GENERATION
from edgelam_fl.model.gguf_config import BY_MODEL_TYPE, FACTORS, config_of
from edgelam_fl.model.gguf_header import GgufHeader, StoredTensor, read_header
from edgelam_fl.model.gguf_tokenizer import Vocabulary
from edgelam_fl.model.index import TensorEntry


def unpack_metadata(path: Path, folder: Path) -> dict[str, TensorEntry]:
    """Writes config.json, generation_config.json and the tokenizer of a GGUF file into `folder`; returns the index of its tensors.

    Raises ModelError for a file with a key, a tensor or a vocabulary that is not understood.
    """
    from transformers import AutoConfig

    header = read_header(path)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    made = config_of(header.keys, shapes, numbers_of(path, header, FACTORS), str(path))
    family_of(made["model_type"], str(path))
    vocabulary = Vocabulary(header.keys, str(header.keys["general.architecture"]), str(path))
    try:
        config = AutoConfig.for_model(**made, **vocabulary.special_ids)
        index = _index(path, header, config)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # sizes that transformers or torch refuse
        words = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{path}: transformers makes no model of its sizes: {words}. Convert the model again"
        ) from error
    vocabulary.tokenizer().save_pretrained(folder)
    config.save_pretrained(folder)
    write_atomically(folder / GENERATION, json.dumps(vocabulary.generation(), indent=2) + "\n")
    return index


def _index(path: Path, header: GgufHeader, config: Any) -> dict[str, TensorEntry]:
    """Returns where each tensor of the model is. Raises ModelError for one that is missing, superfluous or of another shape."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    names = names_in_model(str(header.keys["general.architecture"]), config.num_hidden_layers, wanted)
    index = {}
    for stored, tensor in header.tensors.items():
        if stored == FACTORS:
            continue
        name = names.get(stored, "")
        if name not in wanted:
            raise ModelError(
                f"{path} has the tensor {stored}, which {config.model_type} as it is read here has not. Set model.name to the model's "
                f"safetensors folder"
            )
        shape = _shape_in_model(stored, tensor, config.model_type)
        if shape != wanted[name]:
            raise ModelError(
                f"{path}: {stored} is of shape {list(shape)}, by the file's keys it must be {list(wanted[name])}. Convert the model again"
            )
        index[name] = TensorEntry(tensor.shape, str(path), stored, tensor.kind, tensor.offset, tensor.size)
    missing = set(wanted) - set(index) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if missing:
        raise ModelError(
            f"{path} lacks tensors of its own architecture {config.model_type}: {', '.join(sorted(missing)[:3])}"
        )
    return index


def names_in_model(architecture: str, layers: int, wanted: Iterable[str]) -> dict[str, str]:
    """Returns the names in transformers' model by the names in the file.

    transformers has a function for it, which makes llama.cpp's table of names anew for every module: seconds of a processor.
    """
    import gguf

    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, layers)
    split = [(name, *name.rpartition(".")) for name in wanted]
    stored = {name: table.get_name(module) for name, module, _, _ in split}
    return {f"{stored[name]}.{end}": name for name, _, _, end in split if stored[name]}


def _shape_in_model(stored: str, tensor: StoredTensor, model_type: str) -> tuple[int, ...]:
    return tensor.shape[::-1] if is_turned(stored, model_type) else tensor.shape


def is_turned(stored: str, model_type: str) -> bool:
    """Tells whether a matrix is stored as [out, in], and transformers' model has it as [in, out]."""
    return model_type == "gpt2" and stored.startswith("blk.") and stored.endswith(".weight") and "norm" not in stored


def numbers_of(path: Path, header: GgufHeader, name: str) -> np.ndarray | None:
    """Reads a tensor that is no weight; None if the file has none of this name."""
    if name not in header.tensors:
        return None
    tensor = header.tensors[name]
    return _unpacked(TensorEntry(tensor.shape, str(path), name, tensor.kind, tensor.offset, tensor.size))


def read_tensor(entry: TensorEntry, config: Mapping[str, Any]) -> np.ndarray:
    """Reads one tensor, dequantized to fp32 in torch's layout. Touches only the tensor's own bytes."""
    weights, name = _unpacked(entry), entry.stored_name
    architecture = BY_MODEL_TYPE[config["model_type"]]
    if is_turned(name, config["model_type"]):
        weights = weights.T
    elif architecture.paired and ".attn_q." in name:
        weights = _halves(weights, config["num_attention_heads"])
    elif architecture.paired and ".attn_k." in name:
        weights = _halves(weights, config["num_key_value_heads"])
    elif architecture.raised and name.endswith("norm.weight"):
        weights = weights - 1
    return np.ascontiguousarray(weights, dtype=np.float32)


def _unpacked(entry: TensorEntry) -> np.ndarray:
    import gguf

    kind = gguf.GGMLQuantizationType[entry.stored_type]
    stored_shape = gguf.quant_shape_to_byte_shape(entry.shape, kind)
    raw = np.memmap(entry.file, np.uint8, "r", entry.offset, (entry.stored_bytes,))
    return gguf.dequantize(raw.reshape(stored_shape), kind)


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Puts the rows of each head from pairs (llama.cpp's order for rotary positions) back into halves."""
    return rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:]).swapaxes(2, 1).reshape(rows.shape)
