"""Second copies of a tied embedding that a checkpoint holds, most often as `lm_head.weight`.

Knows names, shapes and values of a checkpoint; knows nothing of engines, layers or architectures.
"""

from collections.abc import Collection, Mapping

import torch

from flashrl_rollout.checkpoint_reader import Checkpoint


def head_copies(
    checkpoint: Checkpoint, held: Mapping[str, tuple[int, ...]], vocab_sizes: Collection[int]
) -> frozenset[str]:
    """Names that the model does not hold and that are copies of a matrix [V, K] that it does hold, bit for bit in bf16.

    ValueError where one differs: a model whose embeddings are tied has one matrix for both, so the head of the
    checkpoint would be lost without a word. `held` are the model's own names and shapes.
    """
    found = set()
    for name, shape in checkpoint.shapes.items():
        if name in held or len(shape) != 2 or shape[0] not in vocab_sizes:
            continue
        originals = [other for other in held if held[other] == checkpoint.shapes.get(other) == shape]
        if originals:
            _check_equal(checkpoint, name, originals)
            found.add(name)
    return frozenset(found)


def _check_equal(checkpoint: Checkpoint, name: str, originals: list[str]) -> None:
    values = dict(checkpoint.tensors([name, *originals]))
    if not any(torch.equal(values[name], values[original]) for original in originals):
        raise ValueError(
            f"checkpoint: {name} differs from {originals[0]}, but this model has one matrix for both (tied embeddings)"
        )
