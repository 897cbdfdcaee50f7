"""Digests against a second implementation in Python's integers, and the sums that updates rely on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashrl_wire.digest import Combiner, PartDigest, digest_at, digest_range
from flashrl_wire.layout import PartSpec

MASK = (1 << 64) - 1
DTYPES = [torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float32]


def reference(index: int, pattern: int) -> tuple[int, int]:
    """splitmix64's finalizer over index and bit pattern; the second lane mixes once more."""
    mixed = (index * 0x9E3779B97F4A7C15 + pattern * 0x165667B19E3779F9) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    mixed ^= mixed >> 31
    return mixed, ((mixed ^ (mixed >> 29)) * 0x9FB21C651E98DF25) & MASK


def patterns(values: Tensor) -> list[int]:
    size = values.element_size()
    raw = values.contiguous().reshape(-1).view(torch.uint8).reshape(-1, size).tolist()
    return [int.from_bytes(bytes(item), "little") for item in raw]


def random_values(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """Random bits, NaNs among them."""
    size = torch.empty(0, dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=generator).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(count=st.integers(0, 40), start=st.integers(0, 2**40), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_matches_the_reference(dtype: torch.dtype, count: int, start: int, seed: int) -> None:
    values = random_values(dtype, count, seed)
    lanes = [reference(start + i, pattern) for i, pattern in enumerate(patterns(values))]
    expected = PartDigest(sum(low for low, _ in lanes) & MASK, sum(high for _, high in lanes) & MASK)
    assert digest_range(values, start) == expected
    assert digest_at(torch.arange(start, start + count), values) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@given(cut=st.integers(0, 50), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_shards_add_up(dtype: torch.dtype, cut: int, seed: int) -> None:
    values = random_values(dtype, 50, seed)
    assert digest_range(values[:cut]) + digest_range(values[cut:], cut) == digest_range(values)


@pytest.mark.parametrize("dtype", DTYPES)
@given(indices=st.sets(st.integers(0, 49), min_size=1), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_update_moves_the_digest_by_what_it_touched(dtype: torch.dtype, indices: set[int], seed: int) -> None:
    old, other = random_values(dtype, 50, seed), random_values(dtype, 50, seed + 1)
    where = torch.tensor(sorted(indices))
    new = old.clone()
    new.view(torch.uint8).reshape(50, -1)[where] = other.view(torch.uint8).reshape(50, -1)[where]
    shift = digest_at(where, new[where]) - digest_at(where, old[where])
    assert digest_range(old) + shift == digest_range(new)


def test_order_and_position_count() -> None:
    assert digest_range(torch.tensor([1.0, 2.0])) != digest_range(torch.tensor([2.0, 1.0]))
    assert digest_range(torch.tensor([1.0]), 0) != digest_range(torch.tensor([1.0]), 1)


@pytest.mark.parametrize(("left", "right"), [(0.0, -0.0), (1e-45, 0.0), (float("nan"), float("-nan"))])
def test_bits_count_not_values(left: float, right: float) -> None:
    nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    pair = torch.tensor([left]), (nan if right != right else torch.tensor([right]))
    assert digest_range(pair[0]) != digest_range(pair[1])


def test_every_flipped_bit_is_seen() -> None:
    values = random_values(torch.bfloat16, 8, 0)
    seen = {digest_range(values)}
    for index in range(8):
        for bit in range(16):
            flipped = values.clone()
            flipped.view(torch.int16)[index] ^= (1 << bit) if bit < 15 else -(1 << 15)
            seen.add(digest_range(flipped))
    assert len(seen) == 1 + 8 * 16


def test_large_indices_do_not_wrap() -> None:
    one = torch.ones(1, dtype=torch.int8)
    assert digest_range(one, 2**40) == PartDigest(*reference(2**40, 1))


@given(low=st.integers(0, MASK), high=st.integers(0, MASK))
def test_hex_round_trip(low: int, high: int) -> None:
    digest = PartDigest(low, high)
    assert PartDigest.from_hex(digest.hex()) == digest
    assert digest - digest == PartDigest()


def combine(parts: dict[PartSpec, PartDigest]) -> str:
    return Combiner(parts).combine({part.name: value for part, value in parts.items()})


def test_combined_digest_covers_names_shapes_and_types_in_any_order() -> None:
    base = {PartSpec("a", "int8", (2, 3)): PartDigest(1, 2), PartSpec("b", "bf16", (4,)): PartDigest(3, 4)}
    assert combine(dict(reversed(base.items()))) == combine(base)
    others = [
        {PartSpec("a", "int8", (3, 2)): PartDigest(1, 2), PartSpec("b", "bf16", (4,)): PartDigest(3, 4)},
        {PartSpec("a", "fp8", (2, 3)): PartDigest(1, 2), PartSpec("b", "bf16", (4,)): PartDigest(3, 4)},
        {PartSpec("c", "int8", (2, 3)): PartDigest(1, 2), PartSpec("b", "bf16", (4,)): PartDigest(3, 4)},
        {PartSpec("a", "int8", (2, 3)): PartDigest(2, 1), PartSpec("b", "bf16", (4,)): PartDigest(3, 4)},
        {PartSpec("a", "int8", (2, 3)): PartDigest(1, 2)},
    ]
    assert len({combine(base), *map(combine, others)}) == 6


def test_blocks_do_not_change_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    values = random_values(torch.bfloat16, 100, 3)
    whole = digest_range(values)
    monkeypatch.setattr("flashrl_wire.digest._BLOCK_ELEMENTS", {"cpu": 7})
    assert digest_range(values) == digest_at(torch.arange(100), values) == whole
