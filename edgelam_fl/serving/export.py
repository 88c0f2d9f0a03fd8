"""Exports a run's result for other tools: the adapter as a peft folder, or merged into its base as a Hugging Face model.

Knows nothing about federations. Other tools load the files without EdgeLAM-FL.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from edgelam_fl.errors import ConfigError, EnvironmentProblem
from edgelam_fl.machine import disk_free_bytes, memory_free_bytes
from edgelam_fl.model.generation import GENERATION, generation_settings
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.tensor_file import write_tensors
from edgelam_fl.model.tokenizer import load_tokenizer
from edgelam_fl.serving.results import Result

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
BYTES_PER_NUMBER = {"fp32": 4, "bf16": 2}


def export(result: Result, kind: str, out: Path | None, dtype: str = "", front: Path | None = None) -> tuple[Path, str]:
    """Writes the result as `kind` "peft" or "merged" to `out` (None: a folder of that name in the run's folder).

    `front`: a device's own adapter of the front, which a run with privacy.private_front lacks. Returns the folder and the code that loads it elsewhere. The folder appears complete or not at all. Raises ConfigError
    if it exists or an option is wrong, EnvironmentProblem if memory or disk is short.
    """
    if kind not in ("peft", "merged"):
        raise ConfigError(
            f"--to {kind!r} must be 'peft' (the adapter alone) or 'merged' (base and adapter as one model)"
        )
    if kind == "peft" and dtype:
        raise ConfigError("--dtype belongs to --to merged; an adapter stays fp32, as it was trained")
    if result.config.wire.gradients == "lowrank":
        raise ConfigError(
            f"wire.gradients = 'lowrank' in {result.folder}: its cut adapter is no LoRA of a module, so no other tool can load the "
            f"result; `edgelam chat {result.folder}` answers with it. A run with wire.gradients = 'full' can be exported"
        )
    if dtype not in ("", *BYTES_PER_NUMBER):
        raise ConfigError(f"--dtype {dtype!r} must be {' or '.join(BYTES_PER_NUMBER)}")
    folder = out or result.folder / kind
    if folder.exists():
        raise ConfigError(f"{folder} exists; choose another with --out (nothing is ever overwritten)")
    _check_front(result, front)
    source = find_model(result.config.model.name)
    result.check_base(source)
    with _adapter(result, front) as adapter:
        if kind == "peft":
            _check_adapter(adapter, source)
            _whole_or_nothing(folder, lambda part: _copy(adapter, part))
            return folder, _load_peft(folder, source)
        _check_room(source, folder, dtype or "fp32")
        _whole_or_nothing(folder, lambda part: _merge(adapter, source, part, dtype or "fp32"))
    return folder, f'model = AutoModelForCausalLM.from_pretrained("{folder}")    # from transformers'


def _whole_or_nothing(folder: Path, write: Callable[[Path], None]) -> None:
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        write(part)
        part.rename(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ---------------------------------------------------------------- a front that stayed on its device


def _check_front(result: Result, front: Path | None) -> None:
    """Raises ConfigError if a run's private front is missing, or one is given to a run that has none."""
    if result.config.privacy.private_front and front is None:
        raise ConfigError(
            f"{result.folder} lacks the front's adapter: with privacy.private_front = true each device keeps its own, and the run's "
            f"folder holds those of hosts and back alone. On a device, export with --front FILE: "
            f"private-fronts/RUN.safetensors in the node's state folder"
        )
    if front is not None and not result.config.privacy.private_front:
        raise ConfigError("--front belongs to runs with privacy.private_front = true; this run's adapter is whole")


@contextmanager
def _adapter(result: Result, front: Path | None) -> Iterator[Path]:
    """Gives the folder of the whole adapter. Raises ConfigError for a front that does not belong to it."""
    if front is None:
        yield result.adapter
        return
    try:
        own = load_file(front)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--front {front} cannot be read: {error}") from error
    whole = load_file(result.adapter / _TENSORS)
    wrong = [name for name, array in own.items() if name not in whole or whole[name].shape != array.shape]
    if wrong or not own:
        what = f"{wrong[0]} is no tensor of it" if wrong else "it is empty"
        raise ConfigError(f"--front {front} does not belong to the adapter of {result.folder}: {what}")
    with tempfile.TemporaryDirectory() as made:
        shutil.copyfile(result.adapter / _CONFIG, Path(made) / _CONFIG)
        write_tensors(Path(made) / _TENSORS, whole | own, {"format": "pt"})
        yield Path(made)


# ---------------------------------------------------------------- the adapter alone


def _copy(adapter: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in (_CONFIG, _TENSORS):
        shutil.copyfile(adapter / name, folder / name)


def _check_adapter(adapter: Path, source: ModelSource) -> None:
    """Lets peft put the adapter on its base, which has no storage here: the check takes no memory for a model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgelam_fl.model.whole import put_on

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source.folder))
    put_on(base, adapter)


def _load_peft(folder: Path, source: ModelSource) -> str:
    gguf = f', gguf_file="{source.gguf.name}"' if source.gguf and source.reference == str(source.gguf) else ""
    base = str(source.gguf.parent) if source.gguf and gguf else source.reference
    if gguf and not _transformers_reads_it(source):
        return (
            f"# The base is {source.gguf}, which transformers does not read as llama.cpp and EdgeLAM-FL do. Put the adapter on the\n"
            f"# folder that the file was converted from, or take `--to merged`:\n"
            f'base = AutoModelForCausalLM.from_pretrained("FOLDER")    # from transformers\n'
            f'model = PeftModel.from_pretrained(base, "{folder}")    # from peft'
        )
    return (
        f'base = AutoModelForCausalLM.from_pretrained("{base}"{gguf})    # from transformers\n'
        f'model = PeftModel.from_pretrained(base, "{folder}")    # from peft'
    )


def _transformers_reads_it(source: ModelSource) -> bool:
    """Tells whether transformers' reader gets the same weights and positions out of a GGUF file."""
    rope = source.config.get("rope_parameters") or {}
    return source.config["model_type"] in ("llama", "qwen2", "qwen3", "gpt2") and rope.get("rope_type") in (
        None,
        "default",
    )


# ---------------------------------------------------------------- base and adapter as one model


def _check_room(source: ModelSource, folder: Path, dtype: str) -> None:
    """Raises EnvironmentProblem if memory or disk is short: the whole model is merged in fp32, in memory."""
    needed, free = source.fp32_bytes, memory_free_bytes()
    if free < needed:
        raise EnvironmentProblem(
            f"merging {source.name} takes {_gb(needed)} of memory (4 bytes per weight), {_gb(free)} are free here; end "
            f"another program, or merge on a larger machine: the run's folder and the model are all it needs"
        )
    needed, free = source.fp32_bytes * BYTES_PER_NUMBER[dtype] // 4, disk_free_bytes(folder)
    if free < needed:
        raise EnvironmentProblem(
            f"{folder} takes {_gb(needed)} in {dtype}, {_gb(free)} are free there; see --out, --dtype"
        )


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _merge(adapter: Path, source: ModelSource, folder: Path, dtype: str) -> None:
    import torch

    from edgelam_fl.model.whole import load_whole, put_on

    # Our own loading rather than from_pretrained: a GGUF file is read from the cache, and saves like any other model.
    merged: Any = put_on(load_whole(source, "fp32"), adapter).merge_and_unload()
    if dtype == "bf16":
        merged.to(torch.bfloat16)
    merged.save_pretrained(folder)
    load_tokenizer(source.folder).save_pretrained(folder)
    _keep_generation(source, folder)


def _keep_generation(source: ModelSource, folder: Path) -> None:
    """Writes the base's own generation settings; all that ends an answer is among the ends, as in training and in chat."""
    settings = generation_settings(source.folder)
    if not settings and not (folder / GENERATION).is_file():
        return
    settings = settings or generation_settings(folder)
    listed = settings.get("eos_token_id")
    known = listed if isinstance(listed, list) else [] if listed is None else [listed]
    ends = [*known, *sorted(source.stop_ids - set(known))]
    if ends:
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    (folder / GENERATION).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
