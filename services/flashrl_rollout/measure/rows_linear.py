"""Linear layers of a Hugging Face model run by the service's own 8-bit kernels, exchanged and put back.

Knows modules and the stored form; knows nothing of which layers are worth it, nor of devices: kernels are given.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from flashrl_wire.quantize import RowStorage, quantize_rows

if TYPE_CHECKING:  # importing it loads vLLM
    from flashrl_rollout.kernels import Kernel

MakeKernel = Callable[[], "Kernel"]


class RowsLinear(nn.Module):
    """A linear layer over codes and scales: x [..., K] bf16 -> [..., N] bf16, activations quantized by the kernel."""

    codes: Tensor  # [N, K]
    scales: Tensor  # [N, 1] fp32

    def __init__(self, linear: nn.Linear, storage: RowStorage, kernel: "Kernel") -> None:
        super().__init__()
        codes, scales = quantize_rows(linear.weight.detach(), storage)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.bias = linear.bias
        self._kernel = kernel
        kernel.refresh(codes, scales)

    def forward(self, x: Tensor) -> Tensor:
        """One matrix product of the service."""
        rows = x.reshape(-1, x.shape[-1])
        return self._kernel(rows, self.codes, self.scales, self.bias).view(*x.shape[:-1], -1)


class ExchangeableModel:
    """A model and 8-bit versions of some of its linear layers, made once and put in as often as needed."""

    def __init__(self, model: nn.Module, modules: Iterable[str], storage: RowStorage, make_kernel: MakeKernel) -> None:
        """Raises ValueError, naming the module, for a weight that is NaN or Inf."""
        self._model = model
        self._originals = {name: model.get_submodule(name) for name in modules}
        self._exchanged: dict[str, RowsLinear] = {}
        for name, linear in self._originals.items():
            assert isinstance(linear, nn.Linear)
            try:
                self._exchanged[name] = RowsLinear(linear, storage, make_kernel())
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    @contextmanager
    def quantized(self, modules: Iterable[str]) -> Iterator[None]:
        """The model with these modules in 8 bits, until the block ends."""
        names = list(modules)
        try:
            for name in names:
                self._model.set_submodule(name, self._exchanged[name])
            yield
        finally:
            for name in names:
                self._model.set_submodule(name, self._originals[name])
