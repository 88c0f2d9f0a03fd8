"""Nodes that have no model at all get their slices from the server, and train what nodes with the model do."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgelam_fl.files import cache_folder
from edgelam_fl.model.source import ModelSource
from edgelam_fl.telemetry.events import EventTail, SliceReceived, of_kind
from tests.integration.federation import Federation, Run, config_of

pytestmark = pytest.mark.processes

NAME = "elsewhere/tiny"


def forget(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def test_nodes_without_the_model_train_what_nodes_with_it_do(
    federation: Federation, averaged: Run, tiny: ModelSource
) -> None:
    give_to_the_server(federation.server_models, tiny.folder)
    kept, tensors = (cache_folder() / "slices" / digest[:32] for digest in (tiny.digest, tiny.weights_digest))
    forget(kept, tensors)
    tails = {name: EventTail(node.state / "events.jsonl") for name, node in federation.nodes.items()}
    for tail in tails.values():
        tail.poll()
    try:
        # Checkpointing changes no bit, and makes it another slice than the one that the nodes hold already.
        served = federation.run("served", config_of(NAME, "split.checkpointing=true"))
        assert (kept / "tokenizer.json").exists()
    finally:
        forget(kept, tensors)
    received = {name: list(of_kind(tail.poll(), SliceReceived)) for name, tail in tails.items()}
    (host,) = received.pop("edge-1")
    layer = sum(np.prod(entry.shape) for name, entry in tiny.index.items() if ".layers.2." in name)
    assert host.bytes == host.slice_bytes == 4 * 2 * layer, "layers 2 and 3 and nothing else"
    # The devices are on one machine here: whoever comes first fetches what all of them hold.
    assert sum(event.bytes for events in received.values() for event in events) == tiny.fp32_bytes - host.bytes
    ours, theirs = (load_file(run.path / "adapter/adapter_model.safetensors") for run in (averaged, served))
    assert ours
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def give_to_the_server(cache: Path, folder: Path) -> None:
    """As the hub's own client lays out what it has downloaded."""
    repository = cache / f"models--{NAME.replace('/', '--')}"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
