"""The shapes that `--shape` knows, as Hugging Face configurations.

Knows numbers; imports nothing, so that a mistyped name shows at once.
"""

from typing import Any


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, *, vocab: int, context: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _qwen2(256, 768, 4, 4, 2, vocab=512, context=8192, tied=True),
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
    },
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, vocab=151936, context=32768, tied=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, vocab=152064, context=32768, tied=False),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, vocab=152064, context=32768, tied=False),
    "30m": _qwen2(384, 1536, 8, 6, 2, vocab=32768, context=8192, tied=True),
    "135m": _qwen2(768, 3072, 12, 12, 4, vocab=40960, context=8192, tied=True),
    "170m": _qwen2(768, 3072, 16, 12, 4, vocab=40960, context=8192, tied=True),
}
