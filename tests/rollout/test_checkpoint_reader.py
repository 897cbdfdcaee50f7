"""Folders of safetensors files, single and sharded, whole and broken."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashrl_rollout.checkpoint_reader import Checkpoint

TENSORS = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0], dtype=torch.bfloat16)}


def _sharded(folder: Path, weight_map: dict[str, str]) -> None:
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _check(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert checkpoint.shapes == {"a": (1, 2), "b": (1,)}
    read = dict(checkpoint.tensors(["b", "a"]))
    assert {name: tensor.dtype for name, tensor in read.items()} == {"a": torch.bfloat16, "b": torch.bfloat16}
    assert read["a"].tolist() == [[1.0, 2.0]]
    assert read["b"].tolist() == [3.0]


def test_a_single_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    _check(tmp_path)


def test_shards(tmp_path: Path) -> None:
    _sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    _check(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "gone.safetensors"])
def test_an_index_cannot_point_elsewhere(tmp_path: Path, file: str) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    folder = tmp_path / "inner"
    folder.mkdir()
    _sharded(folder, {"a": "one.safetensors", "b": file})
    with pytest.raises(ValueError, match=r"checkpoint: the index of .* names"):
        Checkpoint(folder)


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    _sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    with pytest.raises(ValueError, match="checkpoint: c is in the index"):
        Checkpoint(tmp_path)


def test_no_safetensors_and_damaged_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint: .* has neither model\.safetensors nor"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="checkpoint: "):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="checkpoint: "):
        Checkpoint(tmp_path)
