"""Writes a random Llama of 1.1 billion parameters to disk: seeded, bf16, one file per layer, never whole in memory.

It serves memory benchmarks: the weights are untrained, and the tokenizer knows only bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support import write_tiny_llama

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu",
    "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1,
    "initializer_range": 0.02,
}  # fmt: skip


def write_llama(folder: Path, config: dict[str, Any] = CONFIG, seed: int = 1) -> Path:
    """Writes the model and returns its folder; a folder that has a model is kept, since a seed always gives the same files."""
    if (folder / "config.json").exists():
        return folder
    write_tiny_llama(folder, layers=1)  # its tokenizer
    (folder / "model.safetensors").unlink()
    generator = torch.Generator().manual_seed(seed)
    files: dict[str, str] = {}
    for part, shapes in enumerate(_parts(config)):
        tensors = {name: _tensor(shape, config["initializer_range"], generator) for name, shape in shapes.items()}
        file = folder / f"model-{part:03d}.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors makes files that only this user can read; containers run as another user
        files |= dict.fromkeys(shapes, file.name)
    index = {"metadata": {"total_size": 2 * parameters(config)}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def parameters(config: dict[str, Any] = CONFIG) -> int:
    return sum(math.prod(shape) for shapes in _parts(config) for shape in shapes.values())


def _tensor(shape: tuple[int, ...], spread: float, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, spread, generator=generator)


def _parts(config: dict[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yields name and shape of each file's tensors: the embedding, one layer per file, final norm and head."""
    d, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = d // config["num_attention_heads"] * config["num_key_value_heads"]
    yield {"model.embed_tokens.weight": (words, d)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield {
            f"{prefix}input_layernorm.weight": (d,),
            f"{prefix}post_attention_layernorm.weight": (d,),
            f"{prefix}self_attn.q_proj.weight": (d, d),
            f"{prefix}self_attn.k_proj.weight": (keys, d),
            f"{prefix}self_attn.v_proj.weight": (keys, d),
            f"{prefix}self_attn.o_proj.weight": (d, d),
            f"{prefix}mlp.gate_proj.weight": (inner, d),
            f"{prefix}mlp.up_proj.weight": (inner, d),
            f"{prefix}mlp.down_proj.weight": (d, inner),
        }
    yield {"model.norm.weight": (d,), "lm_head.weight": (words, d)}
