"""Loads the whole model on one machine and lets peft put an adapter folder on it. Knows nothing about runs or routes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError, safe_open

from edgelam_fl.errors import ModelError
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import load_stages


def load_whole(source: ModelSource, base: str) -> Any:
    """Loads the Hugging Face model with all layers, frozen. It can be saved, even if it comes from a GGUF file."""
    (stage,) = load_stages(source, [Span(0, source.num_layers, embed=True, head=True)], base, None)
    return stage.model


def put_on(model: Any, adapter: Path) -> PeftModel:
    """Puts the adapter of a folder in peft's format on `model`.

    Raises ModelError if a tensor is missing, superfluous or of another shape: peft itself takes a missing one as zero.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft would warn about is refused below
            tuned = PeftModel.from_pretrained(model, str(adapter), low_cpu_mem_usage=True)
        with safe_open(adapter / "adapter_model.safetensors", framework="numpy") as tensors:
            stored = {name for name in tensors.keys() if ".lora_" in name}  # noqa: SIM118 - no mapping
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise ModelError(f"{adapter} cannot be put on its model: {' '.join(str(error).split())[:300]}") from error
    needed = {name.replace(".default.", ".") for name, _ in tuned.named_parameters() if ".lora_" in name}
    if stored != needed:
        raise ModelError(
            f"{adapter} does not belong to the model: {len(needed - stored)} tensors are missing and "
            f"{len(stored - needed)} too many, {min(needed ^ stored)} among them"
        )
    return tuned
