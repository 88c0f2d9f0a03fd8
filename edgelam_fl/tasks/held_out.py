"""Decides which examples of a device are held out: measured and never learned. Knows pairs, no files and no tokens.

The share is of examples. Equal examples are on one side, and so are examples with the same question wherever the share allows it.
The content alone decides: the same examples are held out in every round, in every run and in any order of the file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgelam_fl.tasks.data import Pair, Prompt

_FEW_ANSWERS = 10  # so many different answers are few in data of any size, if each of them occurs twice on average
_FEW_SHARE = 0.25  # more of them are few up to this share of the examples

_Keys = tuple[str, ...]  # examples with a key in common are on one side


@dataclass(frozen=True)
class _Group:
    """Examples that are on one side together."""

    rank: tuple[str, str]  # the lowest hashes of its examples; low ranks are held out first
    members: tuple[int, ...]
    answers: frozenset[str]


def set_aside(pairs: Sequence[Pair], share: float, *, classes: bool = False) -> tuple[list[Pair], list[Pair]]:
    """Splits pairs into (training, held-out), each in the order of the file.

    The held-out ones are within one example of `share` of all if some set of groups is. `classes`: the answers are
    classes. Classes, and answers if they are few, are all among the learned ones; answers that are mostly different texts are on
    one side each as long as the share allows it, so that no measured answer was learned. The held-out side is empty if
    `share` is 0 or if nothing can be measured without breaking these rules.
    """
    wanted = share * len(pairs)
    if not wanted or len(pairs) < 2:
        return list(pairs), []
    examples = [(_prompt_key(prompt), _answer_key(prompt, answer)) for prompt, answer in pairs]
    few = classes or _are_few(examples)
    ways: list[Callable[[str, str], _Keys]] = [_same_prompt, _same_pair]
    if not few:
        ways.insert(0, _same_prompt_or_answer)
    best: set[int] = set()
    for way in ways:
        groups = _groups(examples, way, by_answer=not few)
        chosen = _choose(_without_last(groups, few), wanted, len(pairs) - 1)
        if not best or abs(len(chosen) - wanted) < abs(len(best) - wanted):
            best = chosen
        if abs(len(best) - wanted) <= 1 and best:
            break
    return (
        [pair for number, pair in enumerate(pairs) if number not in best],
        [pair for number, pair in enumerate(pairs) if number in best],
    )


def sample(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """Returns `most` of the pairs, in their order; all of them if they are fewer, or if `most` is 0.

    As for `set_aside`, the content alone decides, so that every round and every run measures with the same ones.
    """
    if not 0 < most < len(pairs):
        return list(pairs)

    def rank(number: int) -> str:
        prompt, answer = pairs[number]
        return _hash(json.dumps(["sample", _prompt_key(prompt), _answer_key(prompt, answer)]))

    return [pairs[number] for number in sorted(sorted(range(len(pairs)), key=rank)[:most])]


def _are_few(examples: Sequence[tuple[str, str]]) -> bool:
    """Returns whether answers are like classes: few of them, each with several examples."""
    different = len(set(examples))
    answers = len({answer for _, answer in examples})
    return 2 * answers <= different and answers <= max(_FEW_ANSWERS, _FEW_SHARE * different)


# ---------------------------------------------------------------- what is on one side together


def _same_prompt_or_answer(prompt: str, answer: str) -> _Keys:
    return (*_same_prompt(prompt, answer), f"answer {answer}")


def _same_prompt(prompt: str, answer: str) -> _Keys:
    return (f"prompt {prompt}",) if prompt else (f"answer {answer}",)  # a passage has no prompt


def _same_pair(prompt: str, answer: str) -> _Keys:
    return (json.dumps([prompt, answer]),)


def _groups(examples: Sequence[tuple[str, str]], way: Callable[[str, str], _Keys], *, by_answer: bool) -> list[_Group]:
    """Returns the groups of examples by rank; `by_answer`: the answer's hash decides first, else the prompt's."""
    keys = [way(prompt, answer) for prompt, answer in examples]
    root_of = _roots(keys)
    members: dict[str, list[int]] = defaultdict(list)
    for number, own in enumerate(keys):
        members[root_of(own[0])].append(number)
    groups = []
    for numbers in members.values():
        of_group = [examples[number] for number in numbers]
        rank = min(
            (_hash(answer), _hash(prompt)) if by_answer else (_hash(prompt), _hash(answer))
            for prompt, answer in of_group
        )
        groups.append(_Group(rank, tuple(numbers), frozenset(answer for _, answer in of_group)))
    return sorted(groups, key=lambda group: group.rank)


def _roots(keys: Iterable[_Keys]) -> Callable[[str], str]:
    """Returns a function that gives all keys that are linked, directly or over others, the same key."""
    parent: dict[str, str] = {}

    def root_of(key: str) -> str:
        while (above := parent.setdefault(key, key)) != key:
            parent[key] = parent[above]
            key = above
        return key

    for first, *others in keys:
        for other in others:
            parent[root_of(other)] = root_of(first)
    return root_of


def _prompt_key(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return json.dumps([prompt.messages[:-1], prompt.tools], sort_keys=True)


def _answer_key(prompt: Prompt, answer: str) -> str:
    """Returns the answer; the whole message for one that only calls tools."""
    return answer if answer or isinstance(prompt, str) else json.dumps(prompt.messages[-1], sort_keys=True)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# ---------------------------------------------------------------- what is held out


def _without_last(groups: Sequence[_Group], few: bool) -> list[_Group]:
    """Returns the groups that may be held out: all but the last one of each answer.

    Unless answers are few, an answer in one group alone may be held out: it is a text of its own.
    """
    last = {answer: number for number, group in enumerate(groups) for answer in group.answers}
    times = Counter(answer for group in groups for answer in group.answers)
    kept = {number for answer, number in last.items() if few or times[answer] > 1}
    return [group for number, group in enumerate(groups) if number not in kept]


def _choose(groups: Sequence[_Group], wanted: float, most: int) -> set[int]:
    """Returns the examples to hold out: of the groups with the lowest ranks, unless other groups come nearer to `wanted`."""
    target, taken, total = min(most, max(1, round(wanted))), list[int](), 0
    sizes = [len(group.members) for group in groups]
    for number, size in enumerate(sizes):
        if total + size <= target:
            taken.append(number)
            total += size
    if not taken or abs(total - wanted) > 1:
        taken = _nearest(sizes, wanted, min(most, 2 * target))
    return {member for number in taken for member in groups[number].members}


def _nearest(sizes: Sequence[int], wanted: float, most: int) -> list[int]:
    """Returns the places of sizes whose sum, at most `most`, is the nearest to `wanted`; the first places of each size."""
    places: dict[int, list[int]] = defaultdict(list)
    for place, size in enumerate(sizes):
        places[size].append(place)
    reached = [1]  # after each size: the sums that can be reached, as bits
    for size, of_size in places.items():
        sums, left, times = reached[-1], len(of_size), 1
        while left:
            sums |= (sums << (size * min(times, left))) & ((2 << most) - 1)
            left -= min(times, left)
            times *= 2
        reached.append(sums)
    possible = [total for total, bit in enumerate(reversed(f"{reached.pop():b}")) if bit == "1"]
    rest = min(possible, key=lambda total: (abs(total - wanted), -total))
    taken: list[int] = []
    for (size, of_size), sums in zip(reversed(places.items()), reversed(reached), strict=True):
        count = next(n for n in range(len(of_size) + 1) if n * size <= rest and sums >> (rest - n * size) & 1)
        taken += of_size[:count]
        rest -= count * size
    return taken
