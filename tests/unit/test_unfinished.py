"""What a run's folder says of an attempt under way: plans as they are, without anything that lets a node in anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from edgelam_fl.wire import edgelam_pb2 as pb
from server import unfinished

SECRET = b"a-secret-of-the-plan"


def secrets_within(message: Message) -> Iterator[tuple[Message, FieldDescriptor]]:
    """Yields all fields of a message and of those within it that hold tokens as bytes; repeated messages get one entry."""
    for field in message.DESCRIPTOR.fields:
        entry = field.message_type
        is_map = entry is not None and entry.GetOptions().map_entry
        of_bytes = entry.fields_by_name["value"] if is_map else field
        if of_bytes.type == FieldDescriptor.TYPE_BYTES:
            if "token" in field.name:
                yield message, field
        elif entry is not None and not is_map:
            within = getattr(message, field.name)
            yield from secrets_within(within.add() if field.is_repeated else within)


def test_no_token_of_a_plan_is_written(tmp_path: Path) -> None:
    plan = pb.Plan(node="ann", round=3, steps=1, snapshot_every=1)
    names = set[str]()
    for message, field in list(secrets_within(plan)):
        names.add(field.name)
        if field.message_type is not None:
            getattr(message, field.name)["ann"] = SECRET
        else:
            setattr(message, field.name, SECRET)
    assert names >= {"token", "relay_token", "relay_tokens", "slices_token", "kept_token", "attend_token"}
    planned: Any = SimpleNamespace(
        plans={"ann": plan}, facts=SimpleNamespace(round=3, attempt=1), layout=SimpleNamespace(sites=[])
    )
    unfinished.note(tmp_path, planned)
    found = unfinished.read(tmp_path)
    assert found is not None
    assert (found.plans["ann"].node, found.plans["ann"].round) == ("ann", 3)
    assert SECRET not in found.plans["ann"].SerializeToString()
    assert SECRET in plan.SerializeToString(), "the plan that is sent keeps them"
