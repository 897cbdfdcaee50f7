"""The policy: a Hugging Face causal language model under FSDP2, from packed tokens to log-probs.

fp32 master weights, sharded by rows; compute in bf16 or fp32. Knows nothing of objectives, data or the service.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from flashrl_trainer import attention
from flashrl_trainer.batch import PackedBatch
from flashrl_trainer.distributed import Ranks
from flashrl_trainer.flops import ModelSize
from flashrl_trainer.logprobs import token_logprobs

LOAD_ERRORS = (OSError, ValueError, StrictDataclassError, SafetensorError)
"""What transformers raises for a folder or hub id that it cannot load."""

_UNSUPPORTED = ("final_logit_softcapping", "logits_scaling", "logit_scale", "vision_config", "audio_config")


@dataclass(frozen=True)
class Shard:
    """This rank's rows of a parameter: `local` [rows, ...] fp32 begins at row `first_row` of `shape`."""

    name: str
    local: Tensor
    first_row: int
    shape: tuple[int, ...]


class Policy(nn.Module):
    """Log-probs of packed sequences; parameters keep their Hugging Face names under `lm.`."""

    def __init__(
        self, lm: nn.Module, temperature: float, chunk_tokens: int, compute_dtype: str, *, compiled: bool = False
    ) -> None:
        super().__init__()
        self.lm = lm
        self.compute_dtype = compute_dtype  # "bfloat16" or "float32"
        self._temperature = temperature
        self._chunk_tokens = chunk_tokens
        self._compiled = compiled

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """`(logprobs, entropy)`, both [T] fp32 and 0 outside the loss mask.

        The log-prob of token t is that of drawing it from what stands before it in its sample.
        """
        lm: Any = self.lm
        hidden = lm.model(
            input_ids=batch.token_ids.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            max_length_q=batch.max_sample_tokens,
            document_rows=batch.rows,
            document_kept=batch.kept,
        ).last_hidden_state[0]
        where = batch.loss_mask.nonzero().flatten()
        found, entropies = token_logprobs(
            hidden[batch.previous[where]],
            lm.lm_head.weight,
            batch.token_ids[where],
            self._temperature,
            self._chunk_tokens,
            compiled=self._compiled,
        )
        zeros = torch.zeros(batch.token_ids.shape, dtype=torch.float32, device=hidden.device)
        return zeros.index_put((where,), found), zeros.index_put((where,), entropies)

    def shards(self, ranks: Ranks) -> Iterator[Shard]:
        """Every parameter once (tied ones under the first name), in name order, as this rank holds it.

        Where there are copies of the model (HSDP), a rank of the first copy yields its rows, and the others none of
        them: every row is some rank's, and of one rank only.
        """
        for name, parameter in sorted(self.lm.named_parameters()):
            tensor = parameter.detach()
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            local = local[:0] if ranks.replica else local
            first = ranks.first_row(tensor.shape[0])
            rows = min(-(-tensor.shape[0] // ranks.num_shards), tensor.shape[0] - first)
            assert local.shape[0] == rows, name
            yield Shard(name, local, first, tuple(tensor.shape))

    def size(self) -> ModelSize:
        """What its arithmetic depends on."""
        lm: Any = self.lm
        config = lm.config
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        blocks = sum(parameter.numel() for parameter in lm.model.layers.parameters() if parameter.dim() == 2)
        return ModelSize(blocks, lm.lm_head.weight.numel(), heads * head_size * len(lm.model.layers))


def dtype_advice(device_type: str, compute_dtype: str) -> str | None:
    """What to do where the device computes in `compute_dtype` much slower than it could; None where it does not."""
    if device_type == "cpu" and compute_dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bf16: model.compute_dtype = float32 is several times faster on it"
    return None


def load_policy(
    path: str,
    ranks: Ranks,
    *,
    compute_dtype: str,
    checkpointing: bool,
    temperature: float,
    chunk_tokens: int,
    compiled: bool = False,
) -> Policy:
    """Load a Hugging Face id or folder in fp32 and shard it; ValueError where it is missing or not supported."""
    attention.register()
    config = _load_config(path)
    try:
        lm = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, attn_implementation=attention.NAME
        )
    except LOAD_ERRORS as error:
        raise ValueError(f"model.path: {path}: {first_line(error)}") from error
    if lm.lm_head.bias is not None:
        raise ValueError(f"model.path: {path} has a bias in its head, which is not supported")
    policy = Policy(lm, temperature, chunk_tokens, compute_dtype, compiled=compiled).train()
    if checkpointing:
        _recompute_blocks(lm.model.layers)
    if compiled:
        _compile_blocks(lm.model.layers)
    _shard(policy, ranks, torch.bfloat16 if compute_dtype == "bfloat16" else torch.float32)
    return policy


def _load_config(path: str) -> Any:
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise ValueError(f"model.path: no folder {path}")
    try:
        config = AutoConfig.from_pretrained(path)
    except LOAD_ERRORS as error:
        raise ValueError(
            f"model.path: {path} is neither a model folder nor a reachable hub id: {first_line(error)}"
        ) from None
    for name in _UNSUPPORTED:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"model.path: {path} sets {name}, which is not supported in training")
    return config


def first_line(error: Exception) -> str:
    """What went wrong, without the advice that transformers adds."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        return str(error.__cause__)
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _shard(policy: Policy, ranks: Ranks, compute_dtype: torch.dtype) -> None:
    policy.to(ranks.device)
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    lm: Any = policy.lm
    for block in lm.model.layers:
        fully_shard(block, mesh=ranks.mesh, mp_policy=precision)
    fully_shard(policy, mesh=ranks.mesh, mp_policy=precision)


def _compile_blocks(layers: nn.ModuleList) -> None:
    """One graph for all blocks, for any number of tokens; in place, so that parameters keep their names."""
    for layer in layers:
        layer.compile(dynamic=True)


def _recompute_blocks(layers: nn.ModuleList) -> None:
    """Drop each block's activations and compute them again in the backward pass."""
    for layer in layers:
        forward = layer.forward

        def recomputed(*args: Any, _forward: Any = forward, **kwargs: Any) -> Any:
            return checkpoint(_forward, *args, use_reentrant=False, **kwargs)

        layer.forward = recomputed
