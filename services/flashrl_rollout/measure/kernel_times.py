"""How long a kind of layer takes in bf16 and in 8 bits, activation quantization included, on the device at hand.

On CUDA under graphs, as the engine runs it. Knows matrices and clocks; knows nothing of names or of accuracy.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from flashrl_rollout.measure.rows_linear import MakeKernel, RowsLinear
from flashrl_wire.quantize import RowStorage

_SECONDS = {"cpu": 0.2, "cuda": 0.1}
_LEAST_REPEATS, _MOST_REPEATS = 5, 200

Run = Callable[[], None]


@dataclass(frozen=True)
class LayerTime:
    """Median microseconds of one layer at `rows` rows of activations."""

    rows: int
    bf16_us: float
    quantized_us: float


def layer_times(
    layers: Sequence[Sequence[nn.Linear]], storage: RowStorage, make_kernel: MakeKernel, row_counts: Sequence[int]
) -> list[LayerTime]:
    """Times a layer at each row count; `layers` are several of one kind, each given as the parts that are fused.

    They run one after the other, as in a model, so that no weight is still in a cache when it is needed again.
    """
    plain = [_fused(parts) for parts in layers]
    quantized = [RowsLinear(layer, storage, make_kernel()) for layer in plain]
    weight = plain[0].weight
    found = []
    with torch.inference_mode():
        for rows in row_counts:
            x = torch.randn(rows, weight.shape[1], device=weight.device).to(torch.bfloat16)
            bf16, eight = _medians([_run(plain, x), _run(quantized, x)], weight.device.type)
            found.append(LayerTime(rows, bf16 / len(plain) * 1e6, eight / len(plain) * 1e6))
    return found


def _fused(parts: Sequence[nn.Linear]) -> nn.Linear:
    """One layer that computes the parts' outputs at once."""
    if len(parts) == 1:
        return parts[0]
    biases = [part.bias for part in parts]
    weight = torch.cat([part.weight.detach() for part in parts])
    fused = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    fused.weight = nn.Parameter(weight, requires_grad=False)
    if all(bias is not None for bias in biases):
        fused.bias = nn.Parameter(torch.cat([bias.detach() for bias in biases]), requires_grad=False)
    return fused


def _run(layers: Sequence[nn.Module], x: Tensor) -> Run:
    def run() -> None:
        for layer in layers:
            if isinstance(layer, nn.Linear):
                functional.linear(x, layer.weight, layer.bias)
            else:
                layer(x)

    return _captured(run) if x.is_cuda else run


def _captured(run: Run) -> Run:
    """The same as one CUDA graph: without it, launching small kernels would be what is timed."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _medians(runs: Sequence[Run], device: str) -> list[float]:
    """Median seconds of each, taken in turns, so that what disturbs one disturbs all."""
    samples: list[list[float]] = [[] for _ in runs]
    for run in runs:
        _timed(run, device)  # first uses allocate and tune
    began = time.perf_counter()
    while len(samples[0]) < _LEAST_REPEATS or (
        len(samples[0]) < _MOST_REPEATS and time.perf_counter() - began < _SECONDS[device]
    ):
        for run, taken in zip(runs, samples, strict=True):
            taken.append(_timed(run, device))
    return [statistics.median(taken) for taken in samples]


def _timed(run: Run, device: str) -> float:
    if device != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000
