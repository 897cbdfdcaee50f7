"""An export is there whole or as it was before, and a disk without room is one line."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashrl_trainer.distributed import Ranks, start_ranks, stop_ranks
from flashrl_trainer.export import export
from flashrl_trainer.model import Policy, load_policy

MODEL = Path(__file__).resolve().parents[2] / "examples/tiny_arith/model"


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    yield start_ranks("cpu", timeout_s=30)
    stop_ranks()


@pytest.fixture
def policy(ranks: Ranks) -> Policy:
    """The tiny model, twice as large in every weight."""
    options: dict[str, Any] = {"compute_dtype": "float32", "checkpointing": False, "temperature": 1.0}
    policy = load_policy(str(MODEL), ranks, chunk_tokens=64, **options)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(2)
    return policy


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Files cannot grow beyond that: what a write to a full disk looks like."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_transformers_loads_the_policys_weights(policy: Policy, tokenizer: Any, ranks: Ranks, tmp_path: Path) -> None:
    export(policy, tokenizer, tmp_path / "export", ranks)
    found = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.bfloat16).named_parameters())
    first = load_file(MODEL / "model.safetensors")
    assert found.keys() == first.keys()
    assert all(torch.equal(found[name], (first[name].float() * 2).bfloat16()) for name in first)
    assert names(tmp_path) == ["export"]


def test_a_second_export_replaces_the_first_whole(policy: Policy, tokenizer: Any, ranks: Ranks, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model-00001-of-00009.safetensors").write_text("of a larger model")
    export(policy, tokenizer, folder, ranks)
    assert "model-00001-of-00009.safetensors" not in names(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_no_room_is_one_line_and_leaves_what_was_there(
    policy: Policy, tokenizer: Any, ranks: Ranks, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with largest_file(100_000), pytest.raises(OSError, match=r"^export .*/export was not written: [^\n]+$"):
        export(policy, tokenizer, folder, ranks)
    assert (names(tmp_path), names(folder)) == (["export"], ["config.json"])
