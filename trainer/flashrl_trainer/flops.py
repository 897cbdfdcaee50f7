"""How much arithmetic a model's forward and backward are, and how much a GPU can do. Knows nothing of how they are run.

Model FLOPs as in PaLM (arXiv 2204.02311, appendix B): what the mathematics needs, so recomputed activations and logits
do not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass

BF16_FLOPS_PER_S = {
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}
"""Dense bf16 peak by the name that CUDA gives the card, from NVIDIA's data sheets."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Elements of the blocks' matrices, elements of the head, and heads x head size summed over the layers."""

    block_elements: int
    head_elements: int
    attention_width: int


def forward_flops(size: ModelSize, lengths: Sequence[int], num_loss_tokens: int, num_shared_tokens: int = 0) -> int:
    """FLOPs of one forward over samples of `lengths` tokens, with logits at `num_loss_tokens` of them.

    `num_shared_tokens` stand in several samples and go through the matrices once. A multiplication and an addition an
    element of a matrix; in attention the same for each pair of a token and one before it (or itself), twice: for scores
    and for values. Windows narrower than a sample are not taken off.
    """
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    blocks = 2 * size.block_elements * (sum(lengths) - num_shared_tokens)
    return blocks + 4 * size.attention_width * pairs + 2 * size.head_elements * num_loss_tokens


def training_flops(size: ModelSize, lengths: Sequence[int], num_loss_tokens: int, num_shared_tokens: int = 0) -> int:
    """FLOPs of forward and backward: each product has two more in the backward pass."""
    return 3 * forward_flops(size, lengths, num_loss_tokens, num_shared_tokens)


def training_flops_per_token(size: ModelSize, length: int) -> float:
    """FLOPs a token of training on samples of `length` tokens, all of them in the loss."""
    return training_flops(size, [length], length) / length


def peak_flops(device_name: str, compute_dtype: str, num_devices: int) -> float | None:
    """What `num_devices` of that card can do in a second; None for other cards, for a CPU, and for float32."""
    peak = BF16_FLOPS_PER_S.get(device_name) if compute_dtype == "bfloat16" else None
    return None if peak is None else peak * num_devices
