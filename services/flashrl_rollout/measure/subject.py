"""The model that is measured: loaded in bf16 by transformers, described by vLLM, to be run by the service's kernels.

Knows how to load and which kernels there are; knows nothing of what is measured.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from flashrl_rollout import kernels
from flashrl_rollout.layer_selection import Packed
from flashrl_rollout.measure.layer_kinds import LayerKind, layer_kinds
from flashrl_rollout.measure.measurer import STORAGE, Measurer
from flashrl_rollout.measure.rows_linear import MakeKernel
from flashrl_rollout.measure.token_scores import ScoredText, sample
from flashrl_rollout.model_limits import check_supported
from flashrl_rollout.packed_layers import describe_model, packed_layers
from flashrl_wire.messages import Quantization


@dataclass(frozen=True)
class Subject:
    """A model on the device, its tokenizer and its kinds of layers."""

    model: Any
    tokenizer: Any
    packed: Packed
    kinds: list[LayerKind]

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def device_name(self) -> str:
        """The GPU's name, or the number of threads."""
        on_gpu = self.model.device.type == "cuda"
        return torch.cuda.get_device_name() if on_gpu else f"a CPU with {torch.get_num_threads()} threads"

    def encode(self, text: str) -> list[int]:
        """Token ids with what the tokenizer puts before a text."""
        return list(self.tokenizer(text)["input_ids"])

    def sample(self, prompts: Iterator[Sequence[int]], num_tokens: int, max_tokens: int, seed: int) -> list[ScoredText]:
        """See `token_scores.sample`."""
        return sample(self.model, prompts, num_tokens, max_tokens, seed)

    def measurer(self, texts: Sequence[ScoredText]) -> Measurer:
        """Measures on these texts."""
        return Measurer(self.model, self.kinds, texts)


def load(name: str, quantizations: Sequence[Quantization]) -> Subject:
    """ValueError of one line for a model that the service would refuse, or a precision without a kernel here."""
    for quantization in quantizations:
        kernel_maker(quantization)()
    config = describe_model(name)
    check_supported(config)
    packed = packed_layers(config)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to(kernels.device()).eval()
    return Subject(model, AutoTokenizer.from_pretrained(name), packed, layer_kinds(model, packed))


def kernel_maker(quantization: Quantization) -> MakeKernel:
    """Makes the kernel of a layer."""
    return partial(kernels.make_kernel, STORAGE[quantization])
