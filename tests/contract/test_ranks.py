"""A job of two ranks makes the same step as one process, and stops and goes on as one."""

import signal
from pathlib import Path

import pytest
import torch
from tests.helpers.workshop import Straight, Workshop, rows, state, until
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from flashrl_rollout import stored_state
from flashrl_rollout.scripted_folder import folder_layout

LEARNING_RATE = 1e-4  # the recipe's
NUMBERS = ("loss", "grad_norm", "entropy", "mismatch/k3_kl", "mismatch/max_ratio", "tis/weight_mean", "reward/mean")


def weights(run: Path, step: int, file: Path) -> dict[str, Tensor]:
    """The fp32 master weights in a checkpoint."""
    dcp_to_torch_save(run / "checkpoints" / f"step-{step:06d}", file)
    return dict(torch.load(file)["model"])


def test_two_ranks_step_stop_and_go_on_as_one_process(straight: Straight, workshop: Workshop, tmp_path: Path) -> None:
    service = workshop.service(token_s=0.03)
    ranks = workshop.ranks(2, service.url)
    until(lambda: len(workshop.recorded()) == 2 and service.is_sampling, ranks[0])
    for rank in ranks:  # a terminal's Ctrl-C reaches every process
        rank.signal(signal.SIGINT)
    ended = [rank.wait() for rank in ranks]
    assert [each.code for each in ended] == [130, 130], ended
    run = workshop.run_folder()
    assert state(run, 1)["digest"] == service.weights()["digest"]

    one, two = (rows(folder)[1] for folder in (straight.folder, run))
    for number in NUMBERS:
        assert two[number] == pytest.approx(one[number], rel=1e-4), number
    alone, together = weights(straight.folder, 1, tmp_path / "one.pt"), weights(run, 1, tmp_path / "two.pt")
    assert alone.keys() == together.keys()
    for name, expected in alone.items():
        difference = (together[name] - expected).abs()
        # Adam turns a gradient's rounding into a step's where the gradient is next to nothing, and nowhere else
        assert difference.max() <= 2.1 * LEARNING_RATE, name
        assert (difference > 0.01 * LEARNING_RATE).float().mean() < 0.02, name

    resumed = [rank.wait() for rank in workshop.ranks(2, service.url, f"--resume={run}", run__steps=2)]
    assert [each.code for each in resumed] == [0, 0], resumed
    assert [row["step"] for row in rows(run)] == [0, 1, 2]
    held = service.weights()
    assert (held["version"], held["digest"]) == (2, state(run, 2)["digest"])
    layout = folder_layout(run / "export", "int8")
    exported = stored_state.read_parts(run / "export", layout)
    assert stored_state.combined(layout, stored_state.digests(exported)) == held["digest"]
