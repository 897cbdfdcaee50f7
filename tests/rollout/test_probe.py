"""Probing loaders written like vLLM's: fused rows, column slices, padding, ties, and what must be refused."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from flashrl_rollout.probe import Landing, probe
from flashrl_rollout.runtime_map import Axis

Weights = Iterable[tuple[str, Tensor]]


def _axes(landing: Landing) -> tuple[int, int, tuple[Axis, ...]]:
    return landing.region.part_offset, landing.region.memory_offset, landing.region.axes


def test_fused_rows_and_column_slices_and_padding() -> None:
    fused = torch.full((5, 4), 7, dtype=torch.int8)
    columns = torch.full((3, 2), 7.0, dtype=torch.bfloat16)
    padded = torch.full((8, 4), 7.0, dtype=torch.bfloat16)

    def load(weights: Weights) -> None:
        for name, weight in weights:
            if name == "q":
                fused.data.narrow(0, 0, 3).copy_(weight)
            elif name == "k":
                fused.data.narrow(0, 3, 2).copy_(weight)
            elif name == "down":
                columns.copy_(weight.narrow(1, 2, 2))
            elif name == "embed":
                padded[:6].data.copy_(weight)
                padded[6:].data.fill_(0)

    shapes = {"q": (3, 4), "k": (2, 4), "down": (3, 4), "embed": (6, 4), "inv_freq": (9,)}
    found = {landing.name: landing for landing in probe(load, shapes, [fused, columns, padded])}
    assert _axes(found["q"]) == (0, 0, (Axis(12, 1, 1),))
    assert _axes(found["k"]) == (0, 12, (Axis(8, 1, 1),))
    assert _axes(found["down"]) == (2, 0, (Axis(3, 4, 2), Axis(2, 1, 1)))
    assert _axes(found["embed"]) == (0, 0, (Axis(24, 1, 1),))
    assert "inv_freq" not in found
    assert found["k"].tensor is fused
    assert (fused == 7).all()
    assert (columns == 7).all()
    assert (padded == 7).all()  # nothing was written, not even the padding


def test_a_transposed_copy_keeps_its_geometry() -> None:
    runtime = torch.zeros(4, 3)
    (landing,) = probe(lambda weights: [runtime.copy_(w.t()) for _, w in weights], {"conv": (3, 4)}, [runtime])
    assert _axes(landing) == (0, 0, (Axis(3, 4, 1), Axis(4, 1, 3)))


@pytest.mark.parametrize(
    "transform",
    [lambda w: w.float(), lambda w: -w, lambda w: w.repeat(2, 1)[:3], lambda w: w[:1]],
    ids=["cast", "negated", "repeated", "broadcast"],
)
def test_transformed_weights_are_refused_by_name(transform: object) -> None:
    runtime = torch.zeros(3, 4)

    def load(weights: Weights) -> None:
        for _, weight in weights:
            runtime.copy_(transform(weight))  # type: ignore[operator]

    with pytest.raises(ValueError, match=r"model: layer\.A_log cannot be updated in place"):
        probe(load, {"layer.A_log": (3, 4)}, [runtime])


def test_arithmetic_on_the_engines_tensor_is_refused() -> None:
    runtime = torch.zeros(3)

    def load(weights: Weights) -> None:
        for _, weight in weights:
            runtime.copy_(weight)
            runtime.add_(1)

    with pytest.raises(ValueError, match=r"model: norm cannot be updated in place: .*add_"):
        probe(load, {"norm": (3,)}, [runtime])
    assert (runtime == 0).all()


def test_a_loader_that_looks_at_values_is_refused() -> None:
    def load(weights: Weights) -> None:
        for _, weight in weights:
            weight.max().item()

    with pytest.raises(ValueError, match="model: scale cannot be updated in place"):
        probe(load, {"scale": (3,)}, [torch.zeros(3)])
