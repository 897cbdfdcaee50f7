"""What a trainer and a service must agree on before the first update.

Knows how to name what differs; knows nothing of how the facts were obtained.
"""

import json
from collections.abc import Mapping

import xxhash

from flashrl_wire import CODEC_VERSION, PROTOCOL_VERSION
from flashrl_wire.messages import WeightsInfo


def tokenizer_hash(vocabulary: Mapping[str, int]) -> str:
    """xxh3_128 of a vocabulary (token -> id, added tokens included), hex."""
    rows = sorted(vocabulary.items(), key=lambda item: (item[1], item[0]))
    return xxhash.xxh3_128_hexdigest(json.dumps(rows, ensure_ascii=True, separators=(",", ":")).encode())


def mismatch(info: WeightsInfo, *, quantization: str, tokenizer: str, vocab_size: int, layout: str) -> str:
    """One line that says what differs between a trainer and the service behind `info`; empty where nothing does."""
    pairs = (
        ("protocol version", PROTOCOL_VERSION, info.protocol),
        ("codec version", CODEC_VERSION, info.codec),
        ("quantization", quantization, info.quantization),
        ("vocabulary size", vocab_size, info.vocab_size),
        ("tokenizer hash", tokenizer, info.tokenizer_hash),
        ("weight layout hash", layout, info.layout_hash),
    )
    return "; ".join(f"{name}: {ours} here, {theirs} there" for name, ours, theirs in pairs if ours != theirs)
