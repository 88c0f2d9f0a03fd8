"""Says which tensors a model's architecture has, by making the model of transformers without storage.

The answer hangs on config.json alone and is kept in the cache folder, so torch is imported only for a model that this machine
sees for the first time. Knows no files of weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from edgelam_fl.errors import ModelError
from edgelam_fl.files import cache_folder, write_atomically
from edgelam_fl.model.families import Family

_READER = 1  # raised when the same config.json gets another answer


@dataclass(frozen=True)
class Architecture:
    """The tensors that transformers loads into a model with its head; a task head, which a run makes, is left out."""

    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]  # name -> the other name of the same tensor: files need one of the two
    ignored: tuple[str, ...]  # patterns of further names that transformers leaves out
    model_class: str


def architecture_of(folder: Path, family: Family) -> Architecture:
    """Returns the architecture of config.json. Raises ModelError if transformers cannot make it."""
    content = (folder / "config.json").read_bytes()
    key = hashlib.sha256(f"{_READER} {family} {version('transformers')}\0".encode() + content).hexdigest()
    note = cache_folder() / "architectures" / f"{key[:32]}.json"
    try:
        kept = json.loads(note.read_text(encoding="utf-8"))
        shapes = {name: tuple(shape) for name, shape in kept["shapes"].items()}
        return Architecture(shapes, kept["tied"], tuple(kept["ignored"]), kept["model_class"])
    except (OSError, ValueError, KeyError, TypeError):  # absent, or cut off by a power failure
        made = _make(folder, family)
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps(asdict(made)))
    return made


def _make(folder: Path, family: Family) -> Architecture:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from edgelam_fl.model.skeleton import whole_on_meta

    refusals = (
        OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, ZeroDivisionError, RuntimeError,
        ImportError, StrictDataclassError,
    )  # fmt: skip
    try:
        model = whole_on_meta(AutoConfig.from_pretrained(folder), 2 if family.task_head else 0)
    except refusals as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(
            f"config.json of {folder} cannot be used: transformers {version('transformers')} says {type(error).__name__}: {said}"
        ) from error
    shapes = {
        name: tuple(values.shape)
        for name, values in model.state_dict().items()
        if family.task_head is None or not name.startswith(f"{family.task_head}.")
    }
    tied = {name: other for name, other in model.all_tied_weights_keys.items() if name in shapes and other in shapes}
    return Architecture(
        shapes, tied, tuple(sorted(model._keys_to_ignore_on_load_unexpected or ())), type(model).__name__
    )
