"""Canaries: random secrets that are put into training data to measure how much a model remembers (arXiv 1802.08232).

A secret is drawn from a known set of equally probable ones. The attacker has the adapter and the text before the secret, and
ranks all secrets of the set by their probability. Knows no model and no tokenizer: takes a function from token ids to logits.

Shapes: K secrets of the set, L tokens per secret, S symbols, B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

# a text before the secret [T] and what may follow of it [B, L - 1] -> logits [B, L, V], the first after the text alone
Logits = Callable[[Sequence[int], np.ndarray], np.ndarray]


def exposure(log_probabilities_K: np.ndarray, secret: int) -> float:
    """Computes log2(K) - log2(rank) of the secret among all (arXiv 1802.08232, definition 5), in bits.

    From 0 (last) to log2(K) (first). Secrets that are as probable as this one count half each, so that a model that tells
    none of them apart exposes none.
    """
    higher = int((log_probabilities_K > log_probabilities_K[secret]).sum())
    alike = int((log_probabilities_K == log_probabilities_K[secret]).sum()) - 1
    return math.log2(len(log_probabilities_K)) - math.log2(1 + higher + alike / 2)


def chance_exposure(secrets: int) -> float:
    """Returns the mean exposure of secrets that were never seen: each rank has the same probability."""
    return math.log2(secrets) - math.lgamma(secrets + 1) / math.log(2) / secrets


def every_secret(symbols: Sequence[int], length: int) -> np.ndarray:
    """Lists all secrets of `length` symbols as token ids [K, L], the last symbol changing first."""
    return np.array(list(itertools.product(symbols, repeat=length)), dtype=np.int64)


def log_probabilities(logits: Logits, before: Sequence[int], symbols: Sequence[int], length: int) -> np.ndarray:
    """Computes the log-probability of each of `every_secret` after the token ids `before`; returns [K].

    Secrets with the same beginning share a row, so the model runs on one row per beginning of L - 1 tokens.
    """
    beginnings_BL = every_secret(symbols, length - 1)
    logits_BLV = logits(before, beginnings_BL).astype(np.float64)
    logits_BLV -= logits_BLV.max(axis=-1, keepdims=True)
    log_BLV = logits_BLV - np.log(np.exp(logits_BLV).sum(axis=-1, keepdims=True))
    of_beginning_BL = np.take_along_axis(log_BLV[:, :-1], beginnings_BL[:, :, None], axis=-1)[:, :, 0]
    return (of_beginning_BL.sum(axis=1)[:, None] + log_BLV[:, -1, list(symbols)]).ravel()
