"""Follows at the server's hub whose membership has ended. Knows no links: they ask `Security.ended` themselves."""

from __future__ import annotations

import threading
from contextlib import suppress

import grpc

from edgelam_fl.trust.identity import SERVER
from edgelam_fl.wire.grpc.options import DEFAULT_TIMING, LinkTiming, channel_options
from edgelam_fl.wire.grpc.secure import Security
from edgelam_fl.wire.grpc.services import stub
from edgelam_fl.wire.membership import ENDED, MEMBERSHIP_SERVICE


class Following:
    """Hears from the hub until `close`, and calls it again if it goes away.

    While the hub cannot be reached, what was heard last holds: an honest round outlives its hub. Whoever was let go in the
    meantime is in no later plan, and the hub says it first when it is back.
    """

    def __init__(self, hub: str, security: Security, timing: LinkTiming = DEFAULT_TIMING) -> None:
        self._hub, self._security, self._timing = hub, security, timing
        self._closed = threading.Event()
        self._call: grpc.Call | None = None
        threading.Thread(target=self._listen, name="membership", daemon=True).start()

    def close(self) -> None:
        """Stops to listen; what was heard stays known."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    def _listen(self) -> None:
        while not self._closed.is_set():
            options = channel_options(self._timing)
            with self._security.channel(self._hub, SERVER, options) as channel, suppress(grpc.RpcError):
                self._call = stub(channel, MEMBERSHIP_SERVICE, ENDED)(b"")
                for said in self._call:
                    self._security.ended.replace(said.serials, said.names)
                    if self._closed.is_set():
                        return
            self._closed.wait(self._timing.listen_again_s)
