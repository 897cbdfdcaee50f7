"""The linear layers of a Hugging Face model by kind, fused as the engine fuses them.

Finds kinds by the last part of a module's name; knows no table of architectures and nothing of kernels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from flashrl_rollout.layer_selection import LayerSelection, Packed

_CODE_BYTES, _BF16_BYTES, _SCALE_BYTES = 1, 2, 4


@dataclass(frozen=True)
class FusedLayer:
    """What the engine computes at once: `FusedLayer("model.layers.0.self_attn.qkv_proj", (q, k, v), 1152, 896)`."""

    name: str
    parts: tuple[str, ...]
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        """N * K."""
        return self.rows * self.columns

    @property
    def saved_bytes(self) -> int:
        """What the stored form in 8 bits is smaller by than in bf16."""
        return self.elements * (_BF16_BYTES - _CODE_BYTES) - self.rows * _SCALE_BYTES


@dataclass(frozen=True)
class LayerKind:
    """All layers whose names end alike: `LayerKind("qkv_proj", (FusedLayer(...), ...))`, one a block of the model."""

    name: str
    layers: tuple[FusedLayer, ...]

    @property
    def modules(self) -> list[str]:
        """The modules of all layers."""
        return [part for layer in self.layers for part in layer.parts]

    @property
    def saved_bytes(self) -> int:
        """Of all layers."""
        return sum(layer.saved_bytes for layer in self.layers)

    @property
    def patterns(self) -> list[str]:
        """What `keep_bf16` says to leave this kind in bf16."""
        return sorted({"*." + module.rpartition(".")[2] for module in self.modules})


def layer_kinds(model: Any, packed: Packed) -> list[LayerKind]:
    """Every kind of linear layer but the head, in the model's order; ValueError for a model that has none."""
    kinds: dict[str, list[FusedLayer]] = {}
    for layer in _fused_layers(model, packed):
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    if not kinds:
        raise ValueError(f"model: {type(model).__name__} has no linear layers that could be quantized")
    return [LayerKind(name, tuple(layers)) for name, layers in kinds.items()]


def selected_modules(kinds: list[LayerKind], selection: LayerSelection, packed: Packed, device: str) -> list[str]:
    """The modules that a service with this selection would quantize."""
    layers = (layer for kind in kinds for layer in kind.layers)
    chosen = (layer for layer in layers if selection.quantizes(layer.name, packed, (layer.rows, layer.columns), device))
    return [part for layer in chosen for part in layer.parts]


def _fused_layers(model: Any, packed: Packed) -> Iterator[FusedLayer]:
    head = model.get_output_embeddings()
    linears = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head
    }
    fused_names = {part: fused for fused, parts in packed.items() for part in parts}
    seen: set[str] = set()
    for name in linears:
        parent, dot, last = name.rpartition(".")
        fused = fused_names.get(last, last)
        parts = tuple(parent + dot + part for part in packed.get(fused, [last]))
        if not all(part in linears for part in parts):
            fused, parts = last, (name,)
        if parts[0] not in seen:
            seen.update(parts)
            rows = sum(linears[part].out_features for part in parts)
            yield FusedLayer(parent + dot + fused, parts, rows, linears[name].in_features)
