"""The process that keeps a node connected to the SuperLink and answers for it (`python -m edgelam_fl.federation.supernode`).

Runs the main loop of Flower's SuperNode and, on threads beside it, the node's own ClientApp. It listens nowhere: Flower's
Runtime API, over which Flower starts a process per message, stays closed. Knows nothing of what the messages say.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    import edgelam_fl.federation.no_database  # noqa: F401

import httpx
from flwr.common.constant import ISOLATION_MODE_PROCESS
from flwr.supercore import date, heartbeat
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supernode import fleet_http_connection as connection
from flwr.supernode import start_client_internal as flower
from flwr.supernode.nodestate import NodeStateFactory

from edgelam_fl.federation.app_archive import installed_app
from edgelam_fl.federation.clientapp import ClientAppThreads
from edgelam_fl.federation.environment import proxies_set
from edgelam_fl.federation.flower_app import app_module
from edgelam_fl.machine import end_with_parent, since_boot_s
from edgelam_fl.trust.identity import load_identity, load_key

_FIRST_IDLE_S, _IDLE_GROWTH = 0.1, 1.2  # so a pause lasts a sixth of the time without a message, up to Flower's
_HEARTBEAT_S = 10  # the least that Flower's server allows; a heartbeat is sent after less than half of it
_LONGEST_PAUSE_S = 2  # between two attempts to reach the server
_FIRST_TENSOR_S, _LONGEST_TENSOR_S = 0.05, 1.0  # pauses until a message's tensors are asked for again
_SHORTEST_IDLE_S = 1.0  # of Flower's two pauses the shorter one is for replies


def main() -> None:
    """Serves until SIGTERM or SIGINT, or until the process that started it is gone."""
    options = _parse(sys.argv[1:])
    end_with_parent()
    for proxy in proxies_set(
        os.environ
    ):  # it reaches the server alone, and Flower's client fails at a proxy it does not know
        del os.environ[proxy]
    settings = {"name": options.name, "state": str(options.state.absolute())}
    states = NodeStateFactory(ObjectStoreFactory())
    threads = ClientAppThreads(states.state(), app_module("clients.app").app, installed_app(), settings)
    if options.clock_offset is not None:
        set_flowers_clock(options.clock_offset)
    threading.Thread(target=_or_end, args=(threads.serve,), name="ClientApp", daemon=True).start()
    # Flower reads a run's settings out of the App that the run brings. No node needs them, so nothing is unpacked.
    flower.get_fused_config_from_fab = lambda archive, run: {}
    flower.time = Pauses(threads.replied)
    beat_often()
    be_back_soon()
    await_tensors_briefly()
    flower._pull_and_store_message = and_late_replies(flower._pull_and_store_message, states.state())
    flower.start_client_internal(
        state_factory=states,
        server_address=options.server,
        node_config=settings,
        isolation=ISOLATION_MODE_PROCESS,  # else it would start Flower's SuperExec
        **_security(options.identity),
    )


def beat_often() -> None:
    """Has Flower say more often that this node is here, and promise its server to: a node that dies is missed earlier."""
    heartbeat.HEARTBEAT_DEFAULT_INTERVAL = connection.HEARTBEAT_DEFAULT_INTERVAL = _HEARTBEAT_S


def set_flowers_clock(offset_s: float) -> None:
    """Lets Flower take the time since boot plus `offset_s` for the time, in the place of a clock that is wrong.

    Flower signs with the time and dates messages, and its server refuses what seems old or not yet made.
    """

    def now(tz: datetime.tzinfo) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(since_boot_s() + offset_s, tz)

    date.datetime = SimpleNamespace(datetime=SimpleNamespace(now=now), UTC=datetime.UTC)


def be_back_soon() -> None:
    """Has Flower look often for a server that does not answer: a node is to be back seconds after its server is.

    Flower's own pauses grow to 20 s and more, and it takes every broken connection of TLS, as of a server that is ending, for one
    that can never be made.
    """
    make = connection.make_simple_http_retry_invoker

    def impatient() -> RetryInvoker:
        invoker = make()
        gives_up = invoker.should_giveup
        assert gives_up is not None
        invoker.wait_gen_factory = lambda: exponential(max_delay=_LONGEST_PAUSE_S)
        invoker.should_giveup = lambda error: not _is_of_the_moment(error) and gives_up(error)
        return invoker

    connection.make_simple_http_retry_invoker = impatient
    heartbeat.exponential = lambda max_delay: exponential(max_delay=_LONGEST_PAUSE_S)


def await_tensors_briefly() -> None:
    """Has Flower look soon again for a message's tensors that the server has not been given yet.

    Flower hands a message out before its tensors are there, and its own pauses begin with a second, for which a whole round would wait.
    """
    flower.pull_objects = partial(flower.pull_objects, initial_backoff=_FIRST_TENSOR_S, backoff_cap=_LONGEST_TENSOR_S)


def and_late_replies(pull: Callable[..., int | None], state: Any) -> Callable[..., int | None]:
    """Returns Flower's `pull`, which also ends with a run if a reply to an earlier message has come meanwhile, so that it is sent.

    Flower drops a message whose run stands still for a moment, as after a restart of its server, but not the answer that is being
    given to it: sent in the place of the next message's answer, it would leave each answer one message late for good.
    """

    def pull_or_send(**arguments: Any) -> int | None:
        run: int | None = pull(**arguments)
        if run is not None:
            return run
        with state.lock_msg_store:
            kept = [entry.message.metadata for entry in state.msg_store.values() if not entry.is_retrieved]
        return next((message.run_id for message in kept if message.reply_to_message_id), None)

    return pull_or_send


def _is_of_the_moment(error: Exception) -> bool:
    """Returns whether a connection broke for another reason than a certificate that is not trusted."""
    return isinstance(error, httpx.TransportError) and "certificate" not in str(error).lower()


class Pauses:
    """The pauses of Flower's main loop, in the place of its module `time`.

    Flower's own are fixed: 3 s while there is no message, which a round would wait for, and 0.5 s until a reply is there.
    Here a reply ends the pause at once, and the pauses without a message are short after a message and grow to Flower's.
    """

    def __init__(self, replied: threading.Event, wait: Callable[[float], object] = time.sleep) -> None:
        """replied: is set when a reply is there. wait: waits as many seconds as it is told."""
        self._replied, self._wait, self._idle_s = replied, wait, _FIRST_IDLE_S

    def sleep(self, pause_s: float) -> None:
        """Waits `pause_s` seconds or less."""
        if pause_s < _SHORTEST_IDLE_S:  # a message is being answered
            self._idle_s = _FIRST_IDLE_S
            self._replied.wait(pause_s)
            self._replied.clear()
            return
        self._wait(min(pause_s, self._idle_s))
        self._idle_s = min(pause_s, _IDLE_GROWTH * self._idle_s)


def _or_end(serve: Callable[[Callable[[float], bool]], None]) -> None:
    """Ends the whole process if `serve` fails: whoever watches it starts it again."""

    def stopped(pause_s: float) -> bool:
        time.sleep(pause_s)
        return False

    try:
        serve(stopped)
    finally:
        traceback.print_exc()
        os._exit(1)


def _security(identity: Path | None) -> dict[str, Any]:
    """Returns Flower's arguments for TLS and for the node's key; without an identity the connection is plain text."""
    if identity is None:
        return {"insecure": True}
    own = load_identity(identity)
    key = load_key(own.key)
    return {
        "insecure": False,
        "root_certificates": own.authority,
        "authentication_keys": (key, key.public_key()),
    }


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A node's SuperNode with the node's own ClientApp.")
    parser.add_argument("--server", required=True, help="HOST:PORT of the SuperLink")
    parser.add_argument("--name", required=True, help="the node's name")
    parser.add_argument("--state", required=True, type=Path, help="the node's folder, with its stage host's endpoint")
    parser.add_argument("--identity", type=Path, help="folder with the node's key and certificates; else plain text")
    parser.add_argument(
        "--clock-offset", type=float, help="the server's time less the time since boot, in seconds; else the clock"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
