"""From two stored states over the wire's bytes and back, for every dtype, shape, density and split over ranks."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashrl_wire import codec, delta
from flashrl_wire.codec import PART_DTYPE, TORCH_DTYPE
from flashrl_wire.delta import Change
from flashrl_wire.digest import PartDigest, bits, digest_range
from flashrl_wire.layout import PartSpec

SHAPES = st.one_of(
    st.tuples(st.integers(1, 5000)),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.tuples(st.integers(1, 300), st.just(1)),
    st.tuples(st.just(1), st.integers(1, 300)),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    st.just((90_000, 2)),  # gaps beyond 16 bits fit in
)
SHARES = st.one_of(st.sampled_from([0.0, 1e-5, 1e-3, 1.0]), st.floats(0, 1))


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Every bit pattern there is: NaNs, infinities, -0.0 and subnormals among them."""
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def changed(old: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Other bits in a share of the elements."""
    new = old.clone()
    flat = bits(new)
    hit = torch.rand(flat.shape, generator=generator) < share
    flat[hit] = flat[hit] ^ 1
    return new


def over_the_wire(changes: list[Change], part: PartSpec, block_bytes: int) -> list[Change]:
    """Encoded, compressed, unpacked and decoded."""
    encoded = codec.encode(changes, block_bytes)
    codec.check_segments(encoded.segments, {part.name: part})
    blocks = itertools.starmap(codec.decompress, zip(encoded.chunks, encoded.payloads, strict=True))
    raw = np.frombuffer(b"".join(blocks), dtype=np.uint8)
    return list(codec.decode(encoded.segments, raw, {part.name: part}))


@pytest.mark.parametrize("dtype", list(TORCH_DTYPE.values()), ids=str)
@given(
    shape=SHAPES,
    share=SHARES,
    seed=st.integers(0, 2**31),
    cuts=st.lists(st.floats(0, 1), max_size=3),
    block_bytes=st.sampled_from([97, 4096, 1 << 20]),
    whole=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_what_arrives_is_what_was_sent(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    share: float,
    seed: int,
    cuts: list[float],
    block_bytes: int,
    whole: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    old = random_bits(shape, dtype, generator)
    new = changed(old, share, generator)
    part = PartSpec("p", PART_DTYPE[dtype], shape)
    edges = [0, *sorted(int(cut * part.numel) for cut in cuts), part.numel]  # equal ones: a rank without elements
    changes, shift = [], PartDigest()
    for start, end in itertools.pairwise(edges):
        shard_old, shard_new = old.reshape(-1)[start:end], new.reshape(-1)[start:end]
        if whole:
            changes.append(delta.snapshot("p", shard_new, start))
        elif (found := delta.diff("p", shard_old, shard_new, start)) is not None:
            changes.append(found[0])
            shift = shift + found[1]
    held = old.clone()
    for change in over_the_wire(changes, part, max(block_bytes, part.num_bytes // 1000)):
        delta.write(change, held.view(-1))
    assert delta.equal_bits(held, new)
    different = int((bits(old) != bits(new)).sum())
    assert sum(change.changed for change in changes) == (part.numel if whole else different)
    if not whole:
        assert digest_range(old) + shift == digest_range(new)
        assert bool(changes) == bool(different)
