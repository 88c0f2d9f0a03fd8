"""Attends at the server's hub while a part is played: says every second that the node lives, and hears what the server decided.

Works on a thread of its own, so that a sign of life never waits for a computation. Knows neither parts nor plans.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import grpc

from edgelam_fl.trust.identity import SERVER
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.attendance import ATTEND, ATTENDANCE_SERVICE, BEAT_EVERY_S
from edgelam_fl.wire.grpc.options import channel_options
from edgelam_fl.wire.grpc.secure import PLAIN, Security
from edgelam_fl.wire.grpc.services import stub
from edgelam_fl.wire.relay import token_metadata

_ANSWER_S = 3.0  # patience with one answer
_LAST_TRIES = 3  # of the beat that says how the part ended
_REFUSED_PAUSE = 10  # beats that are left out after the hub has refused one: it will refuse the next one too


class Attending:
    """Attends until `close`. A hub that goes away is called again: a round outlives its hub."""

    def __init__(
        self,
        hub: str,
        token: bytes,
        beat: Callable[[], pb.Beat],
        hear: Callable[[pb.Notice], object],
        every_s: float = BEAT_EVERY_S,
        security: Security = PLAIN,
    ) -> None:
        """`hub`: HOST:PORT. `token`: the plan's. `beat`: returns what to say. `hear`: takes each answer, on another thread."""
        self._hub, self._metadata, self._security = hub, token_metadata(token), security
        self._beat, self._hear, self._every_s = beat, hear, every_s
        self._closed = threading.Event()
        self._channel: grpc.Channel | None = None  # of the thread alone
        threading.Thread(target=self._attend, name="attendance", daemon=True).start()

    def close(self) -> None:
        """Attends no longer; the thread says a last time how things are, while the caller goes on."""
        self._closed.set()

    def _attend(self) -> None:
        pause_s = 0.0
        while not self._closed.wait(pause_s):
            pause_s = self._every_s * self._say()
        for _ in range(_LAST_TRIES):
            if self._say() == 1:
                break
            time.sleep(self._every_s)
        self._hang_up()

    def _say(self) -> int:
        """Beats once; returns after how many intervals the next beat is due, 1 if this one was heard."""
        try:
            if self._channel is None:
                self._channel = self._security.channel(self._hub, SERVER, channel_options())
            call = stub(self._channel, ATTENDANCE_SERVICE, ATTEND)
            notice = call(self._beat(), metadata=self._metadata, timeout=_ANSWER_S)
        except grpc.RpcError as error:
            self._hang_up()  # a connection that does not answer may never answer again
            refused = error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            return _REFUSED_PAUSE if refused else 2
        self._hear(notice)
        return 1

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
