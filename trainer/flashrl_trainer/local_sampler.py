"""Samples from a model in bf16 with transformers, in batches, without a service or quantization.

It is there to tell whether a gain is the model's or its sampler's; slow beside an engine. Knows nothing of rewards.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM, GenerationConfig

from flashrl_trainer.checkpoint_files import LIST
from flashrl_trainer.model import LOAD_ERRORS, first_line
from flashrl_trainer.prompt_tokens import token_ids
from flashrl_trainer.row_formats import PromptText
from flashrl_trainer.settings import TrainerConfig

Progress = Callable[[int, int], None]  # (done, total) sequences
SEED = 0


class LocalSampler:
    """`sample` and `greedy` return texts by prompt; what they draw depends on the model, the prompts and the batch."""

    def __init__(self, model: Any, tokenizer: Any, batch: int) -> None:
        self._model, self._tokenizer, self._batch = model.eval(), tokenizer, batch
        self._end_tokens = _end_tokens(model, tokenizer)
        pad = tokenizer.pad_token_id
        self._pad = pad if pad is not None else next(iter(self._end_tokens), 0)
        # the model's own would be filled in where ours says nothing, and some have a repetition penalty
        model.generation_config = GenerationConfig()

    @staticmethod
    def load(config: TrainerConfig, tokenizer: Any, folder: Path | None) -> "LocalSampler":
        """`model.path`, an exported folder, or a training checkpoint; ValueError where it cannot be read."""
        device = (
            config.model.device if config.model.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        )
        is_training = folder is not None and (folder / LIST).is_file()
        path = str(folder) if folder is not None and not is_training else config.model.path
        name = "model.path" if path == config.model.path else "--checkpoint"
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32 if is_training else torch.bfloat16)
        except LOAD_ERRORS as error:
            raise ValueError(f"{name}: {path}: {first_line(error)}") from None
        if folder is not None and is_training:
            _load_training_checkpoint(model, folder)
        return LocalSampler(model.to(device=device, dtype=torch.bfloat16), tokenizer, config.eval.bf16_batch)

    def sample(self, prompts: Sequence[PromptText], n: int, max_tokens: int, on_progress: Progress) -> list[list[str]]:
        """`n` texts a prompt at temperature 1, from the whole distribution."""
        torch.manual_seed(SEED)
        return self._texts(prompts, n, {"do_sample": True, "top_k": 0, "top_p": 1.0}, max_tokens, on_progress)

    def greedy(self, prompts: Sequence[PromptText], max_tokens: int, on_progress: Progress) -> list[list[str]]:
        """One text a prompt."""
        return self._texts(prompts, 1, {"do_sample": False}, max_tokens, on_progress)

    def _texts(
        self, prompts: Sequence[PromptText], n: int, how: dict[str, Any], max_tokens: int, on_progress: Progress
    ) -> list[list[str]]:
        encoded = [token_ids(self._tokenizer, prompt) for prompt in prompts]
        # of like length together, the longest first: little padding, and memory runs out at once or never
        order = sorted(range(len(prompts)), key=lambda index: -len(encoded[index]))
        wanted = [index for index in order for _ in range(n)]
        texts: list[list[str]] = [[] for _ in prompts]
        for start in range(0, len(wanted), self._batch):
            chosen = wanted[start : start + self._batch]
            for index, text in zip(chosen, self._generate([encoded[i] for i in chosen], how, max_tokens), strict=True):
                texts[index].append(text)
            on_progress(min(start + self._batch, len(wanted)), len(wanted))
        return texts

    @torch.inference_mode()
    def _generate(self, batch: list[list[int]], how: dict[str, Any], max_tokens: int) -> list[str]:
        longest = max(map(len, batch))
        rows = [[self._pad] * (longest - len(tokens)) + tokens for tokens in batch]
        masks = [[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in batch]
        settings = GenerationConfig(
            max_new_tokens=max_tokens, eos_token_id=sorted(self._end_tokens) or None, pad_token_id=self._pad, **how
        )
        output = self._model.generate(
            input_ids=torch.tensor(rows, device=self._model.device),
            attention_mask=torch.tensor(masks, device=self._model.device),
            generation_config=settings,
        )
        return [self._decoded(tokens) for tokens in output[:, longest:].tolist()]

    def _decoded(self, tokens: list[int]) -> str:
        end = next((index for index, token in enumerate(tokens) if token in self._end_tokens), len(tokens))
        return str(self._tokenizer.decode(tokens[:end], skip_special_tokens=True))


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The model's and the tokenizer's, as the service's engine ends at both."""
    config = getattr(model, "generation_config", None)
    of_model = getattr(config, "eos_token_id", None)
    found = of_model if isinstance(of_model, list) else [of_model]
    return {token for token in (*found, tokenizer.eos_token_id) if token is not None}


def _load_training_checkpoint(model: Any, folder: Path) -> None:
    """The fp32 master weights of a checkpoint, in place."""
    state = {"model": {f"lm.{name}": parameter.data for name, parameter in model.named_parameters()}}
    try:
        state_dict_loader.load(state, checkpoint_id=folder, no_dist=True)
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise ValueError(f"--checkpoint: {folder}: {' '.join(str(reason).split())}") from None
