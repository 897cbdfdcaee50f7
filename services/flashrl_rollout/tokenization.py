"""Prompts to token ids and back, as the model's tokenizer does it.

Knows Hugging Face tokenizers; knows nothing of vLLM or requests.
"""

from typing import Any

from jinja2 import TemplateError

from flashrl_wire.handshake import tokenizer_hash


class Tokenization:
    """A tokenizer, and its hash for the handshake."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.hash = tokenizer_hash(tokenizer.get_vocab())

    def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a text, or of a chat with the generation prompt; ValueError if the tokenizer cannot.

        A chat template writes its own special tokens, so none are added to its text: no second BOS.
        """
        if isinstance(prompt, str):
            return list(self._tokenizer.encode(prompt))
        try:
            text = self._tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        except (TemplateError, KeyError, TypeError) as error:
            raise ValueError(f"prompts: the chat template refuses this chat: {error}") from error
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
