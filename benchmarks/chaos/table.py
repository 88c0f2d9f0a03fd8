"""The table of faults and outcomes, and the figures. Knows verdicts only."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from benchmarks.chaos.trial import RunEnd, Verdict
from benchmarks.common import Figure

MEDIAN_BAR_S, WORST_BAR_S = 10.0, 45.0
UNDISTURBED = "an undisturbed round, median"

# Of the harness before this one, on a machine with a load of 15 to 45: outcome, seconds to the next round, to a whole one.
EARLIER: dict[str, tuple[str, str, str]] = {
    "kill:device-stage": ("1 nothing lost", "68", "68"),
    "stop25:device-stage": ("1 nothing lost; 1 device's round lost", "39, 136", "39, 181"),
    "stop8:device-stage": ("1 nothing lost", "154", "154"),
    "kill:device-supernode": ("1 device's round lost", "49", "72"),
    "kill:device-client": ("2 device's round lost", "141, 147", "never"),
    "cut:device-links": ("1 device's round lost", "7", "25"),
    "hole25:device-links": ("1 device's round lost", "20", "36"),
    "part25:device-links": ("1 device's round lost", "5", "53"),
    "kill:edge-stage": ("5 attempt lost", "4, 66, 159, 135, 9", "4, 66, 159, 135, 9"),
    "stop25:edge-stage": ("1 nothing lost", "3", "3"),
    "stop8:edge-stage": ("2 nothing lost", "26, 3", "26, 3"),
    "kill:edge-client": ("1 waits for a person; 1 attempt lost", "23", "23"),
    "cut:edge-links": ("2 device's round lost", "12, 8", "38, 33"),
    "hole25:edge-links": ("1 device's round lost", "32", "58"),
    "part25:edge-links": ("1 device's round lost", "25", "56"),
    "kill:hub": ("2 nothing lost; 1 attempt lost", "37, 18, 43", "37, 18, 43"),
    "stop25:hub": ("1 nothing lost", "74", "74"),
    "stop8:hub": ("1 nothing lost", "3", "3"),
    "kill:superlink": ("1 HANG", "never", "never"),
    "stop25:superlink": ("1 nothing lost", "65", "65"),
    "stop8:superlink": ("1 nothing lost", "33", "33"),
    "kill:serverapp": ("1 run lost", "never", "never"),
    "stop25:serverapp": ("1 nothing lost", "29", "29"),
    "stop8:serverapp": ("1 nothing lost", "28", "28"),
    "kill:server": ("1 HANG", "never", "never"),
    "kill:run": ("1 nothing lost", "20", "20"),
}


def table(verdicts: Sequence[Verdict]) -> str:
    """Returns a Markdown table: a row per kind of fault, with what the same fault cost before."""
    rows = defaultdict(list)
    for verdict in verdicts:
        rows[verdict.fault.target, verdict.fault.action].append(verdict)
    lines = [
        "| target | fault | times | outcome | to the next round, s | to a whole round, s | earlier: outcome | next, s | whole, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (target, action), found in sorted(rows.items()):
        outcomes = Counter(verdict.outcome() for verdict in found)
        words = "; ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
        earlier = EARLIER.get(f"{action}:{target}", ("not tried", "", ""))
        hit = [verdict for verdict in found if verdict.hit]
        times = (_seconds([v.next_round_s for v in hit]), _seconds([v.whole_round_s for v in hit]))
        lines.append(f"| {' | '.join((target, action, str(len(found)), words, *times, *earlier))} |")
    return "\n".join(lines) + "\n"


def _seconds(found: Sequence[float | None]) -> str:
    return ", ".join("never" if value is None else f"{value:.0f}" for value in found)


def figures(
    verdicts: Sequence[Verdict], ends: Sequence[RunEnd], left: Mapping[str, Sequence[str]], rounds_s: Sequence[float]
) -> list[Figure]:
    hit = [verdict for verdict in verdicts if verdict.hit]
    outcomes = Counter(verdict.outcome() for verdict in hit)
    next_s = [verdict.next_round_s for verdict in hit if verdict.next_round_s is not None]
    over_s = [
        max(0.0, verdict.next_round_s - verdict.fault.seconds) for verdict in hit if verdict.next_round_s is not None
    ]
    whole_s = [verdict.whole_round_s for verdict in hit if verdict.whole_round_s is not None]
    whole_runs = [end for end in ends if end.state == "done" and end.whole]
    damaged = sum(end.adapter not in ("equal", "differs", "finite") for end in ends if end.rounds)
    found = [
        Figure("faults", len(verdicts), ""),
        Figure("faults that hit something", len(hit), ""),
        *(Figure(f"outcome: {outcome}", outcomes[outcome], "faults") for outcome in sorted(outcomes)),
        _none("hangs", sum(verdict.hang for verdict in hit)),
        _none("runs lost", sum(bool(verdict.run_lost) for verdict in hit)),
        _none("finished rounds lost", sum(verdict.repeated for verdict in hit)),
        _none("rounds lost by devices that were not struck", sum(verdict.others_rounds for verdict in hit)),
        Figure("rounds lost by the struck device", sum(verdict.own_rounds for verdict in hit), ""),
        Figure("went on by the printed line", sum(verdict.went_on_by_line for verdict in hit), "faults"),
        Figure(UNDISTURBED, round(statistics.median(rounds_s), 2) if rounds_s else 0.0, "s"),
        *_recovery("to the next round", next_s, bars=True),
        *_recovery("from the fault's end to the next round", over_s, bars=False),
        *_recovery("to a whole round", whole_s, bars=False),
        Figure("runs", len(ends), ""),
        Figure("runs that ended well", sum(end.state == "done" for end in ends), ""),
        Figure("runs in which no device missed a step", len(whole_runs), ""),
        Figure("of these, adapters equal to the undisturbed run's", sum(end.adapter == "equal" for end in whole_runs), ""),
        _none("adapters that are damaged or not finite", damaged),
        _none("processes that outlived their killed command", sum(len(verdict.orphans) for verdict in hit)),
        *(_none(f"left behind at the end: {what}", len(things)) for what, things in left.items()),
    ]  # fmt: skip
    return found


def of_newest(verdicts: Sequence[Verdict]) -> list[Figure]:
    """Returns the figures of the newest sitting alone: earlier ones were of earlier code, and on another load."""
    next_s = [verdict.next_round_s for verdict in verdicts if verdict.hit and verdict.next_round_s is not None]
    found = [Figure("newest sitting: faults that hit something", sum(bool(verdict.hit) for verdict in verdicts), "")]
    if next_s:
        median = Figure("newest sitting: to the next round, median", round(statistics.median(next_s), 1), "s")
        found += [median, Figure("newest sitting: to the next round, worst", round(max(next_s), 1), "s")]
    return found


def _none(name: str, count: int) -> Figure:
    return Figure(name, count, "", "none", count == 0)


def _recovery(name: str, seconds: Sequence[float], *, bars: bool) -> list[Figure]:
    if not seconds:
        return []
    median, worst = statistics.median(seconds), max(seconds)
    return [
        Figure(f"recovery {name}, median", round(median, 1), "s",
               f"at most {MEDIAN_BAR_S:g} s" if bars else None, median <= MEDIAN_BAR_S if bars else None),
        Figure(f"recovery {name}, worst", round(worst, 1), "s",
               f"at most {WORST_BAR_S:g} s" if bars else None, worst <= WORST_BAR_S if bars else None),
    ]  # fmt: skip
