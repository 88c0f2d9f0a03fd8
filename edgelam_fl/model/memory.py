"""Computes the memory that a slice of a model needs, from config and tensor index alone. Imports no torch: plans use it.

Weights are exact. What one micro-batch keeps for its backward pass is calibrated on Llama; other families are close.

Letters in sizes: D hidden, A heads x head size, K the same of keys, I of the feed-forward part, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgelam_fl.model.adapter import Span, target_modules
from edgelam_fl.model.base_names import FP32_BYTES, ITEM_BYTES
from edgelam_fl.model.index import TensorEntry, layer_number
from edgelam_fl.model.lora import LoraKind
from edgelam_fl.model.source import ModelSource

_NF4_BLOCK = 64
_PLAIN_NORMS = ("gpt2", "bert")  # their layer norm computes in the model's dtype, others' in fp32
# number of tensors of size I per layer; other families keep gate, its activation, and up
_FEED_FORWARD_KEPT = {"gpt2": 4, "bert": 1, "phi3": 4}
_NORMED_HEADS = ("qwen3", "qwen3_moe", "olmo2", "gemma3_text")  # queries and keys have norms of their own
_FOUR_NORMS = ("gemma2", "gemma3_text")  # per layer; others have two
_FUSED = ("phi3",)  # queries, keys and values are one matrix, gate and up another
_EAGER = ("gemma2",)  # transformers computes its capped scores one by one and keeps them
_SCORE_BYTES = 8  # per score: capped ones and their softmax
_CHUNK_LOGITS, _LEAST_CHUNK = 2**22, 32  # of a head's chunk: logits, and positions
_PIECE_LOGITS = 2**19  # of the positions in a chunk whose loss is taken at once


def head_chunk(outputs: int) -> int:
    """Returns how many positions a head of so many logits computes at once in training and evaluation.

    The product with the head's matrix is slow for a few positions, and logits of many fill a small machine's memory.
    """
    return max(_LEAST_CHUNK, _CHUNK_LOGITS // outputs)


def loss_piece(outputs: int) -> int:
    """Returns how many of these positions the loss is taken of at once: few enough that their logits stay in a processor's cache."""
    return max(1, _PIECE_LOGITS // outputs)


def weights_bytes(
    source: ModelSource, spans: Iterable[Span], base: str, compute: str = "", *, tokens: bool = True
) -> int:
    """Returns the bytes of frozen weights in all `spans` of one node; a tensor in two spans (a tied embedding) counts once.

    tokens: whether the model takes and gives tokens; else embedding and head have no weights.
    """
    itemsize = ITEM_BYTES[compute or ("bfloat16" if base == "bf16" else "float32")]
    names = {name for span in spans for name in source.index if _needs(source, span, name, tokens)}
    return sum(_tensor_bytes(source, name, source.index[name], base, itemsize) for name in names)


def _needs(source: ModelSource, span: Span, name: str, tokens: bool) -> bool:
    layer = layer_number(name)
    if layer is not None:
        return span.first <= layer < span.last
    if not tokens and name in source.names_of_tokens:
        return False
    if any(part in name for part in ("embed", "wte", "wpe")):
        tied = span.head and source.tied_head and "lm_head.weight" not in source.index and "wpe" not in name
        return span.embed or tied
    return span.head


def _tensor_bytes(source: ModelSource, name: str, entry: TensorEntry, base: str, itemsize: int) -> int:
    size = math.prod(entry.shape)
    if base not in ("int8", "nf4") or not source.packs(name):
        return size * itemsize
    *experts, rows, columns = entry.shape
    count = math.prod(experts)
    if base == "nf4":
        return count * -(rows * columns // -_NF4_BLOCK) * (_NF4_BLOCK // 2 + FP32_BYTES)
    return size + count * (columns if source.family.input_first else rows) * FP32_BYTES


def unit_bytes(
    config: Mapping[str, Any],
    layers: int,
    rows: int,
    tokens: int,
    itemsize: int,
    *,
    checkpointing: bool = False,
    head: bool = False,
    all_linear: bool = False,
    dora_bytes: int = 0,
) -> int:
    """Returns the bytes of one micro-batch on `layers` layers: input, what the backward pass needs, output and its gradient.

    `config`: a model's config.json. `itemsize`: bytes per element that is computed with. `head`: the layers are followed by
    final norm, head and loss. `all_linear`: LoRA is on every matrix, not on a few of the attention's. `dora_bytes`: per layer and
    position, what DoRA keeps.
    """
    positions = rows * tokens
    hidden = positions * _size(config, "hidden_size", "n_embd") * itemsize
    layer = positions * (_layer_bytes(config, tokens, itemsize, all_linear) + dora_bytes)
    saved = layers * hidden + (layer if layers else 0) if checkpointing else layers * layer
    loss = 3 * hidden + loss_bytes(config, positions, itemsize) if head else 2 * hidden
    return hidden + saved + loss


@dataclass(frozen=True)
class DoraBytes:
    """The memory that DoRA takes beyond LoRA; none without DoRA."""

    kept: int = 0  # per position and layer, for the backward pass: outputs of the frozen matrices and of their LoRA
    passing: int = (
        0  # of one matrix at a time: the product of its factors, as a whole, and the sum whose rows are measured
    )

    @classmethod
    def of(
        cls, source: ModelSource, targets: Iterable[str], kind: LoraKind, itemsize: int, *, packed: bool = False
    ) -> DoraBytes:
        """`itemsize`: bytes per element that is computed with. `packed`: matrices are unpacked first (int8 and nf4)."""
        if not kind.dora:
            return cls()
        modules, widths = target_modules(source, targets, kind.layers), Counter[int | None]()
        for name, (out_features, _) in modules.items():
            widths[layer_number(name)] += out_features
        copies = 5 if packed else 3  # of the size of the matrix
        most = max((columns + copies * rows) * columns for rows, columns in modules.values())
        return cls((itemsize + FP32_BYTES) * max(widths.values()), FP32_BYTES * most)


def loss_bytes(config: Mapping[str, Any], positions: int, itemsize: int) -> int:
    """Returns the bytes that head and loss take for a moment: the logits of one chunk of positions, which all may carry loss.

    Their gradient replaces them. Of a piece of the chunk there are also log-probabilities and two gradients, which are fp32 always.
    """
    vocabulary = int(config["vocab_size"])
    logits = min(positions, head_chunk(vocabulary)) * vocabulary
    return logits * itemsize + min(positions, loss_piece(vocabulary)) * vocabulary * 3 * FP32_BYTES


def _layer_bytes(config: Mapping[str, Any], tokens: int, itemsize: int, all_linear: bool) -> int:
    """Returns the bytes that one layer keeps per position for the backward pass, in transformers with sdpa and peft."""
    kind = config["model_type"]
    d = _size(config, "hidden_size", "n_embd")
    heads = _size(config, "num_attention_heads", "n_head")
    head_size = config.get("head_dim") or d // heads
    a, k = heads * head_size, (config.get("num_key_value_heads") or heads) * head_size
    i = config.get("intermediate_size") or config.get("n_inner") or 4 * d
    norm = itemsize if kind in _PLAIN_NORMS else FP32_BYTES
    kept = (4 if kind in _FOUR_NORMS else 2) * d * norm
    feed_forward = _FEED_FORWARD_KEPT.get(kind, 3) * i
    if "num_experts_per_tok" in config:  # each has gate, its activation, up and output; 2 d for router and sum
        feed_forward = config["num_experts_per_tok"] * (3 * config["moe_intermediate_size"] + d) + 2 * d
    kept += itemsize * (2 * a + 2 * k + feed_forward)
    if kind in _NORMED_HEADS:
        kept += (a + k) * norm  # queries and keys before their own norms
    if kind in _EAGER:
        kept += itemsize * 2 * (a - k) + _SCORE_BYTES * heads * tokens  # keys and values once per head, and scores
    copied = itemsize != FP32_BYTES
    return kept + FP32_BYTES * _lora_inputs(d, a, i, copied=copied, all_linear=all_linear, fused=kind in _FUSED)


def _lora_inputs(d: int, a: int, i: int, *, copied: bool, all_linear: bool, fused: bool) -> int:
    """Returns the fp32 inputs that LoRA keeps per position; a model not in fp32 needs a copy per adapted matrix."""
    if not copied:
        return d + (d + i if all_linear else 0)
    return (2 if fused else 5) * d + a + i if all_linear else 2 * d


def _size(config: Mapping[str, Any], *names: str) -> int:
    return next(int(config[name]) for name in names if name in config)
