"""Measures for `edgelam doctor --measure`, with a finding for each part that cannot be measured. Knows no checks."""

from __future__ import annotations

from collections.abc import Callable

from edgelam_fl.doctor.checks import Finding
from edgelam_fl.errors import EdgelamError, ModelError
from edgelam_fl.hub.link_speed import HUB_ANSWER_S
from edgelam_fl.node.profile.data import Profile
from edgelam_fl.node.profile.measure import measure_profile


def measured(
    model: str,
    hub: tuple[str, int] | None,
    say: Callable[[str], None],
    device: str = "cpu",
    hub_answer_s: float = HUB_ANSWER_S,
) -> tuple[list[Finding], Profile | None]:
    """Returns the profile and a finding for each part that could not be measured and is left out; None: nothing could.

    model: whose layers to time; empty: none. hub: (host, port) to measure the link to; None: none. say: receives progress. device: what
    it computes on, as --device.
    """
    findings: list[Finding] = []
    asked = {"model": model, "hub": hub}
    while True:
        try:
            found = measure_profile(asked["model"], asked["hub"], say, hub_answer_s=hub_answer_s, device=device)  # type: ignore[arg-type]
            return findings, found
        except ModelError as error:
            asked["model"] = ""
            findings.append(Finding("layer's time", "note", str(error), "give --model one that is here"))
        except EdgelamError as error:
            what, _, fix = str(error).partition("; ")
            findings.append(Finding("measuring", "problem", what, fix))
            if asked["hub"] is None or "cannot be written" in what:
                return findings, None
            asked["hub"] = None
