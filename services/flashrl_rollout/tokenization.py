"""Prompts to token ids and back, as the model's tokenizer does it.

Knows Hugging Face tokenizers; knows nothing of vLLM or requests.
"""

from typing import Any

from jinja2 import TemplateError

from flashrl_wire.handshake import tokenizer_hash


class Tokenization:
    """A tokenizer for a context of `max_tokens`, and its hash for the handshake."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self.hash = tokenizer_hash(vocabulary)
        self._max_tokens, self._max_characters = max_tokens, max_tokens * max(map(len, vocabulary))

    def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a text, or of a chat with the generation prompt; ValueError if the tokenizer or context cannot.

        A chat template writes its own special tokens, so none are added to its text: no second BOS.
        """
        if isinstance(prompt, str):
            return self._encode(prompt)
        try:
            text = self._tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        except (TemplateError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"the chat template refuses this chat: {error}") from error
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, **options: bool) -> list[int]:
        if len(text) > self._max_characters:  # tens of megabytes would take minutes, in which nobody is answered
            limit = f"of which the context of {self._max_tokens} tokens holds at most {self._max_characters}"
            raise ValueError(f"has {len(text)} characters, {limit}")
        return list(self._tokenizer.encode(text, **options))

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
