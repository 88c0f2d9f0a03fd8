"""The dropout that a model has of its own (GPT-2 and BERT: 0.1 in config.json), with masks of a micro-batch's seed.

Masks are those of `UnitDropout`: they depend on the seed, the module's name and the shape alone, so they are the same on any stage
and in a layer that is recomputed. transformers' fused attention draws its masks from the generator of the whole process;
so attention whose weights are dropped is computed here step by step, as transformers' "eager" does. Knows no stages' links.

Shapes: B rows, H heads, T tokens, C channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from edgelam_fl.errors import ModelError
from edgelam_fl.model.adapter import PREFIX, Span
from edgelam_fl.model.families import Family, attention_dropout
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.modules import UnitDropout, UnitSeed

_ATTENTION = "edgelam_unit_dropout"  # in transformers' tables of attention


def turn_on(model: nn.Module, config: Any, span: Span, family: Family, seed: UnitSeed) -> None:
    """Replaces the dropout that belongs to `span`; it acts while `seed` has a value. Raises ModelError if attention forbids it."""
    share = attention_dropout(config.to_dict())
    found = list(model.named_modules())
    for name, module in found:
        full = name.removeprefix(PREFIX)
        if type(module) is nn.Dropout and module.p and _is_of(span, family, full):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, UnitDropout(module.p, full, seed))
        elif share and hasattr(module, "is_causal") and layer_number(f"{full}.") is not None:
            module.unit_dropout = UnitDropout(share, f"{full}.weights", seed)
    if share:
        if config._attn_implementation not in ("sdpa", _ATTENTION):  # a node's stages share their config
            raise ModelError(
                f"model.dropout = 'own': {config.model_type} drops {share:g} of its attention's weights, in an attention "
                f"({config._attn_implementation}) that has no masks by seed here; allowed: 'off'"
            )
        for _, module in found:
            if hasattr(module, "config"):
                module.config._attn_implementation = _ATTENTION


def _is_of(span: Span, family: Family, name: str) -> bool:
    """Whether the dropout of this name acts in the span: in its layers, behind the embedding, or before the task's head."""
    if layer_number(f"{name}.") is not None:
        return True  # other stages' layers are pass-through modules, which have none
    return span.embed if name.startswith(f"{family.body}.") else span.head


def _attention(
    module: nn.Module,
    query_BHTC: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends as transformers' sdpa does; with a seed, as its eager attention does, with some of the weights dropped."""
    dropout: UnitDropout | None = getattr(module, "unit_dropout", None)
    if dropout is None or dropout.seed.value is None:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query_BHTC, key, value, attention_mask, scaling=scaling, **more
        )
        return found
    groups, tokens = query_BHTC.shape[1] // key.shape[1], query_BHTC.shape[2]
    key_BHTC, value_BHTC = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    scores_BHTT = query_BHTC @ key_BHTC.transpose(2, 3) * (scaling or query_BHTC.shape[-1] ** -0.5)
    if attention_mask is None and getattr(module, "is_causal", True):
        attention_mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query_BHTC.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores_BHTT = scores_BHTT.masked_fill(~attention_mask, torch.finfo(scores_BHTT.dtype).min)
    elif attention_mask is not None:
        scores_BHTT = scores_BHTT + attention_mask
    weights_BHTT = dropout(scores_BHTT.softmax(-1, dtype=torch.float32).to(query_BHTC.dtype))
    return (weights_BHTT @ value_BHTC).transpose(1, 2).contiguous(), weights_BHTT


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
