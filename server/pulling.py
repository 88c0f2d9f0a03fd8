"""Bounds how long the ServerApp waits for a reply whose content does not come.

Flower tells of a reply before its tensors are uploaded, and then waits up to two hours for them, while the ServerApp can do
nothing else. The upload ends early if the node's SuperNode is killed. Here a reply without a new tensor for some seconds counts
as lost, and the node's message can be sent again: what was uploaded before is not uploaded twice. Knows one name inside Flower;
knows nothing about rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError, pull_objects
from flwr.superlink.grid import http_grid

STILL_S = 20.0
"""Seconds without a new object after which a reply counts as lost. Tensors travel in objects of half a MiB."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.0


def bound_pulls(still_s: float = STILL_S) -> None:
    """Has Flower's grid wait for a reply's tensors only as long as there is a new one every `still_s` seconds."""

    def bounded(object_ids: list[str], pull_object_fn: Callable[[str], bytes], **settings: Any) -> dict[str, bytes]:
        return pull_objects(
            object_ids,
            giving_up(pull_object_fn, still_s),
            **{"initial_backoff": _FIRST_PAUSE_S, "backoff_cap": _LONGEST_PAUSE_S, **settings},
        )

    http_grid.pull_objects = bounded


def giving_up(
    pull: Callable[[str], bytes], still_s: float, clock: Callable[[], float] = time.monotonic
) -> Callable[[str], bytes]:
    """Returns `pull`, which raises ObjectPullError, and so ends, once no object has come for `still_s` seconds.

    pull: returns an object by its id; raises ObjectUnavailableError for one that has not been uploaded yet. clock: in seconds.
    """
    newest = clock()

    def bounded(object_id: str) -> bytes:
        nonlocal newest
        try:
            found = pull(object_id)
        except ObjectUnavailableError as error:
            if clock() - newest >= still_s:
                raise ObjectPullError(object_id, f"nothing was uploaded for {still_s:.0f} s") from error
            raise
        newest = clock()
        return found

    return bounded
