"""Runs a model over texts and keeps the hidden states at each cut, as what a host sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.leakage.texts import LEAST_TOKENS
from edgelam_fl.privacy.attacks.seen import Seen


@torch.no_grad()
def look(model: Any, texts: Sequence[Sequence[int]], cuts: Sequence[int]) -> dict[int, Seen]:
    """Runs the model on the tokens of each text; returns what is seen per cut. Leaves out texts under LEAST_TOKENS tokens."""
    states: dict[int, list[torch.Tensor]] = {cut: [] for cut in cuts}
    kept = [torch.tensor(text) for text in texts if len(text) >= LEAST_TOKENS]
    for ids_T in kept:
        hidden = model.base_model(input_ids=ids_T[None], output_hidden_states=True, use_cache=False).hidden_states
        for cut in cuts:
            states[cut].append(hidden[cut][0])
    lengths_R = tuple(len(ids_T) for ids_T in kept)
    return {cut: Seen(torch.cat(parts), torch.cat(kept), lengths_R) for cut, parts in states.items()}
