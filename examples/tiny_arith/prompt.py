"""What the model sees and says: the prompt text, the tokenizer, and how a pair becomes token ids.

Knows nothing of arithmetic, training or sampling.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PROMPT_TEMPLATE = "{question}\n"  # the trainer's configuration for this example says the same
EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY_SIZE = 512
MAX_ANSWER_TOKENS = 80


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE over `texts`; digits are cut apart before merging, so each stays one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def encode_pair(tokenizer: PreTrainedTokenizerFast, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Prompt and completion ids, encoded apart because a sampler too starts from the prompt's ids alone."""
    prompt_ids: list[int] = tokenizer.encode(PROMPT_TEMPLATE.format(question=question))
    answer_ids: list[int] = tokenizer.encode(answer)
    return prompt_ids, [*answer_ids, tokenizer.eos_token_id]
