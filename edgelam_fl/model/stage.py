"""A stage: the unchanged Hugging Face model with the layers of other stages replaced by pass-through modules.

Masks, rotary positions, attention and LoRA stay the libraries' own code; names and layer numbers stay global. Knows
nothing about networks, tokens' meaning or optimizers. Neighbours: `split.driver` and `split.host` call it.

Shapes: B rows, T tokens, D hidden, V vocabulary, N chosen positions.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PreTrainedModel

from edgelam_fl.errors import ModelError, ProtocolError
from edgelam_fl.model.adapter import LM_HEAD, PREFIX, Adapter, Span, saved_tensors, target_modules
from edgelam_fl.model.bases import compute_dtype, require_base
from edgelam_fl.model.carry import CARRY_A, CARRY_B
from edgelam_fl.model.chip import CPU, onto
from edgelam_fl.model.cut import CUT_A, CUT_B, CutAdapter, is_cut
from edgelam_fl.model.families import Family
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.lora import MAGNITUDE, PLAIN, A, B, LoraKind, pattern_of
from edgelam_fl.model.modules import CarryFactors, CutDown, CutUp, Normed, Pass, StageCache, UnitDropout, UnitSeed
from edgelam_fl.model.own_dropout import turn_on
from edgelam_fl.model.skeleton import fill_computed, skeleton
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.value_ends import INPUT_MODULE, NETWORK, OUTPUT_MODULE, OwnNetwork, ValueModel, is_of_values
from edgelam_fl.model.weights import ALIGNED_BYTES, read_tensors

AdapterSet = dict[str, nn.Parameter]
ReadTensors = Callable[[ModelSource, list[str], str, str], Iterable[tuple[str, torch.Tensor]]]


@dataclass(frozen=True)
class LoraSettings:
    """LoRA of one stage: its rank, alpha, the modules that it is put on, its dropout and kind, and the route's cut adapter."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    own_dropout: bool = False  # whether the model's own dropout is on in training
    cut: CutAdapter | None = None
    kind: LoraKind = PLAIN


class Stage(nn.Module):
    """One span of a model with LoRA on it, and with the task head if it has one.

    A stage is always in evaluation mode: only LoRA's dropout and, if it was turned on, the model's own are random in training,
    and they come from a seed. One thread at a time may compute on it.
    """

    def __init__(
        self,
        model: nn.Module,
        span: Span,
        dtype: torch.dtype,
        family: Family,
        dropout: float,
        cut: CutDown | CutUp | None = None,
        *,
        own_dropout: bool = False,
        chip: torch.device = CPU,
        adapted: frozenset[int] = frozenset(),
        saved: Collection[str] = (),
        values: ValueModel | None = None,
    ) -> None:
        """`dropout`: of LoRA. `cut`: this stage's part of the cut adapter; None: it has none. `own_dropout`: the model's is on in
        training. `chip`: what the stage computes on; all of it goes there. `adapted`: the layers of the whole model in which
        something may learn. `saved`: names of the whole model's tensors that learn as a whole. `values`: of a model that takes and
        gives values; None: it takes tokens.
        """
        super().__init__()
        self.model = model.to(chip)
        self.span = span
        self.dtype = dtype
        self.chip = chip
        self.family = family
        self.adapted, self.saved, self._values = adapted, saved, values
        self._seed = UnitSeed()
        self._recomputes = False
        self._normed = Normed()
        if dropout:
            for name, module in model.named_modules():
                if isinstance(module, LoraLayer):
                    module.lora_dropout["default"] = UnitDropout(dropout, name.removeprefix(PREFIX), self._seed)
                    if module.use_dora["default"]:
                        self._seed.dora.append(module)
        if own_dropout:
            turn_on(model, self._transformer.config, span, family, self._seed)
        self._carries = {
            PREFIX + name.removeprefix(PREFIX): CarryFactors(module.get_base_layer(), dtype)
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
        }
        self._cut = cut if cut is None else cut.to(chip)
        self._places = _adapter_places(model, family, saved) | _cut_place(cut, span, family)
        self.adapter_parameters: AdapterSet = {
            name: module.get_parameter(attribute) for name, (module, attribute) in self._places.items()
        }
        for parameter in self.adapter_parameters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self._as_loaded = {
            name: parameter.detach().clone()
            for name, parameter in self.adapter_parameters.items()
            if not name.endswith((A, B)) and layer_number(name) is not None and not is_cut(name)
        }
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
        rows: torch.Tensor | None = None,
        segments: Sequence[Sequence[int]] = (),
    ) -> torch.Tensor:
        """Computes hidden states [B, T, D], or in a stage with the head logits [B, T, V], in classification [B, classes], of a model
        of values [B, T, O].

        `inputs` are token ids [B, T] or values [B, T, F] for a stage with the embedding or what stands in its place, else hidden
        states [B, T, D], in the CPU's memory or on the
        stage's chip; what is computed stays on the chip. Row b holds `row_lengths[b]`
        real tokens; padding is on the right, or with `pad_left` on the left. layers: (enter, leave), if only some of the
        stage's layers are on the route. unit_seed: turns dropout on, with masks of this seed. cache: from `new_cache`; the
        rows continue what it holds, with any padding per call (a sliding window counts padding too, so with sliding windows and
        unequal rows pad on the left). With a cut adapter, [B, T, D + rank] is what the last host gives and the device's back takes.
        rows: numbers [N] of positions, counted row after row; a stage with a language model's head then leaves the head out and
        gives the normed hidden states [N, D] of these positions, for `logits`. segments: the lengths of several texts per row,
        which attend to themselves alone; together they are the row's real tokens. Empty: a row is one text.
        """
        takes_ids = self.span.embed and self._values is None
        if takes_ids:
            self._check_ids(inputs)
        inputs = onto(inputs, self.chip)
        if self.span.embed and not takes_ids:
            inputs = self._transformer.get_submodule(INPUT_MODULE)(inputs).to(self.dtype)
        if isinstance(self._cut, CutUp):
            inputs = self._cut(inputs)
        mask_BT: torch.Tensor | None
        if segments:
            mask_BT, positions_BT = None, packed_positions(inputs.shape[1], segments)
        else:
            mask_BT, positions_BT = _mask_and_positions(inputs.shape[1], row_lengths, pad_left, cache)
        feed: dict[str, Any] = {"input_ids": inputs} if takes_ids else {"inputs_embeds": inputs}
        if self.family.task_head is None:
            feed.update(past_key_values=cache, use_cache=cache is not None)
        headed = self.span.head and rows is None
        logits = headed and self._values is None
        with self._only(layers, recompute=cache is None), self._seed.set_to(unit_seed):
            # Without the head's code in a stage without the head: some families scale or cap what they take for logits.
            if logits and self.family.experts is not None:
                feed["output_router_logits"] = False  # else transformers computes a loss of their balance
            called = self.model if logits else self._transformer.get_submodule(self.family.body)
            mask = onto(mask_BT, self.chip) if mask_BT is not None else None
            output = called(**feed, attention_mask=mask, position_ids=onto(positions_BT, self.chip))
        if cache is not None:
            cache.mask_BT = mask_BT
        states: torch.Tensor = output.logits if logits else output.last_hidden_state
        if headed and not logits:
            states = self._transformer.get_submodule(OUTPUT_MODULE)(states)
        if rows is not None:
            return states.flatten(0, 1).index_select(0, rows.to(states.device))
        return self._cut(states) if isinstance(self._cut, CutDown) else states

    def logits(self, states_ND: torch.Tensor) -> torch.Tensor:
        """Computes a language model's logits [N, V], or values [N, O], of normed hidden states, as `forward` gives them for `rows`."""
        if self._values is not None:
            values_NO: torch.Tensor = self._transformer.get_submodule(OUTPUT_MODULE)(states_ND)
            return values_NO
        feed: dict[str, Any] = {"output_router_logits": False} if self.family.experts is not None else {}
        model = self._transformer
        body = model.get_submodule(self.family.body)
        setattr(model, self.family.body, self._normed)
        try:
            logits_1NV: torch.Tensor = model(inputs_embeds=states_ND[None], use_cache=False, **feed).logits
        finally:
            setattr(model, self.family.body, body)
        return logits_1NV[0]

    def head_parameters(self) -> list[nn.Parameter]:
        """Lists what learns of the head, which `logits` computes with, in the set in use."""
        named = self.adapter_parameters.items()
        heads = (f"{PREFIX}{LM_HEAD}.", f"{PREFIX}{OUTPUT_MODULE}.")
        return [p for name, p in named if name.startswith(heads) and p.requires_grad]

    @property
    def outputs(self) -> int:
        """The number of a head's logits or values per position, or per row in classification."""
        if self._values is not None:
            return self._values.outputs
        config = self._transformer.config
        return int(config.vocab_size if self.family.task_head is None else config.num_labels)

    def _check_ids(self, ids_BT: torch.Tensor) -> None:
        """Raises ModelError for a token without a row in the table. A tokenizer may have some, which stand for images."""
        rows, most = len(self.embeddings()), int(ids_BT.max())
        if most >= rows:
            raise ModelError(
                f"a text holds the token {most}, and the model's table of tokens has {rows} rows; take it out"
            )

    def new_cache(self) -> StageCache:
        """Makes a cache for the keys and values of one batch that is generated. Raises ModelError for a classifier."""
        if self.family.task_head is not None:
            raise ModelError("this model is a classifier; it cannot generate text")
        return StageCache(self._transformer.config)

    def set_checkpointing(self, on: bool) -> None:
        """Sets whether layers keep only their inputs and are recomputed in the backward pass. The bits are the same."""
        self._recomputes = on
        for number in range(self.span.first, self.span.last):
            layer: Any = self.layers[number]
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = on, self._recomputable

    @property
    def _transformer(self) -> PreTrainedModel:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def embeddings(self) -> torch.Tensor:
        """Returns the table of token embeddings [V, D] of a stage that holds it."""
        return (
            self._transformer.get_submodule(f"{self.family.body}.{self.family.embed}").get_parameter("weight").detach()
        )

    @property
    def layers(self) -> nn.ModuleList:
        """All layers of the model by global number; those outside the span are pass-through modules."""
        return self._transformer.get_submodule(f"{self.family.body}.{self.family.layers}")

    @contextmanager
    def _only(self, route: tuple[int, int] | None, recompute: bool) -> Iterator[None]:
        """Replaces layers that are not on the route by pass-through modules while the context is open."""
        span, layers = self.span, self.layers
        enter, leave = route or (span.first, span.last)
        if not span.first <= enter <= leave <= span.last:
            raise ProtocolError(f"layers {enter} to {leave} asked of a stage of layers {span.first} to {span.last}")
        if (span.embed and enter != span.first) or (span.head and leave != span.last):
            raise ProtocolError(f"layers {enter} to {leave} leave out the embedding or the head, which this stage has")
        absent = {n: layers[n] for n in range(span.first, span.last) if not enter <= n < leave}
        for number in range(enter, leave):
            # transformers reads this before it checkpoints a layer; the inner modules keep their own value.
            layers[number].training = self._recomputes and recompute
        for number in absent:
            layers[number] = Pass()
        try:
            yield
        finally:
            for number, layer in absent.items():
                layers[number] = layer

    def _recomputable(self, layer: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
        """Computes `layer(*inputs)`; its backward pass recomputes with the adapter set and the seed that are in use now."""
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

    # ---------------------------------------------------------------- for several threads

    def view(self) -> Stage:
        """Returns a stage of the same weights, adapter parameters and carry factors, on which another thread may compute.

        Nothing of their size is copied. Carry factors that are loaded later are the original's alone.
        """
        modules = list(self.modules())
        tensors = [value for one in [*modules, *self._carries.values()] for value in vars(one).values()]
        shared = [*self.parameters(), *self.buffers(), *(one for one in tensors if isinstance(one, torch.Tensor))]
        arrays = [factors.arrays for factors in self._carries.values() if factors.arrays is not None]
        configs = [one.config for one in modules if isinstance(one, PreTrainedModel)]
        kept: list[Any] = [*shared, *arrays, *configs, self.family, self.adapter_parameters]
        return copy.deepcopy(self, {id(one): one for one in kept})

    # ---------------------------------------------------------------- the adapter

    def new_adapter_set(self) -> AdapterSet:
        """Returns a copy of the set in use, with parameters of its own, for `use`."""
        return {
            name: nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            for name, parameter in self.adapter_parameters.items()
        }

    def untrained_set(self) -> AdapterSet:
        """Returns a set, for `use`, with which the layers compute as the base does: factors of zero, all else as it was loaded."""
        return {
            name: nn.Parameter(self._as_loaded.get(name, torch.zeros_like(parameter)), requires_grad=False)
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
        """Makes the set in use trainable in the layers for which `trains` is true and freezes the rest; returns `trainable()`.

        `trains` is called with a layer number, or with None for the task head. Of a cut adapter, A always learns and B never.
        """
        for name, parameter in self.adapter_parameters.items():
            parameter.requires_grad_(name.endswith(CUT_A) if is_cut(name) else trains(layer_number(name)))
        return self.trainable()

    def trainable(self) -> list[nn.Parameter]:
        """Lists the trainable parameters of the set in use, in an order that is the same for every set."""
        return [self.adapter_parameters[name] for name in self._places if self.adapter_parameters[name].requires_grad]

    def adapter(self) -> Adapter:
        """Copies the adapter in use."""
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self.adapter_parameters.items()}

    def carry(self) -> Adapter:
        """Returns the carry factors in use, by name."""
        return {
            module + end: array
            for module, factors in self._carries.items()
            if factors.arrays is not None
            for end, array in zip((CARRY_A, CARRY_B), factors.arrays, strict=True)
        }

    def load_adapter(self, adapter: Adapter) -> None:
        """Loads this stage's tensors from `adapter`, with carry factors if it has any (all sets of parameters share them).

        Raises ProtocolError if a tensor is missing or has another shape.
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
        """Returns the carry factors. Raises ProtocolError if they do not fit the module's own factors or each other."""
        _, features_in = self.adapter_parameters[module + A].shape
        features_out, _ = self.adapter_parameters[module + B].shape
        if a_MI is None or b_OM is None or {a_MI.dtype, b_OM.dtype} != {np.dtype(np.float32)}:
            raise ProtocolError(f"carry factors of {module}: expected A and B in float32")
        rank = len(a_MI)
        if not rank or a_MI.shape != (rank, features_in) or b_OM.shape != (features_out, rank):
            raise ProtocolError(
                f"carry factors of {module}: expected A [rank, {features_in}] and B [{features_out}, rank], got "
                f"{list(a_MI.shape)} and {list(b_OM.shape)}"
            )
        return a_MI, b_OM


class NetworkStage(Stage):
    """A network of our own as the whole of a model: it has no layers, and all of its parameters learn."""

    def __init__(self, network: OwnNetwork, family: Family, chip: torch.device = CPU) -> None:
        """`family`: that of a model without layers."""
        holder = nn.Module()
        holder.add_module(NETWORK, network.make())
        span = Span(0, 0, embed=True, head=True)
        super().__init__(holder, span, torch.float32, family, 0.0, chip=chip, values=network)

    def forward(self, inputs: torch.Tensor, row_lengths: list[int], **_: Any) -> torch.Tensor:
        """Computes what the network gives for the values [B, T, F] of a micro-batch."""
        output: torch.Tensor = self.model.get_submodule(NETWORK)(onto(inputs, self.chip))
        return output


def _adapter_places(model: nn.Module, family: Family, saved: Collection[str]) -> dict[str, tuple[nn.Module, str]]:
    """Maps adapter names to the module and attribute of the parameter: LoRA's tensors, and those that learn as a whole."""
    places = {}
    for name, _ in model.named_parameters():
        bare = name.removeprefix(PREFIX)
        full = PREFIX + bare
        of_head = family.task_head is not None and full.startswith(f"{PREFIX}{family.task_head}.")
        if ".lora_" in full or of_head or bare in saved or is_of_values(bare):
            module, _, attribute = name.rpartition(".")
            places[_peft_name(full)] = (model.get_submodule(module), attribute)
    return places


def _peft_name(parameter: str) -> str:
    """Returns the name under which peft saves a parameter; of DoRA's magnitudes it leaves the ".weight" out."""
    name = parameter.replace(".default.", ".")
    return name.removesuffix(".weight") if name.endswith(f"{MAGNITUDE}.weight") else name


def _cut_place(cut: CutDown | CutUp | None, span: Span, family: Family) -> dict[str, tuple[nn.Module, str]]:
    """Maps the name of this stage's part of the cut adapter to the module and attribute of the parameter."""
    if cut is None:
        return {}
    last = f"{family.body}.{family.layers}.{span.last - 1}"
    name = f"{PREFIX}{last}{CUT_A}" if isinstance(cut, CutDown) else f"{PREFIX.rstrip('.')}{CUT_B}"
    return {name: (cut, "weight")}


def _mask_and_positions(
    tokens: int, row_lengths: list[int], pad_left: bool, cache: StageCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mask of real tokens, cached and new, and the positions of the new tokens."""
    slots_T, lengths_B1 = torch.arange(tokens), torch.tensor(row_lengths)[:, None]
    padding_B1 = tokens - lengths_B1 if pad_left else torch.zeros_like(lengths_B1)
    positions_BT = (slots_T - padding_B1).clamp(min=0)
    mask_BT = ((slots_T >= padding_B1) & (slots_T < padding_B1 + lengths_B1)).long()
    if cache is not None and cache.mask_BT is not None:
        positions_BT = positions_BT + cache.mask_BT.sum(dim=1, keepdim=True)
        mask_BT = torch.cat([cache.mask_BT, mask_BT], dim=1)
    return mask_BT, positions_BT


def packed_positions(tokens: int, segments: Sequence[Sequence[int]]) -> torch.Tensor:
    """Returns the positions [B, T] of rows with several texts each: they begin at 0 with every text, and padding is all 0.

    transformers takes a position that does not follow on the one before for the beginning of another text, to which its masks
    close the way, if it gets no mask and no cache: so each token of the padding is a text of its own.
    """
    positions_BT = torch.zeros(len(segments), tokens, dtype=torch.long)
    for row, lengths in enumerate(segments):
        places = torch.cat([torch.arange(length) for length in lengths])
        positions_BT[row, : len(places)] = places
    return positions_BT


# ---------------------------------------------------------------- loading


def load_stages(
    source: ModelSource,
    spans: list[Span],
    base: str,
    lora: LoraSettings | None,
    compute: str = "",
    *,
    classes: int = 0,
    values: ValueModel | None = None,
    read: ReadTensors = read_tensors,
    chip: torch.device = CPU,
) -> list[Stage]:
    """Loads the stages of one node. Stages share a tensor that two of them need (a tied embedding).

    Reads only the tensors of the spans: resident memory grows with the slice, never with the model. compute: "float32",
    "bfloat16", or "" for the base's own. classes: the number of outputs of a classifier; its head is zero until an adapter is
    loaded, and so are the modules of a model that takes and gives `values`. read: gets the tensors. chip: what they are computed
    on, one by one brought there.
    """
    if isinstance(values, OwnNetwork):
        return [NetworkStage(values, source.family, chip) for _ in spans]
    config, family = AutoConfig.from_pretrained(source.folder), source.family
    # What the files are, whatever config.json says: read_tensors gives numbers that are not packed, and a head that is stored
    # is the model's own.
    config.__dict__.pop("quantization_config", None)
    if "lm_head.weight" in source.index:
        config.tie_word_embeddings = False
    dtype = compute_dtype(base, compute)
    require_base(base, chip)
    models = [skeleton(config, family, span, base, classes, values) for span in spans]
    names = {_stored_name(source, name) for model in models for name in _frozen(model, family)}
    wanted = {name for name in names if name.removesuffix("_scale") == name or name.removesuffix("_scale") not in names}
    tensors = {name: _aligned(tensor).to(chip) for name, tensor in read(source, sorted(wanted), base, compute)}
    stages = []
    modules = target_modules(source, lora.targets, lora.kind.layers) if lora else {}
    saved = saved_tensors(source, lora.kind.saved) if lora else {}
    adapted = frozenset(layer for name in [*modules, *saved] if (layer := layer_number(name)) is not None)
    for model, span in zip(models, spans, strict=True):
        own = {name: tensors[_stored_name(source, name)] for name in _frozen(model, family)}
        model.load_state_dict(own, strict=False, assign=True)
        fill_computed(model, family)
        model.requires_grad_(False)
        _give_own(model, saved, dtype)
        dropout = lora.dropout if lora else 0.0
        cut = _cut_part(lora.cut, span, source.hidden_size) if lora and lora.cut else None
        own_dropout = lora.own_dropout if lora else False
        stages.append(
            Stage(
                _with_lora(model, span, lora, modules, family), span, dtype, family, dropout, cut,
                own_dropout=own_dropout, chip=chip, adapted=adapted, saved=frozenset(saved), values=values,
            )
        )  # fmt: skip
    return stages


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensors of experts where torch itself would put them, others as they are mapped.

    An expert may get a single position, and the library's product of a matrix and a vector gives other bits from another address.
    Files that `model.weights` writes are aligned, so that only a foreign file costs a copy.
    """
    return tensor.clone() if tensor.dim() == 3 and tensor.data_ptr() % ALIGNED_BYTES else tensor


def _cut_part(cut: CutAdapter, span: Span, hidden: int) -> CutDown | CutUp | None:
    """Returns a stage's part of the cut adapter: A at the end of the last host, B where the device's back begins."""
    if not span.head and span.last == cut.layer + 1:
        return CutDown(hidden, cut.rank)
    return CutUp(hidden, cut.rank, cut.scale) if span.head and span.first == cut.layer + 1 else None


def _frozen(model: PreTrainedModel, family: Family) -> list[str]:
    """Lists the names of the state that comes from the files of the base model."""
    # keep_vars: parameters, not copies
    names = model.state_dict(keep_vars=True)
    of_head = (f"{family.task_head}.",) if family.task_head is not None else ()
    return [name for name in names if not (name.startswith(of_head) or is_of_values(name))]


def _stored_name(source: ModelSource, name: str) -> str:
    if name == "lm_head.weight" and name not in source.index and source.tied_head:
        return f"{source.family.body}.{source.family.embed}.weight"  # files hold a tied tensor once
    return name


def _give_own(model: nn.Module, saved: Collection[str], dtype: torch.dtype) -> None:
    """Gives the model fp32 tensors of its own for those that learn as a whole, in modules that take and give `dtype`."""
    for name in (name for name, _ in list(model.named_parameters()) if name in saved):
        module, _, attribute = name.rpartition(".")
        owner = model.get_submodule(module)
        setattr(owner, attribute, nn.Parameter(owner.get_parameter(attribute).detach().float().clone()))
        if dtype != torch.float32 and not owner._forward_hooks:
            owner.register_forward_pre_hook(_as_fp32)
            owner.register_forward_hook(partial(_as_dtype, dtype))


def _as_fp32(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.float() for tensor in inputs)


def _as_dtype(dtype: torch.dtype, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output.to(dtype)


def _with_lora(
    model: PreTrainedModel, span: Span, lora: LoraSettings | None, modules: Iterable[str], family: Family
) -> nn.Module:
    """Lets peft put LoRA on those of the `modules` of the whole model that the span has."""
    # Full names, so that a target that matches only modules of other stages is not an error here.
    names = [name for name in modules if span.first <= (layer_number(name) or 0) < span.last]
    if lora is None or not names:
        return model
    own = [(terms, sorted(set(names).intersection(terms.modules))) for terms in lora.kind.own]
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=names,
        lora_dropout=0.0,  # UnitDropout replaces it
        bias="none",
        fan_in_fan_out=family.input_first,
        task_type=None if family.task_head else "CAUSAL_LM",
        rank_pattern={pattern_of(here): terms.rank for terms, here in own if here and terms.rank},
        alpha_pattern={pattern_of(here): terms.alpha for terms, here in own if here and terms.alpha},
        use_rslora=lora.kind.rslora,
        use_dora=lora.kind.dora,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute that transformers 6 renames
        return get_peft_model(model, settings)
