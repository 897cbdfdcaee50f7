"""A trainer's full-precision weights that move at random, and the stored form that follows from them.

Knows checkpoints and quantization; knows nothing of services or of how an update is sent.
"""

from pathlib import Path

import torch
from tests.helpers.real_engine import save_like
from torch import Tensor

from flashrl_rollout import stored_state
from flashrl_rollout.checkpoint_reader import Checkpoint
from flashrl_rollout.stored_state import Parts
from flashrl_wire.layout import WeightLayout

_NOISE = 0.1  # of a tensor's spread: enough to change codes, too little to lose the scale of the model


class WeightWalk:
    """bf16 tensors under their checkpoint names; every element stays near where the checkpoint had it."""

    def __init__(self, folder: Path, layout: WeightLayout, seed: int) -> None:
        self._folder, self._layout = folder, layout
        self._first = dict(Checkpoint(folder).tensors([spec.name for spec in layout.tensors]))
        self._now = {name: values.clone() for name, values in self._first.items()}
        self._spread = {name: float(values.float().std()) + 0.01 for name, values in self._first.items()}
        self._generator = torch.Generator().manual_seed(seed)
        self._stored: Parts = {}
        for spec in layout.tensors:
            self._stored |= stored_state.store(spec, self._now[spec.name])

    def step(self, share: float) -> Parts:
        """Give about `share` of all elements another value near their first one; the new stored form."""
        for spec in self._layout.tensors:
            count = self._count(share, self._first[spec.name].numel())
            if count:
                self._now[spec.name] = self._moved(spec.name, count, share)
                self._stored |= stored_state.store(spec, self._now[spec.name])
        return self.stored()

    def _count(self, share: float, numel: int) -> int:
        """`share` of `numel`, up or down at random, so that small tensors change now and then."""
        return min(numel, int(share * numel + float(torch.rand(1, generator=self._generator))))

    def _moved(self, name: str, count: int, share: float) -> Tensor:
        first = self._first[name].reshape(-1)
        where = torch.randint(first.numel(), (count,), generator=self._generator)
        if share == 1.0:
            where = torch.arange(first.numel())
        noise = torch.randn(where.numel(), generator=self._generator) * _NOISE * self._spread[name]
        moved = self._now[name].clone()  # the stored form of before may be this very tensor
        moved.view(-1)[where] = (first[where].float() + noise).bfloat16()
        return moved

    def stored(self) -> Parts:
        """Codes and scales of the weights as they are now."""
        return dict(self._stored)

    def export(self, folder: Path) -> Path:
        """The weights as they are now, as a checkpoint."""
        return save_like(self._folder, folder, self._now)
