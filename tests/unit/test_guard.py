"""The guard before the SuperLink, with a stand-in for Flower: who is let through, who is refused with which words."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from edgelam_fl.federation.guard import ROUTES, START_RUN, Audience, Guard, Receive, Scope, Send

TOKEN = "the operator's"


class Flower:
    """Answers every request that reaches it, and keeps its body."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.bodies.append((await receive())["body"])
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})


def guard(flower: Flower, **settings: Any) -> Guard:
    return Guard(flower=flower, token=TOKEN, **{"judge_run": lambda body: "", **settings})


def ask(
    asked: Guard, path: str, *, client: str = "192.0.2.7", token: str = "", body: bytes = b"", parts: int = 1
) -> tuple[int, dict[str, Any]]:
    """Sends one request with `body` in `parts` parts; returns the status and the JSON of the answer."""
    size = -(-len(body) // parts)
    messages = [
        {"type": "http.request", "body": body[n * size : (n + 1) * size], "more_body": n + 1 < parts}
        for n in range(parts)
    ]
    sent: list[Mapping[str, Any]] = []

    async def receive() -> Mapping[str, Any]:
        return messages.pop(0)

    async def send(message: Mapping[str, Any]) -> None:
        sent.append(message)

    headers = [(b"authorization", f"Bearer {token}".encode())] if token else []
    scope = {
        "type": "http", "path": path, "headers": headers, "client": (client, 5000), "server": ("198.51.100.1", 8000),
    }  # fmt: skip
    asyncio.run(asked(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


@pytest.mark.parametrize("path", [path for path, caller in ROUTES.items() if caller is Audience.OPERATOR])
def test_s3_the_control_api_is_for_the_operator(path: str, capfd: pytest.CaptureFixture[str]) -> None:
    flower = Flower()
    for wrong in ("", "another", TOKEN[:-1], f"{TOKEN} "):
        status, said = ask(guard(flower), path, client="127.0.0.1", token=wrong)
        assert status == 403
        assert "only the operator" in said["detail"]
    assert not flower.bodies
    assert f"refused 127.0.0.1, '{path}': only the operator" in capfd.readouterr().err
    assert ask(guard(flower), path, token=TOKEN)[0] == 200


@pytest.mark.parametrize("path", [path for path, caller in ROUTES.items() if caller is Audience.MACHINE])
def test_s2_the_runtime_api_is_for_this_machine(path: str) -> None:
    flower = Flower()
    status, said = ask(guard(flower), path, token=TOKEN)
    assert (status, said["detail"]) == (403, "only tasks that run on the server's machine may do that")
    assert not flower.bodies
    for client in ("127.0.0.1", "::1", "198.51.100.1"):  # the last one is the server's own address
        assert ask(guard(flower), path, client=client)[0] == 200


def test_s2_nobody_may_take_a_task() -> None:
    flower = Flower()
    for client in ("192.0.2.7", "127.0.0.1"):
        assert ask(guard(flower), "/v1/runtime/acquire-task", client=client, token=TOKEN)[0] == 404
    assert not flower.bodies


@pytest.mark.parametrize(
    "path",
    ["/docs", "/openapi.json", "/docs/oauth2-redirect", "/", "/v1/control/list-runs/", "/v1/control/register-node"],
)
def test_s20_what_is_not_listed_is_closed(path: str) -> None:
    flower = Flower()
    assert ask(guard(flower), path, client="127.0.0.1", token=TOKEN)[0] == 404
    assert not flower.bodies


def test_a_node_is_judged_by_its_headers_before_its_request_is_read() -> None:
    flower = Flower()
    judging = guard(
        flower, judge_node=lambda headers: "" if headers.get("authorization") == "Bearer a member" else "no"
    )
    body = bytes(100 << 20)
    assert ask(judging, "/v1/fleet/push-object", token="another", body=body) == (401, {"detail": "no"})
    assert not flower.bodies
    assert ask(judging, "/v1/fleet/push-object", token="a member", body=b"tensors")[0] == 200
    assert flower.bodies == [b"tensors"]


def test_a_node_and_a_check_of_health_pass() -> None:
    flower = Flower()
    for path in ("/health", "/v1/fleet/pull-messages"):
        assert ask(guard(flower), path)[0] == 200
    assert len(flower.bodies) == 2


@pytest.mark.parametrize("parts", [1, 3])
def test_s1_a_run_is_judged_before_flower_sees_it(parts: int) -> None:
    flower, seen = Flower(), list[bytes]()

    def judge(body: bytes) -> str:
        seen.append(body)
        return "it is not ours" if body == b"foreign" else ""

    judging = guard(flower, judge_run=judge)
    assert ask(judging, START_RUN, token=TOKEN, body=b"foreign", parts=parts) == (403, {"detail": "it is not ours"})
    assert not flower.bodies
    assert ask(judging, START_RUN, token=TOKEN, body=b"our own", parts=parts)[0] == 200
    assert flower.bodies == [b"our own"], "in one part, whatever came"
    assert ask(judging, START_RUN, body=b"foreign")[0] == 403
    assert len(seen) == 2, "without the token nothing is read"


def test_a_run_that_is_too_long_is_not_read_to_its_end() -> None:
    status, said = ask(guard(Flower()), START_RUN, token=TOKEN, body=bytes(17 << 20), parts=17)
    assert (status, said["detail"]) == (413, f"the request is longer than {16 << 20} bytes")


def test_own_routes_of_the_operator_ask_for_the_token_before_they_read(capfd: pytest.CaptureFixture[str]) -> None:
    seen = list[dict[str, Any]]()

    def stop(asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        seen.append(asked)
        return 200, {"name": asked["run"]}

    flower = Flower()
    stopping = guard(flower, operators={"stop-run": stop}, own={"about": lambda asked: (200, {})})
    body = b'{"run": "mine"}'
    for wrong in ("", "another", f"{TOKEN} "):
        status, said = ask(stopping, "/v1/edgelam/stop-run", client="127.0.0.1", token=wrong, body=body)
        assert (status, "only the operator" in said["detail"]) == (403, True)
    assert not seen
    assert "refused 127.0.0.1, '/v1/edgelam/stop-run'" in capfd.readouterr().err
    assert ask(stopping, "/v1/edgelam/stop-run", token=TOKEN, body=body) == (200, {"name": "mine"})
    assert ask(stopping, "/v1/edgelam/about")[0] == 200
    assert not flower.bodies


def test_routes_of_this_project_are_answered_here() -> None:
    own = {"double": lambda asked: (201, {"is": 2 * asked["number"]})}
    flower = Flower()
    doubling = guard(flower, own=own)
    assert ask(doubling, "/v1/edgelam/double", body=b'{"number": 4}') == (201, {"is": 8})
    assert ask(doubling, "/v1/edgelam/treble")[0] == 404
    assert ask(doubling, "/v1/edgelam/double", body=b"[1]") == (400, {"detail": "the request is no JSON object"})
    assert ask(doubling, "/v1/edgelam/double", body=b"{") == (400, {"detail": "the request is no JSON"})
    assert ask(doubling, "/v1/edgelam/double", body=bytes(65 << 10))[0] == 413
    assert not flower.bodies
