"""A stored form in plain CPU tensors: made at random, read from a checkpoint, digested.

Knows layouts and quantization; knows nothing of engines. The scripted engine and tests hold their weights in it.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flashrl_rollout.checkpoint_reader import Checkpoint
from flashrl_rollout.head_copies import head_copies
from flashrl_wire.codec import TORCH_DTYPE
from flashrl_wire.digest import Combiner, PartDigest, digest_range
from flashrl_wire.layout import TensorSpec, WeightLayout
from flashrl_wire.quantize import quantize_rows

Parts = dict[str, Tensor]
"""Part name -> values of the part's dtype and shape."""


def random_parts(layout: WeightLayout, seed: int) -> Parts:
    """Weights drawn from N(0, 0.02^2) and stored as the layout says; equal seeds give equal bits."""
    generator = torch.Generator().manual_seed(seed)
    parts: Parts = {}
    for spec in layout.tensors:
        parts |= store(spec, torch.randn(spec.shape, generator=generator).mul_(0.02).bfloat16())
    return parts


def store(spec: TensorSpec, values: Tensor) -> Parts:
    """The parts that hold bf16 values of the spec's shape."""
    if spec.storage == "bf16":
        return {spec.name: values}
    codes, scales = quantize_rows(values, spec.storage)
    code_part, scale_part = spec.parts()
    return {code_part.name: codes, scale_part.name: scales}


def read_parts(folder: Path, layout: WeightLayout, vocab_sizes: Collection[int] = ()) -> Parts:
    """The stored form of a Hugging Face folder.

    ValueError for a tensor that is missing or has another shape, and for a second head of `vocab_sizes` rows that
    differs from the embedding it should be.
    """
    checkpoint = Checkpoint(folder)
    for spec in layout.tensors:
        if checkpoint.shapes.get(spec.name) != spec.shape:
            raise ValueError(f"{folder.name}: has no tensor {spec.name} of shape {list(spec.shape)}")
    specs = {spec.name: spec for spec in layout.tensors}
    head_copies(checkpoint, {name: spec.shape for name, spec in specs.items()}, vocab_sizes)
    parts: Parts = {}
    for name, values in checkpoint.tensors(list(specs)):
        parts |= store(specs[name], values)
    return parts


def empty_parts(layout: WeightLayout) -> Parts:
    """Zeros in every part."""
    return {part.name: torch.zeros(part.shape, dtype=TORCH_DTYPE[part.dtype]) for part in layout.parts()}


def digests(parts: Mapping[str, Tensor]) -> dict[str, PartDigest]:
    """The digest of every part."""
    return {name: digest_range(values) for name, values in parts.items()}


def combined(layout: WeightLayout, found: Mapping[str, PartDigest]) -> str:
    """The digest of the whole stored form."""
    return Combiner(layout.parts()).combine(found)
