"""From a round's answers to its outcome: reads and checks them, then aggregates. Knows nothing about the next round."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from edgelam_fl.errors import TooFewSources
from edgelam_fl.plan.layout import site_source
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.tasks.kinds import points_alike
from edgelam_fl.wire import edgelam_pb2 as pb
from server.exchange import Missing
from server.global_adapter import as_start
from server.holdings import NodeHoldings, holdings_after
from server.judging import UpdateJudge, first_not_finite, spoilers, without_outliers
from server.private_sums import PrivateSums
from server.replies import (
    Reply,
    Reported,
    RunningMeans,
    broken_sites,
    contributions_of,
    parts_by_site,
    reply_of,
    why_unusable,
)
from server.state import Outcome, PlannedRound, Received
from strategies.aggregation.error import aggregation_error
from strategies.api import Aggregated, Aggregation

_STAYS = "the adapter before the round stays"
_AGAIN = "what the others trained with it does not count, and the round is done again without it"


def receive(
    planned: PlannedRound,
    answers: Iterable[Reported | Missing],
    update_factor: float = 0.0,
    private: PrivateSums | None = None,
) -> Received:
    """Reads the answers as they arrive and checks each against its plan. Of a large or private round, no tensors are kept.

    `update_factor`: how many times the median of its like an update may be; 0: any size. `private`: what the updates are
    summed up in if they must not be seen one by one; None: no privacy is promised.
    """
    site_sources = frozenset(site_source(site.name) for site in planned.layout.sites)
    rslora = any(plan.lora.rslora for plan in planned.plans.values())
    directions = all(points_alike(plan.task.kind) for plan in planned.plans.values())
    judge = UpdateJudge(planned.start.adapter, planned.start.personal, site_sources, update_factor, rslora, directions)
    means = private or (RunningMeans(judge) if planned.sums_on_arrival else None)
    replies: dict[str, Reply] = {}
    problems, codes, silent = dict.fromkeys(planned.plans, "no reply"), dict[str, str](), set()
    refused: dict[str, str] = {}  # why what a node has trained is not taken
    for answer in answers:
        if isinstance(answer, Missing):
            problems[answer.name], codes[answer.name] = answer.reason, answer.code
            silent.add(answer.name)
            continue
        reply, wrong = _read(planned, answer, means, judge)
        if wrong:
            problems[answer.name], codes[answer.name] = wrong, reply.report.code
            if reply.report.state == "done":
                refused[answer.name] = wrong
        else:
            replies[answer.name] = reply
        del answer, reply  # an update; else the next one would be fetched while this one is still here
    broken = broken_sites(planned.layout, replies)
    if means is not None:
        contributions, left_out = means.contributions(broken), means.left_out
    else:
        found = contributions_of(replies, planned.plans, planned.layout, broken)
        contributions, left_out = without_outliers(found, judge, planned.layout)
    hosts = {name: replies[name].report for name, plan in planned.plans.items() if plan.serves and name in replies}
    return Received(
        replies=replies,
        problems={name: reason for name, reason in problems.items() if name not in replies},
        codes=codes,
        silent=frozenset(silent),
        broken=broken,
        left_out=left_out,
        spoilers={} if private is not None else spoilers(planned.layout, planned.plans, hosts, refused | left_out),
        devices=[
            name
            for site in planned.layout.sites
            if site.name not in broken
            for name in site.members
            if name in replies and name not in left_out
        ],
        contributions=contributions,
        holdings={name: _held(planned, plan, replies.get(name)) for name, plan in planned.plans.items()},
    )


def conclude(planned: PlannedRound, received: Received, rule: Aggregation, spec: RunSpec) -> Outcome:
    """Aggregates the contributions. The outcome has no aggregate if there are too few devices (`min_nodes`), no whole
    site, fewer sources than the rule needs, if the rule made values that are not finite, or if a device has spoiled what others
    trained with it and enough others are there to do the round again. A round that chose no device has one: the adapter as it
    was, with noise if privacy is promised.
    """
    outcome = Outcome(planned=planned, received=received)
    contributions, chosen = received.contributions, planned.lineup.selected.names
    if not (chosen or contributions):
        return replace(outcome, aggregated=Aggregated({}))  # a round of nobody, which only coins can choose
    least = min(spec.config.federation.min_nodes, len(chosen))
    if not contributions or len(received.devices) < least:
        return outcome
    if received.spoilers and len(set(received.devices) - received.spoilers.keys()) >= max(1, least):
        named = "; ".join(f"{name}: {reason}" for name, reason in sorted(received.spoilers.items()))
        return replace(outcome, problem=f"{named}; {_AGAIN}", spoiled=True)
    start = as_start(planned.start.adapter, spec, planned.facts.round)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what they would warn of is looked for below
            new = rule.aggregate(contributions, start)
    except TooFewSources as problem:
        return replace(outcome, problem=str(problem))
    except np.linalg.LinAlgError as problem:
        return replace(outcome, problem=f"the contributions cannot be aggregated: {problem}; {_STAYS}")
    bad = first_not_finite([new.tensors, new.carry, *new.personal.values()])
    if bad:
        return replace(outcome, problem=f"the aggregate of {bad} is not finite; {_STAYS}")
    # The error needs the factors of each source, which a large round does not keep.
    error = None if planned.sums_on_arrival else aggregation_error(contributions, {**new.tensors, **new.carry}, start)
    return replace(outcome, aggregated=new, error=error)


def _read(
    planned: PlannedRound, answer: Reported, means: RunningMeans | PrivateSums | None, judge: UpdateJudge
) -> tuple[Reply, str]:
    """Returns the reply and why it cannot be used ("": it can). Its tensors are dropped if they go into `means`."""
    name, plan = answer.name, planned.plans[answer.name]
    reply = reply_of(answer.report, answer.content)
    measures = judge if isinstance(means, RunningMeans) else None
    wrong = why_unusable(reply, plan, planned.starts, measures)
    if means is None:
        return reply, wrong
    if not wrong:
        means.add(parts_by_site(name, reply, plan, planned.layout))
    return reply.without_tensors(), wrong


def _held(planned: PlannedRound, plan: pb.Plan, reply: Reply | None) -> NodeHoldings | None:
    if reply is None:
        return None
    return holdings_after(planned.starts.start(plan), reply)
