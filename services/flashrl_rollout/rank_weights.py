"""One rank's model as stored parts: found by probing its loader, described, loaded from checkpoints.

Knows vLLM's layers by their quantization method only; knows nothing of workers' calls or of other ranks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from flashrl_rollout import addressed
from flashrl_rollout.checkpoint_reader import Checkpoint
from flashrl_rollout.head_copies import head_copies
from flashrl_rollout.linear_method import RowsLinearMethod
from flashrl_rollout.probe import Landing, probe
from flashrl_rollout.ready_group import Shifts
from flashrl_rollout.runtime_map import Held, RuntimePart, check_disjoint, patterns_of
from flashrl_rollout.runtime_weights import RuntimeWeights
from flashrl_wire.codec import PART_DTYPE
from flashrl_wire.delta import Change, snapshot
from flashrl_wire.layout import SCALE_SUFFIX, PartDtype, PartSpec, Storage, TensorSpec
from flashrl_wire.quantize import quantize_rows

_STORAGE: dict[PartDtype, Storage] = {"int8": "int8_rows", "fp8": "fp8_rows", "bf16": "bf16"}
_REFRESHED = (RowsLinearMethod, UnquantizedEmbeddingMethod, UnquantizedLinearMethod)


@dataclass(frozen=True)
class RankWeights:
    """The tensors of the stored form, the parts of them that this rank holds, and names the model has no use for."""

    tensors: tuple[TensorSpec, ...]
    parts: Mapping[str, RuntimePart]
    unused: frozenset[str]
    vocab_sizes: frozenset[int]
    weights: RuntimeWeights

    @classmethod
    def open(cls, model: Any, checkpoint: Checkpoint) -> "RankWeights":
        """Find all tensors of `checkpoint` in `model`; ValueError names one that cannot be updated or is not served."""
        watched = _memory(model)
        if watched[0].is_cuda:
            addressed.warm_up(watched[0].device)
        found = _by_name(probe(model.load_weights, checkpoint.shapes, watched))
        tensors = tuple(_spec(name, checkpoint.shapes[name], landings) for name, landings in found.items())
        scales = {spec.name + SCALE_SUFFIX: (spec.shape[0], 1) for spec in tensors if spec.storage != "bf16"}
        found.update(_by_name(probe(model.load_weights, scales, watched)))
        parts = {part.name: _part(part, found.get(part.name, [])) for spec in tensors for part in spec.parts()}
        check_disjoint(parts)
        unused = frozenset(checkpoint.shapes.keys() - found.keys())
        opened = cls(tensors, parts, unused, _vocab_sizes(model), RuntimeWeights(parts, _Refresh(model)))
        head_copies(checkpoint, opened.shapes, opened.vocab_sizes)  # one that differs would not be served
        return opened

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the stored form."""
        return {spec.name: spec.shape for spec in self.tensors}

    def describe(self) -> dict[str, Any]:
        """Tensors, and the number of elements in each region of each part, as plain values."""
        regions = {
            name: {held.region.key: held.region.numel for held in part.held} for name, part in self.parts.items()
        }
        return {"tensors": [spec.model_dump(mode="json") for spec in self.tensors], "regions": regions}

    def load(self, checkpoint: Checkpoint) -> Shifts:
        """Write a whole checkpoint; ValueError, with nothing changed, unless it holds exactly the model's tensors."""
        ours = self.shapes
        passed_over = self.unused | head_copies(checkpoint, ours, self.vocab_sizes)
        theirs = {name: shape for name, shape in checkpoint.shapes.items() if name not in passed_over}
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"checkpoint: {name} is {_shape(theirs.get(name))}, the model's {_shape(ours.get(name))}"
                )
        return self.weights.write(self._changes(checkpoint))

    def _changes(self, checkpoint: Checkpoint) -> Iterator[Change]:
        specs = {spec.name: spec for spec in self.tensors}
        for name, values in checkpoint.tensors(list(specs)):
            storage = specs[name].storage
            if storage == "bf16":
                yield snapshot(name, values)
                continue
            device = self.parts[name].held[0].memory.device
            codes, scales = _quantized(name, values.to(device), storage)
            yield snapshot(name, codes)
            yield snapshot(name + SCALE_SUFFIX, scales)


class _Refresh:
    """Calls the methods of the layers whose stored tensors were written."""

    def __init__(self, model: nn.Module) -> None:
        self._layers: dict[int, list[Any]] = {}
        for name, module in model.named_modules():
            parameters = list(module.parameters(recurse=False))
            method = getattr(module, "quant_method", None)
            if not parameters or not isinstance(method, QuantizeMethodBase):
                continue
            if not isinstance(method, _REFRESHED):
                raise ValueError(f"model: {name} is run by {type(method).__name__}, which cannot be updated in place")
            for parameter in parameters:
                self._layers.setdefault(parameter.untyped_storage().data_ptr(), []).append(module)

    def __call__(self, touched: set[int]) -> None:
        layers = {id(layer): layer for address in touched for layer in self._layers.get(address, [])}
        for layer in layers.values():
            layer.quant_method.process_weights_after_loading(layer)


def _memory(model: nn.Module) -> list[Tensor]:
    """Every tensor that a loader may write."""
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()]


def _vocab_sizes(model: nn.Module) -> frozenset[int]:
    """Rows of the embeddings and heads, without padding."""
    return frozenset(m.org_vocab_size for m in model.modules() if isinstance(m, VocabParallelEmbedding))


def _by_name(landings: list[Landing]) -> dict[str, list[Landing]]:
    found: dict[str, list[Landing]] = {}
    for landing in landings:
        found.setdefault(landing.name, []).append(landing)
    return found


def _spec(name: str, shape: tuple[int, ...], landings: list[Landing]) -> TensorSpec:
    dtypes = {landing.tensor.dtype for landing in landings}
    dtype = PART_DTYPE.get(dtypes.pop()) if len(dtypes) == 1 else None
    if dtype is None or dtype not in _STORAGE:
        held = ", ".join(sorted({str(landing.tensor.dtype) for landing in landings}))
        raise ValueError(f"model: {name} is held as {held}, which cannot be updated in place")
    return TensorSpec(name=name, shape=shape, storage=_STORAGE[dtype])


def _part(spec: PartSpec, landings: list[Landing]) -> RuntimePart:
    for landing in landings:
        if PART_DTYPE.get(landing.tensor.dtype) != spec.dtype:
            raise ValueError(f"model: {spec.name} is held as {landing.tensor.dtype}, not {spec.dtype}")
    return RuntimePart(spec, tuple(Held(landing.region, patterns_of(landing.tensor)) for landing in landings))


def _quantized(name: str, values: Tensor, storage: Storage) -> tuple[Tensor, Tensor]:
    assert storage != "bf16"
    try:
        return quantize_rows(values, storage)
    except ValueError as error:
        raise ValueError(f"checkpoint: {name}: {error}") from error


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
