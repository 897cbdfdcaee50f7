"""What 8 bits cost and gain, kind by kind of layer: KL against bf16, speed, and the choice that follows.

Runs the service's own kernels inside the Hugging Face model. Knows nothing of files, tables or flags.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from flashrl_rollout.measure.choice import Choice, KindCost, choose
from flashrl_rollout.measure.kernel_times import LayerTime, layer_times
from flashrl_rollout.measure.layer_kinds import LayerKind
from flashrl_rollout.measure.rows_linear import ExchangeableModel, MakeKernel
from flashrl_rollout.measure.token_scores import Mismatch, ScoredText, mismatch, token_logprobs
from flashrl_wire.messages import Quantization
from flashrl_wire.quantize import RowStorage

ROW_COUNTS = (1, 64, 256, 1024)
DECODE_ROWS = (64, 256)
"""Sequences that are decoded at once while a trainer's prompts are sampled: what a kind's speed is judged by."""

STORAGE: dict[Quantization, RowStorage] = {"int8": "int8_rows", "fp8": "fp8_rows"}
_TIMED_LAYERS = {"cpu": 2, "cuda": 8}


@dataclass(frozen=True)
class KindReport:
    """One kind of layer in 8 bits, all others in bf16; no times where speed was not asked for."""

    kind: str
    num_layers: int
    rows: int
    columns: int
    saved_bytes: int
    mismatch: Mismatch
    times: tuple[LayerTime, ...]

    @property
    def speedup(self) -> float | None:
        """bf16 time / 8-bit time, summed over `DECODE_ROWS`."""
        decode = [time for time in self.times if time.rows in DECODE_ROWS]
        quantized_us = sum(time.quantized_us for time in decode)
        return sum(time.bf16_us for time in decode) / quantized_us if quantized_us else None


@dataclass(frozen=True)
class PrecisionReport:
    """One precision: each kind alone, all kinds together, and the choice with what it costs."""

    quantization: Quantization
    kinds: tuple[KindReport, ...]
    all_kinds: Mismatch
    choice: Choice
    chosen: Mismatch


class Measurer:
    """A loaded bf16 model, its kinds of layers, and tokens that were sampled from it."""

    def __init__(self, model: nn.Module, kinds: Sequence[LayerKind], texts: Sequence[ScoredText]) -> None:
        self._model, self._kinds, self._texts = model, list(kinds), texts
        self._reference = token_logprobs(model, texts)

    def report(
        self,
        quantization: Quantization,
        make_kernel: MakeKernel,
        limit_kl: float,
        *,
        has_times: bool,
        tell: Callable[[str], None],
    ) -> PrecisionReport:
        """Measure one precision and choose; `tell` is called with each piece that is begun."""
        storage = STORAGE[quantization]
        modules = [module for kind in self._kinds for module in kind.modules]
        exchangeable = ExchangeableModel(self._model, modules, storage, make_kernel)
        found: dict[frozenset[str], Mismatch] = {frozenset(): Mismatch(0.0, 0.0)}

        def measured(names: frozenset[str]) -> Mismatch:
            if names not in found:
                tell(f"{quantization}: {', '.join(sorted(names))}")
                found[names] = mismatch(self._reference, self._scores(exchangeable, names))
            return found[names]

        kinds = tuple(
            self._kind(kind, measured(frozenset([kind.name])), storage, make_kernel if has_times else None)
            for kind in self._kinds
        )
        costs = [KindCost(kind.kind, kind.mismatch.k3_kl, kind.saved_bytes, kind.speedup) for kind in kinds]
        choice = choose(costs, lambda names: measured(names).k3_kl, limit_kl)
        everything = measured(frozenset(kind.name for kind in self._kinds))
        return PrecisionReport(quantization, kinds, everything, choice, measured(frozenset(choice.quantized)))

    def _scores(self, exchangeable: ExchangeableModel, names: frozenset[str]) -> Tensor:
        modules = [module for kind in self._kinds if kind.name in names for module in kind.modules]
        with exchangeable.quantized(modules):
            return token_logprobs(self._model, self._texts)

    def _kind(
        self, kind: LayerKind, found: Mismatch, storage: RowStorage, make_kernel: MakeKernel | None
    ) -> KindReport:
        times: list[LayerTime] = []
        if make_kernel is not None:
            times = layer_times(self._timed_layers(kind), storage, make_kernel, ROW_COUNTS)
        first = kind.layers[0]
        return KindReport(kind.name, len(kind.layers), first.rows, first.columns, kind.saved_bytes, found, tuple(times))

    def _timed_layers(self, kind: LayerKind) -> list[list[nn.Linear]]:
        """Some layers of the kind's first shape."""
        shape = (kind.layers[0].rows, kind.layers[0].columns)
        alike = [layer for layer in kind.layers if (layer.rows, layer.columns) == shape]
        device = next(self._model.parameters()).device.type
        some = alike[: _TIMED_LAYERS[device]]
        return [[cast(nn.Linear, self._model.get_submodule(part)) for part in layer.parts] for layer in some]


def summary(report: PrecisionReport) -> dict[str, Any]:
    """The report as plain values."""
    return {
        "quantization": report.quantization,
        "all_kinds": vars(report.all_kinds),
        "chosen": vars(report.chosen) | {"quantized": list(report.choice.quantized), "kept": report.choice.kept},
        "kinds": [
            vars(kind)
            | {"mismatch": vars(kind.mismatch), "times": [vars(time) for time in kind.times], "speedup": kind.speedup}
            for kind in report.kinds
        ],
    }
