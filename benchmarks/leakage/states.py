"""Measures how much of a device's text a host can read from the hidden states at the cut, by attacks of growing strength.

The attacker is an honest but curious host. It has the public model and public text, and never saw the private text. Nearest
neighbour and the ridge map use one position at a time, the inverter all states of a text.

--smoke: two cuts, few texts.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common import RESULTS, Figure
from benchmarks.leakage.looking import look
from benchmarks.leakage.texts import MODULES, glosses, private_texts, token_ids
from edgelam_fl.privacy.attacks import nearest, ridge
from edgelam_fl.privacy.attacks.seen import GUESSES, Reading, Seen, chance, share_read

MODEL, BASE, DEFAULT_CUT = "smollm2-135m", "fp32", 2
CUTS = (0, 1, 2, 4, 8, 16, 24)  # layers that stay on the device, after the embedding
PUBLIC_TEXTS, PRIVATE_TEXTS = 2500, 120
SHOWN = 32
NEAREST, FIRST, AMONG = (
    "nearest neighbour in the embedding table",
    "ridge map, first guess",
    f"ridge map, first {GUESSES}",
)


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    from transformers import AutoTokenizer

    from edgelam_fl.model.source import find_model
    from edgelam_fl.model.whole import load_whole

    cuts = (0, DEFAULT_CUT) if smoke else CUTS
    source = find_model(MODEL)
    model, tokenizer = load_whole(source, BASE), AutoTokenizer.from_pretrained(source.folder)

    def seen(texts: list[str]) -> dict[int, Seen]:
        return look(model, [token_ids(tokenizer, text) for text in texts], cuts)

    public = seen(glosses()[: 20 if smoke else PUBLIC_TEXTS])
    private = seen(private_texts()[: 4 if smoke else PRIVATE_TEXTS])
    embeddings_VD = model.get_input_embeddings().weight.detach()
    figures, reads = [], {}
    for cut in cuts:
        near = nearest.read(private[cut], embeddings_VD)
        reads[cut] = ridge.read(public[cut], private[cut], embeddings_VD)
        figures += figures_of_cut(cut, share_read(near, private[cut]), reads[cut], private[cut])
    commonest = chance(public[0], private[0])
    figures.append(Figure("always the commonest public token", percent(commonest), "% of tokens"))
    if not smoke:
        shown = [tokenizer.decode(ids_N[:SHOWN]) for ids_N in (private[0].ids_N, reads[DEFAULT_CUT].ids_N)]
        head = [len(public[0].ids_N), len(private[0].ids_N)]
        (RESULTS / "leakage.md").write_text(table(figures, cuts, head, *shown), encoding="utf-8")
    settings = {
        "model": MODEL, "base": BASE, "cuts": list(cuts), "public_tokens": len(public[0].ids_N),
        "private_tokens": len(private[0].ids_N), "private_modules": list(MODULES), "ridge": ridge.RIDGE, "seed": 0,
        "default_cut": DEFAULT_CUT, "map": f"{model.config.hidden_size + 1} x {model.config.hidden_size} numbers",
    }  # fmt: skip
    return settings, figures


def figures_of_cut(cut: int, near: float, read: Reading, private: Seen) -> list[Figure]:
    unit = "% of tokens"
    check = ("100 %: embeddings are the text", near == 1.0) if cut == 0 else (None, None)
    return [
        Figure(f"cut {cut}: {NEAREST}", percent(near), unit, *check),
        Figure(f"cut {cut}: {FIRST}", percent(share_read(read, private)), unit),
        Figure(f"cut {cut}: {AMONG}", percent(read.among_five), unit),
    ]


def percent(value: float) -> float:
    return round(100 * value, 1)


def table(figures: list[Figure], cuts: tuple[int, ...], tokens: list[int], text: str, read: str) -> str:
    values = {figure.name: figure.value for figure in figures}
    lines = [
        "# What a host reads from the hidden states",
        "",
        f"SmolLM2-135M, a ridge map taught by {tokens[0]:,} tokens of public text and tried on {tokens[1]:,} tokens of",
        "private text; % of the private tokens. Written by `python -m benchmarks.leakage`.",
        "",
        f"| layers on the device | {NEAREST} | {FIRST} | {AMONG} |",
        "|---|---|---|---|",
        *(
            f"| {cut} | " + " | ".join(f"{values[f'cut {cut}: {name}']:.1f}" for name in (NEAREST, FIRST, AMONG)) + " |"
            for cut in cuts
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
