"""Puts beside a result's weights what other programs load with them: tokenizer, generation settings, model card.

Knows folders in Hugging Face's layout, and no weights. Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path

from edgelam_fl.files import write_atomically
from edgelam_fl.model.generation import GENERATION, generation_settings
from edgelam_fl.model.identity import text_files
from edgelam_fl.model.source import ModelSource
from edgelam_fl.serving.trained_on import CARD


def add_texts(source: ModelSource, folder: Path) -> None:
    """Copies the model's tokenizer, templates and generation settings into a folder, each file in one step."""
    for name in text_files(source.folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, (source.folder / name).read_bytes())
    keep_generation(source, folder)


def add_card(card: str, folder: Path) -> None:
    """Writes a model card into a folder, over that of the model itself."""
    write_atomically(folder / CARD, card)


def keep_generation(source: ModelSource, folder: Path) -> None:
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
    write_atomically(folder / GENERATION, json.dumps(settings, indent=2) + "\n")
