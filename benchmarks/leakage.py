"""Measures how much of a device's text a host can read from the hidden states at the cut, by a simple attack on SmolLM2.

The attacker is an honest but curious host. It has the public model and public text, and never saw the private text. It
runs the model on the public text and solves one ridge regression (closed form) from the hidden states at the cut to the
embedding table; then it applies this map to the hidden states that devices send. The map uses one position at a time,
without context, language model or gradients, so these shares are lower bounds: a better attacker reads more.

Public text: glosses of WordNet. Private text: docstrings of the standard library. --smoke: two cuts, few texts.
Writes a table as well: benchmarks/results/leakage.md.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import normalize

from benchmarks.common import RESULTS, Figure, main
from benchmarks.data.wordnet import SAMPLE

MODEL, BASE, DEFAULT_CUT = "smollm2-135m", "fp32", 2
CUTS = (0, 1, 2, 4, 8, 16, 24)  # layers that stay on the device, after the embedding
PUBLIC_TEXTS, PRIVATE_TEXTS, MOST_TOKENS, LEAST_TOKENS = 2500, 120, 96, 4
MODULES = (
    "statistics", "asyncio", "email", "logging", "argparse", "subprocess", "decimal", "datetime", "csv", "zipfile",
    "threading", "socket",
)  # fmt: skip
SHORTEST, LONGEST = 40, 400  # characters of a docstring, both excluded
RIDGE, GUESSES, SHOWN = 1.0, 5, 32
NEAREST, FIRST, AMONG = (
    "nearest neighbour in the embedding table",
    "ridge map, first guess",
    f"ridge map, first {GUESSES}",
)


@dataclass(frozen=True)
class Seen:
    """A text's hidden states per cut, and the tokens that the attacker looks for (N tokens, D hidden)."""

    states_ND: dict[int, torch.Tensor]
    ids_N: torch.Tensor


@dataclass(frozen=True)
class Leak:
    """Shares of the private tokens that the attacker reads at one cut; `first_ids_N` are the map's first guesses."""

    nearest: float
    first: float
    among: float
    first_ids_N: torch.Tensor


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    from transformers import AutoTokenizer

    from edgelam_fl.model.source import find_model
    from edgelam_fl.model.whole import load_whole

    torch.manual_seed(0)  # nothing here draws random numbers yet; the seed keeps later changes reproducible
    cuts = (0, DEFAULT_CUT) if smoke else CUTS
    source = find_model(MODEL)
    model, tokenizer = load_whole(source, BASE), AutoTokenizer.from_pretrained(source.folder)

    def seen(texts: Sequence[str]) -> Seen:
        return look(model, [token_ids(tokenizer, text) for text in texts], cuts)

    public = seen(public_texts()[: 20 if smoke else PUBLIC_TEXTS])
    private = seen(private_texts()[: 4 if smoke else PRIVATE_TEXTS])
    embeddings_VD = model.get_input_embeddings().weight.detach()
    leaks = {cut: read_back(public, private, cut, embeddings_VD) for cut in cuts}
    most_common = (private.ids_N == public.ids_N.mode().values).float().mean().item()
    figures = [figure for cut, leak in leaks.items() for figure in figures_of_cut(cut, leak)]
    figures.append(Figure("always the commonest public token", percent(most_common), "% of tokens"))
    if not smoke:
        shown = [tokenizer.decode(ids_N[:SHOWN]) for ids_N in (private.ids_N, leaks[DEFAULT_CUT].first_ids_N)]
        (RESULTS / "leakage.md").write_text(table(leaks, private, public, *shown), encoding="utf-8")
    settings = {
        "model": MODEL, "base": BASE, "cuts": list(cuts), "public_tokens": len(public.ids_N),
        "private_tokens": len(private.ids_N), "private_modules": list(MODULES), "ridge": RIDGE, "seed": 0,
        "default_cut": DEFAULT_CUT, "map": f"{model.config.hidden_size + 1} x {model.config.hidden_size} numbers",
    }  # fmt: skip
    return settings, figures


# ---------------------------------------------------------------- texts


def public_texts() -> list[str]:
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    return [f"{row['gloss']} {row['domain']}" for row in rows]


def private_texts() -> list[str]:
    """Returns sorted docstrings, which are the same on every machine with the same version of Python."""
    members = (member for name in MODULES for _, member in inspect.getmembers(importlib.import_module(name), callable))
    found = {inspect.getdoc(member) or "" for member in members}
    return sorted(text for text in found if SHORTEST < len(text) < LONGEST)


def token_ids(tokenizer: Callable[..., Any], text: str) -> list[int]:
    ids: list[int] = tokenizer(text, truncation=True, max_length=MOST_TOKENS)["input_ids"]
    return ids


# ---------------------------------------------------------------- the attack


@torch.no_grad()
def look(model: Any, texts: Sequence[list[int]], cuts: Sequence[int]) -> Seen:
    """Runs the model on each text and keeps the hidden states at each cut. Leaves out texts under LEAST_TOKENS tokens."""
    states: dict[int, list[torch.Tensor]] = {cut: [] for cut in cuts}
    ids = []
    for text in texts:
        if len(text) < LEAST_TOKENS:
            continue
        ids.append(torch.tensor(text))
        hidden = model.base_model(input_ids=ids[-1][None], output_hidden_states=True, use_cache=False).hidden_states
        for cut in cuts:
            states[cut].append(hidden[cut][0])
    return Seen({cut: torch.cat(parts) for cut, parts in states.items()}, torch.cat(ids))


def read_back(public: Seen, private: Seen, cut: int, embeddings_VD: torch.Tensor) -> Leak:
    """Guesses tokens from hidden states: by the nearest embedding, and by a ridge map fitted to the public text.

    States are scaled to one length, that of random vectors of this width (the root of D), since a few positions have
    states that are a thousand times longer than the others.
    """
    directions_VD, length = normalize(embeddings_VD, dim=1), embeddings_VD.shape[1] ** 0.5

    def inputs(states_ND: torch.Tensor) -> torch.Tensor:
        return torch.cat([normalize(states_ND, dim=1) * length, torch.ones(len(states_ND), 1)], dim=1)

    x_NI = inputs(public.states_ND[cut])
    target_ND = directions_VD[public.ids_N] * length
    map_ID = torch.linalg.solve(x_NI.T @ x_NI + RIDGE * torch.eye(x_NI.shape[1]), x_NI.T @ target_ND)
    near_NV = normalize(private.states_ND[cut], dim=1) @ directions_VD.T
    guess_NV = normalize(inputs(private.states_ND[cut]) @ map_ID, dim=1) @ directions_VD.T
    best_NG = guess_NV.topk(GUESSES, dim=1).indices
    return Leak(
        share(near_NV.argmax(1) == private.ids_N), share(best_NG[:, 0] == private.ids_N),
        share((best_NG == private.ids_N[:, None]).any(1)), best_NG[:, 0],
    )  # fmt: skip


def share(hits_N: torch.Tensor) -> float:
    return hits_N.float().mean().item()


# ---------------------------------------------------------------- figures


def figures_of_cut(cut: int, leak: Leak) -> list[Figure]:
    unit = "% of tokens"
    check = ("100 %: embeddings are the text", leak.nearest == 1.0) if cut == 0 else (None, None)
    return [
        Figure(f"cut {cut}: {NEAREST}", percent(leak.nearest), unit, *check),
        Figure(f"cut {cut}: {FIRST}", percent(leak.first), unit),
        Figure(f"cut {cut}: {AMONG}", percent(leak.among), unit),
    ]


def percent(value: float) -> float:
    return round(100 * value, 1)


def table(leaks: dict[int, Leak], private: Seen, public: Seen, text: str, read: str) -> str:
    lines = [
        "# What a host reads from the hidden states",
        "",
        f"SmolLM2-135M, a ridge map taught by {len(public.ids_N):,} tokens of public text and tried on {len(private.ids_N):,} tokens of",
        "private text; % of the private tokens. Written by `python -m benchmarks.leakage`.",
        "",
        f"| layers on the device | {NEAREST} | {FIRST} | {AMONG} |",
        "|---|---|---|---|",
        *(
            f"| {cut} | {percent(leak.nearest):.1f} | {percent(leak.first):.1f} | {percent(leak.among):.1f} |"
            for cut, leak in leaks.items()
        ),
        "",
        f"At the default cut ({DEFAULT_CUT} layers), the beginning of the private text and the map's first guesses:",
        "",
        "```",
        f"private  {' '.join(text.split())}",
        f"read     {' '.join(read.split())}",
        "```",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main("leakage", measure)
