"""What differs between the architectures that can be cut, as plain data. Imports no torch.

A new row needs no code where the model embeds, runs a list of layers, normalises and projects; `tests/parity/test_families.py`
then shows whether its slices are exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgelam_fl.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Module names are those inside `body`, the model without its head."""

    body: str  # what transformers calls it; every tensor outside the head has this prefix
    layers: str  # the list of layers
    embed: str  # the table of token embeddings
    norm: str | None  # after the last layer; None: the layers end in their own
    tied: bool = False  # whether embedding and head are one where config.json does not say
    input_first: bool = False  # matrices lie [in, out]
    task_head: str | None = (
        None  # classification: the trained module after `body`; None: it has a language model's head
    )


_LLAMA = Family(body="model", layers="layers", embed="embed_tokens", norm="norm")

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": Family(body="model", layers="layers", embed="embed_tokens", norm="norm", tied=True),
    "gpt2": Family(body="transformer", layers="h", embed="wte", norm="ln_f", tied=True, input_first=True),
    "bert": Family(
        body="bert", layers="encoder.layer", embed="embeddings.word_embeddings", norm=None, task_head="classifier"
    ),
}


def family_of(model_type: str, name: str) -> Family:
    """Raises ModelError for an architecture that is not in the table. `name`: the model's, for the message."""
    if model_type not in FAMILIES:
        raise ModelError(
            f"model.name: {name} is of the architecture {model_type!r}, which cannot be cut; known: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def full_names(stored: Iterable[str], family: Family) -> dict[str, str]:
    """Stored tensor name -> its name in the model with a head.

    Files of a model without head lack the body's prefix; BERT's oldest call a norm's weight and bias gamma and beta.
    """
    names = list(stored)
    bare = not any(name.startswith(f"{family.body}.") for name in names)
    full = {name: f"{family.body}.{name}" if bare else name for name in names}
    return {
        name: new.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        for name, new in full.items()
    }
