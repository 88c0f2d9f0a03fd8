"""Exports a run's result for other tools: the adapter as a peft folder, merged into its base as a Hugging Face model, or as GGUF files.

Knows nothing about federations. Other tools load the files without EdgeLAM-FL.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from edgelam_fl.errors import ConfigError, EnvironmentProblem
from edgelam_fl.files import share, write_atomically
from edgelam_fl.machine import disk_free_bytes, memory_free_bytes
from edgelam_fl.model.generation import generation_settings
from edgelam_fl.model.gguf_file import BYTES_PER_NUMBER
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.tensor_file import write_tensors
from edgelam_fl.model.tokenizer import load_tokenizer
from edgelam_fl.serving.companions import add_card, add_texts, keep_generation
from edgelam_fl.serving.gguf_out import ADAPTER, MODEL, GgufPlan, plan_file, why_no_adapter, write_lora, write_merged
from edgelam_fl.serving.model_card import model_card
from edgelam_fl.serving.modelfile import modelfile
from edgelam_fl.serving.results import Result
from edgelam_fl.serving.trained_on import TrainedOn, trained_on
from edgelam_fl.tasks.kinds import values_of
from edgelam_fl.telemetry.events import EVENTS_FILE, Event

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_DTYPES = {"peft": (), "merged": ("fp32", "bf16"), "gguf": tuple(BYTES_PER_NUMBER)}  # --to -> what --dtype may be


def export(result: Result, kind: str, out: Path | None, dtype: str = "", front: Path | None = None) -> tuple[Path, str]:
    """Writes the result as `kind` "peft", "merged" or "gguf" to `out` (None: a folder of that name in the run's folder).

    `front`: a device's own tensors, which a run with privacy.private_front or task.private_modules lacks. Returns the folder and the lines
    that use it elsewhere. The folder appears complete or not at all. Raises ConfigError if it exists or an option is wrong,
    EnvironmentProblem if memory or disk is short.
    """
    _check_options(result, kind, dtype)
    folder = out or result.folder / kind
    if folder.exists():
        raise ConfigError(f"{folder} exists; choose another with --out (nothing is ever overwritten)")
    _check_front(result, front)
    source = find_model(result.config.model.name)
    result.check_base(source)
    made, classes = _Made(result, source, trained_on(source), dtype or "fp32"), result.config.task.classes
    card = model_card(result.config, made.base, _events(result), kind)
    with _adapter(result, front) as adapter:
        if kind == "peft":
            _check_adapter(adapter, source, classes)
            _whole_or_nothing(folder, lambda part: _copy(adapter, source, part), card)
            return folder, _load_peft(folder, source, made.base, classes)
        if kind == "gguf":
            plan = plan_file(source, made.base)
            _check_room(source, folder, made.dtype)
            _whole_or_nothing(folder, lambda part: _write_gguf(made, adapter, plan, part), card)
            return folder, _use_gguf(folder)
        _check_room(source, folder, made.dtype)
        _whole_or_nothing(folder, lambda part: _write_merged(made, adapter, part), card)
    return folder, f'model = {_auto(classes)}.from_pretrained("{folder}")    # from transformers'


def _events(result: Result) -> list[Event]:
    """Returns what happened in the run; nothing if its events were taken away."""
    return list(result.events()) if (result.folder / EVENTS_FILE).is_file() else []


@dataclass(frozen=True)
class _Made:
    """A result that is exported, and the form that it gets."""

    result: Result
    source: ModelSource
    base: TrainedOn
    dtype: str


def _check_options(result: Result, kind: str, dtype: str) -> None:
    """Raises ConfigError for options that do not go together, and for a run whose result has no such form."""
    if kind not in _DTYPES:
        raise ConfigError(
            f"--to {kind!r} must be 'peft' (the adapter alone), 'merged' (base and adapter as one model) or 'gguf' (both for "
            f"llama.cpp and Ollama)"
        )
    if kind == "peft" and dtype:
        raise ConfigError("--dtype belongs to --to merged and --to gguf; an adapter stays fp32, as it was trained")
    if dtype not in ("", *_DTYPES[kind]):
        raise ConfigError(f"--dtype {dtype!r} must be {' or '.join(_DTYPES[kind])} with --to {kind}")
    if result.config.wire.gradients == "lowrank":
        raise ConfigError(
            f"wire.gradients = 'lowrank' in {result.folder}: its cut adapter is no LoRA of a module, so no other tool can load the "
            f"result; `edgelam chat {result.folder}` answers with it. A run with wire.gradients = 'full' can be exported"
        )
    if kind != "peft" and values_of(result.config.task.kind):
        raise ConfigError(
            f"task.kind = {result.config.task.kind!r} in {result.folder}: the modules in the places of embedding and head are no part of a "
            f"language model; `--to peft` writes them with the adapter"
        )
    if kind == "gguf" and result.config.task.classes:
        raise ConfigError(
            f"task.kind = {result.config.task.kind!r} in {result.folder}: a GGUF file answers with text, not with a class; "
            f"`--to merged` writes a folder for transformers"
        )


def _auto(classes: Sequence[str]) -> str:
    """Returns transformers' name for what opens a model."""
    return "AutoModelForSequenceClassification" if classes else "AutoModelForCausalLM"


def _whole_or_nothing(folder: Path, write: Callable[[Path], None], card: str) -> None:
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        write(part)
        add_card(card, part)
        share(part)  # safetensors' writer keeps its files private
        part.rename(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ---------------------------------------------------------------- a front that stayed on its device


def _check_front(result: Result, front: Path | None) -> None:
    """Raises ConfigError if a run's private front is missing, or one is given to a run that has none."""
    kept = list(result.config.task.private_modules)
    if kept and front is None:
        raise ConfigError(
            f"{result.folder} lacks what each device keeps to itself: with task.private_modules = {kept} these modules are as the run began "
            f"with them. On a device, export with --front FILE: private-fronts/RUN.safetensors in the node's state folder"
        )
    if result.config.privacy.private_front and front is None:
        raise ConfigError(
            f"{result.folder} lacks the front's adapter: with privacy.private_front = true each device keeps its own, and the run's "
            f"folder holds those of hosts and back alone. On a device, export with --front FILE: "
            f"private-fronts/RUN.safetensors in the node's state folder"
        )
    if front is not None and not (kept or result.config.privacy.private_front):
        raise ConfigError(
            "--front belongs to runs with privacy.private_front = true or task.private_modules; this run's adapter is whole"
        )


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
    with safe_open(result.adapter / _TENSORS, framework="numpy") as file:
        told = file.metadata()
    wrong = [name for name, array in own.items() if name not in whole or whole[name].shape != array.shape]
    if wrong or not own:
        what = f"{wrong[0]} is no tensor of it" if wrong else "it is empty"
        raise ConfigError(f"--front {front} does not belong to the adapter of {result.folder}: {what}")
    with tempfile.TemporaryDirectory() as made:
        shutil.copyfile(result.adapter / _CONFIG, Path(made) / _CONFIG)
        write_tensors(Path(made) / _TENSORS, whole | own, told)
        yield Path(made)


# ---------------------------------------------------------------- the adapter alone


def _copy(adapter: Path, source: ModelSource, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in (_CONFIG, _TENSORS):
        shutil.copyfile(adapter / name, folder / name)
    add_texts(source, folder)


def _check_adapter(adapter: Path, source: ModelSource, classes: Sequence[str]) -> Any:
    """Lets peft put the adapter on its base, which has no storage here, and returns both: it takes no memory for a model."""
    from transformers import AutoConfig

    from edgelam_fl.model.skeleton import whole_on_meta
    from edgelam_fl.model.whole import put_on

    return put_on(whole_on_meta(AutoConfig.from_pretrained(source.folder), len(classes)), adapter)


def _load_peft(folder: Path, source: ModelSource, known: TrainedOn, classes: Sequence[str]) -> str:
    """Returns the lines that load the adapter elsewhere, and before them what has to be known of its base."""
    told, base, more = "", source.reference, f", num_labels={len(classes)}" if classes else ""
    if known.is_rounded_copy:
        told = (
            f"# Trained on {known.in_words}.\n"
            f"# {base} has the weights before they were rounded: losses and answers differ a little there. `--to merged` and\n"
            f"# `--to gguf` have exactly the model that was trained.\n"
        )
    elif source.gguf is not None and _transformers_reads_it(source):
        base, more = str(source.gguf.parent), f', gguf_file="{source.gguf.name}"'
    elif source.gguf is not None:
        told = (
            f"# The base is {source.gguf}, which transformers does not read as llama.cpp and EdgeLAM-FL do. Put the adapter on the\n"
            f"# folder that the file was converted from, or take `--to merged`:\n"
        )
        base = "FOLDER"
    return (
        f'{told}base = {_auto(classes)}.from_pretrained("{base}"{more})    # from transformers\n'
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


def _merged(made: _Made, adapter: Path) -> Any:
    """Returns transformers' model in fp32, with the adapter in its weights."""
    from edgelam_fl.model.whole import load_whole, put_on

    # Our own loading rather than from_pretrained: a GGUF file is read from the cache, and saves like any other model.
    whole = load_whole(made.source, "fp32", classes=len(made.result.config.task.classes))
    return put_on(whole, adapter).merge_and_unload()


def _write_merged(made: _Made, adapter: Path, folder: Path) -> None:
    import torch

    merged, classes = _merged(made, adapter), made.result.config.task.classes
    if classes:
        merged.config.id2label = dict(enumerate(classes))
        merged.config.label2id = {name: number for number, name in enumerate(classes)}
    if made.dtype == "bf16":
        merged.to(torch.bfloat16)
    merged.save_pretrained(folder)
    load_tokenizer(made.source.folder).save_pretrained(folder)
    keep_generation(made.source, folder)


# ---------------------------------------------------------------- for llama.cpp and Ollama


def _write_gguf(made: _Made, adapter: Path, plan: GgufPlan, folder: Path) -> None:
    """Writes the model, the adapter if it is plain LoRA, and the Modelfile; a text in place of an adapter that is not."""
    folder.mkdir(parents=True)
    tuned = _check_adapter(adapter, made.source, ())
    reason = why_no_adapter(tuned)
    if reason:
        write_atomically(
            folder / "no-adapter.txt", f"There is no {ADAPTER} here: {reason}. {MODEL} has all of the result.\n"
        )
    else:
        write_lora(tuned, load_file(adapter / _TENSORS), plan, folder / ADAPTER)
    write_merged(_merged(made, adapter), plan, folder / MODEL, made.dtype)
    penalty = float(generation_settings(made.source.folder).get("repetition_penalty") or 1.0)
    tokenizer = load_tokenizer(made.source.folder)
    text = modelfile(made.result.config.task, tokenizer, made.source.stop_ids, penalty, MODEL)
    write_atomically(folder / "Modelfile", text)


def _use_gguf(folder: Path) -> str:
    no_adapter = folder / "no-adapter.txt"
    said = (
        no_adapter.read_text(encoding="utf-8").strip()
        if no_adapter.is_file()
        else f"llama-cli -m BASE.gguf --lora {folder / ADAPTER}    # the adapter alone, beside its base"
    )
    return f"llama-cli -m {folder / MODEL}    # llama.cpp\nollama create NAME -f {folder / 'Modelfile'}\n{said}"
