"""AdamW over sharded parameters, and the guard that keeps NaN out of them. Knows nothing of losses or batches."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from flashrl_trainer.distributed import Ranks
from flashrl_trainer.settings import OptimSettings


class SkippedStepsError(RuntimeError):
    """`optim.max_skipped_steps` updates in a row had no finite loss and gradient; the weights are those before them."""


class Optimizer:
    """AdamW with a clipped gradient; updates whose loss or gradient is not finite are left out and counted."""

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks, settings: OptimSettings) -> None:
        self._parameters, self._ranks, self._settings = list(parameters), ranks, settings
        self._skipped_in_a_row = 0
        self._reason = ""
        # fused is one pass over memory: on a CPU, too, several times as fast as a loop over operations
        betas = (settings.beta1, settings.beta2)
        self.adamw = AdamW(
            self._parameters, lr=settings.lr, betas=betas, weight_decay=settings.weight_decay, fused=True
        )

    def learning_rate(self, step: int) -> float:
        """Constant after a linear warm-up; `step` counts from 1."""
        return self._settings.lr * min(1.0, step / max(1, self._settings.warmup_steps))

    def begin(self, step: int) -> None:
        """Set the learning rate of a training step."""
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate(step)

    def update(self, loss: float) -> float | None:
        """Take a step with the gradients that are there; their norm, or None where the step was left out.

        `loss` is the global one. Gradients are gone afterwards. All ranks decide alike.
        """
        norm = clip_grad_norm_(self._parameters, self._settings.max_grad_norm)
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        is_finite = self._agree(math.isfinite(loss) and math.isfinite(value))
        if is_finite:
            self.adamw.step()
            self._skipped_in_a_row = 0
        else:
            self._skipped_in_a_row += 1
            self._reason = f"loss {loss:g}, gradient norm {value:g}"
        self.adamw.zero_grad()
        return value if is_finite else None

    def check(self) -> None:
        """SkippedStepsError once too many updates in a row were left out."""
        if self._skipped_in_a_row >= self._settings.max_skipped_steps:
            raise SkippedStepsError(
                f"optim.max_skipped_steps: {self._skipped_in_a_row} updates in a row were left out ({self._reason}); "
                "the weights are unharmed: look at the last samples, lower optim.lr, and go on with --resume"
            )

    def _agree(self, is_finite: bool) -> bool:
        # a rank that took a step which another left out would train another model from here on
        bad = torch.tensor(float(not is_finite), device=self._ranks.device)
        return not bool(self._ranks.max(bad))
