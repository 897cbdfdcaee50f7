"""Prompts to token ids, with a tokenizer of single characters that adds a BOS."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flashrl_rollout.tokenization import Tokenization
from flashrl_wire.handshake import tokenizer_hash

MAX_TOKENS = 8
WORDS = {"<s>": 0, "</s>": 1, "hi": 2, "user": 3, "assistant": 4, ":": 5}
TEMPLATE = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.role }} : {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)


def _tokenization(template: str | None = TEMPLATE) -> Tokenization:
    words = Tokenizer(models.WordLevel(WORDS, unk_token="hi"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return Tokenization(fast, MAX_TOKENS)


def test_text_gets_the_tokenizers_own_bos() -> None:
    assert _tokenization().encode("hi user") == [0, 2, 3]


def test_text_that_no_context_could_hold_is_refused_unread() -> None:
    longest = MAX_TOKENS * len("assistant")
    assert _tokenization().encode("hi" + " " * (longest - 2)) == [0, 2]
    with pytest.raises(ValueError, match=f"has {longest + 1} characters, of which the context of 8 tokens holds"):
        _tokenization().encode(" " * (longest + 1))


def test_a_chat_gets_the_generation_prompt_and_one_bos() -> None:
    assert _tokenization().encode([{"role": "user", "content": "hi"}]) == [0, 3, 5, 2, 4, 5]


def test_decoding_leaves_out_special_tokens() -> None:
    assert _tokenization().decode([0, 2, 3, 1]).split() == ["hi", "user"]


def test_the_hash_is_that_of_the_vocabulary() -> None:
    assert _tokenization().hash == tokenizer_hash(WORDS)


@pytest.mark.parametrize("chat", [[{"role": "system", "content": "hi"}], [{"content": "hi"}], [{"role": "user"}]])
def test_chats_that_the_template_cannot_take(chat: list[dict[str, str]]) -> None:
    strict = TEMPLATE.replace("{{ m.role }} : {{ m.content }}", "{{ m['role'] + ' : ' + m['content'] }}")
    with pytest.raises(ValueError, match="the chat template refuses this chat"):
        _tokenization(strict).encode(chat)


def test_a_model_without_a_template() -> None:
    with pytest.raises(ValueError, match="chat_template"):
        _tokenization(None).encode([{"role": "user", "content": "hi"}])
