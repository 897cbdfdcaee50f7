"""Second copies of a tied embedding: passed over where they are copies, refused where they are not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashrl_rollout.checkpoint_reader import Checkpoint
from flashrl_rollout.head_copies import head_copies

EMBEDDING = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
HELD = {"embed.weight": (3, 2), "proj.weight": (2, 2)}


def checkpoint(folder: Path, **extra: torch.Tensor) -> Checkpoint:
    tensors = {"embed.weight": EMBEDDING, "proj.weight": torch.ones(2, 2)} | extra
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder)


def test_a_copy_is_one_also_in_another_type(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, head=EMBEDDING.bfloat16())
    assert head_copies(found, HELD, {3}) == {"head"}
    assert head_copies(found, HELD, {2}) == set()
    assert head_copies(found, HELD | {"head": (3, 2)}, {3}) == set()  # a head of the model's own


def test_what_differs_in_one_element_is_refused_by_name(tmp_path: Path) -> None:
    other = EMBEDDING.clone()
    other[2, 1] = 7.0
    with pytest.raises(ValueError, match=r"^checkpoint: head differs from embed\.weight, but .*\(tied"):
        head_copies(checkpoint(tmp_path, head=other), HELD, {3})


def test_other_tensors_are_none_of_its_business(tmp_path: Path) -> None:
    extra = {"bias": torch.ones(3), "wide": torch.ones(3, 4), "square": torch.zeros(2, 2)}
    assert head_copies(checkpoint(tmp_path, **extra), HELD, {3}) == set()
