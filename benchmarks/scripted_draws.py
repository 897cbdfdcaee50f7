"""Whether the tokens of the scripted engine are those that the weights named in their spans draw.

They are a hash of prompt, seed, tokens so far and the digest of the weights: a token under a wrong version shows at
once. Knows that hash; knows nothing of HTTP.
"""

import hashlib
from typing import Any

from benchmarks.soak_clients import Versions

VOCAB_SIZE = 512
_LARGEST_SEED = (1 << 63) - 1


class ScriptedDraws:
    """`complaint` is a `soak_clients.Draws`."""

    def __init__(self, versions: Versions, vocab_size: int = VOCAB_SIZE) -> None:
        self._versions, self._vocab_size = versions, vocab_size

    def complaint(self, body: dict[str, Any], index: int, number: int, result: dict[str, Any]) -> str:
        """Where sample `number` of prompt `index` differs from what its versions draw."""
        completion, seed = result["completions"][number], _seed(body, index, number)
        tokens: list[int] = completion["token_ids"]
        for version, start, end in completion["weight_versions"]:
            digest = self._versions.digests[version]
            for position in range(start, end):
                if self._draw(result["prompt_token_ids"], seed, tokens[:position], digest) != tokens[position]:
                    return f"token {position} was not drawn by version {version}"
        return ""

    def _draw(self, prompt: list[int], seed: str, tokens: list[int], digest: str) -> int:
        word = hashlib.blake2b(f"{prompt} {seed} {tokens} {digest}".encode(), digest_size=16).digest()
        return int.from_bytes(word[:8], "little") % self._vocab_size


def _seed(body: dict[str, Any], index: int, number: int) -> str:
    sampling = body["sampling"]
    if sampling["temperature"] == 0:
        return "greedy"
    seed = sampling.get("seed")
    first = 0 if seed is None else (seed + index * body["n"]) & _LARGEST_SEED
    return str(first + number)
