"""A stage: the unchanged Hugging Face model with the layers that live elsewhere replaced by pass-through modules.

Masks, rotary positions, attention and LoRA stay the libraries' own code; names and layer numbers stay global. Knows
nothing about networks, tokens' meaning or optimizers. Neighbours: `split.driver` and `split.host` call it.

Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from edgelam_fl.errors import ModelError, ProtocolError
from edgelam_fl.model.adapter import Adapter, Span, target_modules
from edgelam_fl.model.bases import compute_dtype, require_base
from edgelam_fl.model.quantized import QUANTIZED, quantize_linears
from edgelam_fl.model.source import ModelSource, layer_number
from edgelam_fl.model.weights import read_tensors

_FINAL_NORMS = ("norm", "ln_f", "final_layernorm")


@dataclass(frozen=True)
class LoraSettings:
    rank: int
    alpha: float
    targets: tuple[str, ...]


class Pass(nn.Module):
    """Stands where a layer of another stage would be."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


class Stage(nn.Module):
    """One slice of a causal language model with LoRA on it."""

    def __init__(self, model: nn.Module, span: Span, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.span = span
        self.dtype = dtype
        self.adapter_parameters = {
            name.replace(".default.", "."): parameter
            for name, parameter in model.named_parameters()
            if ".lora_" in name
        }
        for parameter in self.adapter_parameters.values():
            parameter.data = parameter.data.float()

    def forward(self, inputs: torch.Tensor, row_lengths: list[int]) -> torch.Tensor:
        """Token ids [B, T] (a stage with the embedding) or hidden states [B, T, D] -> hidden states or logits [B, T, V].

        Row b holds `row_lengths[b]` real tokens; padding stands to the right.
        """
        tokens = inputs.shape[1]
        positions_T = torch.arange(tokens)
        mask_BT = (positions_T[None, :] < torch.tensor(row_lengths)[:, None]).long()
        feed = {"input_ids": inputs} if self.span.embed else {"inputs_embeds": inputs}
        output = self.model(
            **feed,
            attention_mask=mask_BT,
            position_ids=positions_T[None, :].expand(len(row_lengths), -1),
            use_cache=False,
        )
        return output.logits

    def set_trainable(self, trains: Callable[[int], bool]) -> list[nn.Parameter]:
        """Frees the adapters of the layers for which `trains` is true, freezes the others; returns the free ones."""
        for name, parameter in self.adapter_parameters.items():
            parameter.requires_grad_(trains(layer_number(name) or 0))
        return [parameter for parameter in self.adapter_parameters.values() if parameter.requires_grad]

    def adapter(self) -> Adapter:
        return {name: parameter.detach().numpy().copy() for name, parameter in self.adapter_parameters.items()}

    def load_adapter(self, adapter: Adapter) -> None:
        """Takes this stage's tensors out of `adapter`. Raises ProtocolError where one is missing or shaped otherwise."""
        for name, parameter in self.adapter_parameters.items():
            array = adapter.get(name)
            if array is None or array.shape != tuple(parameter.shape) or array.dtype != np.float32:
                got = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
                raise ProtocolError(f"adapter tensor {name}: expected float32 {list(parameter.shape)}, got {got}")
            parameter.data.copy_(torch.from_numpy(array))


def load_stages(
    source: ModelSource, spans: list[Span], base: str, lora: LoraSettings | None, compute: str = ""
) -> list[Stage]:
    """Builds the stages that one node holds. A tensor that two of them need (a tied embedding) is one tensor.

    Reads only the spans' tensors: resident memory grows with the slice, never with the model.
    """
    config = AutoConfig.from_pretrained(source.folder)
    dtype = compute_dtype(base, compute)
    require_base(base)
    models = [_skeleton(config, span, base) for span in spans]
    # keep_vars: parameters, not copies; a tied head's own name is absent from files that hold it once.
    wanted = {
        _stored_name(source, name.removesuffix("_scale") if name.endswith(".weight_scale") else name)
        for model in models
        for name in model.state_dict(keep_vars=True)
    }
    tensors = dict(read_tensors(source, sorted(wanted), base, compute))
    stages = []
    for model, span in zip(models, spans, strict=True):
        own = {name: tensors[_stored_name(source, name)] for name in model.state_dict(keep_vars=True)}
        model.load_state_dict(own, strict=True, assign=True)
        _rebuild_rotary(model, config)
        model.requires_grad_(False).eval()
        stages.append(Stage(_with_lora(model, span, lora, source), span, dtype))
    return stages


def _stored_name(source: ModelSource, name: str) -> str:
    if name == "lm_head.weight" and name not in source.index and source.tied_head:
        return "model.embed_tokens.weight"
    return name


def _skeleton(config: Any, span: Span, base: str) -> PreTrainedModel:
    """The model without storage, and without what other stages hold."""
    with torch.device("meta"):
        # The tensors that are assigned later bring their dtype. Any other here would be set as the whole process's
        # default for a moment, and two stages loading at once would leave it so.
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    inner = model.base_model
    layers, norm = _parts(inner, config)
    if not 0 <= span.first <= span.last <= len(layers):
        raise ModelError(f"a stage of layers {span.first} to {span.last} is outside the model's {len(layers)} layers")
    for number in range(len(layers)):
        if not span.first <= number < span.last:
            layers[number] = Pass()
        elif base in QUANTIZED:
            quantize_linears(layers[number], base)
    if not span.head:
        setattr(inner, norm, nn.Identity())
        model.set_output_embeddings(nn.Identity())
    elif not span.embed:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # no longer the embedding's
    if not span.embed:
        model.set_input_embeddings(nn.Identity())
    return model


def _parts(inner: nn.Module, config: Any) -> tuple[nn.ModuleList, str]:
    """The list of layers and the final norm's name, found by shape rather than by a table of architectures."""
    lists = [m for m in inner.children() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers]
    norms = [name for name in _FINAL_NORMS if hasattr(inner, name)]
    if len(lists) != 1 or len(norms) != 1:
        raise ModelError(
            f"architecture {config.model_type!r} cannot be cut: its layers or its final norm were not found"
        )
    return lists[0], norms[0]


def _rebuild_rotary(model: PreTrainedModel, config: Any) -> None:
    # Rotary tables are computed, never stored, so they are still on the meta device.
    inner = model.base_model
    if hasattr(inner, "rotary_emb"):
        inner.rotary_emb = type(inner.rotary_emb)(config=config)


def _with_lora(model: PreTrainedModel, span: Span, lora: LoraSettings | None, source: ModelSource) -> nn.Module:
    if lora is None:
        return model
    # Spelled out, so that a target which names modules of other stages only is no error here.
    names = [
        name for name in target_modules(source, lora.targets) if span.first <= (layer_number(name) or 0) < span.last
    ]
    if not names:
        return model
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=names, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute that transformers renames in version 6
        return get_peft_model(model, settings)
