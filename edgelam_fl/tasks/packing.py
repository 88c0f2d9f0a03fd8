"""Packs the examples of a micro-batch into few rows, so that little of it is padding. Knows neither models nor losses.

The examples of a row attend to themselves alone, with positions that begin at 0 (`model.stage`), and the first token of each is
predicted from nothing. So a packed micro-batch has the loss and the gradients of the same examples in rows of their own, up to
rounding: which examples make a step does not depend on packing, nor does their weight.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import chain

from edgelam_fl.tasks.base import Example, Unit, pad
from edgelam_fl.tasks.masking import IGNORED

_TRIES = 8  # numbers of rows that are tried, from the fewest that all examples fit into


def packed_unit(examples: Sequence[Example], most: int) -> Unit | None:
    """Makes a micro-batch of packed rows, each of at most `most` tokens. None: no packing has fewer positions than a row per example."""
    rows = packed_rows([example.length for example in examples], most)
    if len(rows) == len(examples):
        return None
    packed = [[examples[number] for number in row] for row in rows]
    labels = [[IGNORED, *example.labels[1:]] for row in packed for example in row]
    of_rows = iter(labels)
    return Unit(
        pad([list(chain.from_iterable(example.ids for example in row)) for row in packed], 0),
        pad([list(chain.from_iterable(next(of_rows) for _ in row)) for row in packed], IGNORED),
        [sum(example.length for example in row) for row in packed],
        sum(example.count for example in examples),
        [[example.length for example in row] for row in packed],
    )


def packed_rows(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Returns the numbers of the examples in each row, so that rows times the longest row is small.

    No row is longer than `most`, or than one example. Each number of rows gets its examples by falling length, always into the
    shortest row; as many rows as examples is always among the answers, and the first of equal ones counts.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    total, longest = sum(lengths), max(lengths)
    best, fewest = [[number] for number in range(len(lengths))], len(lengths) * longest
    least = max(1, -(-total // max(most, longest)))
    for count in range(least, min(least + _TRIES, len(lengths))):
        rows = _filled(order, lengths, count)
        widest = max(sum(lengths[number] for number in row) for row in rows)
        if widest <= most and count * widest < fewest:
            best, fewest = rows, count * widest
    return best


def _filled(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Puts examples, one after the other, into the shortest of `count` rows."""
    rows: list[list[int]] = [[] for _ in range(count)]
    free = [(0, row) for row in range(count)]
    for number in order:
        length, row = heapq.heappop(free)
        rows[row].append(number)
        heapq.heappush(free, (length + lengths[number], row))
    return rows
