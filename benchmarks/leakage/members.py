"""Measures whether a published adapter tells which examples a device learned from, and how well it remembers secrets.

Two devices train SmolLM2 in a federation without hosts on docstrings of the standard library, some of which stay out; so
members and others come from the same distribution. One device also has canaries: questions for access codes, whose answers
are random digits, once, 4 or 16 times. After some passes over the data the attacker gets the adapter that the server
publishes, or, as the server does, what one device sent in before it was averaged. Chance is measured too: the same scores
from the model without an adapter, and canaries that nobody learned. One run more has central differential privacy.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks.common import Figure
from benchmarks.leakage.recorded import recorded_rounds, run_config
from edgelam_fl.model.adapter import Adapter, Span, initial_adapter
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.stage import LoraSettings, Stage, load_stages
from edgelam_fl.privacy.attacks import canaries, membership
from edgelam_fl.tasks.base import Example, pad
from edgelam_fl.tasks.causal_lm import IGNORED, CausalLm
from edgelam_fl.tasks.data import Pair
from edgelam_fl.tasks.docstrings import docstring_pairs
from edgelam_fl.tasks.held_out import set_aside
from tests.support import write_tiny_llama

MODEL = "smollm2-135m"
NAMES = (
    "Ada", "Bruno", "Clara", "David", "Edith", "Felix", "Greta", "Hugo", "Iris", "Jonas", "Karla", "Leo",
)  # fmt: skip
DIGITS, LENGTH = "0123456789", 3
ROWS = 16  # examples that are scored at once
PRIVACY, PRIVATE = "epsilon 8", ("privacy.mode=central", "privacy.epsilon=8", "privacy.clip=0.01")
BASE, WAYS = "no adapter", ("loss", "loss against the base model")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the training and of what is scored."""

    seeds: int = 3
    devices: int = 2
    members: int = 40  # per device
    others: int = 80
    passes: tuple[int, ...] = (1, 4)  # over each device's data, at which the published adapter is attacked
    canaries: tuple[tuple[int, int], ...] = ((0, 4), (1, 4), (4, 2), (16, 1))  # (times in the data, how many) per seed
    settings: tuple[str, ...] = ("federation.epochs=1", "federation.batch_size=8", "split.micro_batches=1")

    @property
    def last(self) -> str:
        """The name of the adapter that one device sends in after all passes."""
        return f"one device's own after {counted(self.passes[-1])}"


SMOKE = Sizes(1, 1, 2, 2, (1,), ((4, 1),), ("federation.local_steps=1", "federation.batch_size=2"))


@dataclass(frozen=True)
class Canary:
    """A secret, and how often it is in the device's data."""

    name: str
    secret: int
    times: int

    @property
    def pair(self) -> Pair:
        return f"What is the access code of {self.name}?", f"{self.secret:0{LENGTH}d}"


@dataclass(frozen=True)
class Texts:
    """The texts of one seed."""

    files: Mapping[str, list[Pair]]  # by device, all of its data
    members: Mapping[str, list[Pair]]  # by device, without canaries and what the engine holds out
    others: list[Pair]
    canaries: list[Canary]


@dataclass(frozen=True)
class Attacked:
    """The leaks of one adapter of one seed: losses per example, and the exposure of each canary in bits."""

    members_N: np.ndarray
    others_M: np.ndarray
    exposures: list[float]


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    with TemporaryDirectory() as folder:
        return measure_model(
            find_model(str(write_tiny_llama(Path(folder))) if smoke else MODEL), SMOKE if smoke else Sizes()
        )


def measure_model(source: ModelSource, sizes: Sizes) -> tuple[dict[str, Any], list[Figure]]:
    """Trains and attacks all seeds."""
    torch.set_num_threads(1)
    private = replace(sizes, settings=(*sizes.settings, *PRIVATE))
    with TemporaryDirectory() as folder:
        seeds = [attack_seed(source, sizes, seed, Path(folder) / f"run-{seed}") for seed in range(1, sizes.seeds + 1)]
        with_privacy = [attack_seed(source, private, 1, Path(folder) / "private")]
    del with_privacy[0][1][sizes.last]  # what the server sees, which is trusted there
    areas: dict[str, list[float]] = {}
    figures = figures_of(seeds, "", areas) + figures_of(with_privacy, f"{PRIVACY}, ", areas)
    secrets = len(DIGITS) ** LENGTH
    figures += [
        Figure("exposure by chance", round(canaries.chance_exposure(secrets), 2), "bits"),
        Figure("exposure of a canary that is the first guess", round(float(np.log2(secrets)), 2), "bits"),
    ]
    settings = {
        "model": source.name, "seeds": sizes.seeds, "devices": sizes.devices, "members_per_device": sizes.members,
        "others": sizes.others, "canaries_per_seed": {str(times): count for times, count in sizes.canaries},
        "run": list(run_settings(sizes, 1)), "private_run": list(PRIVATE), "auc_by_seed": areas,
    }  # fmt: skip
    return settings, figures


def run_settings(sizes: Sizes, seed: int) -> list[str]:
    return [f"federation.rounds={sizes.passes[-1]}", f"run.seed={seed}", *sizes.settings]


def counted(passes: int) -> str:
    return f"{passes} pass{'es' * (passes > 1)}"


# ---------------------------------------------------------------- a seed


def attack_seed(source: ModelSource, sizes: Sizes, seed: int, folder: Path) -> tuple[Texts, dict[str, Attacked]]:
    """Trains one federation; returns its texts, and what each adapter gives away."""
    folder.mkdir()
    config = run_config(source, run_settings(sizes, seed))
    texts = draw_texts(sizes, seed, config.data.held_out)
    data = write_data(texts, folder)
    lora = config.lora
    span = Span(0, source.num_layers, embed=True, head=True)
    (stage,) = load_stages(source, [span], "fp32", LoraSettings(lora.rank, lora.alpha, lora.targets))
    task = CausalLm(source.folder, config.task)
    first = next(iter(data))
    members = [pair for pairs in texts.members.values() for pair in pairs]

    def attack(adapter: Adapter, members: Sequence[Pair]) -> Attacked:
        stage.load_adapter(adapter)
        of_members, of_others = (losses(stage, task.examples(pairs).examples) for pairs in (members, texts.others))
        return Attacked(of_members, of_others, [exposure(stage, task, canary) for canary in texts.canaries])

    found = {BASE: attack(initial_adapter(source, lora.targets, lora.rank, seed), members)}
    for number, done in enumerate(recorded_rounds(source, data, folder / "run", run_settings(sizes, seed)), start=1):
        if number in sizes.passes:
            found[f"published after {counted(number)}"] = attack(done.published, members)
    found[sizes.last] = attack(done.trained[first], texts.members[first])
    return texts, found


def draw_texts(sizes: Sizes, seed: int, held_out: float) -> Texts:
    """Draws texts; members are what the engine learns of a device's docstrings, without the ones that it holds out."""
    chance = random.Random(seed)
    pairs: list[Pair] = [(pair.prompt, pair.answer) for pair in docstring_pairs()]
    chance.shuffle(pairs)
    others = [pairs.pop() for _ in range(sizes.others)]
    files = {f"device-{n + 1}": [pairs.pop() for _ in range(sizes.members + 1)] for n in range(sizes.devices)}
    first, canaries = next(iter(files)), draw_canaries(chance, sizes)
    while any(canary.pair in set_aside(files[first] + inserted(canaries), held_out)[1] for canary in canaries):
        canaries = draw_canaries(chance, sizes)
    files[first] += inserted(canaries)
    secrets = set(inserted(canaries))
    members = {
        name: [pair for pair in set_aside(rows, held_out)[0] if pair not in secrets] for name, rows in files.items()
    }
    return Texts(files, members, others, canaries)


def draw_canaries(chance: random.Random, sizes: Sizes) -> list[Canary]:
    names = chance.sample(NAMES, sum(count for _, count in sizes.canaries))
    secrets = chance.sample(range(len(DIGITS) ** LENGTH), len(names))
    times = [times for times, count in sizes.canaries for _ in range(count)]
    return [Canary(*each) for each in zip(names, secrets, times, strict=True)]


def inserted(canaries: Sequence[Canary]) -> list[Pair]:
    return [canary.pair for canary in canaries for _ in range(canary.times)]


def write_data(texts: Texts, folder: Path) -> dict[str, Path]:
    files = {name: folder / f"{name}.jsonl" for name in texts.files}
    for name, file in files.items():
        lines = [json.dumps({"question": prompt, "answer": answer}) + "\n" for prompt, answer in texts.files[name]]
        file.write_text("".join(lines), encoding="utf-8")
    return files


# ---------------------------------------------------------------- what the attacker computes


@torch.no_grad()
def losses(stage: Stage, examples: Sequence[Example]) -> np.ndarray:
    """Computes the mean loss per labelled token of each example."""
    found_N = np.empty(len(examples))
    by_length = sorted(range(len(examples)), key=lambda number: len(examples[number].ids))
    for start in range(0, len(by_length), ROWS):
        numbers = by_length[start : start + ROWS]
        rows = [examples[number] for number in numbers]
        logits_BTV = stage(pad([row.ids for row in rows], 0), [len(row.ids) for row in rows])
        labels_BT = pad([row.labels for row in rows], IGNORED)[:, 1:]
        losses_BT = cross_entropy(logits_BTV[:, :-1].transpose(1, 2), labels_BT, ignore_index=IGNORED, reduction="none")
        found_N[numbers] = (losses_BT.sum(1) / (labels_BT != IGNORED).sum(1)).numpy()
    return found_N


@torch.no_grad()
def exposure(stage: Stage, task: CausalLm, canary: Canary) -> float:
    """Ranks all secrets after the canary's question, in bits of exposure."""
    prompt, _ = canary.pair
    before = task.opening([{"role": "user", "content": prompt}]).ids
    symbols = [task.tokenizer(digit, add_special_tokens=False)["input_ids"][0] for digit in DIGITS]

    def logits(before: Sequence[int], beginnings_BL: np.ndarray) -> np.ndarray:
        cache = stage.new_cache()
        last_1V = stage(torch.tensor([before]), [len(before)], cache=cache)[:, -1]
        rows, tokens = beginnings_BL.shape
        cache.batch_repeat_interleave(rows)
        assert cache.mask_BT is not None
        cache.mask_BT = cache.mask_BT.expand(rows, -1)
        next_BLV = stage(torch.from_numpy(beginnings_BL), [tokens] * rows, cache=cache)
        return torch.cat([last_1V.expand(rows, 1, -1), next_BLV], dim=1).numpy()

    return canaries.exposure(canaries.log_probabilities(logits, before, symbols, LENGTH), canary.secret)


# ---------------------------------------------------------------- figures


def figures_of(
    seeds: Sequence[tuple[Texts, Mapping[str, Attacked]]], prefix: str, areas: dict[str, list[float]]
) -> list[Figure]:
    """Returns the figures of each adapter, over all seeds; adds the AUC of each seed to `areas`."""
    figures: list[Figure] = []
    bases = [found[BASE] for _, found in seeds]
    for adapter in seeds[0][1]:
        if adapter == BASE and prefix:
            continue  # the same without privacy
        name, attacked = prefix + adapter, [found[adapter] for _, found in seeds]
        figures += perplexities(name, attacked)
        for way, scores in scored(attacked, bases).items():
            if adapter == BASE and way != WAYS[0]:
                continue  # all scores are zero
            figures += separated(f"{name}: {way}", scores)
            areas[f"{name}: {way}"] = [round(membership.auc(*pair), 3) for pair in scores]
        inserted_often = [(texts.canaries, found[adapter].exposures) for texts, found in seeds]
        figures += exposed(name, inserted_often)
    return figures


def scored(attacked: Sequence[Attacked], bases: Sequence[Attacked]) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Scores members and others of each seed in each of `WAYS`. The members of one device are the first of all members."""
    by_loss = [(membership.by_loss(one.members_N), membership.by_loss(one.others_M)) for one in attacked]
    against = [
        (
            membership.by_reference(one.members_N, base.members_N[: len(one.members_N)]),
            membership.by_reference(one.others_M, base.others_M),
        )
        for one, base in zip(attacked, bases, strict=True)
    ]
    return dict(zip(WAYS, (by_loss, against), strict=True))


def separated(name: str, scores: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Figure]:
    """Returns the figures of all seeds' members against all seeds' others."""
    members, others = (np.concatenate(group) for group in zip(*scores, strict=True))
    found = membership.separation(members, others)
    return [
        Figure(f"{name}: AUC", round(found.auc, 3), ""),
        Figure(f"{name}: lower end of the AUC's 95 % interval", round(found.low, 3), ""),
        Figure(f"{name}: upper end of the AUC's 95 % interval", round(found.high, 3), ""),
        Figure(f"{name}: members found at 1 % false positives", round(100 * found.found, 1), "% of members"),
    ]


def perplexities(name: str, attacked: Sequence[Attacked]) -> list[Figure]:
    return [
        Figure(f"{name}: perplexity of {group}", round(float(np.exp(np.concatenate(values).mean())), 2), "")
        for group, values in (
            ("members", [one.members_N for one in attacked]), ("others", [one.others_M for one in attacked]),
        )
    ]  # fmt: skip


def exposed(name: str, found: Sequence[tuple[Sequence[Canary], Sequence[float]]]) -> list[Figure]:
    """Returns the mean exposure of the canaries that were inserted equally often, and how many are the first guess."""
    figures = []
    most = float(np.log2(len(DIGITS) ** LENGTH))
    for times in sorted({canary.times for group, _ in found for canary in group}):
        bits = [
            one
            for group, exposures in found
            for canary, one in zip(group, exposures, strict=True)
            if canary.times == times
        ]
        figures.append(Figure(f"{name}: exposure of canaries inserted {times} times", round(fmean(bits), 2), "bits"))
        first = 100 * fmean(one == most for one in bits)
        figures.append(
            Figure(f"{name}: canaries inserted {times} times that are the first guess", round(first, 1), "%")
        )
    return figures
