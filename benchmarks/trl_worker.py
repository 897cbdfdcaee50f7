"""A few steps of TRL's GRPOTrainer with its transformers backend, timed: one JSON object a step on standard output.

Runs with the Python of an environment that has TRL; FlashRL is not needed there. Knows TRL; knows nothing of FlashRL.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

ANSWER = re.compile(r"####\s*(-?[\d,.]+)")


class TimedTrainer(GRPOTrainer):
    """Keeps how long a step's generation and scoring took, and what came out."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        start, cpu = time.perf_counter(), time.process_time()
        outputs = super()._generate_and_score_completions(inputs)
        self.generate_s, self.generate_cpu_s = time.perf_counter() - start, time.process_time() - cpu
        self.response_tokens = int(outputs["completion_mask"].sum())
        self.tokens = int(outputs["prompt_mask"].sum()) + self.response_tokens
        self.sampled = [
            {name: ids[mask.bool()].tolist() for name, ids, mask in (("prompt", *prompt), ("completion", *completion))}
            for prompt, completion in zip(
                zip(outputs["prompt_ids"], outputs["prompt_mask"], strict=True),
                zip(outputs["completion_ids"], outputs["completion_mask"], strict=True),
                strict=True,
            )
        ]
        return outputs


class Clock(TrainerCallback):
    """Prints a line at the end of every step, and keeps the samples of the last one."""

    trainer: TimedTrainer

    def __init__(self, samples: Path, group_size: int) -> None:
        self._samples, self._group_size = samples, group_size
        self._start = self._cpu = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        whole, cpu = time.perf_counter() - self._start, time.process_time() - self._cpu
        row = {
            "step_s": whole,
            "train_s": whole - self.trainer.generate_s,
            "step_cpu_s": cpu,
            "train_cpu_s": cpu - self.trainer.generate_cpu_s,
            "tokens": self.trainer.tokens,
            "response_tokens": self.trainer.response_tokens,
        }
        print(json.dumps(row), flush=True)
        rows, size = self.trainer.sampled, self._group_size
        self._samples.write_text(json.dumps([rows[start : start + size] for start in range(0, len(rows), size)]))


def reward(completions: list[str], answer: list[str], **unused: Any) -> list[float]:
    """1 where the last number behind #### is the answer's."""
    return [float(_last(text) == _last(wanted)) for text, wanted in zip(completions, answer, strict=True)]


def _last(text: str) -> str | None:
    found = ANSWER.findall(text)
    return found[-1].strip(".,") if found else None


def main() -> None:
    """Train for a few steps."""
    asked = arguments()
    torch.set_num_threads(asked.threads)
    rows = [json.loads(line) for line in Path(asked.data).read_text().splitlines()]
    data = Dataset.from_list([{"prompt": row["question"] + "\n", "answer": row["answer"]} for row in rows])
    config = GRPOConfig(
        output_dir=asked.out,
        max_steps=asked.steps,
        per_device_train_batch_size=asked.sequences_at_once,
        gradient_accumulation_steps=asked.prompts * asked.samples // asked.sequences_at_once,
        num_generations=asked.samples,
        max_completion_length=asked.max_tokens,
        temperature=1.0,
        top_k=0,
        learning_rate=asked.lr,
        weight_decay=0.1,
        loss_type="dapo",
        beta=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        model_init_kwargs={"dtype": torch.float32},
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=asked.seed,
    )
    clock = Clock(Path(asked.out) / "samples.json", asked.samples)
    trainer = TimedTrainer(model=asked.model, reward_funcs=reward, args=config, train_dataset=data, callbacks=[clock])
    clock.trainer = trainer
    print(f"threads {torch.get_num_threads()}, {trainer.model.dtype}", file=sys.stderr)
    trainer.train()


def arguments() -> argparse.Namespace:
    """What `trl_side_by_side` passes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "data", "out"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("steps", "prompts", "samples", "max_tokens", "sequences_at_once", "threads", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, required=True)
    parser.add_argument("--lr", type=float, default=1e-5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
