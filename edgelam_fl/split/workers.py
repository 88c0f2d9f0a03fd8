"""The threads that compute a host's micro-batches, each on a view of the stage that is its own.

Knows neither devices nor turns: it gets functions, and says when one is through. Neighbours: `split.passes` has the functions,
`split.host` asks for them and owns all state.

Each thread has its share of torch's threads, whether others compute beside it or not: what is computed depends on nothing else.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from edgelam_fl.model.stage import Stage
from edgelam_fl.plan.modes import host_mode
from edgelam_fl.wire import edgelam_pb2 as pb

_counting_threads = threading.Lock()  # torch's number of threads is a thread's own, and a new thread gets the newest


def workers_of(plan: pb.Plan, window: int, threads: int = 0) -> int:
    """Returns how many micro-batches a host computes at once, by the rule that the planner knows too (`HostMode.workers`).

    `window`: the micro-batches per device that the host has memory for. `threads`: of the host; 0: torch's.
    """
    threads = threads or torch.get_num_threads()
    return host_mode(plan.host_mode).workers(len(plan.serves), min(window, plan.micro_batches), threads)


class Work:
    """A computation on a stage, and what came of it."""

    def __init__(self, compute: Callable[[Stage], Any], then: Callable[[Any], None], view: Stage | None = None) -> None:
        """`compute`: runs on a worker's thread. `then`: gets its result in `conclude`. `view`: that it needs; None: any."""
        self.view = view
        self.seconds = 0.0
        self.is_over = False
        self._compute: Callable[[Stage], Any] | None = compute
        self._then = then
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self, view: Stage) -> None:
        """Computes on a view. An error waits for `conclude`."""
        compute, self._compute = self._compute, None  # what it holds is let go with the end of the block
        assert compute is not None
        began = time.monotonic()
        try:
            self._result = compute(view)
        except BaseException as error:  # noqa: BLE001 - raised again where the result is awaited
            self._error = error
        self.view, self.seconds = view, time.monotonic() - began
        self.is_over = True

    def conclude(self) -> None:
        """Hands the result over. Raises the error that ended the computation."""
        result, self._result = self._result, None
        if self._error is not None:
            raise self._error
        self._then(result)


class Workers:
    """One worker per view; a single one computes on the thread that starts its work. For one thread, inside a `with` block."""

    def __init__(self, views: Sequence[Stage], when_over: Callable[[Work], None]) -> None:
        """`when_over`: is called on a worker's thread when it is through with its work, which then waits for `release`."""
        self._free, self._count = list(views), len(views)
        self._when_over = when_over
        self._due = queue.SimpleQueue[Work | None]()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> None:
        if self._count == 1:
            return
        with _counting_threads:
            all_threads, are_set = torch.get_num_threads(), threading.Barrier(self._count + 1)
            share = max(1, all_threads // self._count)
            self._threads = [
                threading.Thread(target=self._work, args=(share, are_set), name=f"worker {n}", daemon=True)
                for n in range(self._count)
            ]
            for thread in self._threads:
                thread.start()
            are_set.wait()
            torch.set_num_threads(all_threads)  # of all threads that start later

    def __exit__(self, *_: object) -> None:
        """Ends the threads, after the work that was started."""
        for _thread in self._threads:
            self._due.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, torch_threads: int, are_set: threading.Barrier) -> None:
        torch.get_num_threads()  # a thread's first look at the number takes the newest that any thread has set
        torch.set_num_threads(torch_threads)
        are_set.wait()
        while (work := self._due.get()) is not None:
            assert work.view is not None
            work.run(work.view)
            self._when_over(work)
            del work  # a worker that waits holds nothing

    def can_start(self, view: Stage | None = None) -> bool:
        """Returns whether work would start at once. `view`: as of `Work`."""
        return bool(self._free) if view is None else view in self._free

    def start(self, work: Work) -> None:
        """Starts work; with a single worker, computes it."""
        view = self._free.pop(0 if work.view is None else self._free.index(work.view))
        if self._threads:
            work.view = view
            self._due.put(work)
        else:
            work.run(view)
            self.release(work)

    def release(self, work: Work) -> None:
        """Takes the view of work that is over back, for the next."""
        assert work.view is not None
        self._free.append(work.view)
