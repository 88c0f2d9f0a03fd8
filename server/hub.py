"""The hub beside this run's SuperLink (edgelam_fl.hub), as the environment names it. Without a hub, nothing is offered."""

from __future__ import annotations

import os
from pathlib import Path

from edgelam_fl import hub
from edgelam_fl.hub.relay import relay_key
from edgelam_fl.hub.slices import offer_model
from edgelam_fl.model.source import ModelSource


def port() -> int:
    """Returns the hub's port; 0: there is no hub, or it is not this server's."""
    return int(os.environ.get(hub.PORT) or 0)


def secret() -> bytes:
    """Returns the key that signs the nodes' tokens for the relay; empty: there is no hub."""
    return relay_key(Path(os.environ[hub.STATE])) if port() else b""


def offer(source: ModelSource) -> None:
    """Lets nodes that lack the model fetch slices of it from the hub."""
    if port():
        offer_model(source, Path(os.environ[hub.STATE]))
