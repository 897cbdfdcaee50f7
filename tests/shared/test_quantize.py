"""The stored form against its definition, written again in float64 and plain Python."""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashrl_wire.quantize import CODE_DTYPE, RowStorage, dequantize_rows, quantize_rows, row_max

LARGEST = {"int8_rows": 127.0, "fp8_rows": 448.0}
E4M3FN = sorted(
    {
        sign * value
        for sign in (1.0, -1.0)
        for value in [m * 2.0**-9 for m in range(8)]
        + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    }
)
STORAGES: list[RowStorage] = ["int8_rows", "fp8_rows"]


def fp32(value: float) -> float:
    """Round a float64 to the nearest float32."""
    return struct.unpack("f", struct.pack("f", value))[0] if math.isfinite(value) else value


def nearest_even_e4m3(value: float) -> float:
    """The e4m3fn number nearest to `value`; of two equally near ones that with an even mantissa."""
    size = min(abs(value), 448.0)
    positive = [number for number in E4M3FN if number >= 0]
    best = min(abs(number - size) for number in positive)
    tied = [index for index, number in enumerate(positive) if abs(number - size) == best]
    index = tied[0] if len(tied) == 1 or tied[0] % 2 == 0 else tied[1]  # positions count up the bit patterns
    return math.copysign(positive[index], value)


def reference(row: list[float], storage: RowStorage) -> tuple[list[float], float]:
    """Codes and scale of one row. A quotient of float32s rounded to float32 is exactly IEEE's float32 division."""
    largest = max(map(abs, row))
    scale = fp32(largest / LARGEST[storage]) if largest else 1.0
    scaled = [fp32(value / scale) for value in row]
    if storage == "int8_rows":
        return [float(min(127, max(-127, round(value)))) for value in scaled], scale  # Python rounds half to even
    return [nearest_even_e4m3(value) for value in scaled], scale


def check(weight: Tensor, storage: RowStorage) -> None:
    codes, scales = quantize_rows(weight, storage)
    assert (codes.dtype, scales.dtype) == (CODE_DTYPE[storage], torch.float32)
    assert (codes.shape, scales.shape) == (weight.shape, (weight.shape[0], 1))
    for row, found, scale in zip(weight.double().tolist(), codes.double().tolist(), scales[:, 0].tolist(), strict=True):
        assert (found, scale) == reference(row, storage)


@pytest.mark.parametrize("storage", STORAGES)
@given(rows=st.integers(1, 4), columns=st.integers(1, 9), seed=st.integers(0, 2**31), size=st.floats(-30, 30))
@settings(deadline=None, max_examples=60)
def test_matches_the_definition(storage: RowStorage, rows: int, columns: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    check((torch.randn(rows, columns, generator=generator) * 2.0**size).bfloat16(), storage)


@pytest.mark.parametrize("storage", STORAGES)
@given(bits=st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=12))
@settings(deadline=None, max_examples=150)
def test_matches_the_definition_for_any_finite_bits(storage: RowStorage, bits: list[int]) -> None:
    signed = [word - 0x10000 if word >= 0x8000 else word for word in bits]
    row = torch.tensor([signed], dtype=torch.int16).view(torch.bfloat16)
    row = torch.where(torch.isfinite(row), row, torch.ones_like(row))
    codes, scales = quantize_rows(row, storage)
    if float(scales[0, 0]) >= 2.0**-126:  # a subnormal scale has too few bits for a reference in float64
        assert (codes.double().tolist()[0], float(scales[0, 0])) == reference(row.double().tolist()[0], storage)
    assert bool((codes.float().abs() <= LARGEST[storage]).all())


def test_worked_by_hand() -> None:
    # the largest is 127/64, so the scale is 1/64: 0.5 -> 32, -1 -> -64, and 1.5/64 and 2.5/64 are ties to even
    weight = torch.tensor([[127 / 64, 0.5, -1.0, 1.5 / 64, 2.5 / 64, -0.0]]).bfloat16()
    codes, scales = quantize_rows(weight, "int8_rows")
    assert codes.tolist() == [[127, 32, -64, 2, 2, 0]]
    assert scales.tolist() == [[1 / 64]]
    codes, scales = quantize_rows(torch.tensor([[448.0, 1.0, -17.0, 0.0009765625]]).bfloat16(), "fp8_rows")
    # 17 lies between 16 and 18: a tie to the even mantissa; 2^-10 is half of the least number, a tie to zero
    assert codes.float().tolist() == [[448.0, 1.0, -16.0, 0.0]]
    assert scales.tolist() == [[1.0]]


@pytest.mark.parametrize("storage", STORAGES)
def test_row_of_zeros_has_scale_one(storage: RowStorage) -> None:
    codes, scales = quantize_rows(torch.tensor([[0.0, -0.0], [1.0, 0.0]]).bfloat16(), storage)
    assert (scales[0].tolist(), codes[0].float().abs().tolist()) == ([1.0], [0.0, 0.0])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_number_is_an_error(storage: RowStorage, bad: float) -> None:
    weight = torch.ones(3, 4).bfloat16()
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize_rows(weight, storage)


@pytest.mark.parametrize("weight", [torch.ones(2, 2), torch.ones(4).bfloat16(), torch.ones(2, 2).half()])
def test_only_bf16_matrices_have_a_stored_form(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="expected a bf16 matrix"):
        quantize_rows(weight, "int8_rows")


@pytest.mark.parametrize("storage", STORAGES)
def test_shards_of_rows_with_the_shared_maximum_give_the_whole(storage: RowStorage) -> None:
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole, scales = quantize_rows(weight, storage)
    maximum = torch.maximum(row_max(weight[:, :3]), row_max(weight[:, 3:]))
    for columns in (slice(0, 3), slice(3, 8)):
        codes, shard_scales = quantize_rows(weight[:, columns].contiguous(), storage, maximum)
        assert torch.equal(codes.float(), whole[:, columns].float())
        assert torch.equal(shard_scales, scales)


@pytest.mark.parametrize("storage", STORAGES)
def test_values_come_back_within_half_a_step(storage: RowStorage) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    codes, scales = quantize_rows(weight, storage)
    error = (dequantize_rows(codes, scales) - weight.float()).abs()
    # int8 steps are one scale wide; e4m3 keeps three bits behind the first, down to steps of 2^-9
    half_step = scales / 2 if storage == "int8_rows" else torch.maximum(weight.float().abs() / 16, scales * 2.0**-10)
    assert bool((error <= half_step * 1.001).all())


def test_blocks_of_a_large_matrix_agree_with_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 10, generator=torch.Generator().manual_seed(2)).bfloat16()
    whole, _ = quantize_rows(weight, "int8_rows")
    monkeypatch.setattr("flashrl_wire.quantize._BLOCK_ELEMENTS", 25)
    assert torch.equal(quantize_rows(weight, "int8_rows")[0], whole)
