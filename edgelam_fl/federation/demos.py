"""The demos, by the names that `edgelam demo --task` has for them. A new one is a module and a line here."""

from __future__ import annotations

from edgelam_fl.errors import ConfigError, nearest
from edgelam_fl.federation.demo import Demo
from edgelam_fl.federation.demo_beams import BEAMS
from edgelam_fl.federation.demo_channel import CHANNEL
from edgelam_fl.federation.demo_text import TEXT

DEMOS = {"text": TEXT, "channel": CHANNEL, "beamforming": BEAMS}


def demo_named(task: str) -> Demo:
    """Returns the demo of a task. Raises ConfigError for an unknown one."""
    if task not in DEMOS:
        raise ConfigError(f"--task {task!r} is no demo: {nearest(task, DEMOS)}")
    return DEMOS[task]
