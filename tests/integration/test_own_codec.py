"""A new codec is one file and two lines: the one that docs/extending.md shows carries tensors over memory and over gRPC."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from edgelam_fl.wire import codec_bytes
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codecs import CODECS
from edgelam_fl.wire.codecs.base import Codec
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.serve import DataPlaneServer
from edgelam_fl.wire.link import Frame, Link
from tests.contract import test_codecs as contract
from tests.links import Heard, hello, make_terms, open_pair, ready, terms
from tests.support import WAIT_S

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture
def codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Codec]:
    """The page's file, and its lines in the two tables."""
    section = PAGE.read_text(encoding="utf-8").partition("\n## A codec\n")[2].partition("\n## ")[0]
    source, line, size = (dedent(block) for block in re.findall(r"```python\n(.*?) *```", section, re.DOTALL))
    file = tmp_path / "own.py"
    file.write_text(source, encoding="utf-8")
    spec = spec_from_file_location("own", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    (added,) = eval(f"{{{line}}}", vars(module)).items()  # noqa: S307 - a line of our own page
    monkeypatch.setitem(CODECS, *added)
    (sized,) = eval(f"{{{size}}}", vars(codec_bytes)).items()  # noqa: S307
    monkeypatch.setitem(codec_bytes.CODEC_BYTES, *sized)
    return added[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", contract.TENSORS)
def test_it_keeps_the_contract_of_codecs(codec: Codec, dtype: torch.dtype, kind: str) -> None:
    contract.test_round_trip(codec.name, dtype, kind)
    contract.test_the_decoded_tensor_can_carry_gradients_and_be_changed(codec.name)
    contract.test_one_byte_too_many_is_refused(codec.name)
    contract.test_a_row_has_the_same_bytes_whatever_is_beside_it(codec.name)
    contract.test_what_is_not_finite_does_not_become_a_number(codec.name, math.inf)
    contract.test_planners_know_the_bytes_of_a_row(codec.name, dtype, 33)
    contract.test_both_tables_have_the_same_codecs()
    contract.test_the_table_names_each_codec_by_its_name_on_the_wire(codec.name)


HIDDEN = torch.randn(2, 300, 576, generator=torch.Generator().manual_seed(1))  # several chunks
EXPECTED = (HIDDEN.view(torch.int32) & -256).view(torch.float32)


def test_over_memory(codec: Codec) -> None:
    frames: list[Frame] = []
    answer = ready(0, codec.name)
    left, right = open_pair(terms(answer=answer), terms(answer=answer, on_frame=lambda _, frame: frames.append(frame)))
    left.send(pb.Header(kind=pb.ACT, step=3), HIDDEN)
    assert torch.equal(frames[0].tensor, EXPECTED)
    left.send(pb.Header(kind=pb.LABELS), torch.tensor([[2**40 + 1]]))
    assert frames[1].tensor is not None
    assert frames[1].tensor.item() == 2**40 + 1, "labels are never rounded"
    counted = {count.kind: count.payload_bytes for count in right.counters.report()}
    assert counted == {"ACT": HIDDEN.nbytes * 3 // 4, "LABELS": 8}


def test_over_grpc(codec: Codec) -> None:
    near_heard, far_heard, admitted = Heard(), Heard(), list[Link]()

    def admit(hello: pb.Hello, link: Link) -> pb.Ready:
        answer = ready(codec=next(name for name in hello.codecs if name in CODECS))
        link.open(terms(answer=answer, heard=far_heard))
        admitted.append(link)
        return answer

    server = DataPlaneServer("127.0.0.1", 0, admit)
    try:
        offer = hello(codecs=[codec.name, "raw"])
        link = dial(
            "host", f"127.0.0.1:{server.port}", "entry", offer, ByteCounters(), make_terms(near_heard), ready_s=30
        )
        assert (link.terms.activation_codec, link.terms.gradient_codec) == (codec.name, codec.name)
        link.send(pb.Header(kind=pb.ACT), HIDDEN)
        admitted[0].send(pb.Header(kind=pb.GRAD), HIDDEN)
        for heard in (near_heard, far_heard):
            frame = heard.get(timeout=WAIT_S)
            assert isinstance(frame, Frame), frame
            assert torch.equal(frame.tensor, EXPECTED)
        link.close()
    finally:
        server.stop()
