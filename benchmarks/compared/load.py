"""The load that all ways train: a model, a run file's settings, and examples of which each fills a row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from edgelam_fl.config import RunConfig
from edgelam_fl.model.adapter import Adapter, Span, initial_adapter
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.stage import LoraSettings, Stage, load_stages
from edgelam_fl.model.weights import read_tensors
from edgelam_fl.tasks.base import Unit
from edgelam_fl.tasks.masking import IGNORED
from tests.fleet import device_batches, plain_optimizer
from tests.support import run_config

STEPS = 12  # batches that are made; steps beyond them begin again


@dataclass(frozen=True)
class Load:
    """What is trained. `files`: the data of each device."""

    model: str
    overrides: tuple[str, ...]
    files: tuple[Path, ...]

    def with_settings(self, *overrides: str) -> Load:
        return replace(self, overrides=(*self.overrides, *overrides))

    @property
    def config(self) -> RunConfig:
        return run_config(self.model, "federation.evaluate_every=1000", *self.overrides)

    @property
    def source(self) -> ModelSource:
        return find_model(self.model)

    def batches(self, device: int = 0) -> list[list[Unit]]:
        """Returns a device's micro-batches, by step."""
        return device_batches(self.source, self.config, self.files[device], f"device-{device + 1}", STEPS)

    def start(self) -> Adapter:
        config = self.config
        return initial_adapter(self.source, config.lora.targets, config.lora.rank, config.run.seed)

    def peft_model(self) -> Any:
        """Returns the whole model by transformers and peft alone, in evaluation mode. Our reader gets the tensors, because that of
        transformers takes half a minute for a GGUF.
        """
        source, config = self.source, self.config
        settings = AutoConfig.from_pretrained(source.folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
        tensors = dict(read_tensors(source, sorted(source.index), config.model.base, ""))
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
        model.model.rotary_emb = type(model.model.rotary_emb)(config=settings)
        lora = LoraConfig(
            r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=list(config.lora.targets),
            task_type="CAUSAL_LM",
        )  # fmt: skip
        model = get_peft_model(model, lora)
        set_peft_model_state_dict(model, {name: torch.from_numpy(array.copy()) for name, array in self.start().items()})
        return model.train(False)

    def stages(self, *spans: Span) -> list[Stage]:
        """Loads stages with the adapter that training starts from."""
        config = self.config
        lora = LoraSettings(config.lora.rank, config.lora.alpha, tuple(config.lora.targets))
        stages = load_stages(self.source, list(spans), config.model.base, lora)
        for stage in stages:
            stage.load_adapter(
                {name: array for name, array in self.start().items() if name in stage.adapter_parameters}
            )
        return stages

    def optimizer(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return plain_optimizer(list(parameters), self.config)


def write_long_examples(file: Path, characters: int, examples: int = 40) -> Path:
    """Writes examples of more tokens than a row holds, so that no row is padded and ways that need equal rows can take part."""
    words = (
        "the",
        "edge",
        "of",
        "a",
        "device",
        "sends",
        "what",
        "its",
        "first",
        "layers",
        "make",
        "over",
        "to",
        "hosts",
    )
    with file.open("w", encoding="utf-8") as out:
        for number in range(examples):
            text, at = "", 7 * number
            while len(text) < characters:
                text += words[at * at % len(words)] + (". " if at % 11 == 0 else " ")
                at += 3
            out.write(json.dumps({"question": f"Text {number}", "answer": text}) + "\n")
    return file


def tokens_of(units: Sequence[Unit]) -> int:
    """Returns the tokens of a batch, without padding."""
    return sum(sum(unit.row_lengths) for unit in units)


def loss_over_all(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Sums the token losses with logits of every position, as others' loops compute them."""
    predicted, targets = logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten()
    return functional.cross_entropy(predicted, targets, ignore_index=IGNORED, reduction="sum")
