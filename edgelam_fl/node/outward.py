"""The border of a node in words: what the node says of an error to the server and to other nodes.

The full text of an error may quote the node's data or name its folders. It goes into the node's own log, which is what the
process prints; others get the error's code, place and counts. Knows no messages and no errors in particular.
"""

from __future__ import annotations

import sys
import traceback

from edgelam_fl.errors import EdgelamError, for_others
from edgelam_fl.files import say


def outward(node: str, error: BaseException, what: str) -> str:
    """Writes an error into this node's log; returns what others may hear. `what`: what failed, for the log."""
    if isinstance(error, EdgelamError):
        say(f"{what}: {type(error).__name__}: {error}", sys.stderr)
    else:
        say(f"{what}: {''.join(traceback.format_exception(error))}", sys.stderr)
    said = for_others(error)
    return said if said == str(error) else f"{said}; see stage-host.log on {node}"
