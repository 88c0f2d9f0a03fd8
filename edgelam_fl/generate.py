"""Greedy answers of the whole model on this machine, with or without a run's adapter. transformers and peft do the work."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from edgelam_fl.config import RunConfig
from edgelam_fl.model.source import find_model
from edgelam_fl.model.stage import LoraSettings, Span, Stage, load_stages
from edgelam_fl.tasks.causal_lm import CausalLm


def answer(config: RunConfig, adapter: Path | None, question: str, max_tokens: int) -> str:
    """The answer in at most `max_tokens` tokens. `adapter`: a run's adapter folder; None: the model as it came."""
    from safetensors.numpy import load_file

    stage, task = _load(config)
    if adapter is not None:
        stage.load_adapter(load_file(adapter / "adapter_model.safetensors"))
    ids = torch.tensor([task.tokenizer(task.prompt_text(question), add_special_tokens=False)["input_ids"]])
    model: Any = stage.model
    with torch.no_grad(), _disabled(model, adapter is None):
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
            pad_token_id=task.tokenizer.eos_token_id,
        )  # fmt: skip
    return str(task.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()


@lru_cache(maxsize=1)
def _load(config: RunConfig) -> tuple[Stage, CausalLm]:
    source = find_model(config.model.name)
    whole = Span(0, source.num_layers, embed=True, head=True)
    lora = LoraSettings(config.lora.rank, config.lora.alpha, config.lora.targets)
    task = CausalLm(
        source.folder, template=config.task.template, max_tokens=config.task.max_tokens, loss_on=config.task.loss_on
    )
    return load_stages(source, [whole], config.model.base, lora)[0], task


def _disabled(model: Any, without: bool) -> Any:
    from contextlib import nullcontext

    return model.disable_adapter() if without else nullcontext()
