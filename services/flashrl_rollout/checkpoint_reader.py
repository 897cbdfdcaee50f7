"""Names, shapes and tensors of a Hugging Face folder of safetensors files, single or sharded.

Knows the folder's layout; knows nothing of engines or quantization.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a folder, by name; only headers are read until a tensor is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where the folder holds no readable safetensors checkpoint."""
        self._files = _files(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self._files.values())):
            with _opened(file) as opened:
                self.shapes.update({name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()})  # noqa: SIM118
        missing = sorted(self._files.keys() - self.shapes.keys())
        if missing:
            raise ValueError(f"checkpoint: {missing[0]} is in the index of {folder} but in no file")

    def tensors(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors as bf16 on the CPU, one file opened after the other."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        for file, held in by_file.items():
            with _opened(file) as opened:
                for name in held:
                    yield name, opened.get_tensor(name).to(torch.bfloat16)


def _files(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    if (folder / _INDEX).is_file():
        files = _index(folder / _INDEX)
    elif (folder / _SINGLE).is_file():
        with _opened(folder / _SINGLE) as opened:
            files = dict.fromkeys(opened.keys(), _SINGLE)
    else:
        raise ValueError(f"checkpoint: {folder} has neither {_SINGLE} nor {_INDEX}")
    for file in set(files.values()):
        if Path(file).name != file or not (folder / file).is_file():
            raise ValueError(f"checkpoint: the index of {folder} names {file!r}, which is no file in it")
    return {name: folder / file for name, file in files.items()}


def _index(file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(file.read_text())["weight_map"]
        return {str(name): str(held) for name, held in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint: {file} is no index of tensors") from error


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {file}: {error}") from error
