"""A reply whose tensors do not come holds the ServerApp up for some seconds, not for hours."""

from __future__ import annotations

import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError
from flwr.superlink.grid import http_grid

from server.pulling import bound_pulls, giving_up


def test_an_upload_that_goes_on_is_awaited_and_one_that_stands_still_is_given_up() -> None:
    now, here = 0.0, {"first"}

    def pull(name: str) -> bytes:
        if name not in here:
            raise ObjectUnavailableError(name)
        return name.encode()

    bounded = giving_up(pull, 20.0, lambda: now)
    assert bounded("first") == b"first"
    now = 19.0
    with pytest.raises(ObjectUnavailableError):
        bounded("second")
    here.add("second")
    assert bounded("second") == b"second"
    now = 38.0  # 19 s after the second
    with pytest.raises(ObjectUnavailableError):
        bounded("third")
    now = 39.0
    with pytest.raises(ObjectPullError, match="nothing was uploaded for 20 s"):
        bounded("third")


def test_flowers_grid_gives_a_reply_up_whose_tensors_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_grid, "pull_objects", http_grid.pull_objects)
    bound_pulls(still_s=0.0)

    def never(name: str) -> bytes:
        raise ObjectUnavailableError(name)

    with pytest.raises(ObjectPullError):
        http_grid.pull_objects(object_ids=["a", "b"], pull_object_fn=never)
    assert http_grid.pull_objects(object_ids=["a"], pull_object_fn=str.encode) == {"a": b"a"}
