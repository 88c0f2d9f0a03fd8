"""What every codec promises, over all in the table: a new one is picked up by its line there."""

from __future__ import annotations

import math

import pytest
import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.split.judging import is_finite
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codec_bytes import CODEC_BYTES
from edgelam_fl.wire.codecs import CODECS, NUMBERS, check, describe

LOSSLESS = {"raw"}
MOST_ERROR = 1 / 7  # length of a row's error by the length of the row
LEAST = 2e-38  # numbers below it may become zero


def _random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TENSORS = {
    "ordinary": _random(2, 3, 8),
    "zero rows": torch.zeros(1, 4, 8),
    "a zero row among others": torch.stack([torch.zeros(8), torch.ones(8)]),
    "tiny rows": torch.full((1, 2, 8), 1e-8),
    "subnormal rows": torch.full((1, 2, 8), 1e-40),
    "huge rows": 1e37 * _random(1, 2, 40),
    "rows of unlike size": _random(4, 64) * torch.tensor([[1e-30], [1e-6], [1.0], [1e30]]),
    "a large channel": torch.cat([_random(2, 2, 95), torch.full((2, 2, 1), 300.0)], dim=2),
    "an odd width": _random(3, 33),
    "one position": _random(1, 1, 576),
    "one element": torch.tensor([3.0]),
    "no rows": torch.zeros(0, 5, 8),
    "no numbers": torch.zeros(2, 0),
    "four dimensions": _random(2, 1, 3, 32),
    "not contiguous": torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
}


def decoded(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return CODECS[name].decode(bytearray(CODECS[name].encode(tensor)), describe(tensor, name))


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
    elif tensor.numel():
        rows = tensor.double().reshape(-1, tensor.shape[-1])
        error = back.double().reshape(rows.shape) - rows
        allowed = MOST_ERROR * rows.norm(dim=1) + LEAST * math.sqrt(rows.shape[1])
        assert bool((error.norm(dim=1) <= allowed).all())


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_not_become_a_number(name: str, bad: float) -> None:
    """A receiver refuses it then, as it does without a codec."""
    tensor = _random(3, 40)
    tensor[1, 7] = bad
    back = decoded(name, tensor)
    assert not is_finite(back[1])
    assert is_finite(back[0])
    assert is_finite(back[2])


@pytest.mark.parametrize("name", CODECS)
def test_a_row_has_the_same_bytes_whatever_is_beside_it(name: str) -> None:
    """So a row that is sent again, in another micro-batch, is the same row to the last bit."""
    rows = _random(5, 576) * torch.tensor([[1.0], [1e-9], [0.0], [1e9], [3.0]])
    together = decoded(name, rows)
    for number in range(5):
        assert torch.equal(decoded(name, rows[number : number + 1])[0], together[number])


@pytest.mark.parametrize("name", CODECS)
def test_any_bytes_can_be_decoded(name: str) -> None:
    """Scales come from the network too: whatever they are, a tensor of the announced shape comes out."""
    meta = describe(_random(3, 40), name)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        data = torch.randint(0, 256, (CODECS[name].expected_bytes(meta),), generator=generator, dtype=torch.uint8)
        back = CODECS[name].decode(bytearray(data.numpy().tobytes()), meta)
        assert (back.dtype, back.shape) == (torch.float32, (3, 40))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 8, 31, 32, 33, 576])
def test_planners_know_the_bytes_of_a_row(name: str, dtype: torch.dtype, width: int) -> None:
    meta = describe(torch.zeros(3, 2, width, dtype=dtype), name)
    assert CODECS[name].expected_bytes(meta) == 6 * CODEC_BYTES[name].bytes_of_row(width, dtype.itemsize)


def test_both_tables_have_the_same_codecs() -> None:
    assert list(CODECS) == list(CODEC_BYTES)


@pytest.mark.parametrize("name", CODECS)
def test_the_decoded_tensor_can_carry_gradients_and_be_changed(name: str) -> None:
    tensor = TENSORS["ordinary"]
    back = decoded(name, tensor)
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
