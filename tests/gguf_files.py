"""Writes tiny models as GGUF files, as llama.cpp's converter lays them out, and lets llama.cpp read them where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
# A folder where `npm install node-llama-cpp` was run (Node 20). Without it the comparisons are skipped.
LLAMA_CPP = os.environ.get("EDGELAM_LLAMA_CPP", "")

needs_llama_cpp = pytest.mark.skipif(
    not (LLAMA_CPP and shutil.which("node")),
    reason="llama.cpp is not here: run `npm install node-llama-cpp` in a folder and set EDGELAM_LLAMA_CPP to it",
)
Keys = Mapping[str, Any]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PAIRED = ("llama", "granite", "smollm3")  # rows of q and k are stored in pairs
SPECIALS = ("<unk>", "</s>", "<|im_start|>", "<|im_end|>")


def byte_vocabulary(
    pre: str = "llama-bpe", merges: Sequence[str] = ("t h",), specials: Sequence[str] = SPECIALS
) -> Keys:
    """Returns the keys of a byte-level vocabulary: the special tokens come first, the merged ones last."""
    tokens = [*specials, *BYTES, *(merge.replace(" ", "") for merge in merges)]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(specials) + [1] * (len(tokens) - len(specials)),
        "tokenizer.ggml.merges": list(merges), "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip


def space_vocabulary(texts: Sequence[str], prefix: bool | None = None) -> Keys:
    """Returns the keys of a SentencePiece vocabulary that was learned from `texts`; prefix: None leaves its key out."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    specials = ["<unk>", "<s>", "</s>", *bytes_, "<|user|>"]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials, show_progress=False, max_token_length=8)
    tokenizer.train_from_iterator(list(texts) * 4, trainer)
    vocabulary = tokenizer.get_vocab()
    learned = len(vocabulary) - len(specials)
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": sorted(vocabulary, key=lambda token: vocabulary[token]),
        "tokenizer.ggml.scores": [0.0] * len(specials) + [-float(number) for number in range(learned)],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 3, *[1] * learned],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }  # fmt: skip


def across_words(texts: Sequence[str]) -> list[str]:
    """Returns merges that were learned from texts without words, so that each way to cut texts into words shows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=BYTES, show_progress=False, min_frequency=2)
    tokenizer.train_from_iterator(list(texts) * 4, trainer)
    return [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def keys_of(config: Any, architecture: str) -> Keys:
    """Returns the keys that llama.cpp's converter writes for a config of transformers."""
    if architecture == "gpt2":
        own = {
            "context_length": config.n_positions, "embedding_length": config.n_embd, "block_count": config.n_layer,
            "feed_forward_length": 4 * config.n_embd, "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }  # fmt: skip
    else:
        own = {
            "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": float(config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"]),
        }  # fmt: skip
        width = getattr(config, "head_dim", None)
        if (width and width * config.num_attention_heads != config.hidden_size) or architecture in (
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3",
        ):
            own |= {"attention.key_length": width, "attention.value_length": width}
        if architecture == "granite":
            own |= {
                "attention.scale": config.attention_multiplier, "embedding_scale": config.embedding_multiplier,
                "residual_scale": config.residual_multiplier, "logit_scale": config.logits_scaling,
            }  # fmt: skip
        if architecture == "gemma2":
            own |= {
                "attn_logit_softcapping": config.attn_logit_softcapping, "final_logit_softcapping": config.final_logit_softcapping,
                "attention.sliding_window": config.sliding_window,
            }  # fmt: skip
        if architecture == "gemma3":
            own["attention.sliding_window"] = config.sliding_window
        if architecture in PAIRED:
            own["rope.dimension_count"] = width or config.hidden_size // config.num_attention_heads
    return {"general.architecture": architecture, **{f"{architecture}.{name}": value for name, value in own.items()}}


def tensors_of(model: Any, architecture: str) -> dict[str, np.ndarray]:
    """Returns a model's weights with the names, the order of rows and the values that llama.cpp's converter gives them."""
    number = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    config = model.config
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    made = {}
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        stored, array = f"{names.get_name(stem)}.{kind}", tensor.float().numpy()
        if architecture in PAIRED and (".attn_q." in stored or ".attn_k." in stored):
            heads = config.num_attention_heads if ".attn_q." in stored else config.num_key_value_heads
            array = array.reshape(heads, 2, len(array) // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
        if architecture.startswith("gemma") and stored.endswith("norm.weight"):
            array = array + 1
        if architecture == "gpt2" and array.ndim == 2 and stored.startswith("blk."):
            array = array.T
        made[stored] = np.ascontiguousarray(array)
    return made


def write_gguf(
    path: Path, keys: Keys, tensors: Mapping[str, np.ndarray], *, quantization: str = "F32", big_endian: bool = False
) -> Path:
    """Writes a file. keys with the value None are left out; matrices are stored in `quantization`."""
    order = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(str(path), keys["general.architecture"], endianess=order)
    for key, value in keys.items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif key != "general.architecture" and value is not None:
            writer.add_key_value(key, value, *_type_of(value))
    kind = gguf.GGMLQuantizationType[quantization]
    for name, array in tensors.items():
        if array.ndim == 2 and quantization != "F32" and array.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _type_of(value: Any) -> tuple[gguf.GGUFValueType, gguf.GGUFValueType | None]:
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    if isinstance(value, list):
        element = gguf.GGUFValueType.INT32 if isinstance(value[0], int) else gguf.GGUFValueType[kinds[type(value[0])]]
        return gguf.GGUFValueType.ARRAY, element
    return gguf.GGUFValueType[kinds[type(value)]], None


def read_by_llama_cpp(
    file: Path,
    folder: Path,
    *,
    texts: Sequence[str] = (),
    ids: Sequence[Sequence[int]] = (),
    vocabulary: int = 0,
    prompts: Sequence[Sequence[int]] = (),
    count: int = 0,
    lora: Path | None = None,
) -> dict[str, Any]:
    """Returns what llama.cpp makes of a file: `tokens` of the texts, `ends` among the first `vocabulary` tokens, whether it
    `begins` texts with a token, `probabilities`: of the next token after each of the `ids`, as tensors [tokens, vocabulary], and
    `continued`: the `count` likeliest tokens after each of the prompts, fewer if one ends the text. lora: an adapter beside it.
    """
    request, answer = folder / "request.json", folder / "answer.json"
    asked = {"file": str(file), "texts": list(texts), "ids": [list(row) for row in ids], "vocabulary": vocabulary}
    asked |= {"prompts": [list(row) for row in prompts], "count": count, "lora": str(lora) if lora else ""}
    request.write_text(json.dumps(asked), encoding="utf-8")
    subprocess.run(["node", SCRIPT, LLAMA_CPP, request, answer], check=True, timeout=540, stderr=subprocess.PIPE)
    said: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    assert "error" not in said, said
    said["probabilities"] = [
        torch.tensor([[position.get(str(token), 0.0) for token in range(len(position))] for position in row])
        for row in said["probabilities"]
    ]
    return said


def sharp_model(config: Any) -> Any:
    """Returns a random model whose attention is sharp, so that its positions matter, and whose norms are not all one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
        if name.endswith(("q_proj.weight", "k_proj.weight", "c_attn.weight")):
            parameter.data *= 12
    model.get_output_embeddings().weight.data *= 4 if config.tie_word_embeddings else 15
    return model
