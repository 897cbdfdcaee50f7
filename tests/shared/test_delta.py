"""Diffs of stored states: bit for bit, whatever the values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashrl_wire import delta
from flashrl_wire.delta import Change
from flashrl_wire.digest import digest_range

DTYPES = [torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float32]
AWKWARD = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, 1.0]


def of_bits(words: list[int], dtype: torch.dtype) -> Tensor:
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.tensor([b for word in words for b in word.to_bytes(4, "little")[:size]], dtype=torch.uint8).view(dtype)


WORDS = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.booleans()), max_size=30)


@pytest.mark.parametrize("dtype", DTYPES)
@given(words=WORDS, start=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_diff_written_to_the_old_state_gives_the_new(
    dtype: torch.dtype, words: list[tuple[int, int, bool]], start: int
) -> None:
    old = of_bits([left for left, _, _ in words], dtype)
    new = of_bits([right if changed else left for left, right, changed in words], dtype)
    found = delta.diff("p", old, new, start)
    if found is None:
        assert delta.equal_bits(old, new)
        return
    change, shift = found
    part = torch.zeros(start + len(words), dtype=torch.uint8).to(dtype)
    target = part[start:]
    target.view(torch.uint8)[:] = old.view(torch.uint8)
    before = digest_range(part)
    kept = delta.read(change, part)
    delta.write(change, part)
    assert delta.equal_bits(part[start:], new)
    assert before + shift == digest_range(part)
    rows = [values.view(torch.uint8).reshape(len(words), -1) for values in (old, new)]
    assert change.changed == int((rows[0] != rows[1]).any(dim=1).sum())
    delta.write(change, part)  # absolute values: twice is once
    assert delta.equal_bits(part[start:], new)
    delta.write(change, part, kept)
    assert delta.equal_bits(part[start:], old)


def test_equal_states_have_no_diff() -> None:
    values = torch.tensor(AWKWARD, dtype=torch.bfloat16)
    assert delta.diff("p", values, values.clone()) is None


def test_sign_of_zero_and_nan_bits_are_changes() -> None:
    old = torch.tensor([0.0, 1.0, 1.0, 1.0])
    new = torch.tensor([-0.0, 1.0, 1.0, float("nan")])
    found = delta.diff("p", old, new, start=10)
    assert found is not None
    assert found[0].indices is not None
    assert found[0].indices.tolist() == [10, 13]


@pytest.mark.parametrize(
    ("dtype", "count", "is_dense"), [(torch.int8, 33, False), (torch.int8, 34, True), (torch.bfloat16, 49, False),
                                     (torch.bfloat16, 50, True), (torch.float32, 66, False), (torch.float32, 67, True)]
)  # fmt: skip
def test_dense_where_indices_would_cost_more(dtype: torch.dtype, count: int, is_dense: bool) -> None:
    old = torch.zeros(100).to(dtype)
    new = old.clone()
    new[:count] = 1
    found = delta.diff("p", old, new)
    assert found is not None
    assert (found[0].is_dense, found[0].changed) == (is_dense, count)


def test_snapshot_is_the_flat_shard() -> None:
    change = delta.snapshot("p", torch.arange(6.0).reshape(2, 3), start=4)
    assert (change.values.tolist(), change.start, change.changed) == ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 4, 6)


def test_digest_of_a_change_is_that_of_its_elements() -> None:
    values = torch.tensor([3.0, 4.0])
    assert Change("p", values, start=7).digest() == Change("p", values, torch.tensor([7, 8])).digest()
    assert Change("p", values, start=7).digest() == digest_range(values, 7)
