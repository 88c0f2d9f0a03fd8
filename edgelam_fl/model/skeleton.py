"""Makes the unchanged Hugging Face model on the meta device and replaces what other stages hold. Knows no files of weights.

Neighbour: `model.stage` adds the tensors of the slice and LoRA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from edgelam_fl.errors import ModelError
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.families import Family
from edgelam_fl.model.modules import Embedded, NoPositions, Pass, TaskHead
from edgelam_fl.model.quantized import QUANTIZED, quantize_layer
from edgelam_fl.model.task_modules import InputModule, OutputModule
from edgelam_fl.model.value_ends import INPUT_MODULE, OUTPUT_MODULE, ValueEnds


def skeleton(
    config: Any, family: Family, span: Span, base: str, classes: int, values: ValueEnds | None = None
) -> PreTrainedModel:
    """Makes the model without storage and without what other stages hold. What no file has is zero: a task head, modules of values.

    `values`: of a model that takes and gives values; None: it takes tokens.
    """
    _check_head(config.model_type, family, classes, values)
    model = whole_on_meta(config, classes)
    held = family.experts.held if family.experts else None
    _keep_layers(model.get_submodule(f"{family.body}.{family.layers}"), span, base, held)
    if not span.embed:
        _drop_embedding(model, family, has_lm_head=span.head and family.task_head is None and values is None)
    elif values is not None:
        model.set_input_embeddings(nn.Identity())
        setattr(model, INPUT_MODULE, InputModule(values, config.hidden_size))
    if not span.head:
        _drop_head(model, family)
    elif values is not None:
        model.set_output_embeddings(nn.Identity())
        setattr(model, OUTPUT_MODULE, OutputModule(values, config.hidden_size))
    elif family.task_head is not None:
        setattr(model, family.task_head, TaskHead(config.hidden_size, classes))
        nn.init.zeros_(getattr(model, family.task_head).weight)
        nn.init.zeros_(getattr(model, family.task_head).bias)
    return model


class _Undrawn(TorchFunctionMode):
    """Leaves out torch's starting values, which take a third of the time and more: on meta they are nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def whole_on_meta(config: Any, classes: int) -> PreTrainedModel:
    """Makes the whole model without storage; `classes`: 0 for a language model."""
    if classes:
        config.num_labels = classes
    auto = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    with torch.device("meta"), _Undrawn():
        # The tensors that are assigned later have their own dtype. Any other dtype here would become the default of the
        # whole process for a moment, and two stages that load at the same time could leave it so.
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    return model


def _check_head(model_type: str, family: Family, classes: int, values: ValueEnds | None) -> None:
    if family.task_head is not None and values is not None:
        raise ModelError(f"task.kind: {model_type} classifies texts; a task of values takes a language model")
    if family.task_head is None and classes:
        raise ModelError(f"task.kind: {model_type} has no task head; allowed: a task without classes, or a BERT model")
    if family.task_head is not None and not classes:
        raise ModelError(
            f"task.kind: {model_type} has no language model head; allowed: classification, with task.classes"
        )


def _keep_layers(layers: nn.Module, span: Span, base: str, held: str | None) -> None:
    assert isinstance(layers, nn.ModuleList)
    if not 0 <= span.first <= span.last <= len(layers):
        raise ModelError(f"a stage of layers {span.first} to {span.last} is outside the model's {len(layers)} layers")
    for number in range(len(layers)):
        if not span.first <= number < span.last:
            layers[number] = Pass()
        elif base in QUANTIZED:
            quantize_layer(layers[number], base, held)


def _drop_embedding(model: PreTrainedModel, family: Family, *, has_lm_head: bool) -> None:
    if has_lm_head:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # no longer the embedding's
    body = model.get_submodule(family.body)
    if hasattr(body, "embeddings"):  # BERT's add positions and types and normalise
        body.embeddings = Embedded()
    else:
        model.set_input_embeddings(nn.Identity())
    if hasattr(body, "wpe"):
        body.wpe = NoPositions()
    if hasattr(body, "embedding_multiplier"):  # Granite's: the stage with the embedding has multiplied
        body.embedding_multiplier = 1.0


def _drop_head(model: PreTrainedModel, family: Family) -> None:
    body = model.get_submodule(family.body)
    if family.norm is not None:
        setattr(body, family.norm, nn.Identity())
    if family.task_head is None:
        model.set_output_embeddings(nn.Identity())
    else:
        body.pooler = Pass()
        setattr(model, family.task_head, nn.Identity())


def fill_computed(model: PreTrainedModel, family: Family) -> None:
    """Fills the tables that are computed and never stored, and so are still on the meta device."""
    body = model.get_submodule(family.body)
    if hasattr(body, "rotary_emb"):
        body.rotary_emb = type(body.rotary_emb)(config=model.config)
    for module in body.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
        for name in ("position_ids", "token_type_ids"):
            if hasattr(module, name):
                rows, length = getattr(module, name).shape
                values = torch.arange(length) if name == "position_ids" else torch.zeros(length, dtype=torch.long)
                setattr(module, name, values.expand(rows, -1))
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise ModelError(
            f"{model.config.model_type}: nothing fills {', '.join(left[:3])}; its row in FAMILIES is wrong"
        )
