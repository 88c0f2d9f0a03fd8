"""Runs a model over texts as devices and hosts would, stage after stage, and keeps what a host sees at each cut.

Shapes: B texts, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional

from benchmarks.leakage.texts import LEAST_TOKENS
from edgelam_fl.model.adapter import Adapter, Span
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import LoraSettings, Stage, load_stages
from edgelam_fl.privacy.attacks.front import Front
from edgelam_fl.privacy.attacks.labels import Back
from edgelam_fl.privacy.attacks.replay import Candidates, candidates
from edgelam_fl.privacy.attacks.ridge import RidgeMap
from edgelam_fl.privacy.attacks.seen import Seen
from edgelam_fl.tasks.base import pad

_BATCH = 16


@torch.no_grad()
def look(stages: Sequence[Stage], texts: Sequence[Sequence[int]], cuts: Sequence[int]) -> dict[int, Seen]:
    """Takes each text through the stages, which end at the cuts; returns what is seen per cut.

    Leaves out texts under LEAST_TOKENS tokens. With a stage for cut 0, that is the embedding alone.
    """
    kept = [list(text) for text in texts if len(text) >= LEAST_TOKENS]
    found: dict[int, dict[int, torch.Tensor]] = {cut: {} for cut in cuts}
    order = sorted(range(len(kept)), key=lambda number: len(kept[number]))  # texts of like lengths need little padding
    for start in range(0, len(order), _BATCH):
        numbers = order[start : start + _BATCH]
        lengths = [len(kept[number]) for number in numbers]
        hidden = pad([kept[number] for number in numbers], 0)
        for cut, stage in zip(cuts, stages, strict=True):
            hidden = stage(hidden, lengths)
            for row, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
                found[cut][number] = hidden[row, :length].clone()
    ids_N, lengths_R = torch.tensor([token for text in kept for token in text]), tuple(map(len, kept))
    return {
        cut: Seen(torch.cat([states[n] for n in range(len(kept))]), ids_N, lengths_R) for cut, states in found.items()
    }


def stages_to(source: ModelSource, base: str, cuts: Sequence[int]) -> list[Stage]:
    """Loads the model's layers up to the last cut, in stages that end at the cuts; for the last layer's cut without the head."""
    spans = [Span(first, last, embed=number == 0) for number, (first, last) in enumerate(pairwise((0, *cuts)))]
    return load_stages(source, spans, base, None, classes=_classes(source))


def _classes(source: ModelSource) -> int:
    """Returns a number of classes for a model that needs one; its head is not looked at."""
    return 2 if source.family.task_head else 0


def front_to(
    source: ModelSource, base: str, cut: int, lora: LoraSettings | None = None, adapter: Adapter | None = None
) -> Front:
    """Loads the layers up to the cut as the attacker's front; with an adapter that the attacker knows, if given."""
    (stage,) = load_stages(source, [Span(0, cut, embed=True)], base, lora, classes=_classes(source))
    if adapter is not None:
        stage.load_adapter(adapter)
    return Front(stage.model, stage.new_cache if source.family.task_head is None else None)


def back_of(source: ModelSource, base: str, layers: int) -> Back:
    """Loads the model's last layers with norm and head, as a host can that knows the public model."""
    span = Span(source.num_layers - layers, source.num_layers, head=True)
    (stage,) = load_stages(source, [span], base, None)
    body: Any = stage.model.base_model

    def features(states_BTD: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = body(inputs_embeds=states_BTD, use_cache=False).last_hidden_state
        return out

    head: Any = stage.model
    return Back(features, head.get_output_embeddings().weight.detach())


@torch.no_grad()
def expected_before(seen: Seen, back: Back) -> torch.Tensor:
    """Returns what the head gets [N, D] before each token, zeros before a first one: what the model expects there.

    A host has it from the states that it receives, by its own layers.
    """
    features = [back.features(states_TD[None])[0] for states_TD in seen.states_of_texts]
    return torch.cat([functional.pad(part_TD[:-1], (0, 0, 1, 0)) for part_TD in features])


def likely_tokens(seen: Seen, fitted: RidgeMap, expected_ND: torch.Tensor, head_VD: torch.Tensor) -> Candidates:
    """Ranks tokens by a ridge map and by what the model expects."""
    return candidates(
        fitted.vectors(seen.states_ND), fitted.directions_VD, _SCALE, lambda part: expected_ND[part] @ head_VD.T
    )


_SCALE = 40.0  # of a ridge map's cosines, as logits
