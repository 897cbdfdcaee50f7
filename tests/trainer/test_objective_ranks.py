"""Two FSDP ranks make the same step as one process without FSDP, to the rounding of float32."""

import math
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from random import Random

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from flashrl_trainer.algorithm.importance import correction_weights
from flashrl_trainer.algorithm.objective import dapo_loss_sum, loss_for_backward
from flashrl_trainer.batch import PackedBatch, TrainingSample, num_loss_tokens, pack, split_for_ranks

TIMEOUT_S = 200
VOCABULARY, HIDDEN = 13, 7  # odd, so that the two ranks' shards are uneven
MANY_SHORT = [(3, 9), (1, 2), (2, 7), (1, 1), (4, 4), (2, 12), (1, 5)]  # prompt and response tokens
ONE_LONG_ONE_SHORT = [(2, 30), (2, 0), (1, 3)]  # and one without a response, that no rank gets


class TinyModel(nn.Module):
    """Predicts a token from the one before; enough for gradients to depend on every packed position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.block = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, batch: PackedBatch) -> Tensor:
        """[T] log-probs of each token given the one before; those at position 0 of a sample mean nothing."""
        logits = self.head(torch.tanh(self.block(self.embed(batch.token_ids.roll(1)))))
        return -nn.functional.cross_entropy(logits, batch.token_ids, reduction="none")


def make_samples(shapes: list[tuple[int, int]]) -> list[TrainingSample]:
    random = Random(3)
    return [
        TrainingSample(
            token_ids=[random.randrange(VOCABULARY) for _ in range(prompt + response)],
            num_prompt_tokens=prompt,
            rollout_logprobs=[math.log(1 / VOCABULARY) + random.gauss(0, 0.5) for _ in range(response)],
            weight_versions=[],
            advantage=random.gauss(0, 1),
            in_loss=True,
        )
        for prompt, response in shapes
    ]


def two_steps(
    model: nn.Module, samples: list[TrainingSample], rank: int, num_ranks: int, max_tokens: int
) -> list[float]:
    """This rank's share of the loss in each of two updates on the same mini-batch, the second one off-policy."""
    # not Adam, whose step is blind to gradients that are num_ranks times too large
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    micro_batches = [pack(micro_batch) for micro_batch in split_for_ranks(samples, num_ranks, max_tokens)[rank]]
    with torch.no_grad():
        proximal = [model(batch) for batch in micro_batches]
    losses = []
    for _ in range(2):
        losses.append(accumulate_gradients(model, micro_batches, proximal, num_loss_tokens(samples), num_ranks))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def accumulate_gradients(
    model: nn.Module, batches: list[PackedBatch], proximal: list[Tensor], num_tokens: int, num_ranks: int
) -> float:
    total = 0.0
    for batch, old in zip(batches, proximal, strict=True):
        mask = batch.loss_mask
        weights = correction_weights(
            "token", old, batch.rollout_logprobs, batch.sample_ids, mask, cap=2.0, band=(0.5, 2.0)
        )
        loss_sum, _ = dapo_loss_sum(model(batch), old, batch.advantages, weights, mask, 0.2, 0.28, 10.0)
        loss_for_backward(loss_sum, num_tokens, num_ranks).backward()  # type: ignore[no-untyped-call]
        total += loss_sum.item() / num_tokens
    return total


def in_one_process(shapes: list[tuple[int, int]]) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = TinyModel()
    losses = two_steps(model, make_samples(shapes), rank=0, num_ranks=1, max_tokens=10**6)
    return losses, {name: value.detach() for name, value in model.named_parameters()}


def on_a_rank(rank: int, num_ranks: int, store: str) -> None:
    """Runs in a process of its own, this file as its program; a failed assertion ends it and fails the test."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=TIMEOUT_S)
    )
    mesh = init_device_mesh("cpu", (num_ranks,))
    for shapes in (MANY_SHORT, ONE_LONG_ONE_SHORT):
        torch.manual_seed(0)
        model = TinyModel()
        for module in (model.block, model):
            fully_shard(module, mesh=mesh)
        losses = torch.tensor(two_steps(model, make_samples(shapes), rank, num_ranks, max_tokens=16))
        distributed.all_reduce(losses)
        expected_losses, expected_weights = in_one_process(shapes)
        torch.testing.assert_close(losses.tolist(), expected_losses, rtol=1e-6, atol=1e-6)
        for name, value in model.named_parameters():
            assert isinstance(value, DTensor)
            torch.testing.assert_close(value.full_tensor().detach(), expected_weights[name], rtol=1e-5, atol=2e-6)
    distributed.destroy_process_group()


def test_two_ranks_make_the_same_step_as_one_process(tmp_path: Path) -> None:
    commands = [[sys.executable, __file__, str(rank), "2", str(tmp_path / "store")] for rank in range(2)]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [rank.communicate(timeout=TIMEOUT_S)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)


def test_the_step_moves_every_weight_and_the_loss() -> None:
    """Otherwise the comparison between ranks would compare nothing."""
    torch.manual_seed(0)
    before = TinyModel()
    losses, after = in_one_process(MANY_SHORT)
    assert abs(losses[0] - losses[1]) > 1e-3
    for name, value in before.named_parameters():
        assert (value - after[name]).abs().max() > 1e-3, name


if __name__ == "__main__":
    on_a_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    os._exit(0)  # a thread of gloo's that outlives the interpreter has ended it by SIGABRT
