"""A stage: the unchanged Hugging Face model with the layers that live elsewhere replaced by pass-through modules.

Masks, rotary positions, attention and LoRA stay the libraries' own code; names and layer numbers stay global. Knows
nothing about networks, tokens' meaning or optimizers. Neighbours: `split.driver` and `split.host` call it.

Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PreTrainedModel

from edgelam_fl.errors import ModelError, ProtocolError
from edgelam_fl.model.adapter import PREFIX, Adapter, Span, target_modules
from edgelam_fl.model.bases import compute_dtype, require_base
from edgelam_fl.model.carry import CARRY_A, CARRY_B
from edgelam_fl.model.families import Family
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.modules import CarryFactors, Pass, StageCache, UnitDropout, UnitSeed
from edgelam_fl.model.skeleton import fill_computed, skeleton
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.weights import read_tensors

AdapterSet = dict[str, nn.Parameter]
ReadTensors = Callable[[ModelSource, list[str], str, str], Iterable[tuple[str, torch.Tensor]]]


@dataclass(frozen=True)
class LoraSettings:
    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0


class Stage(nn.Module):
    """One slice of a model, with LoRA on it, and the task head where there is one.

    It is always in evaluation mode: what is random in training is LoRA's dropout alone, and that comes from a seed. One
    thread at a time may compute on it.
    """

    def __init__(self, model: nn.Module, span: Span, dtype: torch.dtype, family: Family, dropout: float) -> None:
        super().__init__()
        self.model = model
        self.span = span
        self.dtype = dtype
        self._family = family
        self._seed = UnitSeed()
        self._recomputes = False
        if dropout:
            for name, module in model.named_modules():
                if isinstance(module, LoraLayer):
                    module.lora_dropout["default"] = UnitDropout(dropout, name.removeprefix(PREFIX), self._seed)
        self._carries = {
            PREFIX + name.removeprefix(PREFIX): CarryFactors(module.get_base_layer(), dtype)
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
        }
        self._places = _adapter_places(model, family)
        self.adapter_parameters: AdapterSet = {
            name: module.get_parameter(attribute) for name, (module, attribute) in self._places.items()
        }
        for parameter in self.adapter_parameters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self.eval()

    # ---------------------------------------------------------------- computing

    def forward(
        self,
        inputs: torch.Tensor,
        row_lengths: list[int],
        *,
        layers: tuple[int, int] | None = None,
        unit_seed: int | None = None,
        cache: StageCache | None = None,
        pad_left: bool = False,
    ) -> torch.Tensor:
        """Token ids [B, T] (a stage with the embedding) or hidden states [B, T, D] -> hidden states [B, T, D], or from
        a stage with the head logits [B, T, V], in classification [B, classes].

        Row b holds `row_lengths[b]` real tokens; padding stands to the right, or with `pad_left` to the left.
        layers: (enter, leave), where only some of the stage's layers are on the route. unit_seed: LoRA's dropout is on,
        with masks of this seed. cache: from `new_cache`; the rows go on behind what it holds, with whatever padding each
        call has (a window slides over padding too, so with sliding windows and unequal rows pad to the left).
        """
        mask_BT, positions_BT = _mask_and_positions(inputs.shape[1], row_lengths, pad_left, cache)
        feed: dict[str, Any] = {"input_ids": inputs} if self.span.embed else {"inputs_embeds": inputs}
        if self._family.task_head is None:
            feed.update(past_key_values=cache, use_cache=cache is not None)
        with self._only(layers, recompute=cache is None), self._seed.set_to(unit_seed):
            output = self.model(**feed, attention_mask=mask_BT, position_ids=positions_BT)
        if cache is not None:
            cache.mask_BT = mask_BT
        logits: torch.Tensor = output.logits
        return logits

    def new_cache(self) -> StageCache:
        """For the keys and values of one batch that is generated."""
        if self._family.task_head is not None:
            raise ModelError("this model classifies; it generates nothing")
        return StageCache(self._transformer.config)

    def set_checkpointing(self, on: bool) -> None:
        """Whether a layer keeps only its input for the backward pass, and is computed again there. Same bits."""
        self._recomputes = on
        for number in range(self.span.first, self.span.last):
            layer: Any = self._layers[number]
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = on, self._recomputable

    @property
    def _transformer(self) -> PreTrainedModel:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def _layers(self) -> nn.ModuleList:
        return self._transformer.get_submodule(f"{self._family.body}.{self._family.layers}")

    @contextmanager
    def _only(self, route: tuple[int, int] | None, recompute: bool) -> Iterator[None]:
        """In here, layers that are not on the route pass through."""
        span, layers = self.span, self._layers
        enter, leave = route or (span.first, span.last)
        if not span.first <= enter <= leave <= span.last:
            raise ProtocolError(f"layers {enter} to {leave} asked of a stage of layers {span.first} to {span.last}")
        if (span.embed and enter != span.first) or (span.head and leave != span.last):
            raise ProtocolError(f"layers {enter} to {leave} leave out the embedding or the head, which this stage has")
        absent = {n: layers[n] for n in range(span.first, span.last) if not enter <= n < leave}
        for number in range(enter, leave):
            # Asked by transformers before it checkpoints a layer; its inner modules stay as they are.
            layers[number].training = self._recomputes and recompute
        for number in absent:
            layers[number] = Pass()
        try:
            yield
        finally:
            for number, layer in absent.items():
                layers[number] = layer

    def _recomputable(self, layer: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
        """`layer(*inputs)`, whose backward pass computes it again with the adapter set and the seed that are in use now."""
        adapter_set, seed = self.adapter_parameters, self._seed.value

        def again(*inputs: Any) -> torch.Tensor:
            in_use = self.adapter_parameters
            self.use(adapter_set)
            try:
                with self._seed.set_to(seed):
                    return layer(*inputs)
            finally:
                self.use(in_use)

        output: torch.Tensor = checkpoint(again, *inputs, use_reentrant=False, preserve_rng_state=False)
        return output

    # ---------------------------------------------------------------- the adapter

    def new_adapter_set(self) -> AdapterSet:
        """A copy of the set in use: parameters of its own, which `use` puts in place."""
        return {
            name: nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            for name, parameter in self.adapter_parameters.items()
        }

    def use(self, adapter_set: AdapterSet) -> None:
        """Computes with these parameters from now on. A backward pass still belongs to the set of its forward pass."""
        if adapter_set is self.adapter_parameters:
            return
        for name, (module, attribute) in self._places.items():
            setattr(module, attribute, adapter_set[name])
        self.adapter_parameters = adapter_set

    def set_trainable(self, trains: Callable[[int | None], bool]) -> list[nn.Parameter]:
        """Frees what is in use of the layers for which `trains` is true, freezes the rest; None asks for the task head.

        Returns `trainable()`.
        """
        for name, parameter in self.adapter_parameters.items():
            parameter.requires_grad_(trains(layer_number(name)))
        return self.trainable()

    def trainable(self) -> list[nn.Parameter]:
        """The free parameters of the set in use; the order is the same for every set."""
        return [self.adapter_parameters[name] for name in self._places if self.adapter_parameters[name].requires_grad]

    def adapter(self) -> Adapter:
        return {name: parameter.detach().numpy().copy() for name, parameter in self.adapter_parameters.items()}

    def carry(self) -> Adapter:
        """The carry factors in use, by name."""
        return {
            module + end: array
            for module, factors in self._carries.items()
            if factors.arrays is not None
            for end, array in zip((CARRY_A, CARRY_B), factors.arrays, strict=True)
        }

    def load_adapter(self, adapter: Adapter) -> None:
        """Takes this stage's tensors out of `adapter`, carry factors where it has any (all sets of parameters share them).

        Raises ProtocolError where a tensor is missing or shaped otherwise.
        """
        for name, parameter in self.adapter_parameters.items():
            array = adapter.get(name)
            if array is None or array.shape != tuple(parameter.shape) or array.dtype != np.float32:
                got = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
                raise ProtocolError(f"adapter tensor {name}: expected float32 {list(parameter.shape)}, got {got}")
            parameter.data.copy_(torch.from_numpy(array))
        for module, factors in self._carries.items():
            a_MI, b_OM = adapter.get(module + CARRY_A), adapter.get(module + CARRY_B)
            given = None if a_MI is None and b_OM is None else self._checked_carry(module, a_MI, b_OM)
            factors.take(given)

    def _checked_carry(
        self, module: str, a_MI: np.ndarray | None, b_OM: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Raises ProtocolError where they do not fit the module's own factors, or each other."""
        _, features_in = self.adapter_parameters[module + ".lora_A.weight"].shape
        features_out, _ = self.adapter_parameters[module + ".lora_B.weight"].shape
        if a_MI is None or b_OM is None or {a_MI.dtype, b_OM.dtype} != {np.dtype(np.float32)}:
            raise ProtocolError(f"carry factors of {module}: expected A and B in float32")
        rank = len(a_MI)
        if not rank or a_MI.shape != (rank, features_in) or b_OM.shape != (features_out, rank):
            raise ProtocolError(
                f"carry factors of {module}: expected A [rank, {features_in}] and B [{features_out}, rank], got "
                f"{list(a_MI.shape)} and {list(b_OM.shape)}"
            )
        return a_MI, b_OM


def _adapter_places(model: nn.Module, family: Family) -> dict[str, tuple[nn.Module, str]]:
    """Adapter name -> the module and attribute where its parameter is: LoRA's factors, and the task head's tensors."""
    places = {}
    for name, _ in model.named_parameters():
        full = PREFIX + name.removeprefix(PREFIX)
        of_head = family.task_head is not None and full.startswith(f"{PREFIX}{family.task_head}.")
        if ".lora_" in full or of_head:
            module, _, attribute = name.rpartition(".")
            places[full.replace(".default.", ".")] = (model.get_submodule(module), attribute)
    return places


def _mask_and_positions(
    tokens: int, row_lengths: list[int], pad_left: bool, cache: StageCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is real, of the cache's tokens and the new ones; and the new ones' positions."""
    slots_T, lengths_B1 = torch.arange(tokens), torch.tensor(row_lengths)[:, None]
    padding_B1 = tokens - lengths_B1 if pad_left else torch.zeros_like(lengths_B1)
    positions_BT = (slots_T - padding_B1).clamp(min=0)
    mask_BT = ((slots_T >= padding_B1) & (slots_T < padding_B1 + lengths_B1)).long()
    if cache is not None and cache.mask_BT is not None:
        positions_BT = positions_BT + cache.mask_BT.sum(dim=1, keepdim=True)
        mask_BT = torch.cat([cache.mask_BT, mask_BT], dim=1)
    return mask_BT, positions_BT


# ---------------------------------------------------------------- loading


def load_stages(
    source: ModelSource,
    spans: list[Span],
    base: str,
    lora: LoraSettings | None,
    compute: str = "",
    *,
    classes: int = 0,
    read: ReadTensors = read_tensors,
) -> list[Stage]:
    """Builds the stages that one node holds. A tensor that two of them need (a tied embedding) is one tensor.

    Reads only the spans' tensors: resident memory grows with the slice, never with the model. compute: "float32",
    "bfloat16", or "" for what the base has. classes: the outputs of a classifier; its head is zero until an adapter
    is loaded. read: where the tensors come from.
    """
    config, family = AutoConfig.from_pretrained(source.folder), source.family
    dtype = compute_dtype(base, compute)
    require_base(base)
    models = [skeleton(config, family, span, base, classes) for span in spans]
    wanted = {
        _stored_name(source, name.removesuffix("_scale") if name.endswith(".weight_scale") else name)
        for model in models
        for name in _frozen(model, family)
    }
    tensors = dict(read(source, sorted(wanted), base, compute))
    stages = []
    for model, span in zip(models, spans, strict=True):
        own = {name: tensors[_stored_name(source, name)] for name in _frozen(model, family)}
        model.load_state_dict(own, strict=False, assign=True)
        fill_computed(model, family)
        model.requires_grad_(False)
        dropout = lora.dropout if lora else 0.0
        stages.append(Stage(_with_lora(model, span, lora, source), span, dtype, family, dropout))
    return stages


def _frozen(model: PreTrainedModel, family: Family) -> list[str]:
    """The names of the state that comes from the base model's files."""
    # keep_vars: parameters, not copies
    names = model.state_dict(keep_vars=True)
    return [name for name in names if family.task_head is None or not name.startswith(f"{family.task_head}.")]


def _stored_name(source: ModelSource, name: str) -> str:
    if name == "lm_head.weight" and name not in source.index and source.tied_head:
        return f"{source.family.body}.{source.family.embed}.weight"  # files hold a tied tensor once
    return name


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
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=names,
        lora_dropout=0.0,  # UnitDropout stands in its place
        bias="none",
        fan_in_fan_out=source.family.input_first,
        task_type=None if source.family.task_head else "CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute that transformers renames in version 6
        return get_peft_model(model, settings)
