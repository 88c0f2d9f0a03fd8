"""What every codec promises, over all in the table: a new one is picked up by its line there."""

from __future__ import annotations

import pytest
import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codecs import CODECS, NUMBERS, check, describe

LOSSLESS = {"raw"}
TENSORS = {
    "ordinary": torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)),
    "zero rows": torch.zeros(1, 4, 8),
    "a zero row among others": torch.stack([torch.zeros(8), torch.ones(8)]),
    "tiny rows": torch.full((1, 2, 8), 1e-8),
    "one element": torch.tensor([3.0]),
    "no rows": torch.zeros(0, 5, 8),
    "not contiguous": torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TENSORS)
def test_round_trip(name: str, dtype: torch.dtype, kind: str) -> None:
    codec, tensor = CODECS[name], TENSORS[kind].to(dtype)
    before = tensor.clone()
    meta = describe(tensor, name)
    data = codec.encode(tensor)
    assert len(data) == codec.expected_bytes(meta)
    meta.total_bytes = len(data)
    check(meta, most_bytes=max(len(data), tensor.nbytes))
    back = codec.decode(bytearray(data), meta)
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert torch.equal(tensor, before), "the codec changed its input"
    if name in LOSSLESS:
        assert torch.equal(back, tensor)
    else:
        scale = tensor.float().abs().amax(dim=-1, keepdim=True)
        assert bool(((back.float() - tensor.float()).abs() <= scale / 7).all())


@pytest.mark.parametrize("name", CODECS)
def test_the_decoded_tensor_can_carry_gradients_and_be_changed(name: str) -> None:
    tensor = TENSORS["ordinary"]
    back = CODECS[name].decode(bytearray(CODECS[name].encode(tensor)), describe(tensor, name))
    back.add_(1)
    back.requires_grad_(True).sum().backward()
    assert torch.equal(back.grad, torch.ones_like(tensor))


@pytest.mark.parametrize("name", CODECS)
def test_one_byte_too_many_is_refused(name: str) -> None:
    tensor = TENSORS["ordinary"]
    meta = describe(tensor, name)
    meta.total_bytes = CODECS[name].expected_bytes(meta)
    largest = max(meta.total_bytes, tensor.nbytes)
    check(meta, most_bytes=largest)
    with pytest.raises(ProtocolError, match=f"{largest} bytes; this link's plan allows"):
        check(meta, most_bytes=largest - 1)
    meta.total_bytes += 1
    with pytest.raises(ProtocolError, match="announces"):
        check(meta, most_bytes=1 << 20)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_other_dtypes_do_not_travel(dtype: torch.dtype) -> None:
    with pytest.raises(ProtocolError, match="cannot travel; known: float32, bfloat16"):
        describe(torch.zeros(2, dtype=dtype), "raw")


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (1,)])
def test_numbers_travel_where_they_are_expected(name: str, shape: tuple[int, ...]) -> None:
    codec, tensor = CODECS[name], torch.full(shape, 2**40 + 1)
    meta = describe(tensor, name, NUMBERS)
    data = codec.encode(tensor)
    meta.total_bytes = len(data)
    check(meta, len(data), NUMBERS)
    back = codec.decode(bytearray(data), meta)
    assert back.dtype == torch.int64
    assert torch.equal(back, tensor)
    with pytest.raises(ProtocolError, match="dtype 'int64'; known: float32, bfloat16"):
        check(meta, len(data))
    with pytest.raises(ProtocolError, match="cannot travel; known: int64"):
        describe(tensor.float(), name, NUMBERS)


@pytest.mark.parametrize("name", CODECS)
def test_the_table_names_each_codec_by_its_name_on_the_wire(name: str) -> None:
    assert CODECS[name].name == name
    assert pb.Tensor(codec=name).codec == name
