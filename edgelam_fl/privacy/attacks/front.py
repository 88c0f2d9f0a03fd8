"""The public model's first layers, as an attacker runs them: on texts, on mixed embeddings, on many candidates for a token.

Knows the interface of transformers' models, and no model. Shapes: B texts, T tokens, D hidden, K candidates, S tokens seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch


def as_it_is(states: torch.Tensor) -> torch.Tensor:
    return states


class Front:
    """Layers from the embedding to the cut; a causal model's can also go on token by token.

    `model` is called as transformers calls a model, and its `logits` are the hidden states at the cut. `new_cache` makes an
    empty cache of keys and values; None if the model is no causal one. `shown` turns hidden states into what the host sees
    of them, as far as the attacker knows it: rounding on the wire, a defence without its randomness.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        new_cache: Callable[[], Any] | None,
        shown: Callable[[torch.Tensor], torch.Tensor] = as_it_is,
    ) -> None:
        self.model, self.new_cache, self._shown = model, new_cache, shown

    def of_embeddings(self, embeddings_BTD: torch.Tensor, lengths_B: Sequence[int]) -> torch.Tensor:
        """Returns the states [B, T, D] of token embeddings, with gradients to these."""
        return self._states(embeddings_BTD.shape[1], lengths_B, inputs_embeds=embeddings_BTD)

    @torch.no_grad()
    def of_tokens(self, ids_BT: torch.Tensor, lengths_B: Sequence[int]) -> torch.Tensor:
        """Returns the states [B, T, D] of tokens; those after a text's length mean nothing."""
        return self._states(ids_BT.shape[1], lengths_B, input_ids=ids_BT)

    def _states(self, tokens: int, lengths_B: Sequence[int], **inputs: torch.Tensor) -> torch.Tensor:
        slots_T = torch.arange(tokens)
        mask_BT = (slots_T < torch.tensor(lengths_B)[:, None]).long()
        return self._shown(self.model(**inputs, attention_mask=mask_BT, position_ids=slots_T[None]).logits)

    @torch.no_grad()
    def tried(self, prefix: Any, tokens: int, ids_BK: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Returns the state [B, K, D] of each candidate as the next token after the prefix, and the cache with all of them.

        prefix: the cache of the `tokens` tokens before, which stays as it is. A candidate sees the prefix and itself.
        """
        rows, candidates = ids_BK.shape
        visible_KS = torch.cat([torch.ones(candidates, tokens), torch.eye(candidates)], dim=1).bool()
        cache = copy.deepcopy(prefix)
        states_BKD = self.model(
            input_ids=ids_BK, attention_mask=visible_KS.expand(rows, 1, -1, -1), past_key_values=cache, use_cache=True,
            position_ids=torch.full((1, candidates), tokens),
        ).logits  # fmt: skip
        return self._shown(states_BKD), cache


def with_rows(cache: Any, rows_B: torch.Tensor) -> Any:
    """Returns a copy of a cache with these texts only."""
    chosen = copy.deepcopy(cache)
    for layer in chosen.layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys[rows_B], layer.values[rows_B]
    return chosen
