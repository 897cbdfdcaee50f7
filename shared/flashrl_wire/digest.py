"""A digest of the stored form that shards add up and that an update changes only by what it touched.

Element i with bit pattern b contributes a 128-bit hash of (i, b), and a part's digest is the sum of the
contributions modulo 2^64 in two lanes. So ranks reduce their shards with one sum, a delta is accounted for from
the old and new values of the touched elements alone, and a device computes it where the weights lie. It detects
errors; it is no cryptographic signature. Knows nothing of layouts on a device or of sockets.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from flashrl_wire.layout import PartSpec

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
# CPU: fits the second-level cache, and is too small for torch to split over threads, whose barriers took 40 times as
# long as the work on busy cores; CUDA: bounds scratch memory to 400 MiB
_BLOCK_ELEMENTS = {"cpu": 1 << 15, "cuda": 1 << 24}
_U64 = (1 << 64) - 1


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant


# splitmix64 (Steele, Lea, Flood 2014): its increment and two multipliers, and two more odd constants from xxh3
_GAMMA, _VALUE = _signed(0x9E3779B97F4A7C15), _signed(0x165667B19E3779F9)
_MIX1, _MIX2, _LANE = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB), _signed(0x9FB21C651E98DF25)


@dataclass(frozen=True)
class PartDigest:
    """The two lanes of a part's digest, each modulo 2^64."""

    low: int = 0
    high: int = 0

    def __add__(self, other: "PartDigest") -> "PartDigest":
        return PartDigest((self.low + other.low) & _U64, (self.high + other.high) & _U64)

    def __sub__(self, other: "PartDigest") -> "PartDigest":
        return PartDigest((self.low - other.low) & _U64, (self.high - other.high) & _U64)

    def hex(self) -> str:
        """32 hex digits, the high lane first."""
        return f"{self.high:016x}{self.low:016x}"

    @classmethod
    def from_hex(cls, text: str) -> "PartDigest":
        """The digest that `hex` wrote."""
        return cls(low=int(text[16:], 16), high=int(text[:16], 16))


def bits(values: Tensor) -> Tensor:
    """The bit patterns of a contiguous tensor, flat; -0.0 and 0.0 differ, and so do NaNs."""
    return values.reshape(-1).view(_BITS[values.element_size()])


def digest_range(values: Tensor, start: int = 0) -> PartDigest:
    """Digest of consecutive elements [start, start + n) of a part: any dtype of the stored form, any shape."""
    patterns, total = bits(values), PartDigest()
    size = _BLOCK_ELEMENTS.get(values.device.type, 1 << 20)
    for begin in range(0, patterns.numel(), size):
        block = patterns[begin : begin + size]
        first = start + begin
        indices = torch.arange(first, first + block.numel(), device=values.device)
        total = total + _sum(indices, block)
    return total


def digest_at(indices: Tensor, values: Tensor) -> PartDigest:
    """Digest of the elements at `indices` [n] int64 with `values` [n]."""
    patterns, total = bits(values), PartDigest()
    size = _BLOCK_ELEMENTS.get(values.device.type, 1 << 20)
    for begin in range(0, patterns.numel(), size):
        block = slice(begin, begin + size)
        total = total + _sum(indices[block].clone(), patterns[block])
    return total


def digest_segments(indices: Tensor, values: Tensor, lengths: Sequence[int]) -> list[PartDigest]:
    """`digest_at` of several runs of elements, laid end to end, `lengths[i]` > 0 each: a device is waited for once."""
    ends = torch.tensor(lengths, device=values.device).cumsum(0) - 1
    low = _low_lane(indices.clone(), bits(values))
    lanes = torch.stack((low, _high_lane(low.clone()))).cumsum(1)[:, ends].tolist()
    totals = [PartDigest(low & _U64, high & _U64) for low, high in zip(*lanes, strict=True)]
    return [after - before for before, after in itertools.pairwise([PartDigest(), *totals])]


def _sum(indices: Tensor, patterns: Tensor) -> PartDigest:
    """Consume `indices`; add up the hashes of (index, pattern)."""
    mixed = _low_lane(indices, patterns)
    low = int(mixed.sum()) & _U64
    return PartDigest(low, int(_high_lane(mixed).sum()) & _U64)


def _low_lane(indices: Tensor, patterns: Tensor) -> Tensor:
    """Consume `indices`; 64 bits of the hash of each (index, pattern)."""
    mask = (1 << (8 * patterns.element_size())) - 1
    values = patterns.long().bitwise_and_(mask).mul_(_VALUE)
    mixed = indices.mul_(_GAMMA).add_(values)
    mixed = _xorshift(mixed, 30).mul_(_MIX1)
    mixed = _xorshift(mixed, 27).mul_(_MIX2)
    return _xorshift(mixed, 31)


def _high_lane(low: Tensor) -> Tensor:
    """Consume the low lane; the other 64 bits."""
    return _xorshift(low, 29).mul_(_LANE)


def _xorshift(values: Tensor, shift: int) -> Tensor:
    # int64 shifts copy the sign; the mask makes the shift logical, without which x and ~x would collide
    return values.bitwise_xor_((values >> shift).bitwise_and_((1 << (64 - shift)) - 1))


class Combiner:
    """The digest of a whole stored form out of those of its parts.

    Made once for a form: the services put hundreds of digests together while sampling stands still.
    """

    def __init__(self, parts: Iterable[PartSpec]) -> None:
        ordered = sorted(parts, key=lambda part: part.name)
        self._heads = [(part.name, _head(part)) for part in ordered]

    def combine(self, digests: Mapping[str, PartDigest]) -> str:
        """xxh3_128 over (name, dtype, shape, digest) in name order, hex; KeyError for a part without a digest."""
        lines = [f"{head}{digests[name].hex()}\n" for name, head in self._heads]
        return xxhash.xxh3_128_hexdigest("".join(lines).encode())


def _head(part: PartSpec) -> str:
    shape = "x".join(map(str, part.shape))
    return f"{part.name}\0{part.dtype}\0{shape}\0"
