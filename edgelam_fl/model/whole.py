"""Loads the whole model on one machine and lets peft put an adapter folder on it. Knows nothing about runs or routes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from edgelam_fl.errors import ModelError
from edgelam_fl.model.adapter import PREFIX, Span, read_peft_folder
from edgelam_fl.model.chip import CPU
from edgelam_fl.model.cut import CUT_A, CUT_B, CutAdapter, cut_of, is_cut
from edgelam_fl.model.modules import CutDown, CutUp
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import load_stages
from edgelam_fl.model.value_ends import is_of_values


def load_whole(source: ModelSource, base: str, chip: torch.device = CPU, *, classes: int = 0) -> Any:
    """Loads the Hugging Face model with all layers on a chip, frozen. It can be saved, even if it comes from a GGUF file.

    classes: of a classification, whose new head an adapter then replaces; 0: a language model.
    """
    whole = [Span(0, source.num_layers, embed=True, head=True)]
    (stage,) = load_stages(source, whole, base, None, chip=chip, classes=classes)
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
            stored = {name for name in tensors.keys() if not (is_cut(name) or is_of_values(name))}  # noqa: SIM118 - no mapping
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise ModelError(f"{adapter} cannot be put on its model: {' '.join(str(error).split())[:300]}") from error
    needed = get_peft_model_state_dict(tuned, save_embedding_layers=False).keys()
    if stored != needed:
        raise ModelError(
            f"{adapter} does not belong to the model: {len(needed - stored)} tensors are missing and "
            f"{len(stored - needed)} too many, {min(needed ^ stored)} among them"
        )
    return tuned


class CutOnWhole:
    """The cut adapter of a folder on a whole model, which peft leaves out; nothing if the folder has none."""

    def __init__(self, adapter: Path) -> None:
        """Reads the tensors."""
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        self._parts: nn.Sequential | None = None
        if "cut_adapter" in config:
            tensors = cut_of(read_peft_folder(adapter))
            (self._layer,) = (name.removeprefix(PREFIX).removesuffix(CUT_A) for name in tensors if name.endswith(CUT_A))
            self._parts = _both_parts(CutAdapter(**config["cut_adapter"]), tensors)

    @contextmanager
    def on(self, model: PeftModel) -> Iterator[None]:
        """Computes with the cut adapter while the context is open."""
        if self._parts is None:
            yield
            return
        layer = model.get_base_model().get_submodule(self._layer)
        self._parts.to(next(layer.parameters()).device)
        hook = layer.register_forward_hook(self._add)
        try:
            yield
        finally:
            hook.remove()

    def _add(self, _layer: nn.Module, _inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
        assert self._parts is not None
        return self._parts(output)


def _both_parts(cut: CutAdapter, tensors: Mapping[str, np.ndarray]) -> nn.Sequential:
    """Makes h -> h + s B (A h)."""
    a_RD, b_DR = (next(tensors[name] for name in tensors if name.endswith(end)) for end in (CUT_A, CUT_B))
    hidden = a_RD.shape[1]
    down, up = CutDown(hidden, cut.rank), CutUp(hidden, cut.rank, cut.scale)
    for part, array in ((down, a_RD), (up, b_DR)):
        part.weight.data.copy_(torch.from_numpy(array))
    return nn.Sequential(down, up).requires_grad_(False)
