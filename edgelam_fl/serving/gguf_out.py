"""Writes a result for llama.cpp and Ollama: the merged model and the LoRA adapter as GGUF files, and a Modelfile.

What no GGUF file has a place for is refused by name before a weight is read. Knows nothing about runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgelam_fl.errors import ConfigError
from edgelam_fl.model.adapter import PREFIX
from edgelam_fl.model.gguf import numbers_of
from edgelam_fl.model.gguf_config import FACTORS
from edgelam_fl.model.gguf_file import TensorPlaces, write_adapter, write_model
from edgelam_fl.model.gguf_header import read_header
from edgelam_fl.model.gguf_keys import architecture_for, check_keys, keys_of, keys_of_file
from edgelam_fl.model.gguf_vocabulary import vocabulary_keys
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.tokenizer import load_tokenizer
from edgelam_fl.serving.trained_on import TrainedOn

MODEL, ADAPTER = "model.gguf", "adapter.gguf"


@dataclass(frozen=True)
class GgufPlan:
    """All of a GGUF file but its weights."""

    architecture: str
    keys: dict[str, Any]
    config: dict[str, Any]
    names: Sequence[str]
    """Of the model's tensors, by their names in transformers."""
    factors: dict[str, np.ndarray]
    """Tensors that are no weights, by their names in the file."""

    @cached_property
    def places(self) -> TensorPlaces:
        return TensorPlaces(self.architecture, self.config, self.names)


def plan_file(source: ModelSource, base: TrainedOn) -> GgufPlan:
    """Returns what a file of this model holds beside the weights. Raises ConfigError for what has no place in one."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.folder).to_dict()
    if "lm_head.weight" in source.index:
        config["tie_word_embeddings"] = False  # the files count, as in training
    architecture = architecture_for(config["model_type"], source.name)
    names = list(source.index)
    if source.gguf is not None:
        header = read_header(source.gguf)
        keys, factors = keys_of_file(header), numbers_of(source.gguf, header, FACTORS)
    else:
        keys, factors = keys_of(config, source.name)
        places = TensorPlaces(architecture, config, names)
        shapes = {places.stored[name]: source.index[name].shape for name in names}
        check_keys(config, keys, shapes, factors, source.name)
        rows = shapes["token_embd.weight"][0]
        keys |= vocabulary_keys(load_tokenizer(source.folder), architecture, rows, source.stop_ids, source.name)
    keys |= _about(base)
    return GgufPlan(architecture, keys, config, names, {FACTORS: factors} if factors is not None else {})


def _about(base: TrainedOn) -> dict[str, Any]:
    short = base.name.rsplit("/", 1)[-1]
    told: dict[str, Any] = {
        "general.name": f"{short} fine-tuned",
        "general.base_model.count": 1,
        "general.base_model.0.name": short,
    }
    if base.is_public:
        told["general.base_model.0.repo_url"] = f"https://huggingface.co/{base.name}"
    return told | ({"general.license": base.licence} if base.licence else {})


def write_merged(model: Any, plan: GgufPlan, path: Path, dtype: str) -> None:
    """Writes a model of transformers, into which the adapter was merged."""
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameters[name].shape) for name in plan.names}
    write_model(
        path, plan.places, plan.architecture, plan.keys, shapes, lambda name: parameters[name].detach().numpy(), dtype,
        plan.factors,
    )  # fmt: skip


def write_lora(tuned: Any, tensors: Mapping[str, np.ndarray], plan: GgufPlan, path: Path) -> None:
    """Writes an adapter that peft has put on a model, from its tensors by peft's names: peft knows the scale of each module.

    Raises ConfigError for an adapter that is more than LoRA: `why_no_adapter`.
    """
    if reason := why_no_adapter(tuned):
        raise ConfigError(reason)
    config = tuned.active_peft_config
    factors = {
        name: (
            tensors[f"{PREFIX}{name}.lora_A.weight"],
            tensors[f"{PREFIX}{name}.lora_B.weight"],
            float(module.scaling["default"]),
        )
        for name, module in tuned.get_base_model().named_modules()
        if "default" in getattr(module, "lora_A", ())
    }
    keys = {key: value for key, value in plan.keys.items() if key.startswith("general.")}
    write_adapter(path, plan.places, plan.architecture, keys, factors, float(config.lora_alpha))


def why_no_adapter(tuned: Any) -> str:
    """Returns why llama.cpp cannot take an adapter of peft beside its base, in words; "": it can."""
    config = tuned.active_peft_config
    if getattr(config, "use_dora", False):
        return "DoRA scales whole rows of the merged weights, which llama.cpp's adapters do not"
    if getattr(config, "modules_to_save", None):
        return "lora.modules_to_save trained whole modules, which llama.cpp's adapters do not hold"
    return ""
