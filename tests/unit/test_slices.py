"""What a node without the model gets from the hub: by real gRPC inside this process, and by streams that go wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from edgelam_fl.errors import EnvironmentProblem, ModelError, PeerLost, ProtocolError, Refused
from edgelam_fl.files import cache_folder
from edgelam_fl.hub.daemon import HubServer
from edgelam_fl.hub.fetch import FetchTiming, Served, check_model, open_model
from edgelam_fl.hub.slices import CHUNK_BYTES, make_service, offered
from edgelam_fl.model import served
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.memory import weights_bytes
from edgelam_fl.model.served import AnnouncedPart, check_part, fetch_missing
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.weights import read_tensors
from edgelam_fl.plan.making import RoundFacts
from edgelam_fl.telemetry.events import Event, SliceReceived, of_kind
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.relay import token_metadata
from tests.fleet import Fleet
from tests.support import grpc_server, run_config, write_tiny_llama

NAME = "elsewhere/tiny"


@dataclass(frozen=True)
class Hub:
    """A hub that serves the tiny model, and the token of the run that offers it."""

    address: str
    token: bytes


@pytest.fixture
def hub(tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Everything here caches in folders of the test's own."""
    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path / "cache"))
    server = HubServer("127.0.0.1", 0, tmp_path / "hub")
    with offered(tiny, tmp_path / "hub") as token:
        yield Hub(f"127.0.0.1:{server.port}", token)
    server.stop()


def opened(tiny: ModelSource, hub: Hub, tokenizer: bool = False) -> ModelSource:
    return open_model(NAME, tiny.digest, hub.address, token=hub.token, tokenizer=tokenizer)


def slice_names(tiny: ModelSource) -> list[str]:
    return [name for name in tiny.index if ".layers.2." in name or ".layers.3." in name]


def tensors_folder(source: ModelSource, base: str) -> Path:
    return cache_folder() / "slices" / source.weights_digest[:32] / base


def call(hub: Hub, method: str, **fields: Any) -> list[bytes]:
    with grpc.insecure_channel(hub.address) as channel:
        ask = channel.unary_stream(f"/edgelam.v1.Slices/{method}", pb.SliceRequest.SerializeToString)
        return list(ask(pb.SliceRequest(**fields), timeout=30, metadata=token_metadata(hub.token)))


def refusal(hub: Hub, method: str, **fields: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call(hub, method, **fields)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    return caught.value.details()


# ---------------------------------------------------------------- over the hub


@pytest.mark.parametrize(
    ("base", "compute"), [("fp32", ""), ("bf16", ""), ("int8", "float32"), ("int8", "bfloat16"), ("nf4", "float32")]
)
def test_served_tensors_are_those_that_the_whole_model_gives(
    tiny: ModelSource, hub: Hub, base: str, compute: str
) -> None:
    names = ["model.embed_tokens.weight", *slice_names(tiny)]
    local = dict(read_tensors(tiny, names, base, compute))
    got = dict(read_tensors(opened(tiny, hub), names, base, compute))
    assert got.keys() == local.keys()
    for name, tensor in local.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


def test_only_what_is_needed_is_on_the_disk(tiny: ModelSource, hub: Hub, tmp_path: Path) -> None:
    source = opened(tiny, hub)
    assert (source.config, source.num_layers, source.linear_modules()) == (tiny.config, 6, tiny.linear_modules())
    assert not (source.folder / "tokenizer.json").exists()
    tensors = dict(read_tensors(source, slice_names(tiny), "bf16"))
    on_disk = sum(file.stat().st_size for file in tensors_folder(source, "bf16").glob("model.*"))
    assert on_disk == sum(tensor.nbytes for tensor in tensors.values())
    with_text = opened(tiny, hub, tokenizer=True)
    assert (with_text.folder / "tokenizer.json").exists()
    assert with_text.stop_ids == tiny.stop_ids
    assert (with_text.folder / "generation_config.json").read_bytes() == (
        tiny.folder / "generation_config.json"
    ).read_bytes()


def test_a_slice_that_is_here_needs_no_hub(tiny: ModelSource, hub: Hub) -> None:
    names = slice_names(tiny)
    first = dict(read_tensors(opened(tiny, hub), names, "int8"))
    again = dict(read_tensors(opened(tiny, Hub("127.0.0.1:1", b"")), names, "int8"))
    assert first.keys() == again.keys() >= set(names)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("harm", ["flipped", "truncated", "gone"])
def test_a_tensor_harmed_on_the_disk_is_fetched_again_and_no_other(tiny: ModelSource, hub: Hub, harm: str) -> None:
    came: list[int] = []

    def emit(event: Event) -> None:
        came.extend(received.bytes for received in of_kind([event], SliceReceived))

    source = Served(NAME, tiny.digest, hub.address, emit, hub.token).source(tokenizer=False)
    names = slice_names(tiny)
    whole = sum(tensor.nbytes for _, tensor in read_tensors(source, names, "fp32"))
    file = tensors_folder(source, "fp32") / names[0]
    content = file.read_bytes()
    file.unlink()
    if harm != "gone":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if harm == "flipped" else content[:-1])
    dict(read_tensors(source, names, "fp32"))
    assert file.read_bytes() == content
    assert came == [whole, len(content)]


def test_a_model_that_no_run_has_opened_is_not_served(tiny: ModelSource, hub: Hub, tiny_folder: Path) -> None:
    for digest in ("0" * 64, str(tiny_folder), "../../models", ""):
        assert "no run of this server lets this node fetch" in refusal(hub, "Describe", model_digest=digest)
    with pytest.raises(Refused, match="no run of this server lets this node fetch"):
        open_model(NAME, "0" * 64, hub.address, token=hub.token)


@pytest.mark.parametrize("method", ["Describe", "List", "Fetch"])
def test_who_has_no_token_of_the_run_gets_nothing(tiny: ModelSource, hub: Hub, tmp_path: Path, method: str) -> None:
    part = pb.SlicePart(name="model.norm.weight")
    asked: dict[str, Any] = {"model_digest": tiny.digest, "base": "fp32", "parts": [part]}
    assert call(hub, method, **asked)
    with offered(tiny, tmp_path / "hub") as second:
        assert call(Hub(hub.address, second), method, **asked), "two runs may offer one model"
    for token in (b"", second, hub.token[:-1], bytes(32)):
        assert "lets this node fetch" in refusal(Hub(hub.address, token), method, **asked), "the run is over, or none"
    assert call(hub, method, **asked)


@pytest.mark.parametrize(
    ("part", "base"),
    [
        (pb.SlicePart(name="../config.json", file=True), ""),
        (pb.SlicePart(name="model.safetensors", file=True), ""),
        (pb.SlicePart(name="config.json", file=True, offset=1 << 40), ""),
        (pb.SlicePart(name="model.nothing.weight"), "fp32"),
        (pb.SlicePart(name="model.norm.weight_scale"), "fp32"),
        (pb.SlicePart(name="model.norm.weight", offset=257), "fp32"),
        (pb.SlicePart(name="model.norm.weight"), "fp64"),
    ],
)
def test_what_the_hub_does_not_send(tiny: ModelSource, hub: Hub, part: pb.SlicePart, base: str) -> None:
    assert refusal(hub, "Fetch", model_digest=tiny.digest, base=base, parts=[part])


def test_pieces_are_of_one_part_and_of_a_mebibyte_at_most(tiny: ModelSource, hub: Hub, tmp_path: Path) -> None:
    names = ["model.layers.2.mlp.up_proj.weight", "model.norm.weight"]
    parts = [pb.SlicePart(name=names[0], offset=1), pb.SlicePart(name=names[1])]
    with grpc_server([make_service(tmp_path / "hub", chunk_bytes=10_000)]) as port:
        pieces = call(Hub(f"127.0.0.1:{port}", hub.token), "Fetch", model_digest=tiny.digest, base="fp32", parts=parts)
    matrix, norm = 4 * 128 * 64 - 1, 4 * 64
    assert [len(piece) for piece in pieces] == [10_000] * (matrix // 10_000) + [matrix % 10_000, norm]
    assert CHUNK_BYTES == 1 << 20


def test_a_model_of_the_same_name_and_other_weights_is_fetched(tiny: ModelSource, hub: Hub, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other", seed=1)
    assert open_model(str(other), tiny.digest, "").digest != tiny.digest  # Held refuses it
    source = open_model(str(other), tiny.digest, hub.address, token=hub.token)
    assert source.digest == tiny.digest
    name = "model.norm.weight"
    assert torch.equal(dict(read_tensors(source, [name], "fp32"))[name], dict(read_tensors(tiny, [name], "fp32"))[name])


def test_without_a_hub_the_model_must_be_here(tiny: ModelSource) -> None:
    with pytest.raises(ModelError, match="is not built in"):
        open_model(NAME, tiny.digest, "")


def test_a_hub_that_does_not_answer(tiny: ModelSource, hub: Hub) -> None:
    with pytest.raises(
        EnvironmentProblem, match=r"is not on this node, and the server's hub at 127.0.0.1:1 .*edgelam server"
    ):
        open_model(NAME, tiny.digest, "127.0.0.1:1", timing=FetchTiming(retry_s=0.01))


def test_an_index_of_another_model_is_refused(tiny: ModelSource, hub: Hub) -> None:
    (described,) = call(hub, "Describe", model_digest=tiny.digest)
    model = pb.SliceModel.FromString(described)
    check_model(model, tiny.digest)
    for change, says in (
        (pb.SliceModel(model_digest="1" * 64), "the plan has"),
        (pb.SliceModel(files=[pb.SliceFile(name="setup.py", size_bytes=1, sha256="0" * 64)]), "no model needs"),
        (pb.SliceModel(files=[pb.SliceFile(name="vocab.txt", size_bytes=1 << 40, sha256="0" * 64)]), "at most"),
    ):
        changed = pb.SliceModel()
        changed.CopyFrom(model)
        changed.MergeFrom(change)
        with pytest.raises(ProtocolError, match=says):
            check_model(changed, tiny.digest)


def test_with_a_hub_everyone_waits_for_the_node_with_the_most_to_fetch(tiny: ModelSource) -> None:
    fleet = Fleet(tiny, run_config(tiny.name), {"device-1": None}, {"edge-1": (None, "x:1")})
    without, with_ = (fleet.plans(RoundFacts("run", 1, 1, 0, 1, hub_port=port)) for port in (0, 8001))
    most = weights_bytes(tiny, [Span(0, 2, embed=True), Span(4, 6, head=True)], "fp32")
    for name in ("device-1", "edge-1"):
        assert (without[name].hub_port, with_[name].hub_port) == (0, 8001)
        longer = with_[name].deadlines.ready_s - without[name].deadlines.ready_s
        assert longer == pytest.approx(most / 0.6e6)


# ---------------------------------------------------------------- streams that go wrong


def made(sizes: Sequence[int], seed: int = 1) -> dict[AnnouncedPart, bytes]:
    rng = random.Random(seed)
    contents = [rng.randbytes(size) for size in sizes]
    return {
        AnnouncedPart(f"t{n}", len(content), hashlib.sha256(content).hexdigest(), "U8", (len(content),)): content
        for n, content in enumerate(contents)
    }


def streams(
    contents: dict[AnnouncedPart, bytes], piece: int, break_at: Callable[[], int], log: list[int]
) -> served.Stream:
    """Sends in pieces, and breaks before the byte that `break_at` says of each stream; `log` gets the bytes sent of each."""

    def stream(parts: Sequence[tuple[AnnouncedPart, int]]) -> Iterator[bytes]:
        left = break_at()
        log.append(0)
        for part, begun in parts:
            for at in range(begun, part.size, piece):
                data = contents[part][at : min(at + piece, part.size)][:left]
                if data:
                    log[-1] += len(data)
                    yield data
                left -= len(data)
                if left == 0:
                    raise PeerLost("cut")

    return stream


@pytest.mark.parametrize("seed", range(4))
def test_broken_streams_go_on_at_their_byte(tmp_path: Path, seed: int) -> None:
    rng, log = random.Random(seed), list[int]()
    contents = made([5000, 1, 777, 3000], seed)
    stream = streams(contents, 256, lambda: rng.randrange(1, 4000), log)
    seen: list[tuple[int, int]] = []
    came = fetch_missing(tmp_path, list(contents), stream, patience_s=0.5, progress=lambda *at: seen.append(at))
    assert came == sum(log) == sum(part.size for part in contents), "no byte came twice"
    assert len(log) > 1
    assert seen[-1] == (came, came)
    assert all((tmp_path / part.name).read_bytes() == content for part, content in contents.items())
    assert not list(tmp_path.glob("*.part"))


def test_another_process_goes_on_where_one_ended(tmp_path: Path) -> None:
    contents, log = made([5000, 4000]), list[int]()

    whole = streams(contents, 100, lambda: 1 << 30, log)
    with pytest.raises(KeyboardInterrupt):
        fetch_missing(tmp_path, list(contents), stop_after(whole, 60))
    assert fetch_missing(tmp_path, list(contents), whole) == 9000 - 60 * 100
    assert fetch_missing(tmp_path, list(contents), whole) == 0, "nothing is missing"


def stop_after(stream: served.Stream, pieces: int) -> served.Stream:
    def stopping(parts: Sequence[tuple[AnnouncedPart, int]]) -> Iterator[bytes]:
        for number, piece in enumerate(stream(parts)):
            if number == pieces:
                raise KeyboardInterrupt
            yield piece

    return stopping


def test_a_part_that_comes_wrong_is_fetched_again_alone(tmp_path: Path) -> None:
    contents, asked = made([500, 400, 300]), list[list[str]]()

    def stream(parts: Sequence[tuple[AnnouncedPart, int]]) -> Iterator[bytes]:
        asked.append([part.name for part, _ in parts])
        for part, begun in parts:
            first_time = len(asked) == 1 and part.name == "t1"
            yield bytes(part.size) if first_time else contents[part][begun:]

    assert fetch_missing(tmp_path, list(contents), stream, patience_s=0.5) == 500 + 400 + 300 + 400
    assert asked == [["t0", "t1", "t2"], ["t1"]]


def test_a_part_that_stays_wrong_ends_it(tmp_path: Path) -> None:
    contents = made([10])
    with pytest.raises(EnvironmentProblem, match="3 times with other bytes"):
        fetch_missing(tmp_path, list(contents), lambda parts: iter([bytes(10)]), patience_s=0.1)


def test_more_than_announced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="more than the 10 bytes"):
        fetch_missing(tmp_path, list(made([10])), lambda parts: iter([bytes(11)]))


def test_a_stream_that_gives_nothing(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"1 of 1 tensors .* it ended early"):
        fetch_missing(tmp_path, list(made([10])), lambda parts: iter([]), patience_s=0.05)


def test_a_disk_that_is_too_small_says_so_before_a_byte_is_asked_for(tmp_path: Path) -> None:
    contents, log = made([30_000_000]), list[int]()
    with pytest.raises(EnvironmentProblem, match=r"needs 30 MB more under .*, 20 MB are free.*EDGELAM_CACHE"):
        fetch_missing(tmp_path, list(contents), streams(contents, 100, lambda: 1, log), free=lambda folder: 20_000_000)
    assert log == []


def test_a_disk_that_fills_up_on_the_way(tmp_path: Path) -> None:
    def stream(parts: Sequence[tuple[AnnouncedPart, int]]) -> Iterator[bytes]:
        yield bytes(4)
        raise OSError(errno.ENOSPC, "No space left on device")

    quota = iter([1 << 30, 0])
    with pytest.raises(EnvironmentProblem, match=r"the slice needs 0 MB more .* 0 MB are free"):
        fetch_missing(tmp_path, list(made([10])), stream, free=lambda folder: next(quota, 0))


@pytest.mark.parametrize(
    "change",
    [
        {"size": 41}, {"name": "../x"}, {"name": ""}, {"name": ".x"}, {"sha256": "x"}, {"dtype": "F64"},
        {"size": 1 << 40, "shape": (1 << 38,)},
    ],
)  # fmt: skip
def test_what_must_not_be_announced(change: dict[str, object]) -> None:
    part = AnnouncedPart("a.weight", 40, "0" * 64, "F32", (10,))
    check_part(part, 80)
    with pytest.raises(ProtocolError):
        check_part(replace(part, **change), 80)  # type: ignore[arg-type]


def test_a_manifest_that_was_cut_short_is_no_manifest(tmp_path: Path) -> None:
    parts = {part.name: part for part in made([3])}
    served.write_manifest(tmp_path, "m", parts)
    assert served.read_manifest(tmp_path, "m") == parts
    for text in ("{", "[]", json.dumps({"a": {}}), ""):
        (tmp_path / "manifest-m.json").write_text(text)
        assert served.read_manifest(tmp_path, "m") == {}
