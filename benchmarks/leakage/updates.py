"""Measures which rare words a device's update gives away: LoRA's change at the first layer, of one step and of one round.

Four devices train SmolLM2 in a federation without hosts on docstrings of the standard library. The attacker has the public
model, the adapter before and after, and a list of rare tokens: those in few of all docstrings. It ranks them by
how well they explain the change of the first layer's factors A, in one device's update (the server) and in the average of
four (everybody who gets the published adapter). Chance is measured too, by asking a device's update for the rare tokens of
another device. The upper line is the same attack on the gradient of the whole weights, which nobody sends. --smoke: a few texts and a
tiny random model with SmolLM2's tokens.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.common import Figure
from benchmarks.leakage.recorded import RecordedRound, recorded_rounds, run_config
from benchmarks.leakage.texts import glosses, token_ids
from edgelam_fl.model.adapter import PREFIX, Adapter
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.tokenizer import load_tokenizer
from edgelam_fl.model.whole import load_whole
from edgelam_fl.privacy.attacks import membership
from edgelam_fl.privacy.attacks.updates import share_of_best, token_scores, whitening
from edgelam_fl.tasks.base import Example
from edgelam_fl.tasks.causal_lm import CausalLm, loss_rows, loss_sum, make_units
from edgelam_fl.tasks.data import Pair, batch_indices, read_pairs
from edgelam_fl.tasks.docstrings import docstring_pairs
from edgelam_fl.tasks.held_out import set_aside
from tests.support import write_tiny_llama

MODEL, MODULES = "smollm2-135m", ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
MOST_TEXTS, BEST, PUBLIC_TEXTS = (
    10,
    20,
    500,
)  # a rare token is in at most so many docstrings; the first ones of a ranking; glosses
AUC, FIRST = "AUC of present against absent rare tokens", f"share of the {BEST} first-ranked that are present"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the training."""

    seeds: int = 3
    devices: int = 4
    examples: int = 100  # per device
    steps: int = 6  # in the round of several steps
    batch: int = 4


@dataclass(frozen=True)
class Ranked:
    """A ranking of all rare tokens from one update."""

    auc: float
    first: float  # share of the best-ranked that are present
    present: float  # share of all rare tokens that are present
    of_another: float | None  # AUC for the tokens of another device; None: from an average
    shown: str  # the first tokens of the ranking; those that are present are between bars


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    model = find_model(MODEL)
    if not smoke:
        return measure_model(model, Sizes())
    with TemporaryDirectory() as folder:
        tiny = write_tiny_llama(Path(folder), layers=4, tokenizer=load_tokenizer(model.folder))
        return measure_model(find_model(str(tiny)), Sizes(1, 2, 3, 2, 1))


def measure_model(source: ModelSource, sizes: Sizes) -> tuple[dict[str, Any], list[Figure]]:
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        seeds = [rank_seed(source, sizes, seed, Path(folder) / str(seed)) for seed in range(1, sizes.seeds + 1)]
    figures = []
    for view in seeds[0]:
        ranked = [one for seed in seeds for one in seed[view]]
        figures += figures_of(view, ranked)
    settings = {
        "model": source.name, "seeds": sizes.seeds, "devices": sizes.devices, "examples_per_device": sizes.examples,
        "rare": f"in 1 to {MOST_TEXTS} docstrings", "steps_of_a_round": sizes.steps, "batch_size": sizes.batch,
        "shown": {view: ranked[0].shown for view, ranked in seeds[0].items()},
    }  # fmt: skip
    return settings, figures


# ---------------------------------------------------------------- a seed


@dataclass(frozen=True)
class Public:
    """The public side, which everybody has: the model's first layer and texts."""

    rare_V: np.ndarray  # ids of the rare tokens
    inputs_VD: np.ndarray  # the first layer's inputs for them
    whitening_DD: np.ndarray
    spell: Callable[[int], str]

    def ranked(self, changes: Sequence[np.ndarray], present: set[int], of_another: set[int] | None = None) -> Ranked:
        """Ranks the rare tokens by one update; `of_another`: tokens of another device that did not make it."""
        scores_V = token_scores(changes, self.inputs_VD, self.whitening_DD)
        present_V = np.isin(self.rare_V, list(present))
        another = None
        if of_another is not None:
            another_V = np.isin(self.rare_V, list(of_another - present))
            another = membership.auc(scores_V[another_V], scores_V[~another_V & ~present_V])
        auc = membership.auc(scores_V[present_V], scores_V[~present_V])
        best = [int(token) for token in self.rare_V[np.argsort(-scores_V, kind="stable")[:BEST]]]
        shown = " ".join(f"|{self.spell(token)}|" if token in present else self.spell(token) for token in best)
        return Ranked(auc, share_of_best(scores_V, present_V, BEST), float(present_V.mean()), another, shown)


def public_side(model: Any, task: CausalLm) -> Public:
    found = Counter(token for example in task.examples(all_pairs()).examples for token in set(example.ids))
    rare_V = np.array(sorted(token for token, texts in found.items() if texts <= MOST_TEXTS))

    @torch.no_grad()
    def inputs(ids: Sequence[int]) -> np.ndarray:
        norm = model.get_submodule("model.layers.0.input_layernorm")
        return norm(model.get_input_embeddings()(torch.tensor(ids))).numpy()

    public = [token for gloss in glosses()[:PUBLIC_TEXTS] for token in token_ids(task.tokenizer, gloss)]
    return Public(
        rare_V, inputs(rare_V.tolist()), whitening(inputs(public)), lambda token: task.tokenizer.decode([token]).strip()
    )


def all_pairs() -> list[Pair]:
    return [(pair.prompt, pair.answer) for pair in docstring_pairs()]


def rank_seed(source: ModelSource, sizes: Sizes, seed: int, folder: Path) -> dict[str, list[Ranked]]:
    """Trains the federations of one seed and attacks their updates; returns rankings by what the attacker has."""
    folder.mkdir()
    settings = [f"run.seed={seed}", f"federation.batch_size={sizes.batch}", "split.micro_batches=1"]
    config = run_config(source, settings)
    task, model = CausalLm(source.folder, config.task), load_whole(source, "fp32")
    public = public_side(model, task)
    data = write_data(sizes, seed, folder)
    examples = {
        name: task.examples(set_aside(read_pairs(file, "question", "answer"), config.data.held_out)[0]).examples
        for name, file in data.items()
    }

    def tokens(name: str, steps: range) -> set[int]:
        batches = [batch_indices(len(examples[name]), sizes.batch, step, seed, name) for step in steps]
        return {token for batch in batches for number in batch for token in examples[name][number].ids}

    def rankings(done: RecordedRound, steps: range) -> tuple[list[Ranked], Ranked]:
        seen = {name: tokens(name, steps) for name in data}
        others = dict(zip(data, [*list(data)[1:], next(iter(data))], strict=True))
        single = [
            public.ranked(changes(done.start, trained), seen[name], seen[others[name]])
            for name, trained in done.trained.items()
        ]
        return single, public.ranked(changes(done.start, done.published), set().union(*seen.values()))

    first, second = recorded_rounds(
        source, data, folder / "steps", [*settings, "federation.rounds=2", "federation.local_steps=1"]
    )
    (whole,) = recorded_rounds(
        source, data, folder / "round", [*settings, "federation.rounds=1", f"federation.local_steps={sizes.steps}"]
    )
    views: dict[str, list[Ranked]] = {"the run's first step, one device": rankings(first, range(1))[0]}
    several = f"{sizes.steps} steps"
    for what, (single, average) in (
        ("one step", rankings(second, range(1, 2))),
        (several, rankings(whole, range(sizes.steps))),
    ):
        views[f"{what}, one device"], views[f"{what}, average of {sizes.devices} devices"] = single, [average]
    name = next(iter(data))
    batch = [examples[name][n] for n in batch_indices(len(examples[name]), sizes.batch, 0, seed, name)]
    views["one step, one device, gradient of the whole weights"] = [
        public.ranked(whole_gradients(model, batch), tokens(name, range(1)))
    ]
    return views


def write_data(sizes: Sizes, seed: int, folder: Path) -> dict[str, Path]:
    pairs = all_pairs()
    random.Random(seed).shuffle(pairs)
    files = {f"device-{n + 1}": folder / f"device-{n + 1}.jsonl" for n in range(sizes.devices)}
    for number, file in enumerate(files.values()):
        own = pairs[number * sizes.examples : (number + 1) * sizes.examples]
        file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in own), encoding="utf-8")
    return files


def changes(before: Adapter, after: Adapter) -> list[np.ndarray]:
    """Returns the changes of the factors A of `MODULES`."""
    names = [f"{PREFIX}{module}.lora_A.weight" for module in MODULES]
    return [after[name] - before[name] for name in names]


def whole_gradients(model: Any, batch: Sequence[Example]) -> list[np.ndarray]:
    """Returns the gradients of the whole weights of `MODULES` for one batch."""
    weights = [model.get_submodule(module).weight for module in MODULES]
    for weight in weights:
        weight.requires_grad_(True)
    (unit,) = make_units(batch, 1)
    rows_N = loss_rows(unit.labels)
    logits_NV = model(input_ids=unit.inputs).logits.flatten(0, 1)[rows_N]
    loss_sum(logits_NV, unit.labels, rows_N).backward()
    return [weight.grad.numpy() for weight in weights]


# ---------------------------------------------------------------- figures


def figures_of(view: str, ranked: Sequence[Ranked]) -> list[Figure]:
    aucs, another = [one.auc for one in ranked], [one.of_another for one in ranked if one.of_another is not None]
    figures = [
        Figure(f"{view}: {AUC}", round(fmean(aucs), 3), ""),
        Figure(f"{view}: lowest {AUC}", round(min(aucs), 3), ""),
        Figure(f"{view}: highest {AUC}", round(max(aucs), 3), ""),
        Figure(f"{view}: {FIRST}", round(100 * fmean(one.first for one in ranked), 1), "%"),
        Figure(f"{view}: share of all rare tokens that are present", round(100 * fmean(one.present for one in ranked), 2), "%"),
    ]  # fmt: skip
    if another:
        figures.append(Figure(f"{view}: chance, AUC for another device's tokens", round(fmean(another), 3), ""))
    return figures
