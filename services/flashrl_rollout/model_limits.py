"""Which kinds of models are refused before they are loaded, judged by vLLM's own description of a model.

No table of architectures: experts, latent attention and images are facts of that description. Knows nothing of weights.
"""

from typing import Any


def check_supported(config: Any) -> None:
    """ValueError of one line for a model whose weights cannot be followed; `config` is vLLM's ModelConfig."""
    for is_so, reason in (
        (config.is_multimodal_model, "it takes more than text (save its language model as a checkpoint of its own)"),
        (config.runner_type != "generate", "it does not generate text"),
        (config.is_encoder_decoder, "it has an encoder"),
        (config.use_mla, "latent attention keeps a transformed copy of a weight"),
        (config.is_moe, "mixtures of experts keep their weights in a layout of the kernel's"),
    ):
        if is_so:
            raise ValueError(f"model: {', '.join(config.architectures)} cannot be updated in place: {reason}")
