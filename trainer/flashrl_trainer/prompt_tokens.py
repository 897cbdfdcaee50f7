"""A prompt -> its token ids, by the model's tokenizer and chat template, as the service makes them.

Knows nothing of data sets or of how long a prompt may be.
"""

from typing import Any

from jinja2 import TemplateError

from flashrl_trainer.row_formats import BadRowError, PromptText


def token_ids(tokenizer: Any, prompt: PromptText) -> list[int]:
    """Text as it is; messages through the chat template, up to where the answer begins.

    ValueError where there is no template; BadRowError where it refuses these messages.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise ValueError(
            f"data.chat_template: the tokenizer of {tokenizer.name_or_path} has no chat template; "
            "with data.chat_template = false prompts are sent as text"
        )
    try:
        return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True)["input_ids"])
    except TemplateError as error:
        raise BadRowError(f"the chat template refuses it: {' '.join(str(error).split())}") from None
