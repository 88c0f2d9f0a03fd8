"""Reads GGUF files: config, tokenizer and tensor index from the metadata, tensors one by one from the data.

Names, element layouts and the order of rows come from the tables of transformers and gguf, so that a tensor read here is
bit-equal to the one of `from_pretrained(gguf_file=...)`.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from edgelam_fl.errors import ModelError
from edgelam_fl.model.families import family_of
from edgelam_fl.model.index import TensorEntry

_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2")  # whose GGUF files are read right


def unpack_metadata(path: Path, folder: Path) -> dict[str, TensorEntry]:
    """Writes config.json and the tokenizer of a GGUF file into `folder`; returns the index of its tensors."""
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: it does not begin with GGUF")
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, IndexError, KeyError, OSError, struct.error) as error:
        raise ModelError(f"{path} is not a whole GGUF file of a known architecture: {error}") from error
    family_of(config.model_type, str(path))
    if config.model_type not in _ARCHITECTURES:
        raise ModelError(
            f"model.name: {path} is a GGUF file of the architecture {config.model_type!r}, which is read from a folder in "
            f"Hugging Face's layout alone; GGUF files: {', '.join(_ARCHITECTURES)}"
        )
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = get_gguf_hf_weights_map(model, _processor(config.model_type, config.to_dict()))
    reader = gguf.GGUFReader(path)
    index = {}
    for tensor in reader.tensors:
        if tensor.name in names:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            index[names[tensor.name]] = TensorEntry(
                shape, str(path), tensor.name, tensor.tensor_type.name, int(tensor.data_offset), int(tensor.n_bytes)
            )
    missing = {name for name, _ in model.named_parameters()} - set(index)
    if missing - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        raise ModelError(
            f"{path} lacks tensors of its own architecture {config.model_type}: {', '.join(sorted(missing)[:3])}"
        )
    return index


def read_tensor(entry: TensorEntry, config: dict[str, Any]) -> np.ndarray:
    """Reads one tensor, dequantized to fp32 in torch's layout. Touches only the tensor's own bytes."""
    import gguf

    kind = gguf.GGMLQuantizationType[entry.stored_type]
    stored_shape = gguf.quant_shape_to_byte_shape(entry.shape, kind)
    raw = np.memmap(entry.file, np.uint8, "r", entry.offset, (entry.stored_bytes,))
    weights = gguf.dequantize(raw.reshape(stored_shape), kind)
    name = entry.stored_name
    return np.ascontiguousarray(
        _processor(config["model_type"], config).process(weights, name).weights, dtype=np.float32
    )


def _processor(architecture: str, config: dict[str, Any]) -> Any:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
