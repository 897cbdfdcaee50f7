"""Checkpoints: there whole or not at all, the newest whole one wins, and what is loaded is what was saved."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from flashrl_trainer.checkpoint import CheckpointStore
from flashrl_trainer.distributed import Ranks, start_ranks, stop_ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    yield start_ranks("cpu", timeout_s=30)
    stop_ranks()


def trained(ranks: Ranks, width: int = 3, seed: int = 0) -> tuple[nn.Module, AdamW]:
    """A model and its optimizer after a step, so that there are moments to save."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, 2), nn.Linear(2, 5))
    fully_shard(model, mesh=ranks.mesh)
    optimizer = AdamW(model.parameters(), lr=0.1)
    step(model, optimizer, width)
    return model, optimizer


def step(model: nn.Module, optimizer: AdamW, width: int = 3) -> list[float]:
    model(torch.linspace(-1, 1, 4 * width).reshape(4, width)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return [float(value) for parameter in model.parameters() for value in local(parameter)]


def local(parameter: Tensor) -> Tensor:
    whole: Any = parameter.detach()
    assert isinstance(whole, DTensor)
    return whole.to_local().flatten()


def saved(folder: Path, ranks: Ranks, steps: range, keep: int = 10) -> CheckpointStore:
    store = CheckpointStore(folder, ranks, keep)
    for number in steps:
        store.save(number, *trained(ranks), {"number": number})
    return store


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def truncate(folder: Path) -> None:
    with next(folder.glob("*.distcp")).open("r+b") as file:
        file.truncate(100)


def test_goes_on_as_if_never_saved(tmp_path: Path, ranks: Ranks) -> None:
    model, optimizer = trained(ranks, seed=1)
    store = CheckpointStore(tmp_path, ranks, 1)
    folder = store.save(7, model, optimizer, {"position": [1, 2]})
    expected = step(model, optimizer)
    other, other_optimizer = trained(ranks, seed=2)
    assert store.load(folder, other, other_optimizer) == {"position": [1, 2]}
    assert step(other, other_optimizer) == expected


def test_saving_before_the_first_step_leaves_no_trace_in_the_steps_after(tmp_path: Path, ranks: Ranks) -> None:
    def fresh() -> tuple[nn.Module, AdamW]:
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        fully_shard(model, mesh=ranks.mesh)
        return model, AdamW(model.parameters(), lr=0.1)

    expected = step(*fresh())
    store, (model, optimizer) = CheckpointStore(tmp_path, ranks, 1), fresh()
    folder = store.save(0, model, optimizer, {})
    assert step(model, optimizer) == expected
    other, other_optimizer = fresh()
    store.load(folder, other, other_optimizer)
    assert step(other, other_optimizer) == expected


def test_nothing_of_a_save_that_was_cut_short_counts(tmp_path: Path, ranks: Ranks) -> None:
    store = saved(tmp_path, ranks, range(1, 2))
    (tmp_path / ".step-000002.partial").mkdir()
    (tmp_path / ".step-000002.partial" / "left-over").write_text("from a killed trainer")
    assert (store.has(1), store.has(2), store.latest()) == (True, False, tmp_path / "step-000001")
    store.save(2, *trained(ranks), {})
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert not (tmp_path / "step-000002" / "left-over").exists()


def test_halves_that_killed_trainers_left_are_cleared_away(tmp_path: Path, ranks: Ranks) -> None:
    (tmp_path / ".step-000007.partial").mkdir()
    saved(tmp_path, ranks, range(8, 9))
    assert names(tmp_path) == ["step-000008"]


def flip_a_bit(file: Path) -> None:
    """One in the middle: the size stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("pattern", ["*.distcp", ".metadata", "trainer.json"])
def test_a_single_bit_is_noticed_said_and_passed_over(tmp_path: Path, ranks: Ranks, pattern: str) -> None:
    saved(tmp_path, ranks, range(1, 3))
    damaged = next((tmp_path / "step-000002").glob(pattern))
    flip_a_bit(damaged)
    lines: list[str] = []
    store = CheckpointStore(tmp_path, ranks, 1)
    assert store.latest(lines.append) == tmp_path / "step-000001"
    (line,) = lines
    assert line.startswith(f"checkpoint {tmp_path}/step-000002 is damaged ({damaged.name} ")
    assert line.endswith(") and passed over")
    assert (store.has(1), store.has(2)) == (True, False)
    store.save(2, *trained(ranks), {})
    assert (names(tmp_path), store.has(2)) == (["step-000002"], True)


def test_one_that_is_known_to_be_damaged_does_not_count_as_kept(tmp_path: Path, ranks: Ranks) -> None:
    saved(tmp_path, ranks, range(1, 4))
    flip_a_bit(next((tmp_path / "step-000003").glob("*.distcp")))
    store = CheckpointStore(tmp_path, ranks, 2)
    store.latest()
    store.save(4, *trained(ranks), {})
    assert names(tmp_path) == ["step-000002", "step-000003", "step-000004"]


def test_random_numbers_go_on_too(tmp_path: Path, ranks: Ranks) -> None:
    model, optimizer = trained(ranks, seed=1)
    torch.manual_seed(3)
    torch.rand(5)
    folder = CheckpointStore(tmp_path, ranks, 1).save(1, model, optimizer, {})
    expected = torch.rand(5)
    CheckpointStore(tmp_path, ranks, 1).load(folder, *trained(ranks, seed=2))
    assert torch.equal(torch.rand(5), expected)


def test_damaged_ones_are_passed_over_and_replaced(tmp_path: Path, ranks: Ranks) -> None:
    store = saved(tmp_path, ranks, range(8, 12))
    truncate(tmp_path / "step-000011")
    (tmp_path / "step-000010" / "trainer.json").unlink()
    assert (store.has(11), store.has(10), store.has(9)) == (False, False, True)
    assert store.latest() == tmp_path / "step-000009"
    with pytest.raises(ValueError, match=r"step-000011 is damaged or incomplete$"):
        store.load(tmp_path / "step-000011", *trained(ranks))
    store.save(11, *trained(ranks), {"again": True})
    assert store.latest() == tmp_path / "step-000011"


def test_oldest_beyond_keep_are_deleted_by_number(tmp_path: Path, ranks: Ranks) -> None:
    store = saved(tmp_path, ranks, range(999_998, 1_000_001), keep=2)
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    assert store.latest() == tmp_path / "step-1000000"


def test_a_damaged_newer_one_never_costs_the_whole_one(tmp_path: Path, ranks: Ranks) -> None:
    """A run goes back past a damaged checkpoint and saves its first one, with `checkpoint.keep = 1`."""
    saved(tmp_path, ranks, range(4, 5))
    truncate(tmp_path / "step-000004")
    store = saved(tmp_path, ranks, range(3, 4), keep=1)
    assert store.latest() == tmp_path / "step-000003"


def test_nothing_saved_yet(tmp_path: Path, ranks: Ranks) -> None:
    store = CheckpointStore(tmp_path / "none", ranks, 2)
    assert (store.latest(), store.has(0)) == (None, False)


def test_another_model_is_one_line(tmp_path: Path, ranks: Ranks) -> None:
    store = saved(tmp_path, ranks, range(1, 2))
    with pytest.raises(ValueError, match=r"step-000001 does not fit the model: [^\n]+$"):
        store.load(tmp_path / "step-000001", *trained(ranks, width=4))


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Files cannot grow beyond that: what a write to a full disk looks like."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_is_one_line_and_leaves_the_older_one(tmp_path: Path, ranks: Ranks) -> None:
    store = saved(tmp_path, ranks, range(1, 2))
    with largest_file(1000), pytest.raises(OSError, match=r"step-000002 was not written[^\n]+: [^\n]+$"):
        store.save(2, *trained(ranks), {})
    assert (store.latest(), store.has(2)) == (tmp_path / "step-000001", False)
    assert names(tmp_path) == ["step-000001"], "a half of one would keep the disk full"
    assert json.loads((tmp_path / "step-000001" / "trainer.json").read_text())["state"] == {"number": 1}
