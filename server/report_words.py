"""Bounds the words in a node's report before they reach events, terminals and pages: a control character becomes its escape.

Knows no plans, and judges neither numbers nor lengths of lists (`server.reports` does).
"""

from __future__ import annotations

import re

from edgelam_fl.errors import known_code
from edgelam_fl.names import printable
from edgelam_fl.wire import edgelam_pb2 as pb

_MOST_REASON = 300  # characters
_MOST_WORD = 100  # of a node's name with a few words around it, as in the name of a link
_DIGEST = re.compile("[0-9a-f]{64}")


def with_bounded_words(report: pb.JobReport) -> pb.JobReport:
    """Returns the report itself, with words that are printable and of limited length."""
    report.error, report.code = printable(report.error, _MOST_REASON), known_code(report.code)
    report.slowed = printable(report.slowed, _MOST_REASON)
    report.state, report.moments = printable(report.state, 20), printable(report.moments, 20)
    if not _DIGEST.fullmatch(report.adapter_digest):
        report.adapter_digest = ""
    for step in report.steps:
        step.reason = printable(step.reason, _MOST_REASON)
    for rows in (report.bytes, report.host.bytes) if report.HasField("host") else (report.bytes,):
        for row in rows:
            row.link, row.kind = printable(row.link, _MOST_WORD), printable(row.kind, _MOST_WORD)
            row.direction = printable(row.direction, 20)
    if report.HasField("host"):
        for one in report.host.left_out:
            one.device, one.reason = printable(one.device, _MOST_WORD), printable(one.reason, _MOST_REASON)
    for interval in report.timeline:
        interval.kind, interval.role = printable(interval.kind, 20), printable(interval.role, 20)
        interval.peer = printable(interval.peer, _MOST_WORD)
    return report
