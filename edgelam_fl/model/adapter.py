"""Adapters as plain arrays: fp32 numpy by peft's names with global layer numbers. Imports no torch.

`base_model.model.model.layers.15.self_attn.q_proj.lora_A.weight` is [rank, in], `...lora_B.weight` is [out, rank].
A task head is part of it as a whole: `base_model.model.classifier.weight` is [classes, hidden], with its `.bias`; so are
the modules of modules_to_save, and those of a model of values: `base_model.model.input_module...` and `...output_module...`, or
`...network...` with all that a network of our own has. With DoRA `...q_proj.lora_magnitude_vector` is [out].
A module may have carry factors in addition (`model.carry`), and a route a cut adapter (`model.cut`).
The stages of a route hold disjoint sets of names, so joining their adapters is a dict merge.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edgelam_fl.errors import ConfigError, ModelError, ProtocolError, nearest
from edgelam_fl.files import write_atomically
from edgelam_fl.model import carry
from edgelam_fl.model.cut import CUT_A, CUT_B, CutAdapter, without_cut
from edgelam_fl.model.families import Experts
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.lora import MAGNITUDE, PLAIN, A, B, LoraKind
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.tensor_file import write_tensors
from edgelam_fl.model.value_ends import ValueModel, is_of_input, is_of_values

Adapter = dict[str, np.ndarray]
JoinedLayout = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of tensors in order: equal for `Joined` adapters whose numbers belong together one by one."""


@dataclass(frozen=True)
class Span:
    """Layers [first, last), with the embedding and/or the final norm and head."""

    first: int
    last: int
    embed: bool = False
    head: bool = False

    def holds(self, name: str) -> bool:
        """Whether a tensor of this name is in the span; one outside the layers belongs to the head, if not to the input module."""
        layer = layer_number(name)
        if layer is None:
            return self.embed if is_of_input(name) else self.head
        return self.first <= layer < self.last


PREFIX = "base_model.model."
LM_HEAD, _HEAD_DEVIATION = "lm_head", 0.02
_CARRY_RANKS = (
    "carry_ranks"  # a note in the file of a peft folder: the adapter's own rank by module, of those with carry factors
)


def digest(adapter: Mapping[str, np.ndarray]) -> str:
    """Computes what names an adapter as a whole: `joined_digest` of its tensors' digests."""
    return joined_digest({name: tensor_digest(name, array) for name, array in adapter.items()})


def tensor_digest(name: str, array: np.ndarray) -> str:
    """Computes SHA-256 over the name, dtype, shape and bytes of a tensor."""
    total = hashlib.sha256(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
    total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def joined_digest(digests: Mapping[str, str]) -> str:
    """Computes SHA-256 over the digests of tensors, by name, in the order of the names: whoever has them reads no tensor again."""
    return hashlib.sha256("".join(digests[name] for name in sorted(digests)).encode()).hexdigest()


def to_bytes(adapter: Mapping[str, np.ndarray]) -> bytes:
    """Writes an adapter in the format of safetensors."""
    return save({name: np.ascontiguousarray(array) for name, array in adapter.items()})


def from_bytes(data: bytes) -> Adapter:
    """Reads what `to_bytes` wrote. Raises ProtocolError for other bytes."""
    try:
        return load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: of a dtype that numpy has not
        raise ProtocolError(f"adapter tensors cannot be read: {error}") from error


class Joined(Mapping[str, np.ndarray]):
    """An adapter whose fp32 numbers lie one behind the other in `numbers`, in the order of the tensors.

    What is done to each number alike is done to all of them at once, which takes half the time of tensor by tensor. So its tensors,
    which are views of the numbers, are made when the first one is asked for.
    """

    def __init__(self, numbers: np.ndarray, layout: JoinedLayout) -> None:
        """`numbers`: as many as the tensors of the layout have together."""
        self.numbers, self.layout = numbers, layout
        self.moved: tuple[np.ndarray, float] | None = None
        """What they were compared with, and the sum of squares of the differences; None: with nothing yet."""

    @cached_property
    def _tensors(self) -> Adapter:
        return _cut(self.numbers, self.layout)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.layout)

    def __len__(self) -> int:
        return len(self.layout)


def _cut(numbers: np.ndarray, layout: JoinedLayout) -> Adapter:
    """Returns the tensors of a layout as views of their numbers."""
    found, at = Adapter(), 0
    for name, shape in layout:
        end = at + math.prod(shape)
        found[name] = numbers[at:end].reshape(shape)
        at = end
    return found


BLOCK = 8192
"""Numbers that stay in a processor's fastest memory, and for which BLAS takes one thread."""
WIDE_BLOCK = 4 * BLOCK
"""Numbers for what BLAS does not do: numpy's time per call is little beside that of so many, which stay in a processor's memory as well."""


def blocks(count: int, size: int = BLOCK) -> Iterator[slice]:
    """Yields slices of so many numbers, each of `size` but for the last: small enough to be worked on fast."""
    return (slice(at, at + size) for at in range(0, count, size))


def views(data: bytes) -> Mapping[str, np.ndarray]:
    """Reads what `to_bytes` wrote as read-only views of the bytes, `Joined` if all tensors are fp32. Raises ProtocolError for other bytes."""
    try:
        size = int.from_bytes(data[:8], "little")
        numbers = np.frombuffer(data, np.float32, offset=8 + size)
        layout_of = _layout if size <= _REMEMBERED_BYTES else _layout.__wrapped__
        return Joined(numbers, layout_of(data[8 : 8 + size], numbers.nbytes))
    except _UNUSUAL:
        return from_bytes(data)


_REMEMBERED_BYTES = 1 << 20  # of a header: the nodes of a round send few different ones


@lru_cache(maxsize=16)
def _layout(header: bytes, size_bytes: int) -> JoinedLayout:
    """Returns the layout by a header of safetensors. Raises one of `_UNUSUAL` unless its fp32 tensors are all of so many bytes, in its order."""
    layout, end = list[tuple[str, tuple[int, ...]]](), 0
    for name, entry in json.loads(header).items():
        (begin, after), shape = entry["data_offsets"], entry["shape"]
        if (
            entry["dtype"] != "F32"
            or begin != end
            or after != begin + 4 * math.prod(shape)
            or min(shape, default=0) < 0
        ):
            raise ValueError(name)
        layout.append((name, tuple(shape)))
        end = after
    if end != size_bytes:
        raise ValueError("numbers of no tensor")
    _cut(np.empty(size_bytes // 4, np.float32), tuple(layout))  # raises for a shape that no array has
    return tuple(layout)


_UNUSUAL = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def slice_of(adapter: Mapping[str, np.ndarray], spans: Iterable[Span]) -> Adapter:
    """Returns the tensors that are in any of the `spans`."""
    spans = list(spans)
    return {name: array for name, array in adapter.items() if any(span.holds(name) for span in spans)}


def target_modules(
    source: ModelSource, targets: Iterable[str], layers: Collection[int] = ()
) -> dict[str, tuple[int, int]]:
    """Returns module -> (out, in) features of the modules that LoRA targets name; a target matches whole trailing name parts.

    `layers`: takes the modules of these layers alone; none: of all. Raises ConfigError for a target that matches nothing, is
    outside the layers (a tied head or embedding) or in a mixture of experts, and for a layer without a target.
    """
    found = _matched(source, list(targets))
    if not layers:
        return found
    _check_layers(source, found, layers)
    return {name: shape for name, shape in found.items() if layer_number(name) in layers}


def _check_layers(source: ModelSource, modules: Iterable[str], layers: Collection[int]) -> None:
    """Raises ConfigError for layers that the model has not, or in which no module is a target."""
    targeted = {layer_number(name) for name in modules}
    for layer in layers:
        if layer not in targeted:
            why = f"{source.name} has layers 0 to {source.num_layers - 1}"
            why = f"no module of layer {layer} is in lora.targets" if 0 <= layer < source.num_layers else why
            raise ConfigError(f"lora.layers_to_transform: layer {layer} gets no adapter: {why}")


def _matched(source: ModelSource, targets: list[str]) -> dict[str, tuple[int, int]]:
    modules = _adaptable(source)
    if source.is_network:
        return modules
    if source.family.experts is not None:
        _refuse_experts(source, source.family.experts, targets, modules)
    if targets == ["all-linear"]:
        return modules
    found: dict[str, tuple[int, int]] = {}
    for target in targets:
        matched = {name: shape for name, shape in modules.items() if name == target or name.endswith(f".{target}")}
        if not matched:
            _refuse_target(source, target, modules)
        found.update(matched)
    return {name: modules[name] for name in modules if name in found}


def target_names(source: ModelSource) -> list[str]:
    """Lists the names of single modules that LoRA may be put on."""
    return sorted(_leaves(_adaptable(source)))


def _adaptable(source: ModelSource) -> dict[str, tuple[int, int]]:
    """Returns the modules that LoRA may be put on: all matrices inside the layers but those in a mixture of experts."""
    experts, modules = source.family.experts, source.linear_modules()
    return {name: shape for name, shape in modules.items() if experts is None or f".{experts.block}." not in name}


def _leaves(modules: Iterable[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in modules}


def _refuse_experts(source: ModelSource, experts: Experts, targets: list[str], allowed: Iterable[str]) -> None:
    """Raises ConfigError for a target in a mixture of experts: peft's adapters of experts belong to two tensors of all of them."""
    parts = {experts.router, *experts.joined, *(part for parts in experts.joined.values() for part in parts)}
    for target in targets:
        if target == "all-linear" or target.rsplit(".", 1)[-1] in parts:
            raise ConfigError(
                f"lora.targets: {target!r} would adapt the experts of {source.name}, which peft does in two tensors per layer "
                f"and not by module. Allowed: {', '.join(sorted(_leaves(allowed)))}"
            )


def _refuse_target(source: ModelSource, target: str, modules: Mapping[str, tuple[int, int]]) -> None:
    leaves = _leaves(modules)
    outside = {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in source.index if layer_number(name) is None}
    if source.tied_head and target in outside | {"lm_head"}:
        raise ConfigError(
            f"lora.targets: {target!r} is a tied tensor of {source.name} (embedding and head are one); an adapter on it "
            f"would change both. Allowed: {', '.join(sorted(leaves))}"
        )
    if target in outside:
        raise ConfigError(f"lora.targets: {target!r} is outside the layers. Allowed: {', '.join(sorted(leaves))}")
    hint = nearest(target, leaves)
    if not hint.startswith("known"):  # the most similar word may be a different module: families name them differently
        hint = f"{hint} Known: {', '.join(sorted(leaves))}"
    raise ConfigError(f"lora.targets: no module of {source.name} is called {target!r}; {hint}")


def _end_of_none(module: str, others: Iterable[str]) -> str:
    """Returns the shortest end of a module's name, in whole parts, that ends none of the others' names."""
    parts = module.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts)))
    return next((end for end in ends if not any(other.endswith(end) for other in others)), module)


def adapter_shapes(
    source: ModelSource, targets: Iterable[str], rank: int, kind: LoraKind = PLAIN
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors of an adapter but those of a task head and of a cut adapter, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, (out_features, in_features) in target_modules(source, targets, kind.layers).items():
        own = kind.rank_of(module, rank)
        shapes[f"{PREFIX}{module}{A}"] = own, in_features
        shapes[f"{PREFIX}{module}{B}"] = out_features, own
    return shapes | base_shapes(source, targets, kind)


def base_shapes(source: ModelSource, targets: Iterable[str], kind: LoraKind) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that begin as what the base has there: DoRA's magnitudes and the modules that are saved."""
    shapes: dict[str, tuple[int, ...]] = {}
    if kind.dora:
        for module, (out_features, _) in target_modules(source, targets, kind.layers).items():
            shapes[f"{PREFIX}{module}{MAGNITUDE}"] = (out_features,)
    return shapes | {f"{PREFIX}{name}": shape for name, shape in saved_tensors(source, kind.saved).items()}


def saved_tensors(source: ModelSource, words: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Returns tensor -> shape of the modules that learn as a whole: those whose names end in one of the `words`, as in peft.

    They are norms of layers and the last one, and a head that is not the embedding. Raises ConfigError for a word that ends no
    name, or the name of another module.
    """
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor, entry in source.index.items():
        modules.setdefault(tensor.rpartition(".")[0], {})[tensor] = entry.shape
    found: dict[str, tuple[int, ...]] = {}
    for word in words:
        matched = [module for module in modules if module.endswith(word)]
        refused = [module for module in matched if not _may_be_saved(module, modules[module])]
        if refused or not matched:
            _refuse_saved(source, word, refused, modules)
        for module in matched:
            found |= modules[module]
    return found


def _may_be_saved(module: str, tensors: Mapping[str, tuple[int, ...]]) -> bool:
    is_norm = all(len(shape) == 1 for shape in tensors.values()) and "embed" not in module
    return is_norm or module == LM_HEAD


def _refuse_saved(
    source: ModelSource, word: str, refused: Sequence[str], modules: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> NoReturn:
    others = tuple(name for name, tensors in modules.items() if not _may_be_saved(name, tensors))
    allowed = ", ".join(sorted({_end_of_none(name, others) for name in modules if name not in others}))
    if source.family.task_head is not None and word.endswith(source.family.task_head):
        why = "the head of a classification always learns as a whole: leave it out"
    elif LM_HEAD.endswith(word) and source.tied_head:
        why = f"the head of {source.name} is its embedding, and would no longer be"
    elif not refused:
        why = f"no module of {source.name} has a name that ends so"
    elif layer_number(f"{refused[0]}.") is not None:
        why = f"it ends {refused[0]}, a matrix inside the layers, for which lora.targets are made"
    else:
        why = f"it ends {refused[0]}, and an embedding's update would list the tokens of a device's text"
    raise ConfigError(f"lora.modules_to_save: {word!r} cannot be taken: {why}. Allowed for this model: {allowed}")


def initial_adapter(
    source: ModelSource,
    targets: Iterable[str],
    rank: int,
    seed: int,
    *,
    classes: int = 0,
    values: ValueModel | None = None,
    kind: LoraKind = PLAIN,
) -> Adapter:
    """Draws an adapter as peft does: A uniform in +-1/sqrt(in), B zero. Seeded by (seed, module), so that slices agree.

    With `classes`, also draws a task head of that many outputs: small normal weights, zero bias; with `values`, the modules of a model
    that takes and gives them. The tensors of `base_shapes` are not drawn (`model.of_base`).
    """
    adapter: Adapter = {}
    for module, (out_features, in_features) in target_modules(source, targets, kind.layers).items():
        bound, own = in_features**-0.5, kind.rank_of(module, rank)
        a_RI = _generator(seed, module).uniform(-bound, bound, (own, in_features)).astype(np.float32)
        adapter[f"{PREFIX}{module}{A}"] = a_RI
        adapter[f"{PREFIX}{module}{B}"] = np.zeros((out_features, own), np.float32)
    if classes:
        head = source.family.task_head
        if head is None:
            raise ConfigError(f"task.kind: {source.name} has no task head; classification takes a BERT model")
        weight = _generator(seed, head).normal(0, _HEAD_DEVIATION, (classes, source.hidden_size))
        adapter[f"{PREFIX}{head}.weight"] = weight.astype(np.float32)
        adapter[f"{PREFIX}{head}.bias"] = np.zeros(classes, np.float32)
    if values is not None:
        adapter |= {f"{PREFIX}{name}": drawn for name, drawn in values.first_values(source.hidden_size, seed)}
    return adapter


def initial_cut(source: ModelSource, cut: CutAdapter, seed: int) -> Adapter:
    """Draws a cut adapter: A zero, and B uniform in +-1/sqrt(hidden), from the seed."""
    layer = f"{source.family.body}.{source.family.layers}.{cut.layer}"
    bound = source.hidden_size**-0.5
    b_DR = _generator(seed, CUT_B).uniform(-bound, bound, (source.hidden_size, cut.rank))
    return {
        f"{PREFIX}{layer}{CUT_A}": np.zeros((cut.rank, source.hidden_size), np.float32),
        f"{PREFIX.rstrip('.')}{CUT_B}": b_DR.astype(np.float32),
    }


def _generator(seed: int, module: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(module.encode())])


def write_peft_folder(
    adapter: Adapter,
    folder: Path,
    *,
    reference: str,
    rank: int,
    alpha: float,
    targets: Iterable[str],
    classes: Sequence[str] = (),
    values: ValueModel | None = None,
    kind: LoraKind = PLAIN,
    trained_on: Mapping[str, str] | None = None,
) -> None:
    """Writes an adapter folder that `PeftModel.from_pretrained` reads on machines without EdgeLAM-FL.

    A module whose rank differs from `rank` is scaled by its own rank, as in training. Carry factors are stacked with
    the adapter's factors. A cut adapter is written too, but peft leaves it out, and warns that it does not know the setting
    "cut_adapter". So it does of the modules of a model of `values`, whose sizes are
    "value_ends". With `classes`, the base must be opened by `AutoModelForSequenceClassification` with that many
    labels. trained_on: which weights the base had, in words; None: they are not known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own_ranks = {module: len(adapter[module + A]) for module in carry.modules_of(adapter)}
    scales = {module: kind.scale_of(_bare(module), own, alpha) for module, own in own_ranks.items()}
    adapter = carry.stacked(adapter, scales)
    factors = {name.removesuffix(A): array for name, array in adapter.items() if name.endswith(A)}
    alphas = {_bare(module): kind.alpha_of(_bare(module), alpha) for module in factors}
    alphas |= {_bare(module): kind.alpha_for(scale, len(factors[module])) for module, scale in scales.items()}
    heads = {name.rpartition(".")[0] for name in without_cut(adapter) if not (".lora_" in name or is_of_values(name))}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if classes else "CAUSAL_LM",
        "base_model_name_or_path": reference,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        # In a classifier peft would adapt more than we do: modules after the layers, too.
        "target_modules": sorted(map(_bare, factors)) if classes else _peft_targets(targets, factors, kind),
        "layers_to_transform": list(kind.layers) or None,
        "rank_pattern": {_bare(module): len(a_RI) for module, a_RI in factors.items() if len(a_RI) != rank},
        "alpha_pattern": {module: own for module, own in alphas.items() if own != alpha},
        "use_rslora": kind.rslora,
        "use_dora": kind.dora,
        "modules_to_save": sorted(map(_bare, heads)) or None,
        "bias": "none",
        "inference_mode": True,
    }
    if (
        trained_on
    ):  # in a key that peft knows, as it warns of others; it reads this one of adapters without a task alone
        config["auto_mapping"] = {"trained_on": dict(trained_on)}
    if cut := cut_in(adapter, alpha):
        config["cut_adapter"] = asdict(cut)
    if values is not None:
        config["value_ends"] = asdict(values)
    temporary = folder / ".adapter_model.safetensors"
    temporary.unlink(missing_ok=True)
    note = {_CARRY_RANKS: json.dumps(own_ranks)} if config["alpha_pattern"] else {}
    write_tensors(temporary, adapter, {"format": "pt", **note})
    temporary.replace(folder / "adapter_model.safetensors")
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n", durable=True)


def cut_in(adapter: Mapping[str, np.ndarray], alpha: float) -> CutAdapter | None:
    """Returns place and size of the cut adapter in an adapter; None if it has none."""
    for name, array in adapter.items():
        if name.endswith(CUT_A):
            layer = layer_number(name)
            assert layer is not None
            return CutAdapter(layer, len(array), alpha / len(array))
    return None


# What a damaged file of a result makes the code that reads it raise.
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, ProtocolError)


def read_peft_folder(folder: Path) -> Adapter:
    """Reads what `write_peft_folder` or peft wrote, and separates the carry factors again (up to rounding).

    Raises ModelError for a folder that holds no such adapter.
    """
    try:
        data = (folder / "adapter_model.safetensors").read_bytes()
        joined = from_bytes(data)
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        alpha, alphas = config["lora_alpha"], config.get("alpha_pattern") or {}
        ranks, kind = _carry_ranks(data), LoraKind(rslora=config.get("use_rslora", False))
        if ranks is None and "init_lora_weights" in config:
            ranks = {}  # peft wrote it, which knows no carry factors
        if (
            ranks is None
        ):  # a folder of an earlier version, in which only modules with carry factors have an alpha of their own
            lengths = {PREFIX + module: len(joined[f"{PREFIX}{module}{A}"]) for module in alphas}
            ranks = {module: round(alpha * length / alphas[_bare(module)]) for module, length in lengths.items()}
        scales = {
            module: kind.scale_of(module, len(joined[module + A]), alphas.get(_bare(module), alpha)) for module in ranks
        }
        return carry.unstacked(joined, scales, ranks)
    except _DAMAGED as error:
        words = " ".join(str(error).split())
        raise ModelError(
            f"{folder} holds no adapter that can be read ({words:.200}): a file in it is damaged"
        ) from error


def _carry_ranks(data: bytes) -> dict[str, int] | None:
    """Returns the adapter's own rank of each module that has carry factors, from a file's header; None: it says nothing of them."""
    size = int.from_bytes(data[:8], "little")
    noted = json.loads(data[8 : 8 + size]).get("__metadata__", {}).get(_CARRY_RANKS)
    return None if noted is None else json.loads(noted)


def _bare(module: str) -> str:
    return module.removeprefix(PREFIX)


def _peft_targets(targets: Iterable[str], modules: Iterable[str], kind: LoraKind) -> list[str] | str:
    """Returns peft's target_modules, which takes "all-linear" for all layers alone."""
    if list(targets) != ["all-linear"]:
        return sorted(targets)
    return sorted(_leaves(modules)) if kind.layers else "all-linear"
