"""Cutting and joining changes, with the groups worked by hand."""

import torch

from flashrl_rollout.ready_group import groups, moved
from flashrl_wire.delta import Change

CPU = torch.device("cpu")


def _shape(change: Change) -> tuple[str, int, int, list[int] | None]:
    indices = None if change.indices is None else change.indices.tolist()
    return change.part, change.start, change.values.numel(), indices


def test_changes_are_joined_and_cut_at_the_limit() -> None:
    changes = [
        Change("a", torch.zeros(2)),
        Change("b", torch.zeros(2), indices=torch.tensor([3, 9])),
        Change("c", torch.zeros(5), start=10),
        Change("d", torch.zeros(0)),
        Change("e", torch.zeros(5), indices=torch.arange(5)),
    ]
    assert [[_shape(change) for change in group] for group in groups(changes, 4)] == [
        [("a", 0, 2, None), ("b", 0, 2, [3, 9])],
        [("c", 10, 4, None)],
        [("c", 14, 1, None)],
        [("e", 0, 4, [0, 1, 2, 3])],
        [("e", 4, 1, [4])],
    ]


def test_a_part_stands_once_in_a_group() -> None:
    changes = [Change("a", torch.zeros(1)), Change("b", torch.zeros(1)), Change("a", torch.ones(1))]
    assert [[change.part for change in group] for group in groups(changes, 100)] == [["a", "b"], ["a"]]


def test_moving_keeps_bits_and_order() -> None:
    changes = [
        Change("a", torch.tensor([1.5, -0.0]).bfloat16(), indices=torch.tensor([4, 6])),
        Change("b", torch.tensor([-1, 5], dtype=torch.int8), start=3),
        Change("c", torch.tensor([2.0]), indices=torch.tensor([8])),
        Change("d", torch.tensor([0.5]).to(torch.float8_e4m3fn), indices=torch.tensor([1])),
    ]
    found = list(moved(changes, CPU))
    assert [_shape(change) for change in found] == [_shape(change) for change in changes]
    assert [change.values.tolist() for change in found] == [[0x3FC0, -0x8000], [255, 5], [0x40000000], [0x30]]
