"""Finds where a model's own loader puts every checkpoint tensor, by loading probes that hold no data.

Needs no table of architectures: fused names, slices and padding are whatever `load_weights` does. Knows nothing of
vLLM beyond that method's signature.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashrl_rollout.runtime_map import Axis, Region

LoadWeights = Callable[[Iterable[tuple[str, Tensor]]], object]
_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)


@dataclass(frozen=True)
class Landing:
    """One copy that the loader made: a box of a checkpoint tensor into a box of `tensor`."""

    name: str
    tensor: Tensor
    region: Region


def probe(load_weights: LoadWeights, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[Tensor]) -> list[Landing]:
    """Every copy that loading tensors of these names and shapes into `tensors` would make; nothing is written.

    Raises ValueError, naming the checkpoint tensor, where the loader does anything but copy its elements.
    """
    probes = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    recorder = _Recorder(probes, tensors)

    def offered() -> Iterable[tuple[str, Tensor]]:
        for name, tensor in probes.items():
            recorder.current = name
            yield name, tensor

    try:
        with torch.no_grad(), recorder:
            load_weights(offered())
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"model: {recorder.current} cannot be updated in place: {error}") from error
    return recorder.landings


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes copies from probes into the watched tensors in place of making them."""

    def __init__(self, probes: Mapping[str, Tensor], tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = "the model"
        self.landings: list[Landing] = []
        self._names = {_storage(tensor): name for name, tensor in probes.items()}
        self._watched = {_storage(tensor): tensor for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        target = args[0] if args and isinstance(args[0], Tensor) else None
        if target is None or not func._schema.is_mutable or _storage(target) not in self._watched:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self._note(target, args[1])
        elif func not in _FILLS:  # a fill sets padding, which stays as it is
            raise ValueError(f"its loader does {func} to the engine's tensor")
        return target

    def _note(self, target: Tensor, source: Tensor) -> None:
        name = self._names.get(_storage(source))
        if name is None or source.shape != target.shape:
            raise ValueError("its loader transforms the values")
        axes = (Axis(*axis) for axis in zip(source.shape, source.stride(), target.stride(), strict=True))
        region = Region.of(int(source.storage_offset()), int(target.storage_offset()), axes)
        if region.numel and 0 not in source.shape:
            self.landings.append(Landing(name, self._watched[_storage(target)], region))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # meta tensors have no address, but their storages are objects
