"""The hub beside this run's SuperLink (edgelam_fl.hub), as the environment names it; without one nothing is offered."""

from __future__ import annotations

import os
from pathlib import Path

from edgelam_fl import hub
from edgelam_fl.hub.relay import relay_key
from edgelam_fl.hub.slices import offer_model
from edgelam_fl.model.source import ModelSource


def port() -> int:
    """0: there is none, or it is not this server's."""
    return int(os.environ.get(hub.PORT) or 0)


def secret() -> bytes:
    """What lets nodes use its relay is made with it; empty where there is none."""
    return relay_key(Path(os.environ[hub.STATE])) if port() else b""


def offer(source: ModelSource) -> None:
    """Lets nodes that lack the model have slices of it."""
    if port():
        offer_model(source, Path(os.environ[hub.STATE]))
