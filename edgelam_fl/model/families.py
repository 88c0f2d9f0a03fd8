"""The architectures that can be cut and what differs between them, as plain data. Imports no torch.

A new row needs no code if the model embeds, runs a list of layers, normalises and projects; `tests/parity/test_families.py`
then shows whether its slices are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgelam_fl.errors import ModelError


@dataclass(frozen=True)
class Experts:
    """A mixture of experts. In the model two tensors hold the matrices of all experts; files hold each expert's by itself."""

    block: str  # name inside a layer of the feed-forward part: it has experts, or is a plain one
    router: str  # inside `block`: its matrix is neither packed nor adapted
    held: str  # inside `block`: the module of the two tensors
    joined: Mapping[
        str, tuple[str, ...]
    ]  # tensor in the model -> each expert's matrices in it, in the order of their rows


@dataclass(frozen=True)
class Family:
    """One architecture. Module names are relative to `body`, the model without its head."""

    body: str  # its name in transformers; every tensor outside the head has this prefix
    layers: str  # the list of layers
    embed: str  # the table of token embeddings
    norm: str | None  # after the last layer; None: the last layer has its own
    tied: bool = False  # whether embedding and head are one tensor if config.json does not say
    input_first: bool = False  # matrices are stored as [in, out]
    task_head: str | None = (
        None  # classification: the trained module after `body`; None: it has a language model's head
    )
    experts: Experts | None = None  # of layers whose feed-forward part is a mixture of experts


_LLAMA = Family(body="model", layers="layers", embed="embed_tokens", norm="norm")
_GEMMA = replace(_LLAMA, tied=True)

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": replace(
        _LLAMA,
        experts=Experts(
            "mlp", "gate", "experts", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
        ),
    ),
    "phi3": _LLAMA,
    "olmo2": _LLAMA,
    "smollm3": replace(_LLAMA, tied=True),
    "granite": _LLAMA,
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": Family(body="transformer", layers="h", embed="wte", norm="ln_f", tied=True, input_first=True),
    "bert": Family(
        body="bert", layers="encoder.layer", embed="embeddings.word_embeddings", norm=None, task_head="classifier"
    ),
}

NO_LAYERS = "edgelam-network"  # model_type of networks of our own
_NETWORK = Family(body="", layers="", embed="", norm=None)

# The keys of config.json that hold a model's own dropout: of attention's weights, elsewhere, and the value if a key is missing.
_DROPOUT: dict[str, tuple[str, tuple[str, ...], float]] = {
    "gpt2": ("attn_pdrop", ("embd_pdrop", "resid_pdrop"), 0.1),
    "bert": ("attention_probs_dropout_prob", ("hidden_dropout_prob",), 0.1),
}
_USUAL_DROPOUT = ("attention_dropout", ("resid_pdrop",), 0.0)

_WAY_OUT = {  # of an architecture that cannot be cut although a part of it can
    "gemma3": (
        "it is Gemma 3 with images. Its text model alone can be cut. In Python, transformers.Gemma3ForCausalLM"
        ".from_pretrained(MODEL, key_mapping={'^language_model.': ''}).save_pretrained(FOLDER, save_original_format=False) "
        "saves it; copy the tokenizer's files and generation_config.json beside it, and set model.name to FOLDER"
    ),
}


def family_of(model_type: str, name: str) -> Family:
    """Returns the row of an architecture. Raises ModelError for an unknown one; `name` is the model's, for the message."""
    if model_type == NO_LAYERS:
        return _NETWORK
    if model_type not in FAMILIES:
        way_out = f"; {_WAY_OUT[model_type]}" if model_type in _WAY_OUT else ""
        raise ModelError(
            f"model.name: {name} is of the architecture {model_type!r}, which cannot be cut; known: {', '.join(FAMILIES)}"
            f"{way_out}"
        )
    return FAMILIES[model_type]


def attention_dropout(config: Mapping[str, Any]) -> float:
    """Returns the share of attention's weights that the model drops in training, by its config.json."""
    key, _, usual = _DROPOUT.get(str(config.get("model_type")), _USUAL_DROPOUT)
    return float(config.get(key, usual) or 0.0)


def most_dropout(config: Mapping[str, Any]) -> float:
    """Returns the largest dropout that the model has of its own, by its config.json; 0: it has none."""
    _, others, usual = _DROPOUT.get(str(config.get("model_type")), _USUAL_DROPOUT)
    return max(attention_dropout(config), *(float(config.get(key, usual) or 0.0) for key in others))


def full_names(stored: Iterable[str], family: Family) -> dict[str, str]:
    """Maps stored tensor names to names in the model with a head.

    Files of a model without head lack the prefix of the body; the oldest BERT files call a norm's weight and bias gamma and
    beta.
    """
    names = list(stored)
    bare = not any(name.startswith(f"{family.body}.") for name in names)
    full = {name: f"{family.body}.{name}" if bare else name for name in names}
    return {
        name: new.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        for name, new in full.items()
    }
