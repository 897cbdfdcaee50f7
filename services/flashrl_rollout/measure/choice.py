"""Which kinds of layers stay bf16: those that 8 bits slow down, then those that cost most accuracy for what they save.

Numbers in, names out; knows nothing of models, kernels or files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

KlOf = Callable[[frozenset[str]], float]
"""k3 KL against bf16 with exactly these kinds quantized."""


@dataclass(frozen=True)
class KindCost:
    """One kind: its own k3 KL, the bytes that 8 bits save, and bf16 time / 8-bit time (None: not measured)."""

    name: str
    k3_kl: float
    saved_bytes: int
    speedup: float | None = None


@dataclass(frozen=True)
class Choice:
    """What is quantized, what stays bf16 and why, and the KL of that."""

    quantized: tuple[str, ...]
    kept: dict[str, str]
    k3_kl: float


def choose(kinds: Sequence[KindCost], kl_of: KlOf, limit_kl: float) -> Choice:
    """Keep what is slower, then the largest KL per saved byte first while what is left is above the limit."""
    kept = {
        kind.name: f"{kind.speedup:.2f}x as fast" for kind in kinds if kind.speedup is not None and kind.speedup < 1
    }
    left = [kind for kind in kinds if kind.name not in kept]
    kl = _kl(left, kl_of)
    while left and kl > limit_kl:
        worst = max(left, key=lambda kind: kind.k3_kl / kind.saved_bytes)
        left.remove(worst)
        kept[worst.name] = f"KL {kl:.2g} with it is above {limit_kl:g}"
        kl = _kl(left, kl_of)
    return Choice(tuple(kind.name for kind in left), kept, kl)


def _kl(kinds: Sequence[KindCost], kl_of: KlOf) -> float:
    return kl_of(frozenset(kind.name for kind in kinds)) if kinds else 0.0
